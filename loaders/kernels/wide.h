/* The registers that the matrix products use: 512 bits where the compiler may, 256 otherwise. */
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "vector.h"

#ifdef __AVX512BW__

typedef __m512 floats;
typedef __m512i integers;
enum { WIDE = 16 }; /* floats in a register; four times as many int8 */
/* A tile of 24 sums leaves 8 of 32 registers: six for the rows' values, one for a channel's weights. */
enum { ROWS = 6, CHANNELS = 4 };

static inline floats load(const float *at) { return _mm512_loadu_ps(at); }
static inline void store(float *at, floats v) { _mm512_storeu_ps(at, v); }
static inline floats all(float value) { return _mm512_set1_ps(value); }
static inline floats times(floats a, floats b) { return _mm512_mul_ps(a, b); }
static inline floats plus(floats a, floats b) { return _mm512_add_ps(a, b); }
static inline floats minus(floats a, floats b) { return _mm512_sub_ps(a, b); }
static inline floats multiply_add(floats a, floats b, floats sum) { return _mm512_fmadd_ps(a, b, sum); }
static inline floats magnitude(floats v) { return _mm512_abs_ps(v); }
static inline floats larger(floats a, floats b) { return _mm512_max_ps(a, b); }
static inline floats from_half(const uint16_t *at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)at)); }
static inline integers no_integers(void) { return _mm512_setzero_si512(); }

static inline floats from_bfloat16(const uint16_t *at) {
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

static inline __m256 halves_added(floats v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

static inline float sum(floats v) { return sum8(halves_added(v)); }

/* The sums of four registers' quarters: side by side in each quarter of one. */
static inline floats quarters4(const floats *v) {
    floats low = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    floats high = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    return _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xEE));
}

/* The sums of four registers, side by side; the same lanes are added in the same order for each. */
static inline __m128 sums4(const floats *v) {
    __m256 halves = halves_added(quarters4(v));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

/* For each of four rows of four registers what sums4 gives, to the same bits: a quarter a row. */
static inline floats sums4x4(const floats (*v)[4]) {
    floats q[4];
    for (int r = 0; r < 4; r++) q[r] = quarters4(v[r]);
    floats first = plus(_mm512_shuffle_f32x4(q[0], q[1], 0x44), _mm512_shuffle_f32x4(q[0], q[1], 0xEE));
    floats second = plus(_mm512_shuffle_f32x4(q[2], q[3], 0x44), _mm512_shuffle_f32x4(q[2], q[3], 0xEE));
    return plus(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xDD));
}

static inline integers quarters4i(const integers *v) {
    integers low = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    integers high = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
}

static inline __m128i sums4i(const integers *v) {
    integers both = quarters4i(v);
    __m256i halves = _mm256_add_epi32(_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64(both, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

static inline integers sums4x4i(const integers (*v)[4]) {
    integers q[4];
    for (int r = 0; r < 4; r++) q[r] = quarters4i(v[r]);
    integers first = _mm512_add_epi32(_mm512_shuffle_i64x2(q[0], q[1], 0x44), _mm512_shuffle_i64x2(q[0], q[1], 0xEE));
    integers second = _mm512_add_epi32(_mm512_shuffle_i64x2(q[2], q[3], 0x44), _mm512_shuffle_i64x2(q[2], q[3], 0xEE));
    return _mm512_add_epi32(_mm512_shuffle_i64x2(first, second, 0x88), _mm512_shuffle_i64x2(first, second, 0xDD));
}

#else

typedef __m256 floats;
typedef __m256i integers;
enum { WIDE = 8 };
enum { ROWS = 3, CHANNELS = 4 }; /* 12 sums leave 4 of 16 registers: three for the rows' values, one for weights */

static inline floats load(const float *at) { return _mm256_loadu_ps(at); }
static inline void store(float *at, floats v) { _mm256_storeu_ps(at, v); }
static inline floats all(float value) { return _mm256_set1_ps(value); }
static inline floats times(floats a, floats b) { return _mm256_mul_ps(a, b); }
static inline floats plus(floats a, floats b) { return _mm256_add_ps(a, b); }
static inline floats minus(floats a, floats b) { return _mm256_sub_ps(a, b); }
static inline floats multiply_add(floats a, floats b, floats sum) { return _mm256_fmadd_ps(a, b, sum); }
static inline floats magnitude(floats v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
static inline floats larger(floats a, floats b) { return _mm256_max_ps(a, b); }
static inline floats from_half(const uint16_t *at) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)at)); }
static inline integers no_integers(void) { return _mm256_setzero_si256(); }

static inline floats from_bfloat16(const uint16_t *at) {
    __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

static inline float sum(floats v) { return sum8(v); }
static inline __m128 sums4(const floats *v) { return sum8x4(v); }
static inline __m128i sums4i(const integers *v) { return sum8x4i(v); }

#endif
