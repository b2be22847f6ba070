/* Decoding kernels for bfloat16 on CPUs, single-threaded: attention of one new token a row, rotary embedding, RMS norm.
 *
 * Sums are taken in float32; results are rounded to bfloat16 once. No function keeps state.
 */

#include "../vectors.h"

#define MAX_WIDTH 256
#define MAX_GROUP 64
#define MAX_SEGMENTS 256

/* The sums of 16 vectors as one vector: halves are added while they are interleaved. */
static inline f16 sums(const f16 *v) {
    f16 a[8], b[4], c[2];
    for (int i = 0; i < 8; i++)
        a[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
               __builtin_shufflevector(v[2 * i], v[2 * i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    for (int i = 0; i < 4; i++)
        b[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(a[2 * i], a[2 * i + 1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    for (int i = 0; i < 2; i++)
        c[i] = __builtin_shufflevector(b[2 * i], b[2 * i + 1], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               __builtin_shufflevector(b[2 * i], b[2 * i + 1], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    return __builtin_shufflevector(c[0], c[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(c[0], c[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

/* What stays the same for all layers of a step. Strides count elements; a tensor's layers lie `*_layer` apart. */
typedef struct {
    int64_t rows, heads, kv_heads, width, value_width;
    const bf16 *prompt_keys, *prompt_values;
    int64_t prompt_key_layer, prompt_value_layer, prompt_capacity;
    const int32_t *slot, *prompt_length, *born;
    int64_t num_blocks, clock;
    bf16 *const *block_keys, *const *block_values;
    const int64_t *block_key_layer, *block_value_layer, *block_start, *block_end;
} Step;

typedef struct {
    const bf16 *keys, *values;
    int64_t count;
} Segment;

/* Turned by rotate_half: x[i] and x[i + width/2] are a pair. Without cosines it is only converted. */
static inline void turn(const bf16 *x, const float *cosine, const float *sine, int64_t width, float *out) {
    int64_t half = width / 2;
    if (!cosine) {
        for (int64_t i = 0; i < width; i += 16) store_float(out + i, load_bf16(x + i));
        return;
    }
    for (int64_t i = 0; i < half; i += 16) {
        f16 a = load_bf16(x + i), b = load_bf16(x + half + i);
        store_float(out + i, a * load_float(cosine + i) - b * load_float(sine + i));
        store_float(out + half + i, b * load_float(cosine + half + i) + a * load_float(sine + half + i));
    }
}

/* scores[g][t] of `count` keys for `group` queries; queries are float32 [group][width] and bfloat16 alike. */
static inline __attribute__((always_inline)) void score(
    const float *query, const bf16 *query_half, int64_t group, int64_t width, const bf16 *keys, int64_t count,
    float *scores, int64_t row_of_scores) {
    for (int64_t t0 = 0; t0 < count; t0 += 16) {
        int64_t n = count - t0 < 16 ? count - t0 : 16;
        for (int64_t g = 0; g < group; g++) {
            f16 parts[16];
            for (int64_t t = 0; t < n; t++) {
                const bf16 *key = keys + (t0 + t) * width;
#ifdef HAS_DOT
                __m512 acc = _mm512_setzero_ps();
                if (width % 32 == 0) {
                    for (int64_t i = 0; i < width; i += 32)
                        acc = _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(query_half + g * width + i),
                                               (__m512bh)_mm512_loadu_si512(key + i));
                    parts[t] = (f16)acc;
                    continue;
                }
#endif
                f16 part = all(0.0f);
                for (int64_t i = 0; i < width; i += 16) part += load_float(query + g * width + i) * load_bf16(key + i);
                parts[t] = part;
            }
            for (int64_t t = n; t < 16; t++) parts[t] = all(0.0f);
            /* the scores have room for whole vectors */
            store_float(scores + g * row_of_scores + t0, sums(parts));
        }
    }
}

/* out[g] += sum over t of weights[g][t] * values[t] */
static inline __attribute__((always_inline)) void mix(
    const float *weights, int64_t row_of_weights, int64_t group, int64_t width, const bf16 *values, int64_t count,
    float *out) {
    for (int64_t i = 0; i < width; i += 64) {
        int64_t lanes = width - i < 64 ? width - i : 64;
        for (int64_t g = 0; g < group; g += 3) {
            int64_t some = group - g < 3 ? group - g : 3;
            f16 acc[3][4];
            for (int64_t a = 0; a < some; a++)
                for (int64_t l = 0; l < lanes / 16; l++) acc[a][l] = load_float(out + (g + a) * width + i + 16 * l);
            if (some == 3 && lanes == 64) {
                const float *w0 = weights + g * row_of_weights, *w1 = w0 + row_of_weights, *w2 = w1 + row_of_weights;
                f16 a0 = acc[0][0], a1 = acc[0][1], a2 = acc[0][2], a3 = acc[0][3];
                f16 b0 = acc[1][0], b1 = acc[1][1], b2 = acc[1][2], b3 = acc[1][3];
                f16 c0 = acc[2][0], c1 = acc[2][1], c2 = acc[2][2], c3 = acc[2][3];
                for (int64_t t = 0; t < count; t++) {
                    const bf16 *v = values + t * width + i;
                    f16 x0 = load_bf16(v), x1 = load_bf16(v + 16), x2 = load_bf16(v + 32), x3 = load_bf16(v + 48);
                    a0 += w0[t] * x0, a1 += w0[t] * x1, a2 += w0[t] * x2, a3 += w0[t] * x3;
                    b0 += w1[t] * x0, b1 += w1[t] * x1, b2 += w1[t] * x2, b3 += w1[t] * x3;
                    c0 += w2[t] * x0, c1 += w2[t] * x1, c2 += w2[t] * x2, c3 += w2[t] * x3;
                }
                acc[0][0] = a0, acc[0][1] = a1, acc[0][2] = a2, acc[0][3] = a3;
                acc[1][0] = b0, acc[1][1] = b1, acc[1][2] = b2, acc[1][3] = b3;
                acc[2][0] = c0, acc[2][1] = c1, acc[2][2] = c2, acc[2][3] = c3;
            } else {
                for (int64_t t = 0; t < count; t++)
                    for (int64_t l = 0; l < lanes / 16; l++) {
                        f16 x = load_bf16(values + t * width + i + 16 * l);
                        for (int64_t a = 0; a < some; a++) acc[a][l] += weights[(g + a) * row_of_weights + t] * x;
                    }
            }
            for (int64_t a = 0; a < some; a++)
                for (int64_t l = 0; l < lanes / 16; l++) store_float(out + (g + a) * width + i + 16 * l, acc[a][l]);
        }
    }
}

static inline __attribute__((always_inline)) void attend_row(
    const Step *s, int64_t layer, int64_t row, int64_t width, int64_t value_width, int64_t group, const bf16 *query,
    const float *cosine, const float *sine, float scale, float *scratch, bf16 *out) {
    float queries[MAX_GROUP * 16 > MAX_WIDTH * 16 ? MAX_GROUP * 16 : MAX_WIDTH * 16];
    bf16 halves[sizeof queries / sizeof *queries];
    float mixed[sizeof queries / sizeof *queries];
    Segment segments[MAX_SEGMENTS];
    for (int64_t head = 0; head < s->kv_heads; head++) {
        int64_t num = 0, total = 0;
        int64_t place = s->slot[row] * s->kv_heads + head;
        segments[num++] = (Segment){
            s->prompt_keys + layer * s->prompt_key_layer + place * s->prompt_capacity * width,
            s->prompt_values + layer * s->prompt_value_layer + place * s->prompt_capacity * value_width,
            s->prompt_length[row]};
        for (int64_t b = 0; b < s->num_blocks; b++) {
            int64_t start = s->block_start[b], columns = s->block_end[b] - start;
            int64_t from = s->born[row] > start ? s->born[row] : start;
            int64_t until = s->clock < s->block_end[b] ? s->clock : s->block_end[b];
            if (until <= from) continue;
            int64_t at = (row * s->kv_heads + head) * columns + from - start;
            segments[num++] = (Segment){s->block_keys[b] + layer * s->block_key_layer[b] + at * width,
                                        s->block_values[b] + layer * s->block_value_layer[b] + at * value_width, until - from};
        }
        for (int64_t i = 0; i < num; i++) total += (segments[i].count + 15) / 16 * 16;
        for (int64_t g = 0; g < group; g++) {
            turn(query + (head * group + g) * width, cosine, sine, width, queries + g * width);
            for (int64_t i = 0; i < width; i += 16) store_bf16(halves + g * width + i, load_float(queries + g * width + i));
        }
        int64_t at = 0;
        for (int64_t i = 0; i < num; i++) {
            score(queries, halves, group, width, segments[i].keys, segments[i].count, scratch + at, total);
            int64_t room = (segments[i].count + 15) / 16 * 16;
            for (int64_t g = 0; g < group; g++)
                for (int64_t t = segments[i].count; t < room; t++) scratch[g * total + at + t] = -1e30f;
            at += room;
        }
        for (int64_t g = 0; g < group; g++) {
            float *row_scores = scratch + g * total;
            f16 top = all(-1e30f), mass = all(0.0f);
            for (int64_t t = 0; t < total; t += 16) top = larger(load_float(row_scores + t), top);
            float most = largest(top), unit = scale * LOG2E;
            for (int64_t t = 0; t < total; t += 16) {
                f16 v = power2((load_float(row_scores + t) - most) * unit);
                mass += v;
                store_float(row_scores + t, v);
            }
            float share = 1.0f / sum(mass);
            for (int64_t t = 0; t < total; t += 16) store_float(row_scores + t, load_float(row_scores + t) * share);
        }
        memset(mixed, 0, group * value_width * sizeof(float));
        at = 0;
        for (int64_t i = 0; i < num; i++) {
            mix(scratch + at, total, group, value_width, segments[i].values, segments[i].count, mixed);
            at += (segments[i].count + 15) / 16 * 16;
        }
        for (int64_t i = 0; i < group * value_width; i += 16)
            store_bf16(out + head * group * value_width + i, load_float(mixed + i));
    }
}

/* Store the new keys (turned) and values of rows first..last-1 in the newest block, and attend. `cosine` and `sine` are float32
 * [rows][width], or null for queries and keys that are turned already. `scratch` holds heads / kv_heads * (longest row + 16 for
 * each block) floats. Scores are taken before `scale`. */
EXPORT void isft_attend(
    const Step *s, int64_t layer, int64_t first, int64_t last, const bf16 *query, int64_t query_row, const bf16 *key,
    int64_t key_row, const bf16 *value, int64_t value_row, const float *cosine, const float *sine, float scale,
    float *scratch, bf16 *out) {
    int64_t width = s->width, value_width = s->value_width, group = s->heads / s->kv_heads;
    int64_t newest = s->num_blocks - 1, columns = s->block_end[newest] - s->block_start[newest];
    int64_t column = s->clock - 1 - s->block_start[newest];
    for (int64_t row = first; row < last; row++) {
        const float *c = cosine ? cosine + row * width : 0, *si = sine ? sine + row * width : 0;
        for (int64_t head = 0; head < s->kv_heads; head++) {
            float turned[MAX_WIDTH];
            int64_t at = (row * s->kv_heads + head) * columns + column;
            turn(key + row * key_row + head * width, c, si, width, turned);
            bf16 *place = s->block_keys[newest] + layer * s->block_key_layer[newest] + at * width;
            for (int64_t i = 0; i < width; i += 16) store_bf16(place + i, load_float(turned + i));
            memcpy(s->block_values[newest] + layer * s->block_value_layer[newest] + at * value_width,
                   value + row * value_row + head * value_width, value_width * sizeof(bf16));
        }
        const bf16 *q = query + row * query_row;
        bf16 *o = out + row * s->heads * value_width;
        if (width == 64 && value_width == 64 && group == 3)
            attend_row(s, layer, row, 64, 64, 3, q, c, si, scale, scratch, o);
        else if (width == 64 && value_width == 64)
            attend_row(s, layer, row, 64, 64, group, q, c, si, scale, scratch, o);
        else if (width == 128 && value_width == 128)
            attend_row(s, layer, row, 128, 128, group, q, c, si, scale, scratch, o);
        else
            attend_row(s, layer, row, width, value_width, group, q, c, si, scale, scratch, o);
    }
}

/* out = x / sqrt(mean(x^2) + epsilon) * weight, each row of `width` (a multiple of 16). */
EXPORT void isft_rms_norm(
    const bf16 *x, const bf16 *weight, int64_t rows, int64_t width, float epsilon, bf16 *out) {
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *from = x + row * width;
        f16 squares = all(0.0f);
        for (int64_t i = 0; i < width; i += 16) {
            f16 v = load_bf16(from + i);
            squares += v * v;
        }
        float mean = sum(squares) / (float)width + epsilon;
        float factor = 1.0f / __builtin_sqrtf(mean);
        for (int64_t i = 0; i < width; i += 16)
            store_bf16(out + row * width + i, load_bf16(from + i) * factor * load_bf16(weight + i));
    }
}

/* Changes whenever a signature does. */
EXPORT int64_t isft_decoding_version(void) { return 1; }
