/* Attention of single rows over KV slots; see linear.c for what is promised of rows and threads. */
#include <math.h>
#include <stdlib.h>
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

/* out = Σ weights[t] · values[t]; four sums at a time stay in registers. */
static void weigh(const float *weights, const float *values, int64_t count, int64_t dim, float *out) {
    for (int64_t d = 0; d < dim; d += 4 * LANES) {
        int64_t left = (dim - d) / LANES, parts = left < 4 ? left : 4;
        __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        if (parts == 4)
            for (int64_t t = 0; t < count; t++) {
                __m256 weight = _mm256_set1_ps(weights[t]);
                const float *value = values + t * dim + d;
                for (int i = 0; i < 4; i++)
                    sums[i] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(value + i * LANES), sums[i]);
            }
        else
            for (int64_t t = 0; t < count; t++)
                for (int64_t i = 0; i < parts; i++)
                    sums[i] = _mm256_fmadd_ps(_mm256_set1_ps(weights[t]),
                                              _mm256_loadu_ps(values + t * dim + d + i * LANES), sums[i]);
        for (int64_t i = 0; i < parts; i++) _mm256_storeu_ps(out + d + i * LANES, sums[i]);
    }
}

/* One head of rows `first` … `end` - 1, all of one slot: appends their keys and values, then attends from each. */
static void attend_run(const float *qkv, float *keys, float *values, const int64_t *positions, int64_t first,
                       int64_t end, int64_t head, int64_t width, int64_t dim, float *scores, float *out) {
    float scale = 1.0f / sqrtf((float)dim);
    for (int64_t row = first; row < end; row++) {
        const float *here = qkv + row * 3 * width + head * dim;
        memcpy(keys + positions[row] * dim, here + width, sizeof(float) * dim);
        memcpy(values + positions[row] * dim, here + 2 * width, sizeof(float) * dim);
    }
    for (int64_t row = first; row < end; row++) {
        const float *query = qkv + row * 3 * width + head * dim;
        int64_t count = positions[row] + 1;
        for (int64_t t = 0; t < count; t++) scores[t] = scale * dot(query, keys + t * dim, dim);
        softmax(scores, count);
        weigh(scores, values, count, dim, out + row * width + head * dim);
    }
}

/* Appends each row's key and value to its slot and attends to all the slot then holds up to that row.
 *
 * qkv (rows, 3 · heads · dim): query, key and value of each row, one after another. keys, values
 * (slots, heads, context, dim). slots, positions (rows,): where each row stands; rows of one slot lie side by side
 * in rising order of position. out (rows, heads · dim). dim is a multiple of 8. 0, or -1: out of memory. */
int bitdial_attention(const float *qkv, float *keys, float *values, const int64_t *slots, const int64_t *positions,
                      int64_t rows, int64_t heads, int64_t dim, int64_t context, float *out, int threads) {
    int64_t longest = 0, runs = 0, *starts = malloc(sizeof(int64_t) * (rows + 1));
    int failed = starts == NULL;
    for (int64_t row = 0; row < rows && !failed; row++) {
        longest = positions[row] > longest ? positions[row] : longest;
        if (row == 0 || slots[row] != slots[row - 1]) starts[runs++] = row;
    }
    if (!failed) starts[runs] = rows;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *scores = malloc(sizeof(float) * (longest + 1 + LANES));
        failed |= scores == NULL;
#pragma omp for schedule(dynamic, 2) nowait
        for (int64_t i = 0; i < runs * heads; i++) {
            int64_t run = i / heads, head = i % heads;
            if (failed) continue;
            int64_t base = (slots[starts[run]] * heads + head) * context * dim;
            attend_run(qkv, keys + base, values + base, positions, starts[run], starts[run + 1], head, heads * dim,
                       dim, scores, out);
        }
        free(scores);
    }
    free(starts);
    return failed ? -1 : 0;
}
