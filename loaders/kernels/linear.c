/* A single matrix product, for the linear layers of any architecture, on x86-64 CPUs with AVX2, FMA and F16C. */
#include <omp.h>
#include <string.h>

#include "gemm.h"

enum { FEW_VALUES = 16384 }; /* packed by one thread: faster than several that wait for each other */

/* Compared by Python with its own structure when the library is loaded. */
const int64_t bitdial_sizeof_matrix = sizeof(matrix);

/* y (rows, outputs) = x (rows, inputs) · Wᵀ + bias (+ residual, which may be y itself).
 * Returns 0; -1 if out of memory; PHASES_MISCOUNTED. */
int bitdial_linear(const matrix *m, const float *x, int64_t rows, const float *residual, float *y, int threads) {
    workspace space = {0};
    gemm g = {.x = x, .residual = residual, .y = y};
    int few = rows * m->inputs <= FEW_VALUES, status = 0;
    int64_t phases = few ? 1 : 2, counters = sizeof(counter) * counter_count(phases, threads);
    allocate_gemm(&g, m, rows, threads, &space);
    allocate(&space, counters);
    if (!reserve(&space)) return -1;
    allocate_gemm(&g, m, rows, threads, &space);
    counter *first = memset(allocate(&space, counters), 0, counters);
    for (int64_t row = 0; few && row < rows; row++) pack(&g, row, NULL);
#pragma omp parallel num_threads(threads) reduction(min : status)
    {
        worker me = start_worker(first, phases, omp_get_thread_num(), threads);
        if (!few) parallel_for(&me, rows, pack, &g);
        parallel_for(&me, gemm_chunks(&g), multiply, &g);
        if (!phases_match(&me)) status = PHASES_MISCOUNTED;
    }
    free(space.memory);
    return status;
}

/* The number that the inputs of a row must be a multiple of. */
int64_t bitdial_multiple(int64_t format) {
    if (format == INT8 || format == STATIC_INT8 || format == INT4) return INT8_STEP;
    if (computes_in(format) == FLOAT32) return format == FOUR_BIT ? 32 : SIMD_WIDTH;
    return format == FOUR_BIT ? 64 : 32;
}

/* What packed activations in static int8 are above their codes. */
int64_t bitdial_static_zero_point(void) { return STATIC_ZERO_POINT; }

int64_t bitdial_computes_in(int64_t format) { return computes_in(format); }
