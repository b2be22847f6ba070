/* Sixteen floats at a time, with the vector extensions of GCC and Clang, whatever the machine's vectors are. */

#include <stdint.h>
#include <string.h>
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define HAS_DOT 1
#endif

#define EXPORT __attribute__((visibility("default")))

typedef float f16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef uint16_t bf16;

static inline f16 all(float x) { return x - (f16){0}; }

static inline f16 load_float(const float *p) {
    f16 f;
    memcpy(&f, p, sizeof f);
    return f;
}

static inline void store_float(float *p, f16 f) { memcpy(p, &f, sizeof f); }

static inline f16 load_bf16(const bf16 *p) {
    h16 h;
    memcpy(&h, p, sizeof h);
    u16 u = __builtin_convertvector(h, u16) << 16;
    f16 f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* To the nearest bfloat16, ties to even; NaN stays NaN. */
static inline void store_bf16(bf16 *p, f16 f) {
#ifdef HAS_DOT
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)f));
    return;
#endif
    u16 u;
    memcpy(&u, &f, sizeof u);
    u16 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    u16 nan = (u16)(f != f);
    rounded = (rounded & ~nan) | (0x7fc0 & nan);
    h16 h = __builtin_convertvector(rounded, h16);
    memcpy(p, &h, sizeof h);
}

static inline float to_float(bf16 h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline bf16 to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    if (f != f) return 0x7fc0;
    return (bf16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline float sum(f16 v) {
    f16 a = v + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    a = a + __builtin_shufflevector(a, a, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    a = a + __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return a[0] + a[1];
}

static inline f16 choose(i16 mask, f16 yes, f16 no) {
    i16 x, y;
    memcpy(&x, &yes, sizeof x);
    memcpy(&y, &no, sizeof y);
    x = (x & mask) | (y & ~mask);
    memcpy(&yes, &x, sizeof yes);
    return yes;
}

static inline f16 larger(f16 a, f16 b) { return choose(a > b, a, b); }

static inline float largest(f16 v) {
    float top = v[0];
    for (int i = 1; i < 16; i++) top = v[i] > top ? v[i] : top;
    return top;
}

/* 2^x, relative error below 3e-7; x is held between -126 and 126, NaN stays NaN. */
static inline f16 power2(f16 x) {
    x = choose(x < -126.0f, all(-126.0f), x);
    x = choose(x > 126.0f, all(126.0f), x);
    i16 n = __builtin_convertvector(x + choose(x < 0.0f, all(-0.5f), all(0.5f)), i16);
    f16 f = x - __builtin_convertvector(n, f16);
    f16 p = all(1.5403530e-4f);
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    i16 bits = (n + 127) << 23;
    f16 scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

#define LOG2E 1.44269504f
#define LN2 0.69314718f
