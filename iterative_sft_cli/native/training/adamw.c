/* AdamW as torch's fused one computes it, and the norm of gradients, which are read in the type that they are in. */

#include "../vectors.h"

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

/* The sum of squares, in an order that does not depend on the number of threads. `parts` holds a number for each 65,536. */
EXPORT void isft_squares(const void *grad, int64_t half, int64_t count, double *parts) {
#pragma omp parallel for schedule(static) if (count > SHARE)
    for (int64_t part = 0; part < (count + SHARE - 1) / SHARE; part++) {
        int64_t start = part * SHARE, end = start + SHARE < count ? start + SHARE : count, whole = start + (end - start) / 16 * 16;
        double total = 0.0;
        for (int64_t low = start; low < whole; low += 1024) {
            f16 squares = all(0.0f);
            for (int64_t i = low; i < whole && i < low + 1024; i += 16) {
                f16 g = half ? load_bf16((const bf16 *)grad + i) : load_float((const float *)grad + i);
                squares += g * g;
            }
            total += sum(squares);
        }
        for (int64_t i = whole; i < end; i++) {
            float g = half ? to_float(((const bf16 *)grad)[i]) : ((const float *)grad)[i];
            total += (double)g * g;
        }
        parts[part] = total;
    }
}
