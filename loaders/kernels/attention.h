/* Attention of single rows over KV slots, one head at a time. */
#pragma once
#include <math.h>
#include <string.h>

#include "vector.h"

/* scores → weights that sum to 1, in place; `count` rounded up to a multiple of 8 may be written. */
static void softmax(float *scores, int64_t count) {
    float largest = scores[0];
    for (int64_t t = 1; t < count; t++) largest = scores[t] > largest ? scores[t] : largest;
    for (int64_t t = count; t % LANES; t++) scores[t] = -INFINITY;
    __m256 total = _mm256_setzero_ps();
    for (int64_t t = 0; t < count; t += LANES) {
        __m256 weight = exp8(_mm256_sub_ps(_mm256_loadu_ps(scores + t), _mm256_set1_ps(largest)));
        _mm256_storeu_ps(scores + t, weight);
        total = _mm256_add_ps(total, weight);
    }
    __m256 inverse = _mm256_set1_ps(1.0f / sum8(total));
    for (int64_t t = 0; t < count; t += LANES)
        _mm256_storeu_ps(scores + t, _mm256_mul_ps(_mm256_loadu_ps(scores + t), inverse));
}

/* scores[t] = scale · query · keys[t], four keys at a time. */
static void match(const float *query, const float *keys, int64_t count, int64_t dim, float scale, float *scores) {
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) {
        __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int64_t d = 0; d < dim; d += LANES) {
            __m256 part = _mm256_loadu_ps(query + d);
            for (int i = 0; i < 4; i++)
                sums[i] = _mm256_fmadd_ps(part, _mm256_loadu_ps(keys + (t + i) * dim + d), sums[i]);
        }
        _mm_storeu_ps(scores + t, _mm_mul_ps(sum8x4(sums), _mm_set1_ps(scale)));
    }
    for (; t < count; t++) {
        __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int64_t d = 0; d < dim; d += LANES)
            sums[0] = _mm256_fmadd_ps(_mm256_loadu_ps(query + d), _mm256_loadu_ps(keys + t * dim + d), sums[0]);
        scores[t] = _mm_cvtss_f32(sum8x4(sums)) * scale; /* the same order of sums as among four */
    }
}

/* out = Σ weights[t] · values[t]; eight sums at a time stay in registers. */
static void weigh(const float *weights, const float *values, int64_t count, int64_t dim, float *out) {
    enum { PARTS = 8 };
    for (int64_t d = 0; d < dim; d += PARTS * LANES) {
        int64_t left = (dim - d) / LANES, parts = left < PARTS ? left : PARTS;
        __m256 sums[PARTS];
        for (int i = 0; i < PARTS; i++) sums[i] = _mm256_setzero_ps();
        for (int64_t t = 0; t < count; t++) {
            __m256 weight = _mm256_set1_ps(weights[t]);
            const float *value = values + t * dim + d;
            if (parts == PARTS)
                for (int i = 0; i < PARTS; i++)
                    sums[i] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(value + i * LANES), sums[i]);
            else
                for (int64_t i = 0; i < parts; i++)
                    sums[i] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(value + i * LANES), sums[i]);
        }
        for (int64_t i = 0; i < parts; i++) _mm256_storeu_ps(out + d + i * LANES, sums[i]);
    }
}

/* out (dim,): `query` attends to the first `count` of keys and values (…, dim). `scores` holds count + 8.
 * dim is a multiple of 8. */
static void attend(const float *query, const float *keys, const float *values, int64_t count, int64_t dim,
                   float *scores, float *out) {
    match(query, keys, count, dim, 1.0f / sqrtf((float)dim), scores);
    softmax(scores, count);
    weigh(scores, values, count, dim, out);
}
