/* y = x · Wᵀ for a few rows x, in two phases of a thread team: rows are packed, then groups of outputs computed.
 *
 * Why not the BLAS in torch: a decode step multiplies 1 … 16 rows with each weight matrix, so it is bound by memory
 * bandwidth. Here the weights are read once, in address order and in their storage format, and dequantized in the
 * first-level cache. The order of every sum depends on its own row alone: the result of a sequence is the same, bit for
 * bit, alone and in any batch, in one prompt chunk or in ten.
 */
#pragma once
#include "int4.h"
#include "static_int8.h"
#include "thread_team.h"
#include "workspace.h"

enum {
    BLOCK_ROWS = 48,  /* rows multiplied with a group of outputs before the next: they stay in the second-level cache */
    CHUNK_GROUPS = 16 /* groups of CHANNELS outputs per chunk */
};

typedef struct {
    const matrix *m;
    const float *x;        /* (rows, inputs) */
    int64_t rows;
    const float *residual; /* (rows, outputs) or NULL; may be y itself */
    float *y;              /* (rows, outputs) */
    enum format type;      /* of the computation */
    packed_activations packed;
    char *scratch;         /* per thread: CHANNELS dequantized rows of weights */
} gemm;

static void allocate_gemm(gemm *g, const matrix *m, int64_t rows, int threads, workspace *from) {
    g->m = m;
    g->rows = rows;
    g->type = computes_in(m->format);
    g->packed.stride = packed_stride(m);
    g->packed.data = allocate(from, rows * g->packed.stride);
    g->scratch = allocate(from, threads * CHANNELS * g->packed.stride);
}

/* Phase 1; a chunk is a row. */
static void pack(void *job, int64_t row, const worker *by) {
    gemm *g = job;
    (void)by;
    pack_row(&g->packed, g->m, g->x, row);
}

/* Calls a microkernel with the number of rows as a constant. */
#define SWITCH_ROWS(most, count, call) \
    switch (count) { \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 3: call(3); break; \
    case 4: if (most > 3) call(4); break; \
    case 5: if (most > 4) call(5); break; \
    case 6: if (most > 5) call(6); break; \
    }

/* A function per type: in a common one the compiler optimizes for the other types. */
#define VARIANT static __attribute__((noinline)) void

VARIANT run_int8(const tile *t, int64_t row, int64_t rows) {
#define INT8_TILE(n) int8_microkernel(t, row, n)
    SWITCH_ROWS(INT8_ROWS, rows, INT8_TILE)
}

VARIANT run_static_int8(const tile *t, int64_t row, int64_t rows) {
#define STATIC_INT8_TILE(n) static_int8_microkernel(t, row, n)
    SWITCH_ROWS(ROWS, rows, STATIC_INT8_TILE)
}

VARIANT run_int4(const tile *t, int64_t row, int64_t rows) {
#define INT4_TILE(n) int4_microkernel(t, row, n)
    SWITCH_ROWS(INT8_ROWS, rows, INT4_TILE)
}

VARIANT run_float(const tile *t, int64_t row, int64_t rows) {
#define FLOAT_TILE(n) float_microkernel(t, row, n)
    SWITCH_ROWS(ROWS, rows, FLOAT_TILE)
}

#ifdef __AVX512BF16__
VARIANT run_bfloat16(const tile *t, int64_t row, int64_t rows) {
#define BFLOAT16_TILE(n) bfloat16_microkernel(t, row, n)
    SWITCH_ROWS(ROWS, rows, BFLOAT16_TILE)
}
#endif

static void run_microkernel(const tile *t, enum format type, int64_t row, int64_t rows) {
    if (type == INT8) run_int8(t, row, rows);
    else if (type == STATIC_INT8) run_static_int8(t, row, rows);
    else if (type == INT4) run_int4(t, row, rows);
#ifdef __AVX512BF16__
    else if (type == BFLOAT16) run_bfloat16(t, row, rows);
#endif
    else run_float(t, row, rows);
}

/* Computes a single row if the format has a gemv; returns whether it has. */
static int gemv(const tile *t, int64_t row) {
    switch (t->m->format) {
    case FLOAT32: gemv_float(t, row); return 1;
    case INT8: gemv_int8(t, row); return 1;
    case STATIC_INT8: gemv_static_int8(t, row); return 1;
    case INT4: gemv_int4(t, row); return 1;
#ifdef __AVX512BF16__
    case BFLOAT16: gemv_bfloat16(t, row); return 1;
    case FOUR_BIT: gemv_four_bit(t, row); return 1;
#endif
    default: return 0;
    }
}

static const char *weight_row(const matrix *m, enum format type, int64_t output, char *scratch) {
    if ((int64_t)type == m->format) return row_of(m, output);
#ifdef __AVX512BF16__
    if (type == BFLOAT16) return (const char *)dequantized_bfloat16(m, output, (uint16_t *)scratch);
#endif
    return (const char *)dequantized(m, output, (float *)scratch);
}

/* Rows `row` … `end` - 1 of one group of outputs, in tiles; each tile prefetches its part of the next group's weights. */
static void compute_rows(tile *t, enum format type, int64_t row, int64_t end) {
    int64_t most = type == INT8 || type == INT4 ? INT8_ROWS : ROWS, tiles = (end - row + most - 1) / most;
    int64_t lines = CHANNELS * PREFETCH_INTERVAL * bits_per_weight(t->m) / 512; /* of a whole group, per interval */
    t->next_lines = (lines + tiles - 1) / tiles;
    t->next = row_of(t->m, t->output + CHANNELS);
    for (; tiles; tiles--) {
        int64_t rows = (end - row + tiles - 1) / tiles;
        run_microkernel(t, type, row, rows);
        row += rows;
        t->next += t->next_lines * t->m->inputs;
    }
}

static void compute_group(tile *t, enum format type, int64_t row, int64_t end, char *scratch) {
    t->bias = _mm_setzero_ps();
    for (int c = 0; c < CHANNELS; c++) {
        t->w[c] = c < t->channels ? row_of(t->m, t->output + c) : t->w[0];
        if (c < t->channels && t->m->bias) t->bias[c] = bias_of(t->m, t->output + c);
    }
    if (end - row == 1 && gemv(t, row)) return;
    for (int c = 0; c < CHANNELS; c++)
        t->w[c] = c < t->channels ? weight_row(t->m, type, t->output + c, scratch + c * t->x->stride) : t->w[0];
    compute_rows(t, type, row, end);
}

static inline int64_t output_chunks(const gemm *g) {
    return (g->m->outputs + CHANNELS * CHUNK_GROUPS - 1) / (CHANNELS * CHUNK_GROUPS);
}

/* Phase 2; a chunk is CHUNK_GROUPS groups of outputs of BLOCK_ROWS rows, ordered by rows, then outputs. */
static void multiply(void *job, int64_t chunk, const worker *by) {
    const gemm *g = job;
    int64_t row = chunk / output_chunks(g) * BLOCK_ROWS, end = row + BLOCK_ROWS;
    int64_t output = chunk % output_chunks(g) * CHANNELS * CHUNK_GROUPS, last = output + CHANNELS * CHUNK_GROUPS;
    char *scratch = g->scratch + by->thread * CHANNELS * g->packed.stride;
    for (; output < last && output < g->m->outputs; output += CHANNELS) {
        int64_t left = g->m->outputs - output;
        tile t = {.m = g->m, .x = &g->packed, .residual = g->residual, .y = g->y, .output = output,
                  .channels = left < CHANNELS ? (int)left : CHANNELS};
        compute_group(&t, g->type, row, end < g->rows ? end : g->rows, scratch);
    }
}

static inline int64_t gemm_chunks(const gemm *g) {
    return (g->rows + BLOCK_ROWS - 1) / BLOCK_ROWS * output_chunks(g);
}
