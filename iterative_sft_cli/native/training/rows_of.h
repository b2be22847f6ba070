/* What is done row by row, for one type of number: T with LOAD and STORE, names ending in NAME. Widths are multiples of 16. */

/* out = x / sqrt(mean(x^2) + epsilon) * weight; the factor of each row is kept. */
EXPORT void NAME(isft_norm_)(
    const T *x, const T *weight, int64_t rows, int64_t width, float epsilon, T *out, float *factors) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *from = x + row * width;
        f16 squares = all(0.0f);
        for (int64_t i = 0; i < width; i += 16) {
            f16 v = LOAD(from + i);
            squares += v * v;
        }
        float factor = 1.0f / __builtin_sqrtf(sum(squares) / (float)width + epsilon);
        factors[row] = factor;
        for (int64_t i = 0; i < width; i += 16) STORE(out + row * width + i, LOAD(from + i) * factor * LOAD(weight + i));
    }
}

/* The gradients of the above. `parts` sums [parts][width] of the weight's gradient, over equal shares of the rows, are left to be
 * added up, so that the result does not depend on the number of threads. */
EXPORT void NAME(isft_norm_back_)(
    const T *x, const T *weight, const float *factors, const T *up, int64_t rows, int64_t width, T *down, float *weight_parts,
    int64_t parts) {
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < parts; part++) {
        float *total = weight_parts + part * width;
        memset(total, 0, width * sizeof(float));
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; row++) {
            const T *from = x + row * width, *above = up + row * width;
            float factor = factors[row];
            f16 along = all(0.0f);
            for (int64_t i = 0; i < width; i += 16) {
                f16 unit = LOAD(from + i) * factor, product = unit * LOAD(above + i);
                along += product * LOAD(weight + i);
                store_float(total + i, load_float(total + i) + product);
            }
            float mean = sum(along) / (float)width;
            for (int64_t i = 0; i < width; i += 16) {
                f16 unit = LOAD(from + i) * factor;
                STORE(down + row * width + i, (LOAD(above + i) * LOAD(weight + i) - unit * mean) * factor);
            }
        }
    }
}

/* out = silu(gate) * up; gate and up are [rows][inner], `stride` numbers from row to row. */
EXPORT void NAME(isft_swiglu_)(const T *gate, const T *up, int64_t stride, int64_t rows, int64_t inner, T *out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < inner; i += 16) {
            f16 g = LOAD(gate + row * stride + i);
            f16 gated = g / (1.0f + power2(g * -LOG2E));
            STORE(out + row * inner + i, gated * LOAD(up + row * stride + i));
        }
}

/* The gradients of the above, laid out as gate and up are, and `out` once more; `above` and `out` may be the same memory. */
EXPORT void NAME(isft_swiglu_back_)(
    const T *gate, const T *up, int64_t stride, int64_t rows, int64_t inner, const T *above, T *grad_gate, T *grad_up, T *out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < inner; i += 16) {
            f16 g = LOAD(gate + row * stride + i), u = LOAD(up + row * stride + i), a = LOAD(above + row * inner + i);
            f16 share = 1.0f / (1.0f + power2(g * -LOG2E)), gated = g * share;
            STORE(grad_up + row * stride + i, a * gated);
            STORE(grad_gate + row * stride + i, a * u * share * (1.0f + g - gated));
            STORE(out + row * inner + i, gated * u);
        }
}

/* Turn the first `heads` heads of `width` in each row of x by rotate_half, in place; `back` turns the other way, as gradients go.
 * cosine and sine are [rows][width]; x[i] and x[i + width/2] are a pair. */
EXPORT void NAME(isft_turn_)(
    T *x, int64_t stride, const T *cosine, const T *sine, int64_t rows, int64_t heads, int64_t width, int64_t back) {
    int64_t half = width / 2;
    float sign = back ? -1.0f : 1.0f;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++) {
            T *p = x + row * stride + head * width;
            for (int64_t i = 0; i < half; i += 16) {
                f16 a = LOAD(p + i), b = LOAD(p + half + i);
                f16 c = LOAD(cosine + row * width + i), d = LOAD(cosine + row * width + half + i);
                f16 s = LOAD(sine + row * width + i) * sign, t = LOAD(sine + row * width + half + i) * sign;
                /* of y1 = a c - b s, y2 = b d + a t the transpose is x1 = c y1 + t y2, x2 = d y2 - s y1 */
                STORE(p + i, a * c - b * (back ? t : s));
                STORE(p + half + i, b * d + a * (back ? s : t));
            }
        }
}

/* From logits to probabilities minus one at the label, in place, and the label's log-probability. Without `keep` only the latter.
 * Any width. */
EXPORT void NAME(isft_softmax_)(
    T *logits, const int64_t *targets, int64_t rows, int64_t width, float *logprobs, int64_t keep) {
    int64_t whole = width / 16 * 16;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        T *x = logits + row * width;
        f16 top = all(-3.0e38f), mass = all(0.0f);
        for (int64_t i = 0; i < whole; i += 16) top = larger(LOAD(x + i), top);
        float high = largest(top), rest = 0.0f;
        for (int64_t i = whole; i < width; i++) {
            float v = ONE(x[i]);
            high = v > high ? v : high;
        }
        for (int64_t i = 0; i < whole; i += 16) mass += power2((LOAD(x + i) - high) * LOG2E);
        for (int64_t i = whole; i < width; i++) rest += __builtin_expf(ONE(x[i]) - high);
        float total = __builtin_logf(sum(mass) + rest) + high;
        float label = ONE(x[targets[row]]) - total;
        logprobs[row] = label;
        if (!keep) continue;
        for (int64_t i = 0; i < whole; i += 16) STORE(x + i, power2((LOAD(x + i) - total) * LOG2E));
        for (int64_t i = whole; i < width; i++) x[i] = BACK(__builtin_expf(ONE(x[i]) - total));
        /* in bfloat16 the difference itself would vanish for sure tokens */
        x[targets[row]] = BACK(__builtin_expm1f(label));
    }
}
