/* A weight matrix in any of its storage formats, and the dequantization of one row. */
#pragma once
#include <stdint.h>
#include <string.h>

#include "four_bit.h"
#include "simd.h"

enum format { FLOAT32, BFLOAT16, FLOAT16, FOUR_BIT, INT8, STATIC_INT8, INT4 };

/* A weight matrix (outputs, inputs), row-major. */
typedef struct {
    int64_t format, outputs, inputs;
    const void *data;
    const float *scales;     /* INT8: one per output, or lane_scales. STATIC_INT8, INT4: one per output. FOUR_BIT: one per
                              * block, or NULL if nested */
    const void *bias;        /* (outputs,) or NULL */
    int64_t bias_format;     /* FLOAT32, BFLOAT16 or FLOAT16 */
    const float *table;      /* FOUR_BIT: the values of the 16 codes */
    int64_t block;           /* FOUR_BIT: weights that share a scale; divides inputs */
    const uint8_t *codes;    /* FOUR_BIT, nested scales: scale = nested_table[code] * nested_scales[i / 256] + offset */
    const float *nested_table, *nested_scales;
    float nested_offset;
    const uint16_t *lane_scales; /* INT8: (outputs, 16) bfloat16, of weights with k / 4 % 16 = lane; NULL: `scales` */
    const float *input_factors;  /* STATIC_INT8: (2, inputs) factors and zero points of the activations */
    const int32_t *offsets;      /* STATIC_INT8: per output, what takes the zero points away from its sum */
    const int8_t *values;        /* INT4: the values of the 16 codes */
    const int8_t *group_scales;  /* INT4: (outputs, inputs / 16), of the groups in int4.h, times `scales` */
} matrix;

static inline int64_t bits_per_weight(const matrix *m) {
    static const int64_t bits[] = {[FLOAT32] = 32, [BFLOAT16] = 16, [FLOAT16] = 16, [FOUR_BIT] = 4, [INT8] = 8,
                                   [STATIC_INT8] = 8, [INT4] = 4};
    return bits[m->format];
}

static inline int64_t row_bytes(const matrix *m) { return m->inputs * bits_per_weight(m) / 8; }

static inline const char *row_of(const matrix *m, int64_t output) {
    return (const char *)m->data + output * row_bytes(m);
}

static inline float bias_of(const matrix *m, int64_t output) {
    switch (m->bias_format) {
    case BFLOAT16: return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(((const uint16_t *)m->bias)[output] << 16)));
    case FLOAT16: return _cvtsh_ss(((const uint16_t *)m->bias)[output]);
    default: return ((const float *)m->bias)[output];
    }
}

static inline float block_scale(const matrix *m, int64_t block) {
    if (m->scales) return m->scales[block];
    return m->nested_table[m->codes[block]] * m->nested_scales[block / 256] + m->nested_offset;
}

static void dequantize_four_bit(const matrix *m, int64_t output, float *out) {
    const uint8_t *w = (const uint8_t *)row_of(m, output);
    int64_t block = output * m->inputs / m->block;
    four_bit_table table = four_bit_values(m->table);
    for (int64_t start = 0; start < m->inputs; start += m->block, block++) {
        floats scale = broadcast(block_scale(m, block));
        for (int64_t k = start; k < start + m->block; k += 32) {
            floats values[32 / SIMD_WIDTH];
            lookup(w + k / 2, &table, values);
            for (int i = 0; i < 32 / SIMD_WIDTH; i++) store(out + k + i * SIMD_WIDTH, mul(values[i], scale));
        }
    }
}

#ifdef __AVX512BF16__
/* Weights k … k + 127 of a row of codes `w`, in bfloat16 and in the interleaved order; if only 64 are left, the others
 * are finite but arbitrary. `k` is a multiple of 128. */
static inline __attribute__((always_inline)) void dequantize_interleaved(const matrix *m, const uint8_t *w,
                                                                         int64_t output, int64_t k, floats table,
                                                                         __m512i values[4]) {
    int both = k + INTERLEAVE <= m->inputs;
    int64_t at = output * m->inputs + k, next = both ? at + INTERLEAVE / 2 : at;
    float first = block_scale(m, at / m->block), second = block_scale(m, next / m->block);
    lookup128(w + k / 2, both, scaled_tables(table, first, second), values);
}

static const uint16_t *dequantized_bfloat16(const matrix *m, int64_t output, uint16_t *out) {
    const uint8_t *w = (const uint8_t *)row_of(m, output);
    floats table = load(m->table);
    for (int64_t k = 0; k < m->inputs; k += INTERLEAVE) {
        __m512i values[4];
        dequantize_interleaved(m, w, output, k, table, values);
        for (int i = 0; i < 4; i++) _mm512_storeu_si512(out + k + 32 * i, values[i]);
    }
    return out;
}
#endif

static void dequantize_int8(const matrix *m, int64_t output, float *out) {
    const int8_t *w = (const int8_t *)row_of(m, output);
    float scales[16];
    for (int lane = 0; lane < 16; lane++) {
        uint32_t bits = m->lane_scales ? (uint32_t)m->lane_scales[output * 16 + lane] << 16 : 0;
        if (m->lane_scales) memcpy(&scales[lane], &bits, sizeof bits);
        else scales[lane] = m->scales[output];
    }
    for (int64_t k = 0; k < m->inputs; k += 64)
        for (int i = 0; i < 64; i++) out[k + i] = w[k + i] * scales[i / 4];
}

/* Row `output` in float32: the matrix's own memory, or dequantized into `scratch`. */
static const float *dequantized(const matrix *m, int64_t output, float *scratch) {
    const uint16_t *halves = (const uint16_t *)row_of(m, output);
    switch (m->format) {
    case BFLOAT16:
        for (int64_t k = 0; k < m->inputs; k += SIMD_WIDTH) store(scratch + k, load_bfloat16(halves + k));
        return scratch;
    case FLOAT16:
        for (int64_t k = 0; k < m->inputs; k += SIMD_WIDTH) store(scratch + k, load_half(halves + k));
        return scratch;
    case FOUR_BIT: dequantize_four_bit(m, output, scratch); return scratch;
    case INT8: dequantize_int8(m, output, scratch); return scratch;
    default: return (const float *)row_of(m, output);
    }
}
