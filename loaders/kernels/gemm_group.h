/* Products of the same rows with several matrices (query, key and value; gate and up), computed in one phase. */
#pragma once
#include "gemm.h"

enum { GROUP_SIZE = 3 };

typedef struct {
    gemm parts[GROUP_SIZE];
    int count;
} gemm_group;

/* Whether both matrices read the same packed activations; static factors are the same if they are shared. */
static inline int packs_alike(const matrix *a, const matrix *b) {
    return a->format == b->format && a->inputs == b->inputs && a->input_factors == b->input_factors;
}

/* Allocates the products of x (rows, inputs) with `count` matrices; the caller sets each y. */
static void allocate_group(gemm_group *g, const matrix *const *matrices, int count, int64_t rows, const float *x,
                           int threads, workspace *from) {
    g->count = count;
    for (int i = 0; i < count; i++) {
        gemm *part = &g->parts[i];
        *part = (gemm){.x = x};
        allocate_gemm(part, matrices[i], rows, threads, from);
        if (i && packs_alike(matrices[i], matrices[0])) part->packed = g->parts[0].packed;
    }
}

/* A chunk is a row; matrices that read the same packed activations share them. */
static void pack_group(gemm_group *g, int64_t row, const worker *by) {
    for (int i = 0; i < g->count; i++)
        if (!i || g->parts[i].packed.data != g->parts[0].packed.data) pack(&g->parts[i], row, by);
}

/* A chunk is one of the first product, then of the second … */
static void multiply_group(void *job, int64_t chunk, const worker *by) {
    gemm_group *g = job;
    int i = 0;
    while (chunk >= gemm_chunks(&g->parts[i])) chunk -= gemm_chunks(&g->parts[i++]);
    multiply(&g->parts[i], chunk, by);
}

static inline int64_t group_chunks(const gemm_group *g) {
    int64_t chunks = 0;
    for (int i = 0; i < g->count; i++) chunks += gemm_chunks(&g->parts[i]);
    return chunks;
}
