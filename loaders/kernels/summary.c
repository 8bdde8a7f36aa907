/* The input of a sampler from rows of logits: the argmax of each, and the logarithm of the sum of exponentials. */
#include <float.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "avx2.h"

enum {
    SEGMENT = 4096,         /* floats; read twice, the second time from the first-level cache */
    PARALLEL_SEGMENTS = 512 /* more are computed by several threads: a segment takes half a microsecond to two */
};

/* Part of a row: the largest value (NaN if there is a NaN) and Σ e^(value - largest). */
typedef struct {
    float largest, total;
} segment;

/* Eight values; past the end, -INFINITY, which adds nothing. */
static inline __m256 eight(const float *x, int64_t at, int64_t count) {
    if (at + LANES <= count) return _mm256_loadu_ps(x + at);
    float filled[LANES];
    for (int64_t i = 0; i < LANES; i++) filled[i] = at + i < count ? x[at + i] : -INFINITY;
    return _mm256_loadu_ps(filled);
}

static segment summarize_segment(const float *x, int64_t count, int totals) {
    __m256 most = _mm256_set1_ps(-INFINITY), unordered = _mm256_setzero_ps(), total = _mm256_setzero_ps();
    for (int64_t at = 0; at < count; at += LANES) {
        __m256 v = eight(x, at, count);
        unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        most = _mm256_max_ps(v, most);
    }
    segment found = {hmax8(most), 0};
    if (_mm256_movemask_ps(unordered)) found.largest = NAN;
    if (!totals || !(fabsf(found.largest) <= FLT_MAX)) return found;
    __m256 largest = _mm256_set1_ps(found.largest);
    for (int64_t at = 0; at < count; at += LANES)
        total = _mm256_add_ps(total, exp8(_mm256_sub_ps(eight(x, at, count), largest)));
    found.total = hsum8(total);
    return found;
}

/* ids (rows,): the first argmax of each row of logits (rows, count). largest (rows,): the value there, NaN if the row has
 * one. logs (rows,) or NULL: log Σ e^value. Segments and the order of sums depend on `count` alone. Returns 0; -1 if out of
 * memory. */
int bitdial_summarize(const float *logits, int64_t rows, int64_t count, int64_t *ids, float *largest, float *logs,
                      int threads) {
    int64_t per_row = (count + SEGMENT - 1) / SEGMENT;
    segment *segments = malloc(sizeof(segment) * rows * per_row);
    if (!segments) return -1;
#pragma omp parallel for num_threads(threads) if (rows * per_row > PARALLEL_SEGMENTS)
    for (int64_t i = 0; i < rows * per_row; i++) {
        int64_t start = i % per_row * SEGMENT, left = count - start;
        const float *from = logits + i / per_row * count + start;
        segments[i] = summarize_segment(from, left < SEGMENT ? left : SEGMENT, logs != NULL);
    }
    for (int64_t row = 0; row < rows; row++) {
        const segment *of = segments + row * per_row;
        const float *x = logits + row * count;
        int64_t best = 0, id = 0;
        for (int64_t i = 0; i < per_row && !isnan(of[best].largest); i++)
            if (of[i].largest > of[best].largest || isnan(of[i].largest)) best = i;
        largest[row] = of[best].largest;
        for (id = best * SEGMENT; id < count - 1 && x[id] != largest[row];) id++;
        ids[row] = isnan(largest[row]) ? 0 : id;
        if (!logs) continue;
        double total = 0;
        for (int64_t i = 0; i < per_row; i++)
            if (of[i].total > 0) total += of[i].total * exp((double)of[i].largest - largest[row]);
        logs[row] = (float)(largest[row] + log(total));
    }
    free(segments);
    return 0;
}
