/* The vector registers of the matrix products: 512 bits if the target has AVX-512, 256 otherwise. */
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "avx2.h"

#ifdef __AVX512BW__

typedef __m512 floats;
typedef __m512i integers;
enum { SIMD_WIDTH = 16 }; /* floats in a register; four times as many int8 */
/* A tile of 24 accumulators leaves 8 of 32 registers: six for the activations of the rows, one for a channel's weights. */
enum { ROWS = 6, CHANNELS = 4 };

static inline floats load(const float *at) { return _mm512_loadu_ps(at); }
static inline void store(float *at, floats v) { _mm512_storeu_ps(at, v); }
static inline floats broadcast(float value) { return _mm512_set1_ps(value); }
static inline floats mul(floats a, floats b) { return _mm512_mul_ps(a, b); }
static inline floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
static inline floats sub(floats a, floats b) { return _mm512_sub_ps(a, b); }
static inline floats fmadd(floats a, floats b, floats sum) { return _mm512_fmadd_ps(a, b, sum); }
static inline floats absolute(floats v) { return _mm512_abs_ps(v); }
static inline floats maximum(floats a, floats b) { return _mm512_max_ps(a, b); }
static inline floats minimum(floats a, floats b) { return _mm512_min_ps(a, b); }
static inline floats load_half(const uint16_t *at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)at)); }
static inline integers zero_integers(void) { return _mm512_setzero_si512(); }
static inline floats to_floats(integers v) { return _mm512_cvtepi32_ps(v); }

static inline floats load_bfloat16(const uint16_t *at) {
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

static inline __m256 add_halves(floats v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

static inline float hsum(floats v) { return hsum8(add_halves(v)); }

/* Per 128-bit quarter: the horizontal sums of four registers, in the four lanes of that quarter. */
static inline floats quarters4(const floats *v) {
    floats low = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    floats high = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    return _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xEE));
}

/* The horizontal sums of four registers, in the lanes of one; the order of the additions is the same for each. */
static inline __m128 hsum4(const floats *v) {
    __m256 halves = add_halves(quarters4(v));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

/* hsum4 of four rows of four registers, bit for bit: one quarter per row. */
static inline floats hsum4x4(const floats (*v)[4]) {
    floats q[4];
    for (int r = 0; r < 4; r++) q[r] = quarters4(v[r]);
    floats first = add(_mm512_shuffle_f32x4(q[0], q[1], 0x44), _mm512_shuffle_f32x4(q[0], q[1], 0xEE));
    floats second = add(_mm512_shuffle_f32x4(q[2], q[3], 0x44), _mm512_shuffle_f32x4(q[2], q[3], 0xEE));
    return add(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xDD));
}

#else

typedef __m256 floats;
typedef __m256i integers;
enum { SIMD_WIDTH = 8 };
enum { ROWS = 3, CHANNELS = 4 }; /* 12 accumulators leave 4 of 16 registers: three for activations, one for weights */

static inline floats load(const float *at) { return _mm256_loadu_ps(at); }
static inline void store(float *at, floats v) { _mm256_storeu_ps(at, v); }
static inline floats broadcast(float value) { return _mm256_set1_ps(value); }
static inline floats mul(floats a, floats b) { return _mm256_mul_ps(a, b); }
static inline floats add(floats a, floats b) { return _mm256_add_ps(a, b); }
static inline floats sub(floats a, floats b) { return _mm256_sub_ps(a, b); }
static inline floats fmadd(floats a, floats b, floats sum) { return _mm256_fmadd_ps(a, b, sum); }
static inline floats absolute(floats v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
static inline floats maximum(floats a, floats b) { return _mm256_max_ps(a, b); }
static inline floats minimum(floats a, floats b) { return _mm256_min_ps(a, b); }
static inline floats load_half(const uint16_t *at) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)at)); }
static inline integers zero_integers(void) { return _mm256_setzero_si256(); }
static inline floats to_floats(integers v) { return _mm256_cvtepi32_ps(v); }

static inline floats load_bfloat16(const uint16_t *at) {
    __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

static inline float hsum(floats v) { return hsum8(v); }
static inline __m128 hsum4(const floats *v) { return hsum8x4(v); }

#endif
