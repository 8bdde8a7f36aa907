/* Attention over a cache in blocks. Keys and values are float32 or float16. A tile of a few queries that attend to the same
 * keys (heads that share them, or tokens of a prompt) reads them once; the sums of a query don't depend on its tile.
 *
 * A block holds BLOCK_TOKENS tokens of one sequence, or of several that share a prefix: the keys of all layers' heads and
 * their values, contiguous. A head's part of it is a few KiB, far from the next one, which the hardware prefetcher finds
 * late: reading keys prefetches the values, and reading values the next head's keys. */
#pragma once
#include <math.h>

#include "kv_blocks.h"
#include "simd.h"

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

#ifdef __AVX512BW__
enum { QUERIES = 4, PARTS_OF_ONE = 4, PARTS_OF_MANY = 4 }; /* queries in a tile; accumulators that stay in registers */
typedef __mmask16 lane_mask;

/* The lanes that a head has left from element d. */
static inline lane_mask lanes_left(int64_t d, int64_t dim) { return dim - d < SIMD_WIDTH ? 0xFF : 0xFFFF; }

/* Elements of keys or values from `at`; zero where the mask is. */
static inline __attribute__((always_inline)) floats load_cached(const void *from, int64_t at, int half, lane_mask mask) {
    if (!half) return _mm512_maskz_loadu_ps(mask, (const float *)from + at);
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)from + at));
}

static inline floats load_lanes(const float *at, lane_mask mask) { return _mm512_maskz_loadu_ps(mask, at); }
static inline void store_lanes(float *at, floats v, lane_mask mask) { _mm512_mask_storeu_ps(at, mask, v); }
#else
enum { QUERIES = 2, PARTS_OF_ONE = 8, PARTS_OF_MANY = 4 };
typedef int lane_mask; /* not used: a head has a multiple of eight elements */

static inline lane_mask lanes_left(int64_t d, int64_t dim) {
    (void)d, (void)dim;
    return 0;
}

static inline __attribute__((always_inline)) floats load_cached(const void *from, int64_t at, int half, lane_mask mask) {
    (void)mask;
    if (!half) return _mm256_loadu_ps((const float *)from + at);
    return _mm256_cvtph_ps(_mm_loadu_si128((const void *)((const uint16_t *)from + at)));
}

static inline floats load_lanes(const float *at, lane_mask mask) {
    (void)mask;
    return load(at);
}

static inline void store_lanes(float *at, floats v, lane_mask mask) {
    (void)mask;
    store(at, v);
}
#endif

/* A query and what it attends to. */
typedef struct {
    const float *query; /* (dim,) */
    float *out;         /* (dim,) */
    int64_t start, end; /* tokens start … end - 1 */
    float *scores;      /* a token more than `end` - the tile's `start`, and SCORES_PADDING */
} attention_query;

enum { SCORES_PADDING = 16 };

/* Queries that attend to the same head of a sequence; `start` and `end` enclose those of all of them. */
typedef struct {
    attention_query queries[QUERIES];
    head_blocks of, next; /* `next`: whose keys are prefetched; its table is as long */
    int64_t start, end, dim;
    float scale;
} attention_tile;

/* `half`, `count` (queries) and `parts` are compile-time constants after inlining. */
#define TILE static inline __attribute__((always_inline)) void

/* scores[t] = scale · query · keys[t] of tokens within a block, four keys at a time; the order of a sum is the same for
 * every key and in every tile. Up to three scores behind the last are written as well. */
TILE span_scores(const attention_tile *a, int count, const void *keys, const void *values, int64_t tokens, int64_t at,
                 int half) {
    int64_t dim = a->dim, bytes = dim * (half ? 2 : 4);
    for (int64_t t = 0; t < tokens; t += 4) {
        int64_t present = tokens - t < 4 ? tokens - t : 4;
        floats sums[QUERIES][4];
        for (int q = 0; q < count; q++)
            for (int i = 0; i < 4; i++) sums[q][i] = broadcast(0);
        for (int64_t byte = 0; byte < 4 * bytes; byte += 64)
            _mm_prefetch((const char *)values + t * bytes + byte, _MM_HINT_T0);
        for (int64_t d = 0; d < dim; d += SIMD_WIDTH) {
            lane_mask mask = lanes_left(d, dim);
            floats key[4];
            for (int i = 0; i < 4; i++) key[i] = load_cached(keys, (i < present ? t + i : t) * dim + d, half, mask);
            for (int q = 0; q < count; q++) {
                floats part = load_lanes(a->queries[q].query + d, mask);
                for (int i = 0; i < 4; i++) sums[q][i] = fmadd(part, key[i], sums[q][i]);
            }
        }
        for (int q = 0; q < count; q++)
            _mm_storeu_ps(a->queries[q].scores + at - a->start + t, _mm_mul_ps(hsum4(sums[q]), _mm_set1_ps(a->scale)));
    }
}

TILE attention_scores(const attention_tile *a, int count, int half) {
    int64_t bytes = a->dim * (half ? 2 : 4);
    for (int64_t at = a->start; at < a->end;) {
        span s = next_span(at, a->end);
        const char *block = block_at(&a->of, s.block);
        span_scores(a, count, block + a->of.keys + s.at * bytes, block + a->of.values + s.at * bytes, s.count, at, half);
        at += s.count;
    }
}

/* Scores → weights: 0 for tokens of the tile that the query doesn't attend to. */
static void weigh(const attention_tile *a, const attention_query *q) {
    float *own = q->scores + q->start - a->start;
    softmax(own, q->end - q->start);
    for (int64_t t = a->start; t < q->start; t++) q->scores[t - a->start] = 0;
    for (int64_t t = q->end; t < a->end; t++) q->scores[t - a->start] = 0;
}

/* sums += Σ weights[t] · values[t] of tokens within a block, elements from d; prefetches `next`. */
TILE add_span(const attention_tile *a, int count, int parts, const void *values, const char *next, int64_t tokens,
              int64_t at, int64_t d, floats (*sums)[PARTS_OF_ONE], int half) {
    int64_t dim = a->dim, bytes = dim * (half ? 2 : 4);
    for (int64_t t = 0; t < tokens; t++) {
        floats value[PARTS_OF_ONE];
        for (int64_t byte = 0; d == 0 && byte < bytes; byte += 64) _mm_prefetch(next + t * bytes + byte, _MM_HINT_T0);
        for (int p = 0; p < parts; p++) {
            int64_t from = d + p * SIMD_WIDTH;
            value[p] = load_cached(values, t * dim + from, half, lanes_left(from, dim));
        }
        for (int q = 0; q < count; q++) {
            floats weight = broadcast(a->queries[q].scores[at - a->start + t]);
            for (int p = 0; p < parts; p++) sums[q][p] = fmadd(weight, value[p], sums[q][p]);
        }
    }
}

/* out = Σ weights[t] · values[t], elements from d. */
TILE sum_parts(const attention_tile *a, int count, int parts, int64_t d, int half) {
    int64_t bytes = a->dim * (half ? 2 : 4);
    floats sums[QUERIES][PARTS_OF_ONE];
    for (int q = 0; q < count; q++)
        for (int p = 0; p < parts; p++) sums[q][p] = broadcast(0);
    for (int64_t at = a->start; at < a->end;) {
        span s = next_span(at, a->end);
        const char *values = block_at(&a->of, s.block) + a->of.values + s.at * bytes;
        const char *keys = block_at(&a->next, s.block) + a->next.keys + s.at * bytes;
        add_span(a, count, parts, values, keys, s.count, at, d, sums, half);
        at += s.count;
    }
    for (int q = 0; q < count; q++)
        for (int p = 0; p < parts; p++) {
            int64_t from = d + p * SIMD_WIDTH;
            store_lanes(a->queries[q].out + from, sums[q][p], lanes_left(from, a->dim));
        }
}

TILE weighted_sums(const attention_tile *a, int count, int parts, int half) {
    int64_t d = 0;
    for (; d + parts * SIMD_WIDTH <= a->dim; d += parts * SIMD_WIDTH) sum_parts(a, count, parts, d, half);
    for (; d < a->dim; d += SIMD_WIDTH) sum_parts(a, count, 1, d, half);
}

/* Computes the outputs of all queries of a tile. dim is a multiple of 8. */
#define ATTEND(name, count, parts, half) \
    static __attribute__((noinline)) void name(const attention_tile *a) { \
        attention_scores(a, count, half); \
        for (int q = 0; q < count; q++) weigh(a, &a->queries[q]); \
        weighted_sums(a, count, parts, half); \
    }
ATTEND(attend_float_1, 1, PARTS_OF_ONE, 0)
ATTEND(attend_half_1, 1, PARTS_OF_ONE, 1)
ATTEND(attend_float_2, 2, PARTS_OF_MANY, 0)
ATTEND(attend_half_2, 2, PARTS_OF_MANY, 1)
#ifdef __AVX512BW__
ATTEND(attend_float_3, 3, PARTS_OF_MANY, 0)
ATTEND(attend_half_3, 3, PARTS_OF_MANY, 1)
ATTEND(attend_float_4, 4, PARTS_OF_MANY, 0)
ATTEND(attend_half_4, 4, PARTS_OF_MANY, 1)
#endif

static void attend(const attention_tile *a, int count, int half) {
    typedef void attend_function(const attention_tile *);
#ifdef __AVX512BW__
    static attend_function *const functions[2][QUERIES] = {
        {attend_float_1, attend_float_2, attend_float_3, attend_float_4},
        {attend_half_1, attend_half_2, attend_half_3, attend_half_4},
    };
#else
    static attend_function *const functions[2][QUERIES] = {{attend_float_1, attend_float_2}, {attend_half_1, attend_half_2}};
#endif
    functions[half][count - 1](a);
}
