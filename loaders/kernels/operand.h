/* The left-hand side of a product: rows of float32, copied into the type that the product multiplies in. */
#pragma once
#include <string.h>

#include "matrix.h"

/* In which type a format's weights are multiplied. The sums are float32, of INT8 int32. */
static inline enum format computes_in(enum format kept) {
    if (kept == INT8) return INT8;
#ifdef __AVX512BF16__
    if (kept == BFLOAT16 || kept == FOUR_BIT) return BFLOAT16;
#endif
    return FLOAT32;
}

typedef struct {
    char *data;
    int64_t stride; /* bytes from row to row */
    float *ranges;  /* INT8: what each row's integers are multiplied with */
} operand;

/* Whether rows and widened weights are in the order of look_up128. */
static inline int is_spread(const matrix *m) { return m->format == FOUR_BIT && computes_in(FOUR_BIT) == BFLOAT16; }

/* How many values a row of a product's operand has: its inputs, and what is filled up with zeros. */
static inline int64_t operand_count(const matrix *m) {
    return is_spread(m) ? (m->inputs + 127) / 128 * 128 : m->inputs;
}

/* Rows a multiple of 4 KiB apart would all fall on the same lines of the first-level cache: 64 bytes keep them apart. */
static inline int64_t operand_stride(const matrix *m) {
    enum format type = computes_in(m->format);
    return operand_count(m) * (type == FLOAT32 ? 4 : type == BFLOAT16 ? 2 : 1) + 64;
}

#ifdef __AVX512BF16__
static inline __m512i rounded32(const float *x) {
    __m512bh values = _mm512_cvtne2ps_pbh(load(x + WIDE), load(x));
    __m512i found;
    memcpy(&found, &values, sizeof found);
    return found;
}

static void round_row(const float *x, int64_t count, uint16_t *out) {
    for (int64_t k = 0; k < count; k += 32) _mm512_storeu_si512(out + k, rounded32(x + k));
}

/* The same in the order of look_up128: the i-th of four parts has the values i, i + 4, i + 8, … of 128. */
static void spread_row(const float *x, int64_t count, uint16_t *out) {
    static const uint16_t every_fourth[32] = {0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60,
                                              0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60};
    for (int64_t k = 0; k < count; k += SPREAD) {
        __m512i in[4] = {rounded32(x + k), rounded32(x + k + 32), _mm512_setzero_si512(), _mm512_setzero_si512()};
        if (k + SPREAD <= count) in[2] = rounded32(x + k + 64), in[3] = rounded32(x + k + 96);
        for (int i = 0; i < 4; i++) {
            __m512i which = _mm512_add_epi16(_mm512_loadu_si512(every_fourth), _mm512_set1_epi16((short)i));
            __m512i first = _mm512_permutex2var_epi16(in[0], which, in[1]);
            __m512i second = _mm512_permutex2var_epi16(in[2], which, in[3]);
            _mm512_storeu_si512(out + k + 32 * i, _mm512_mask_mov_epi16(first, 0xFFFF0000, second));
        }
    }
}
#endif

/* One row → int8 by its own largest magnitude; returns the scale. For AVX-512 the integers are stored 128 higher. */
static float quantize_row(const float *x, int64_t count, void *out) {
    floats largest = all(0), poison = all(0);
    for (int64_t k = 0; k < count; k += WIDE) {
        floats values = load(x + k);
        largest = larger(largest, magnitude(values));
        poison = multiply_add(values, all(0), poison); /* not a number if one of them isn't finite */
    }
    float lanes[WIDE], range = 0;
    store(lanes, largest);
    for (int i = 0; i < WIDE; i++) range = lanes[i] > range ? lanes[i] : range;
    floats inverse = all(range > 0 ? 127.0f / range : 0.0f);
    for (int64_t k = 0; k < count; k += WIDE) {
#ifdef __AVX512BW__
        __m128i narrow = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(times(load(x + k), inverse)));
        _mm_storeu_si128((void *)((char *)out + k), _mm_xor_si128(narrow, _mm_set1_epi8(-128)));
#else
        __m256i q = _mm256_cvtps_epi32(times(load(x + k), inverse));
        __m128i q16 = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
        _mm_storel_epi64((void *)((char *)out + k), _mm_packs_epi16(q16, q16));
#endif
    }
    return range / 127.0f + sum(poison);
}

static void prepare_row(operand *to, const matrix *m, const float *x, int64_t row) {
    char *out = to->data + row * to->stride;
    int64_t inputs = m->inputs;
    x += row * inputs;
    switch (computes_in(m->format)) {
#ifdef __AVX512BF16__
    case BFLOAT16:
        if (is_spread(m)) spread_row(x, inputs, (uint16_t *)out);
        else round_row(x, inputs, (uint16_t *)out);
        return;
#endif
    case INT8: to->ranges[row] = quantize_row(x, inputs, out); return;
    default: memcpy(out, x, sizeof(float) * inputs);
    }
}
