/* A weight matrix in any of its formats, and one row of it in float32. */
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "vector.h"

enum { ROWS = 3, CHANNELS = 4 }; /* a tile of 12 accumulators leaves 4 registers for operands */
enum format { FLOAT32, BFLOAT16, FLOAT16, FOUR_BIT, INT8 };

/* A weight matrix (outputs, inputs), row-major. */
typedef struct {
    int64_t format, outputs, inputs;
    const void *data;
    const float *scales;     /* INT8: one an output. FOUR_BIT: one a block of inputs, or NULL if they are nested */
    const float *bias;       /* (outputs,) or NULL */
    const float *table;      /* FOUR_BIT: the 16 values a code stands for */
    int64_t block;           /* FOUR_BIT: weights that share a scale; divides inputs */
    const uint8_t *codes;    /* FOUR_BIT, nested scales: scale = nested_table[code] * nested_scales[i / 256] + offset */
    const float *nested_table, *nested_scales;
    float nested_offset;
} matrix;

static void widen_bfloat16(const uint16_t *w, int64_t count, float *out) {
    for (int64_t k = 0; k < count; k += LANES) {
        __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(w + k)));
        _mm256_storeu_ps(out + k, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
    }
}

static void widen_float16(const uint16_t *w, int64_t count, float *out) {
    for (int64_t k = 0; k < count; k += LANES) {
        _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + k))));
    }
}

static inline float block_scale(const matrix *m, int64_t block) {
    if (m->scales) return m->scales[block];
    return m->nested_table[m->codes[block]] * m->nested_scales[block / 256] + m->nested_offset;
}

/* The table's 16 floats as four planes of bytes, lowest first, each in both halves of a register: a byte shuffle then
 * looks up 32 codes at once, where a permutation of floats takes twice the time for eight. */
static inline void byte_planes(const float *table, __m256i planes[4]) {
    const __m128i by_byte = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m128i quarter[4];
    for (int i = 0; i < 4; i++)
        quarter[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(table + 4 * i)), by_byte);
    __m128i first = _mm_unpacklo_epi32(quarter[0], quarter[1]), second = _mm_unpacklo_epi32(quarter[2], quarter[3]);
    __m128i third = _mm_unpackhi_epi32(quarter[0], quarter[1]), fourth = _mm_unpackhi_epi32(quarter[2], quarter[3]);
    planes[0] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(first, second));
    planes[1] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(first, second));
    planes[2] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(third, fourth));
    planes[3] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(third, fourth));
}

/* 16 bytes, the first of two codes in the upper half of each → 32 table values in order, as bits of four registers. */
static inline void look_up(const uint8_t *bytes, const __m256i planes[4], __m256i values[4]) {
    /* Unpacking works within halves of a register: codes 0-3, 8-11, … go to the lower one, 4-7, 12-15, … to the upper. */
    const __m256i halves = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,
                                            2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
    both = _mm256_shuffle_epi8(both, halves);
    __m256i upper = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble), lower = _mm256_and_si256(both, nibble);
    __m256i codes = _mm256_unpacklo_epi8(upper, lower), part[4];
    for (int i = 0; i < 4; i++) part[i] = _mm256_shuffle_epi8(planes[i], codes);
    __m256i low01 = _mm256_unpacklo_epi8(part[0], part[1]), low23 = _mm256_unpacklo_epi8(part[2], part[3]);
    __m256i high01 = _mm256_unpackhi_epi8(part[0], part[1]), high23 = _mm256_unpackhi_epi8(part[2], part[3]);
    values[0] = _mm256_unpacklo_epi16(low01, low23);
    values[1] = _mm256_unpackhi_epi16(low01, low23);
    values[2] = _mm256_unpacklo_epi16(high01, high23);
    values[3] = _mm256_unpackhi_epi16(high01, high23);
}

static void widen_four_bit(const matrix *m, int64_t output, float *out) {
    const uint8_t *w = (const uint8_t *)m->data + output * m->inputs / 2;
    int64_t block = output * m->inputs / m->block;
    __m256i planes[4], values[4];
    byte_planes(m->table, planes);
    for (int64_t start = 0; start < m->inputs; start += m->block, block++) {
        __m256 scale = _mm256_set1_ps(block_scale(m, block));
        for (int64_t k = start; k < start + m->block; k += 32) {
            look_up(w + k / 2, planes, values);
            for (int i = 0; i < 4; i++)
                _mm256_storeu_ps(out + k + i * LANES, _mm256_mul_ps(_mm256_castsi256_ps(values[i]), scale));
        }
    }
}

static inline int64_t row_bytes(const matrix *m) {
    static const int64_t eighths[] = {[FLOAT32] = 32, [BFLOAT16] = 16, [FLOAT16] = 16, [FOUR_BIT] = 4, [INT8] = 8};
    return m->inputs * eighths[m->format] / 8;
}

/* Row `output` in float32: where it lies, or widened into `scratch`. */
static const float *widened(const matrix *m, int64_t output, float *scratch) {
    const uint16_t *halves = (const uint16_t *)m->data + output * m->inputs;
    switch (m->format) {
    case BFLOAT16: widen_bfloat16(halves, m->inputs, scratch); return scratch;
    case FLOAT16: widen_float16(halves, m->inputs, scratch); return scratch;
    case FOUR_BIT: widen_four_bit(m, output, scratch); return scratch;
    default: return (const float *)m->data + output * m->inputs;
    }
}
