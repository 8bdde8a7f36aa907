/* A matrix product by itself, for the linear layers of any architecture, on x86-64 CPUs with AVX2, FMA and F16C. */
#include <omp.h>
#include <string.h>

#include "product.h"

enum { FEW_VALUES = 16384 }; /* as many are prepared by one thread sooner than by several that wait for each other */

/* y (rows, outputs) = x (rows, inputs) · Wᵀ + bias (+ residual, which may be y itself). 0, or -1: out of memory. */
int bitdial_linear(const matrix *m, const float *x, int64_t rows, const float *residual, float *y, int threads) {
    workspace space = {0};
    product p = {.x = x, .residual = residual, .y = y};
    lay_out_product(&p, m, rows, threads, &space);
    int64_t tallies = sizeof(tally) * tallies_of(2, threads);
    take(&space, tallies);
    if (!claim(&space)) return -1;
    lay_out_product(&p, m, rows, threads, &space);
    tally *first = memset(take(&space, tallies), 0, tallies);
    int few = rows * m->inputs <= FEW_VALUES;
    for (int64_t row = 0; few && row < rows; row++) prepare(&p, row, NULL);
#pragma omp parallel num_threads(threads)
    {
        worker me = {first, omp_get_thread_num(), threads};
        if (!few) share(&me, rows, prepare, &p);
        share(&me, chunks_of(&p), multiply, &p);
    }
    free(space.memory);
    return 0;
}

/* How many inputs a row of that format must be a multiple of. */
int64_t bitdial_multiple(int64_t format) {
    if (format == INT8) return INT8_STEP;
    if (computes_in(format) == FLOAT32) return format == FOUR_BIT ? 32 : WIDE;
    return format == FOUR_BIT ? 64 : 32;
}

int64_t bitdial_computes_in(int64_t format) { return computes_in(format); }
