/* y = x · Wᵀ for a few rows x, as phases for a crew: rows are prepared, then groups of outputs computed.
 *
 * Why not the BLAS in torch: a decode step multiplies 1 … 16 rows with each weight matrix, so it is bound by how fast
 * weights stream from memory. Here they are read once, row by row as they lie, in whatever format they are kept, and
 * widened in the first-level cache. Every output is one sum in one order that depends on nothing but its own row: a
 * sequence's result is the same, bit for bit, alone and in any batch, in one prompt chunk or in ten.
 */
#pragma once
#include "crew.h"
#include "stream.h"
#include "workspace.h"

enum {
    BLOCK_ROWS = 48,  /* rows that meet a group of outputs before the next group: they stay in the second-level cache */
    CHUNK_GROUPS = 16 /* groups of CHANNELS outputs that a thread takes at a time */
};

typedef struct {
    const matrix *m;
    const float *x;        /* (rows, inputs) */
    int64_t rows;
    const float *residual; /* (rows, outputs) or NULL; may be y itself */
    float *y;              /* (rows, outputs) */
    enum format type;      /* that it is computed in */
    operand prepared;
    char *scratch;         /* for each thread, CHANNELS rows of weights in that type */
} product;

static void lay_out_product(product *p, const matrix *m, int64_t rows, int threads, workspace *from) {
    p->m = m;
    p->rows = rows;
    p->type = computes_in(m->format);
    p->prepared.stride = operand_stride(m);
    p->prepared.data = take(from, rows * p->prepared.stride);
    p->prepared.ranges = take(from, rows * sizeof(float));
    p->scratch = take(from, threads * CHANNELS * p->prepared.stride);
}

/* Phase 1: a chunk is a row. */
static void prepare(void *job, int64_t row, const worker *by) {
    product *p = job;
    (void)by;
    prepare_row(&p->prepared, p->m, p->x, row);
}

/* One tile of `count` rows, a constant in each call. */
#define WITH_CONSTANT(count, call) \
    switch (count) { \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 3: call(3); break; \
    case 4: if (ROWS > 3) call(4); break; \
    case 5: if (ROWS > 3) call(5); break; \
    case 6: if (ROWS > 3) call(6); break; \
    }

/* A function for each kind of tile: in a common one the compiler spends its care on the others. */
#define KIND static __attribute__((noinline)) void

KIND compute_int8(const tile *t, int64_t row, int64_t rows, __m128i excess) {
#define INT8_TILE(n) int8_tile(t, row, n, excess)
    WITH_CONSTANT(rows, INT8_TILE)
}

KIND compute_float(const tile *t, int64_t row, int64_t rows) {
#define FLOAT_TILE(n) float_tile(t, row, n)
    WITH_CONSTANT(rows, FLOAT_TILE)
}

#ifdef __AVX512BF16__
KIND compute_bfloat16(const tile *t, int64_t row, int64_t rows) {
#define BFLOAT16_TILE(n) bfloat16_tile(t, row, n)
    WITH_CONSTANT(rows, BFLOAT16_TILE)
}
#endif

static void compute_tile(const tile *t, enum format type, int64_t row, int64_t rows, __m128i excess) {
    if (type == INT8) compute_int8(t, row, rows, excess);
#ifdef __AVX512BF16__
    else if (type == BFLOAT16) compute_bfloat16(t, row, rows);
#endif
    else compute_float(t, row, rows);
}

/* Whether there is a way for a single row to read weights of that format; done, if so. */
static int stream(const tile *t, int64_t row) {
    switch (t->m->format) {
    case FLOAT32: stream_float(t, row); return 1;
    case INT8: stream_int8(t, row); return 1;
#ifdef __AVX512BF16__
    case BFLOAT16: stream_bfloat16(t, row); return 1;
    case FOUR_BIT: stream_four_bit(t, row); return 1;
#endif
    default: return 0;
    }
}

static const char *weights_for(const matrix *m, enum format type, int64_t output, char *scratch) {
    if ((int64_t)type == m->format) return row_of(m, output);
#ifdef __AVX512BF16__
    if (type == BFLOAT16) return (const char *)rounded_four_bit(m, output, (uint16_t *)scratch);
#endif
    return (const char *)widened(m, output, (float *)scratch);
}

/* Rows `row` … `end` - 1 with the outputs of one group, in tiles; each fetches its share of the next group's weights. */
static void compute_rows(tile *t, enum format type, int64_t row, int64_t end) {
    __m128i excess = type == INT8 ? surplus(t) : _mm_setzero_si128();
    int64_t tiles = (end - row + ROWS - 1) / ROWS;
    int64_t lines = CHANNELS * STRETCH * bits_per_weight(t->m) / 512; /* of a whole group, for each stretch of a tile */
    t->next_lines = (lines + tiles - 1) / tiles;
    t->next = row_of(t->m, t->output + CHANNELS);
    for (; tiles; tiles--) {
        int64_t rows = (end - row + tiles - 1) / tiles;
        compute_tile(t, type, row, rows, excess);
        row += rows;
        t->next += t->next_lines * t->m->inputs;
    }
}

static void compute_group(tile *t, enum format type, int64_t row, int64_t end, char *scratch) {
    t->bias = t->scale = _mm_setzero_ps();
    for (int c = 0; c < CHANNELS; c++) {
        t->w[c] = c < t->channels ? row_of(t->m, t->output + c) : t->w[0];
        if (c < t->channels && t->m->bias) t->bias[c] = bias_of(t->m, t->output + c);
        if (c < t->channels && type == INT8) t->scale[c] = t->m->scales[t->output + c];
    }
    if (end - row == 1 && stream(t, row)) return;
    for (int c = 0; c < CHANNELS; c++)
        t->w[c] = c < t->channels ? weights_for(t->m, type, t->output + c, scratch + c * t->x->stride) : t->w[0];
    compute_rows(t, type, row, end);
}

static inline int64_t chunks_of_outputs(const product *p) {
    return (p->m->outputs + CHANNELS * CHUNK_GROUPS - 1) / (CHANNELS * CHUNK_GROUPS);
}

/* Phase 2: a chunk is CHUNK_GROUPS groups of outputs for BLOCK_ROWS rows; all groups for the first rows come first. */
static void multiply(void *job, int64_t chunk, const worker *by) {
    const product *p = job;
    int64_t row = chunk / chunks_of_outputs(p) * BLOCK_ROWS, end = row + BLOCK_ROWS;
    int64_t output = chunk % chunks_of_outputs(p) * CHANNELS * CHUNK_GROUPS, last = output + CHANNELS * CHUNK_GROUPS;
    char *scratch = p->scratch + by->thread * CHANNELS * p->prepared.stride;
    for (; output < last && output < p->m->outputs; output += CHANNELS) {
        int64_t left = p->m->outputs - output;
        tile t = {.m = p->m, .x = &p->prepared, .residual = p->residual, .y = p->y, .output = output,
                  .channels = left < CHANNELS ? (int)left : CHANNELS};
        compute_group(&t, p->type, row, end < p->rows ? end : p->rows, scratch);
    }
}

static inline int64_t chunks_of(const product *p) {
    return (p->rows + BLOCK_ROWS - 1) / BLOCK_ROWS * chunks_of_outputs(p);
}
