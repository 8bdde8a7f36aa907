/* What a sampler needs of rows of logits: where each is largest, and the logarithm of the sum of their exponentials. */
#include <float.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "vector.h"

enum {
    STRETCH = 4096, /* floats taken together; it is read twice, the second time out of the nearest cache */
    MANY = 512      /* stretches that are worth waking other threads for: one takes half a microsecond to two */
};

/* A stretch of a row: its largest value (NaN if there is any) and Σ e^(value - largest). */
typedef struct {
    float largest, total;
} part;

/* A tail shorter than a register is filled up with what adds nothing. */
static inline __m256 eight(const float *x, int64_t at, int64_t count) {
    if (at + LANES <= count) return _mm256_loadu_ps(x + at);
    float filled[LANES];
    for (int64_t i = 0; i < LANES; i++) filled[i] = at + i < count ? x[at + i] : -INFINITY;
    return _mm256_loadu_ps(filled);
}

static part summed_up(const float *x, int64_t count, int totals) {
    __m256 most = _mm256_set1_ps(-INFINITY), unordered = _mm256_setzero_ps(), total = _mm256_setzero_ps();
    for (int64_t at = 0; at < count; at += LANES) {
        __m256 v = eight(x, at, count);
        unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        most = _mm256_max_ps(v, most);
    }
    part found = {largest8(most), 0};
    if (_mm256_movemask_ps(unordered)) found.largest = NAN;
    if (!totals || !(fabsf(found.largest) <= FLT_MAX)) return found;
    __m256 largest = _mm256_set1_ps(found.largest);
    for (int64_t at = 0; at < count; at += LANES)
        total = _mm256_add_ps(total, exp8(_mm256_sub_ps(eight(x, at, count), largest)));
    found.total = sum8(total);
    return found;
}

/* ids (rows,): where each row of logits (rows, count) is largest, the first place if there are several; largest (rows,):
 * the value there, NaN if the row holds one. logs (rows,), unless it is NULL: log Σ e^value. A row's stretches and the
 * order of its sums depend on `count` alone. 0, or -1: out of memory. */
int bitdial_summarize(const float *logits, int64_t rows, int64_t count, int64_t *ids, float *largest, float *logs,
                      int threads) {
    int64_t stretches = (count + STRETCH - 1) / STRETCH;
    part *parts = malloc(sizeof(part) * rows * stretches);
    if (!parts) return -1;
#pragma omp parallel for num_threads(threads) if (rows * stretches > MANY)
    for (int64_t i = 0; i < rows * stretches; i++) {
        int64_t start = i % stretches * STRETCH, left = count - start;
        parts[i] = summed_up(logits + i / stretches * count + start, left < STRETCH ? left : STRETCH, logs != NULL);
    }
    for (int64_t row = 0; row < rows; row++) {
        const part *of = parts + row * stretches;
        const float *x = logits + row * count;
        int64_t best = 0, id = 0;
        for (int64_t i = 0; i < stretches && !isnan(of[best].largest); i++)
            if (of[i].largest > of[best].largest || isnan(of[i].largest)) best = i;
        largest[row] = of[best].largest;
        for (id = best * STRETCH; id < count - 1 && x[id] != largest[row];) id++;
        ids[row] = isnan(largest[row]) ? 0 : id;
        if (!logs) continue;
        double total = 0;
        for (int64_t i = 0; i < stretches; i++)
            if (of[i].total > 0) total += of[i].total * exp((double)of[i].largest - largest[row]);
        logs[row] = (float)(largest[row] + log(total));
    }
    free(parts);
    return 0;
}
