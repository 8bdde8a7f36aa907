/* Lookup of four-bit codes in a table of 16 values. */
#pragma once
#include <string.h>

#include "simd.h"

#ifdef __AVX512BW__

typedef struct {
    __m512 values;
} four_bit_table;

static inline four_bit_table four_bit_values(const float *table) { return (four_bit_table){_mm512_loadu_ps(table)}; }

/* 8 bytes, each with its first code in the upper half → 16 values in order. */
static inline __m512 lookup16(const uint8_t *bytes, const four_bit_table *table) {
    __m512i pairs = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)bytes));
    /* a permutation uses only the lowest four bits of each lane */
    __m512i codes = _mm512_or_si512(_mm512_slli_epi64(pairs, 32), _mm512_srli_epi64(pairs, 4));
    return _mm512_permutexvar_ps(codes, table->values);
}

/* 16 bytes → 32 values in order. */
static inline void lookup(const uint8_t *bytes, const four_bit_table *table, floats values[2]) {
    values[0] = lookup16(bytes, table);
    values[1] = lookup16(bytes + 8, table);
}

#ifdef __AVX512BF16__
/* In bfloat16, 128 weights at a time are interleaved in the order that needs the fewest instructions to unpack: the upper
 * halves of the even bytes, then their lower halves, then those of the odd bytes. Activations are packed in this order. */
enum { INTERLEAVE = 128 };

/* The table multiplied by the scales of two blocks, in bfloat16. */
static inline __m512i scaled_tables(floats table, float first, float second) {
    __m512bh rounded = _mm512_cvtne2ps_pbh(mul(table, broadcast(second)), mul(table, broadcast(first)));
    __m512i tables;
    memcpy(&tables, &rounded, sizeof tables);
    return tables;
}

/* 32 bytes of the first block and, if `both`, 32 of the second → 4 × 32 bfloat16 values. */
static inline __attribute__((always_inline)) void lookup128(const uint8_t *bytes, int both, __m512i tables,
                                                             __m512i values[4]) {
    const __m512i nibble = _mm512_set1_epi16(15);
    const __m512i table_of = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    __m512i words = _mm512_maskz_loadu_epi64(both ? 0xFF : 0x0F, bytes);
    __m512i codes[4] = {_mm512_srli_epi16(words, 4), words, _mm512_srli_epi16(words, 12), _mm512_srli_epi16(words, 8)};
    for (int i = 0; i < 4; i++) /* (code & 15) | 16 for the second block */
        values[i] = _mm512_permutexvar_epi16(_mm512_ternarylogic_epi64(codes[i], nibble, table_of, 0xEA), tables);
}
#endif

#else

/* The table's 16 floats as four planes of bytes, lowest first, each in both halves of a register: a byte shuffle
 * then looks up 32 codes at once; a permutation of floats takes twice the time for eight. */
typedef struct {
    __m256i planes[4];
} four_bit_table;

static inline four_bit_table four_bit_values(const float *table) {
    const __m128i by_byte = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m128i quarter[4];
    for (int i = 0; i < 4; i++)
        quarter[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(table + 4 * i)), by_byte);
    __m128i first = _mm_unpacklo_epi32(quarter[0], quarter[1]), second = _mm_unpacklo_epi32(quarter[2], quarter[3]);
    __m128i third = _mm_unpackhi_epi32(quarter[0], quarter[1]), fourth = _mm_unpackhi_epi32(quarter[2], quarter[3]);
    four_bit_table found;
    found.planes[0] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(first, second));
    found.planes[1] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(first, second));
    found.planes[2] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(third, fourth));
    found.planes[3] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(third, fourth));
    return found;
}

/* 16 bytes, each with its first code in the upper half → 32 values in order. */
static inline void lookup(const uint8_t *bytes, const four_bit_table *table, floats values[4]) {
    /* Unpacking works within the halves of a register: codes 0-3, 8-11, … go to the lower, 4-7, 12-15, … to the upper. */
    const __m256i halves = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,
                                            2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
    both = _mm256_shuffle_epi8(both, halves);
    __m256i upper = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble), lower = _mm256_and_si256(both, nibble);
    __m256i codes = _mm256_unpacklo_epi8(upper, lower), part[4];
    for (int i = 0; i < 4; i++) part[i] = _mm256_shuffle_epi8(table->planes[i], codes);
    __m256i low01 = _mm256_unpacklo_epi8(part[0], part[1]), low23 = _mm256_unpacklo_epi8(part[2], part[3]);
    __m256i high01 = _mm256_unpackhi_epi8(part[0], part[1]), high23 = _mm256_unpackhi_epi8(part[2], part[3]);
    values[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low01, low23));
    values[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low01, low23));
    values[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(high01, high23));
    values[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(high01, high23));
}

#endif
