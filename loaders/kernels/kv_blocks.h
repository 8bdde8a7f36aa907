/* The cache: keys and values in blocks of BLOCK_TOKENS tokens, float32 or float16. */
#pragma once
#include <string.h>

#include "avx2.h"

enum { BLOCK_TOKENS = 32 };

/* The keys and values of one head of a sequence: where they are in each of its blocks. */
typedef struct {
    const char *pool;
    const int32_t *table; /* the sequence's blocks */
    int64_t block_bytes;
    int64_t keys, values; /* offsets in a block, in bytes; each (BLOCK_TOKENS, dim) */
} head_blocks;

/* Tokens `at` … `end` - 1 within one block. */
typedef struct {
    int64_t block, at, count; /* `at` counts from the start of the block */
} span;

static inline span next_span(int64_t at, int64_t end) {
    span s = {at / BLOCK_TOKENS, at % BLOCK_TOKENS, BLOCK_TOKENS - at % BLOCK_TOKENS};
    if (at + s.count > end) s.count = end - at;
    return s;
}

static inline const char *block_at(const head_blocks *h, int64_t block) {
    return h->pool + h->table[block] * h->block_bytes;
}

/* Whether float16 represents a head's key or value to its usual precision: no element above float16's largest, and the
 * largest not below its smallest normal number. NaN fits: it stays NaN. */
static inline int fits_half(const float *values, int64_t dim) {
    __m256 most = _mm256_setzero_ps();
    for (int64_t d = 0; d < dim; d += LANES)
        most = _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(values + d)), most);
    float largest = hmax8(most);
    return largest == 0 || (largest >= 0x1p-14f && largest <= 65504);
}

/* How keys and values are stored. ROUNDED is float32 rounded to float16 wherever that fits: when a cache becomes float32
 * because of one sequence, no bit changes for the others. */
enum { FLOAT, HALF, ROUNDED };

/* Stores a head's key or value. */
static inline void store_head(void *to, int64_t at, const float *values, int64_t dim, int kind, int fits) {
    for (int64_t d = 0; d < dim; d += LANES) {
        __m256 eight = _mm256_loadu_ps(values + d);
        __m128i half = _mm256_cvtps_ph(eight, _MM_FROUND_TO_NEAREST_INT);
        if (kind == HALF)
            _mm_storeu_si128((void *)((uint16_t *)to + at + d), half);
        else
            _mm256_storeu_ps((float *)to + at + d, kind == ROUNDED && fits ? _mm256_cvtph_ps(half) : eight);
    }
}
