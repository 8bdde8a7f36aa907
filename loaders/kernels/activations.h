/* Packed activations: rows of float32 converted to the type in which the product is computed. */
#pragma once
#include <string.h>

#include "int8_rows.h"
#include "static_int8_rows.h"

/* The type in which weights of a format are multiplied. Sums are float32, or int32 for the kinds of int8 and INT4. */
static inline enum format computes_in(enum format stored) {
    if (stored == INT8 || stored == STATIC_INT8 || stored == INT4) return stored;
#ifdef __AVX512BF16__
    if (stored == BFLOAT16 || stored == FOUR_BIT) return BFLOAT16;
#endif
    return FLOAT32;
}

typedef struct {
    char *data;
    int64_t stride; /* bytes from row to row */
} packed_activations;

/* Whether activations and dequantized weights are in the order of lookup128. */
static inline int is_interleaved(const matrix *m) { return m->format == FOUR_BIT && computes_in(FOUR_BIT) == BFLOAT16; }

/* Values in a packed row: the inputs, and padding with zeros. (int8: also scales, see int8_rows.h.) */
static inline int64_t packed_count(const matrix *m) {
    return is_interleaved(m) ? (m->inputs + 127) / 128 * 128 : m->inputs;
}

/* 64 bytes more than a row needs: rows a multiple of 4 KiB apart would map to the same sets of the first-level cache. */
static inline int64_t packed_stride(const matrix *m) {
    enum format type = computes_in(m->format);
    switch (type) {
    case INT8: return int8_row_bytes(m->inputs) + 64;
    case STATIC_INT8: return static_row_bytes(m->inputs) + 64;
    case INT4: return int4_row_bytes(m->inputs) + 64;
    default: return packed_count(m) * (type == FLOAT32 ? 4 : 2) + 64;
    }
}

#ifdef __AVX512BF16__
static inline __m512i rounded32(const float *x) {
    __m512bh values = _mm512_cvtne2ps_pbh(load(x + SIMD_WIDTH), load(x));
    __m512i found;
    memcpy(&found, &values, sizeof found);
    return found;
}

static void round_row(const float *x, int64_t count, uint16_t *out) {
    for (int64_t k = 0; k < count; k += 32) _mm512_storeu_si512(out + k, rounded32(x + k));
}

/* The same in the order of lookup128: the i-th of four parts has the values i, i + 4, i + 8, … of 128. */
static void interleave_row(const float *x, int64_t count, uint16_t *out) {
    static const uint16_t every_fourth[32] = {0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60,
                                              0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60};
    for (int64_t k = 0; k < count; k += INTERLEAVE) {
        __m512i in[4] = {rounded32(x + k), rounded32(x + k + 32), _mm512_setzero_si512(), _mm512_setzero_si512()};
        if (k + INTERLEAVE <= count) in[2] = rounded32(x + k + 64), in[3] = rounded32(x + k + 96);
        for (int i = 0; i < 4; i++) {
            __m512i which = _mm512_add_epi16(_mm512_loadu_si512(every_fourth), _mm512_set1_epi16((short)i));
            __m512i first = _mm512_permutex2var_epi16(in[0], which, in[1]);
            __m512i second = _mm512_permutex2var_epi16(in[2], which, in[3]);
            _mm512_storeu_si512(out + k + 32 * i, _mm512_mask_mov_epi16(first, 0xFFFF0000, second));
        }
    }
}
#endif

static void pack_row(packed_activations *to, const matrix *m, const float *x, int64_t row) {
    char *out = to->data + row * to->stride;
    int64_t inputs = m->inputs;
    x += row * inputs;
    switch (computes_in(m->format)) {
#ifdef __AVX512BF16__
    case BFLOAT16:
        if (is_interleaved(m)) interleave_row(x, inputs, (uint16_t *)out);
        else round_row(x, inputs, (uint16_t *)out);
        return;
#endif
    case INT8: quantize_row(x, inputs, out); return;
    case STATIC_INT8: quantize_static_row(m, x, out); return;
    case INT4: quantize_row_for_int4(x, inputs, out); return;
    default: memcpy(out, x, sizeof(float) * inputs);
    }
}
