/* Causal attention of rows that lie end to end, forward and backward, in bfloat16 with sums in float32.
 *
 * A token's line holds the heads of its queries, then of its keys, then of its values, `width` numbers each. No score is ever
 * in memory for longer than it takes to use it: backward computes them again from each query's log of the sum of exponentials.
 */

#include <stdlib.h>

#include "../vectors.h"

typedef struct {
    int64_t start, length, head; /* of a row, and one of its heads of keys and values */
} Task;

#ifdef HAS_DOT

#define PANEL 64 /* columns of a product at a time; and how many queries or keys make a tile */
#define STRIPE 6 /* rows of a product at a time */

typedef uint32_t pair; /* two bfloat16 */

static inline int64_t up_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* c[m][64] (+)= a[m][2 * pairs] * b, where b holds [pairs][64][2]. */
static inline __attribute__((always_inline)) void stripe(
    const int m, const bf16 *a, int64_t a_row, const pair *b, int64_t pairs, float *c, int64_t c_row, int add) {
    __m512 acc[STRIPE][4];
    for (int i = 0; i < m; i++)
        for (int j = 0; j < 4; j++) acc[i][j] = add ? _mm512_loadu_ps(c + i * c_row + 16 * j) : _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k * PANEL), b1 = (__m512bh)_mm512_loadu_si512(b + k * PANEL + 16);
        __m512bh b2 = (__m512bh)_mm512_loadu_si512(b + k * PANEL + 32), b3 = (__m512bh)_mm512_loadu_si512(b + k * PANEL + 48);
        for (int i = 0; i < m; i++) {
            int32_t two;
            memcpy(&two, a + i * a_row + 2 * k, sizeof two);
            __m512bh x = (__m512bh)_mm512_set1_epi32(two);
            acc[i][0] = _mm512_dpbf16_ps(acc[i][0], x, b0);
            acc[i][1] = _mm512_dpbf16_ps(acc[i][1], x, b1);
            acc[i][2] = _mm512_dpbf16_ps(acc[i][2], x, b2);
            acc[i][3] = _mm512_dpbf16_ps(acc[i][3], x, b3);
        }
    }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < 4; j++) _mm512_storeu_ps(c + i * c_row + 16 * j, acc[i][j]);
}

static __attribute__((noinline)) void product(
    int64_t rows, const bf16 *a, int64_t a_row, const pair *b, int64_t pairs, float *c, int64_t c_row, int add) {
    int64_t i = 0;
    for (; i + STRIPE <= rows; i += STRIPE) stripe(STRIPE, a + i * a_row, a_row, b, pairs, c + i * c_row, c_row, add);
    a += i * a_row, c += i * c_row;
    switch (rows - i) {
        case 1: stripe(1, a, a_row, b, pairs, c, c_row, add); break;
        case 2: stripe(2, a, a_row, b, pairs, c, c_row, add); break;
        case 3: stripe(3, a, a_row, b, pairs, c, c_row, add); break;
        case 4: stripe(4, a, a_row, b, pairs, c, c_row, add); break;
        case 5: stripe(5, a, a_row, b, pairs, c, c_row, add); break;
    }
}

/* 16 lines of 16 numbers of 4 bytes, turned over. */
static inline void turn_over(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

/* x[count][width] as the right side of a product over its width: [panel of 64 lines][width / 2][64][2], zeros after the last. */
static void pack_lines(const bf16 *x, int64_t row, int64_t count, int64_t width, pair *out) {
    for (int64_t first = 0; first < up_to(count, PANEL); first += 16)
        for (int64_t k = 0; k < width / 2; k += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; i++)
                r[i] = first + i < count ? _mm512_loadu_si512(x + (first + i) * row + 2 * k) : _mm512_setzero_si512();
            turn_over(r);
            pair *to = out + first / PANEL * (width / 2) * PANEL + first % PANEL;
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (k + i) * PANEL, r[i]);
        }
}

/* x[count][64 columns] as the right side of a product over its lines: [lines / 2][64][2], zeros up to a whole panel of lines. */
static void pack_columns(const bf16 *x, int64_t row, int64_t count, pair *out) {
    __m512i low, high;
    uint16_t l[32], h[32];
    for (int i = 0; i < 16; i++) l[2 * i] = i, l[2 * i + 1] = 32 + i, h[2 * i] = 16 + i, h[2 * i + 1] = 48 + i;
    memcpy(&low, l, sizeof low);
    memcpy(&high, h, sizeof high);
    for (int64_t first = 0; first < up_to(count, PANEL); first += 2)
        for (int64_t i = 0; i < PANEL; i += 32) {
            __m512i zero = _mm512_setzero_si512();
            __m512i a = first < count ? _mm512_loadu_si512(x + first * row + i) : zero;
            __m512i b = first + 1 < count ? _mm512_loadu_si512(x + (first + 1) * row + i) : zero;
            pair *to = out + first / 2 * PANEL + i;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(a, high, b));
        }
}

static void *room(int64_t bytes) { return aligned_alloc(64, up_to(bytes > 0 ? bytes : 64, 64)); }

/* One head of keys and values of one row, with the `share` heads of queries that read it. */
static int forward_task(
    const Task *task, const bf16 *line, int64_t row, int64_t heads, int64_t kv_heads, int64_t width, float scale, bf16 *out,
    float *logs, int64_t total) {
    int64_t length = task->length, padded = up_to(length, PANEL), share = heads / kv_heads, columns = width / PANEL;
    const bf16 *queries = line + task->start * row, *keys = queries + (heads + task->head) * width;
    const bf16 *values = keys + kv_heads * width;
    pair *key_lines = room(padded * width * 2), *value_columns = room(padded * width * 2);
    float *scores = room(48 * padded * 4), mixed[48 * PANEL], masses[48];
    bf16 *probs = room(48 * padded * 2);
    if (!key_lines || !value_columns || !scores || !probs) goto done;
    pack_lines(keys, row, length, width, key_lines);
    for (int64_t c = 0; c < columns; c++) pack_columns(values + c * PANEL, row, length, value_columns + c * padded / 2 * PANEL);
    float unit = scale * LOG2E;
    for (int64_t head = task->head * share; head < (task->head + 1) * share; head++)
        for (int64_t first = 0; first < length; first += 48) {
            int64_t rows = length - first < 48 ? length - first : 48, seen = up_to(first + rows, PANEL);
            for (int64_t at = 0; at < seen; at += PANEL)
                product(rows, queries + first * row + head * width, row, key_lines + at * (width / 2), width / 2, scores + at,
                        padded, 0);
            for (int64_t i = 0; i < rows; i++) {
                float *s = scores + i * padded;
                int64_t own = first + i + 1, whole = up_to(own, 16);
                for (int64_t j = own; j < whole; j++) s[j] = -3.0e38f;
                f16 top = all(-3.0e38f), mass = all(0.0f);
                for (int64_t j = 0; j < whole; j += 16) top = larger(load_float(s + j), top);
                float high = largest(top);
                for (int64_t j = 0; j < whole; j += 16) {
                    f16 e = power2((load_float(s + j) - high) * unit);
                    e = choose(load_float(s + j) < -2.9e38f, all(0.0f), e);
                    mass += e;
                    store_bf16(probs + i * padded + j, e);
                }
                memset(probs + i * padded + whole, 0, (seen - whole) * sizeof(bf16));
                masses[i] = sum(mass);
                logs[head * total + task->start + first + i] = high * unit + __builtin_log2f(masses[i]);
            }
            for (int64_t c = 0; c < columns; c++) {
                product(rows, probs, padded, value_columns + c * padded / 2 * PANEL, seen / 2, mixed, PANEL, 0);
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t j = 0; j < PANEL; j += 16)
                        store_bf16(out + ((task->start + first + i) * heads + head) * width + c * PANEL + j,
                                   load_float(mixed + i * PANEL + j) * (1.0f / masses[i]));
            }
        }
done:;
    int failed = !key_lines || !value_columns || !scores || !probs;
    free(key_lines), free(value_columns), free(scores), free(probs);
    return failed;
}

/* Scores stand with a key a line and a query a column here, so that nothing but the gradient of the queries is turned over. */
static int backward_task(
    const Task *task, const bf16 *line, int64_t row, int64_t heads, int64_t kv_heads, int64_t width, float scale,
    const bf16 *out, const float *logs, int64_t total, const bf16 *up, bf16 *grad) {
    int64_t length = task->length, padded = up_to(length, PANEL), share = heads / kv_heads, columns = width / PANEL;
    int64_t stride = heads * width, packed = padded * width / 2;
    const bf16 *queries = line + task->start * row, *keys = queries + (heads + task->head) * width;
    const bf16 *values = keys + kv_heads * width;
    bf16 *to_queries = grad + task->start * row, *to_keys = to_queries + (heads + task->head) * width;
    bf16 *to_values = to_keys + kv_heads * width;
    pair *packs = room(4 * packed * sizeof(pair));
    pair *query_lines = packs, *up_lines = packs + packed, *query_columns = packs + 2 * packed, *up_columns = packs + 3 * packed;
    bf16 *keys_over = room(width * padded * 2);
    float *sums = room(2 * padded * width * 4 + 2 * padded * 4);
    float *key_sums = sums, *value_sums = sums + padded * width, *log = value_sums + padded * width, *inner = log + padded;
    float *over = room(width * PANEL * 4);
    float *tiles = room(2 * PANEL * PANEL * 4), *scores = tiles, *downs = tiles + PANEL * PANEL;
    bf16 *halves = room(2 * PANEL * PANEL * 2), *probs = halves, *parts = halves + PANEL * PANEL;
    pair *part_columns = room(PANEL * PANEL * 2);
    int failed = !packs || !keys_over || !sums || !over || !tiles || !halves || !part_columns;
    if (failed) goto done;
    memset(key_sums, 0, 2 * padded * width * 4);
    for (int64_t i = 0; i < width; i++)
        for (int64_t t = 0; t < padded; t++) keys_over[i * padded + t] = t < length ? keys[t * row + i] : 0;
    float unit = scale * LOG2E;
    for (int64_t head = task->head * share; head < (task->head + 1) * share; head++) {
        const bf16 *q = queries + head * width, *u = up + (task->start * heads + head) * width;
        const bf16 *o = out + (task->start * heads + head) * width;
        pack_lines(q, row, length, width, query_lines);
        pack_lines(u, stride, length, width, up_lines);
        for (int64_t c = 0; c < columns; c++) {
            pack_columns(q + c * PANEL, row, length, query_columns + c * padded / 2 * PANEL);
            pack_columns(u + c * PANEL, stride, length, up_columns + c * padded / 2 * PANEL);
        }
        for (int64_t t = 0; t < padded; t++) {
            f16 along = all(0.0f);
            for (int64_t i = 0; t < length && i < width; i += 16)
                along += load_bf16(u + t * stride + i) * load_bf16(o + t * stride + i);
            inner[t] = sum(along);
            log[t] = t < length ? logs[head * total + task->start + t] : 3.0e38f;
        }
        for (int64_t at = 0; at < length; at += PANEL) {
            for (int64_t from = 0; from <= at; from += PANEL) {
                int64_t rows = length - from < PANEL ? length - from : PANEL;
                product(rows, keys + from * row, row, query_lines + at * (width / 2), width / 2, scores, PANEL, 0);
                product(rows, values + from * row, row, up_lines + at * (width / 2), width / 2, downs, PANEL, 0);
                for (int64_t k = 0; k < rows; k++)
                    for (int64_t j = 0; j < PANEL; j += 16) {
                        f16 p = power2(load_float(scores + k * PANEL + j) * unit - load_float(log + at + j));
                        if (from == at && j <= k) {
                            i16 place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
                            p = choose(place + (int32_t)(j - k) < 0, all(0.0f), p);
                        }
                        p = choose(load_float(log + at + j) > 2.9e38f, all(0.0f), p);
                        f16 d = p * (load_float(downs + k * PANEL + j) - load_float(inner + at + j)) * scale;
                        store_bf16(probs + k * PANEL + j, p);
                        store_bf16(parts + k * PANEL + j, d);
                    }
                if (rows < PANEL) memset(parts + rows * PANEL, 0, (PANEL - rows) * PANEL * sizeof(bf16));
                pack_columns(parts, PANEL, PANEL, part_columns);
                for (int64_t c = 0; c < columns; c++) {
                    int64_t skip = (c * padded + at) / 2 * PANEL;
                    product(rows, probs, PANEL, up_columns + skip, PANEL / 2, value_sums + from * width + c * PANEL, width, 1);
                    product(rows, parts, PANEL, query_columns + skip, PANEL / 2, key_sums + from * width + c * PANEL, width, 1);
                }
                product(width, keys_over + from, padded, part_columns, PANEL / 2, over, PANEL, from > 0);
            }
            for (int64_t i = 0; i < width; i += 16)
                for (int64_t j = 0; j < PANEL && at + j < length; j += 16) {
                    __m512i r[16];
                    for (int k = 0; k < 16; k++) r[k] = _mm512_loadu_si512(over + (i + k) * PANEL + j);
                    turn_over(r);
                    for (int k = 0; k < 16 && at + j + k < length; k++)
                        store_bf16(to_queries + (at + j + k) * row + head * width + i, (f16)_mm512_castsi512_ps(r[k]));
                }
        }
    }
    for (int64_t t = 0; t < length; t++)
        for (int64_t i = 0; i < width; i += 16) {
            store_bf16(to_keys + t * row + i, load_float(key_sums + t * width + i));
            store_bf16(to_values + t * row + i, load_float(value_sums + t * width + i));
        }
done:
    free(packs), free(keys_over), free(sums), free(over), free(tiles), free(halves), free(part_columns);
    return failed;
}

#endif

/* Whether attention of this width is computed here. */
EXPORT int64_t isft_attends(int64_t width) {
#ifdef HAS_DOT
    return width == 64 || width == 128;
#else
    return width < 0;
#endif
}

/* out [total][heads * width] and logs [heads][total] (to base 2) of `line` [total][(heads + 2 * kv_heads) * width]. The tasks are
 * done in their order, longest first is best. Nonzero when memory ran out. */
EXPORT int64_t isft_attend(
    const Task *tasks, int64_t num_tasks, const bf16 *line, int64_t heads, int64_t kv_heads, int64_t width, float scale,
    bf16 *out, float *logs, int64_t total) {
    int64_t failed = 0;
#ifdef HAS_DOT
    int64_t row = (heads + 2 * kv_heads) * width;
#pragma omp parallel for schedule(dynamic) reduction(| : failed)
    for (int64_t i = 0; i < num_tasks; i++)
        failed |= forward_task(tasks + i, line, row, heads, kv_heads, width, scale, out, logs, total);
#endif
    return failed;
}

/* The gradient `grad` of `line`, from that of `out`, `up`. */
EXPORT int64_t isft_attend_back(
    const Task *tasks, int64_t num_tasks, const bf16 *line, int64_t heads, int64_t kv_heads, int64_t width, float scale,
    const bf16 *out, const float *logs, int64_t total, const bf16 *up, bf16 *grad) {
    int64_t failed = 0;
#ifdef HAS_DOT
    int64_t row = (heads + 2 * kv_heads) * width;
#pragma omp parallel for schedule(dynamic) reduction(| : failed)
    for (int64_t i = 0; i < num_tasks; i++)
        failed |= backward_task(tasks + i, line, row, heads, kv_heads, width, scale, out, logs, total, up, grad);
#endif
    return failed;
}
