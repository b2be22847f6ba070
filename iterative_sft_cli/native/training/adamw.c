/* AdamW as torch's fused one computes it, reading the gradient in the type that it is in. */

#include "vectors.h"

#define SHARE 65536

/* rate, decay: learning rate and weight decay; small, large: beta1, beta2; first, second: 1 - beta^step; scale: of the gradient,
 * which is bfloat16 if `half`, else float32. All arrays have `count` numbers. */
EXPORT void isft_adamw(
    float *weight, const void *grad, int64_t half, float *mean, float *square, int64_t count, float rate, float decay,
    float small, float large, float epsilon, float first, float second, float scale) {
    float keep = 1.0f - rate * decay, step = rate / first, root = 1.0f / __builtin_sqrtf(second);
#pragma omp parallel for schedule(static) if (count > SHARE)
    for (int64_t start = 0; start < count; start += SHARE / 4) {
        int64_t end = start + SHARE / 4 < count ? start + SHARE / 4 : count, whole = start + (end - start) / 16 * 16;
        for (int64_t i = start; i < whole; i += 16) {
            f16 g = (half ? load_bf16((const bf16 *)grad + i) : load_float((const float *)grad + i)) * scale;
            f16 m = load_float(mean + i) * small + g * (1.0f - small);
            f16 v = load_float(square + i) * large + g * g * (1.0f - large);
            f16 r;
            for (int j = 0; j < 16; j++) r[j] = __builtin_sqrtf(v[j]);
            store_float(mean + i, m);
            store_float(square + i, v);
            store_float(weight + i, load_float(weight + i) * keep - m * step / (r * root + epsilon));
        }
        for (int64_t i = whole; i < end; i++) {
            float g = (half ? to_float(((const bf16 *)grad)[i]) : ((const float *)grad)[i]) * scale;
            mean[i] = mean[i] * small + g * (1.0f - small);
            square[i] = square[i] * large + g * g * (1.0f - large);
            weight[i] = weight[i] * keep - mean[i] * step / (__builtin_sqrtf(square[i]) * root + epsilon);
        }
    }
}
