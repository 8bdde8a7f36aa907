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

/* Rows a multiple of 4 KiB apart would all fall on the same lines of the first-level cache: 64 bytes keep them apart. */
static inline int64_t operand_stride(enum format type, int64_t inputs) {
    return inputs * (type == FLOAT32 ? 4 : type == BFLOAT16 ? 2 : 1) + 64;
}

#ifdef __AVX512BF16__
static void round_row(const float *x, int64_t count, uint16_t *out) {
    for (int64_t k = 0; k < count; k += 32) {
        __m512bh values = _mm512_cvtne2ps_pbh(load(x + k + WIDE), load(x + k));
        memcpy(out + k, &values, sizeof values);
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

static void prepare_row(operand *to, enum format type, const float *x, int64_t row, int64_t inputs) {
    char *out = to->data + row * to->stride;
    x += row * inputs;
    switch (type) {
#ifdef __AVX512BF16__
    case BFLOAT16: round_row(x, inputs, (uint16_t *)out); return;
#endif
    case INT8: to->ranges[row] = quantize_row(x, inputs, out); return;
    default: memcpy(out, x, sizeof(float) * inputs);
    }
}
