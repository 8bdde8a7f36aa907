/* Attention of single rows over KV slots, one head at a time. Keys and values are float32 or float16.
 *
 * Heads are a few KiB each and far apart, so the hardware prefetcher finds the next one late: reading keys prefetches the
 * values, and reading values the next head's keys. */
#pragma once
#include <math.h>
#include <string.h>

#include "avx2.h"

/* scores → weights that sum to 1, in place; `count` rounded up to a multiple of 8 may be written. */
static void softmax(float *scores, int64_t count) {
    for (int64_t t = count; t % LANES; t++) scores[t] = -INFINITY;
    __m256 most = _mm256_loadu_ps(scores);
    for (int64_t t = LANES; t < count; t += LANES) most = _mm256_max_ps(_mm256_loadu_ps(scores + t), most);
    float largest = hmax8(most);
    __m256 total = _mm256_setzero_ps();
    for (int64_t t = 0; t < count; t += LANES) {
        __m256 weight = exp8(_mm256_sub_ps(_mm256_loadu_ps(scores + t), _mm256_set1_ps(largest)));
        _mm256_storeu_ps(scores + t, weight);
        total = _mm256_add_ps(total, weight);
    }
    __m256 inverse = _mm256_set1_ps(1.0f / hsum8(total));
    for (int64_t t = 0; t < count; t += LANES)
        _mm256_storeu_ps(scores + t, _mm256_mul_ps(_mm256_loadu_ps(scores + t), inverse));
}

/* Eight elements of keys or values, from element `at`. */
static inline __attribute__((always_inline)) __m256 load8(const void *from, int64_t at, int half) {
    if (!half) return _mm256_loadu_ps((const float *)from + at);
    return _mm256_cvtph_ps(_mm_loadu_si128((const void *)((const uint16_t *)from + at)));
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

/* `half` is a compile-time constant after inlining. */
#define HEAD static inline __attribute__((always_inline)) void

/* scores[t] = scale · query · keys[t], four keys at a time; the order of the sum is the same for every key. */
HEAD attention_scores(const float *query, const void *keys, const void *values, int64_t count, int64_t dim, float scale,
           float *scores, int half) {
    int64_t bytes = dim * (half ? 2 : 4);
    for (int64_t t = 0; t < count; t += 4) {
        int64_t present = count - t < 4 ? count - t : 4;
        __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int64_t byte = 0; byte < 4 * bytes; byte += 64)
            _mm_prefetch((const char *)values + t * bytes + byte, _MM_HINT_T0);
        for (int64_t d = 0; d < dim; d += LANES) {
            __m256 part = _mm256_loadu_ps(query + d);
            for (int i = 0; i < 4; i++)
                sums[i] = _mm256_fmadd_ps(part, load8(keys, (i < present ? t + i : t) * dim + d, half), sums[i]);
        }
        _mm_storeu_ps(scores + t, _mm_mul_ps(hsum8x4(sums), _mm_set1_ps(scale)));
    }
}

/* out = Σ weights[t] · values[t]; eight accumulators at a time stay in registers. */
HEAD weighted_sum(const float *weights, const void *values, int64_t count, int64_t dim, const char *next, float *out,
           int half) {
    enum { PARTS = 8 };
    int64_t bytes = dim * (half ? 2 : 4);
    for (int64_t d = 0; d < dim; d += PARTS * LANES) {
        int64_t left = (dim - d) / LANES, parts = left < PARTS ? left : PARTS;
        __m256 sums[PARTS];
        for (int i = 0; i < PARTS; i++) sums[i] = _mm256_setzero_ps();
        for (int64_t t = 0; t < count; t++) {
            __m256 weight = _mm256_set1_ps(weights[t]);
            int64_t at = t * dim + d;
            for (int64_t byte = 0; d == 0 && byte < bytes; byte += 64) _mm_prefetch(next + t * bytes + byte, _MM_HINT_T0);
            if (parts == PARTS)
                for (int i = 0; i < PARTS; i++)
                    sums[i] = _mm256_fmadd_ps(weight, load8(values, at + i * LANES, half), sums[i]);
            else
                for (int64_t i = 0; i < parts; i++)
                    sums[i] = _mm256_fmadd_ps(weight, load8(values, at + i * LANES, half), sums[i]);
        }
        for (int64_t i = 0; i < parts; i++) _mm256_storeu_ps(out + d + i * LANES, sums[i]);
    }
}

/* out (dim,): `query` attends to the first `count` of keys and values (…, dim). `scores` holds count + 8; `next` are
 * keys to prefetch. dim is a multiple of 8. */
#define ATTEND(name, half) \
    static __attribute__((noinline)) void name(const float *query, const void *keys, const void *values, int64_t count, \
                                               int64_t dim, const char *next, float *scores, float *out) { \
        attention_scores(query, keys, values, count, dim, 1.0f / sqrtf((float)dim), scores, half); \
        softmax(scores, count); \
        weighted_sum(scores, values, count, dim, next, out, half); \
    }
ATTEND(attend_float, 0)
ATTEND(attend_half, 1)
