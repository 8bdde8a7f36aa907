/* Products of rows in static int8 (static_int8_rows.h) and int8 weights with a scale per output. A sum is an exact int32
 * over all inputs, so its order doesn't matter; scales and zero points follow once per output. */
#pragma once
#include "gemv.h"

#ifdef __AVX512BW__
enum { STATIC_STEP = 64 }; /* inputs in a register */

static inline integers load_codes(const char *at) { return _mm512_loadu_si512(at); }

/* sums += x · w over groups of four; x is unsigned. */
static inline integers dot_static(integers sums, integers x, integers w) { return _mm512_dpbusd_epi32(sums, x, w); }

/* Per 128-bit quarter: the horizontal sums of four registers, in the four lanes of that quarter. */
static inline integers integer_quarters4(const integers *v) {
    integers low = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    integers high = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
}

static inline __m128i integer_hsum4(const integers *v) {
    integers quarters = integer_quarters4(v);
    __m256i halves = _mm256_add_epi32(_mm512_castsi512_si256(quarters), _mm512_extracti64x4_epi64(quarters, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
#else
enum { STATIC_STEP = 32 };

static inline integers load_codes(const char *at) { return _mm256_loadu_si256((const void *)at); }

/* sums += x · w over groups of four: |x| · (w with x's sign), in pairs that can't overflow 16 bits (2 · 128 · 127 < 2¹⁵). */
static inline integers dot_static(integers sums, integers x, integers w) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

static inline __m128i integer_hsum4(const integers *v) {
    __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}
#endif

/* Scales and offsets of the outputs of a tile; of missing ones, the first's. */
typedef struct {
    __m128 scales;
    __m128i offsets;
} static_outputs;

static inline static_outputs static_outputs_of(const tile *t) {
    const float *scales = t->m->scales + t->output;
    const int32_t *offsets = t->m->offsets + t->output;
    if (t->channels == CHANNELS) return (static_outputs){_mm_loadu_ps(scales), _mm_loadu_si128((const void *)offsets)};
    float scale[CHANNELS];
    int32_t offset[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) {
        scale[c] = scales[c < t->channels ? c : 0];
        offset[c] = offsets[c < t->channels ? c : 0];
    }
    return (static_outputs){_mm_loadu_ps(scale), _mm_loadu_si128((const void *)offset)};
}

static inline void store_static_sums(const tile *t, int64_t row, const static_outputs *of, __m128i sums) {
    __m128 found = _mm_mul_ps(_mm_cvtepi32_ps(_mm_add_epi32(sums, of->offsets)), of->scales);
    store_sums(t, row, _mm_add_ps(found, _mm_broadcast_ss((const float *)x_row(t, row))));
}

MICROKERNEL static_int8_microkernel(const tile *t, int64_t row, int rows) {
    integers sums[ROWS][CHANNELS];
    static_outputs of = static_outputs_of(t);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < CHANNELS; c++) sums[r][c] = zero_integers();
    FOR_EACH_K(t, k, STATIC_STEP) {
        integers values[ROWS];
        for (int r = 0; r < rows; r++) values[r] = load_codes(x_row(t, row + r) + STATIC_HEADER + k);
        for (int c = 0; c < CHANNELS; c++) {
            integers weights = load_codes(t->w[c] + k);
            for (int r = 0; r < rows; r++) sums[r][c] = dot_static(sums[r][c], values[r], weights);
        }
    }
    for (int r = 0; r < rows; r++) store_static_sums(t, row + r, &of, integer_hsum4(sums[r]));
}

/* A single row: as in gemv.h, output by output. */
static void gemv_static_int8(const tile *t, int64_t row) {
    const char *x = x_row(t, row) + STATIC_HEADER;
    integers sums[CHANNELS];
    static_outputs of = static_outputs_of(t);
    for (int c = 0; c < CHANNELS; c++) {
        const char *w = t->w[c];
        integers sum = zero_integers();
        for (int64_t k = 0; k < t->m->inputs; k += STATIC_STEP) {
            prefetch_ahead(w + k);
            sum = dot_static(sum, load_codes(x + k), load_codes(w + k));
        }
        sums[c] = sum;
    }
    store_static_sums(t, row, &of, integer_hsum4(sums));
}
