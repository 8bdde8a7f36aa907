/* Rows of activations in static int8: every input has a constant scale and zero point, found in calibration, so that a row
 * is packed in one pass, without a search for its range. Values outside the range saturate. */
#pragma once
#include "matrix.h"

enum {
    STATIC_HEADER = 64, /* bytes before the codes of a row: 0.0f, or NaN if the row has a value that is not finite */
#ifdef __AVX512BW__
    /* Added to codes, since the instruction multiplies unsigned by signed; `offsets` of the matrix take it away. */
    STATIC_ZERO_POINT = 128
#else
    STATIC_ZERO_POINT = 0
#endif
};

static inline int64_t static_row_bytes(int64_t inputs) { return STATIC_HEADER + inputs; }

/* x · factor + zero point, at most 127: larger ones than int32 holds would become its smallest number. `faults` collects
 * x · 0, which is NaN where x is not finite. */
static inline floats to_static_scale(const matrix *m, const float *x, int64_t k, floats *faults) {
    floats value = load(x + k);
    *faults = fmadd(value, broadcast(0), *faults);
    floats scaled = fmadd(value, load(m->input_factors + k), load(m->input_factors + m->inputs + k));
    return minimum(scaled, broadcast(127));
}

#ifdef __AVX512BW__
static inline __m128i static_codes16(const matrix *m, const float *x, int64_t k, floats *faults) {
    __m128i codes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(to_static_scale(m, x, k, faults)));
    return _mm_xor_si128(codes, _mm_set1_epi8(-128));
}
#else
static inline __m128i static_codes16(const matrix *m, const float *x, int64_t k, floats *faults) {
    __m256i low = _mm256_cvtps_epi32(to_static_scale(m, x, k, faults));
    __m256i high = _mm256_cvtps_epi32(to_static_scale(m, x, k + LANES, faults));
    __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
    return _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}
#endif

static void quantize_static_row(const matrix *m, const float *x, char *out) {
    floats faults = broadcast(0);
    for (int64_t k = 0; k < m->inputs; k += 16)
        _mm_storeu_si128((void *)(out + STATIC_HEADER + k), static_codes16(m, x, k, &faults));
    float fault = hsum(faults);
    memcpy(out, &fault, sizeof fault);
}
