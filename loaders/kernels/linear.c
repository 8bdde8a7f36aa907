/* Matrix products of a decode step on x86-64 CPUs with AVX2, FMA and F16C, or AVX-512.
 *
 * Why not the BLAS in torch: a decode step multiplies 1 … 16 rows with each weight matrix, so it is bound by how fast
 * weights stream from memory. Here they are read once, row by row as they lie, in whatever format they are kept, and
 * widened in the first-level cache. Every output is one sum in one order that depends on nothing but its own row: a
 * sequence's result is the same, bit for bit, alone and in any batch, in one prompt chunk or in ten.
 *
 * Threads are those of the OpenMP runtime that torch has loaded: the library is linked without one of its own, because
 * two pools would fight for the cores.
 */
#include <stdlib.h>

#include "tiles.h"

enum {
    BLOCK_ROWS = 48,    /* rows that meet a group of outputs before the next group: they stay in the second-level cache */
    FEW_VALUES = 16384, /* as many are prepared by one thread sooner than by several that must wait for each other */
};

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

static void compute_tile(const tile *t, enum format type, int64_t row, int64_t rows, __m128i excess) {
#define FLOAT_TILE(n) float_tile(t, row, n)
#define INT8_TILE(n) int8_tile(t, row, n, excess)
#define BFLOAT16_TILE(n) bfloat16_tile(t, row, n)
    if (type == INT8) WITH_CONSTANT(rows, INT8_TILE)
#ifdef __AVX512BF16__
    else if (type == BFLOAT16) WITH_CONSTANT(rows, BFLOAT16_TILE)
#endif
    else WITH_CONSTANT(rows, FLOAT_TILE)
}

static const char *weights_for(const matrix *m, enum format type, int64_t output, char *scratch) {
    if ((int64_t)type == m->format) return row_of(m, output);
#ifdef __AVX512BF16__
    if (type == BFLOAT16) return (const char *)rounded_four_bit(m, output, (uint16_t *)scratch);
#endif
    return (const char *)widened(m, output, (float *)scratch);
}

/* All rows from `row` up to `end` with the outputs of one group. */
static void compute_group(tile *t, enum format type, int64_t row, int64_t end, char *scratch) {
    for (int c = 0; c < CHANNELS; c++)
        t->w[c] = c && c >= t->channels ? t->w[0]
                                        : weights_for(t->m, type, t->output + c, scratch + c * t->x->stride);
    __m128i excess = type == INT8 ? surplus(t) : _mm_setzero_si128();
    t->next_stride = row_bytes(t->m);
    t->next_bits = bits_per_weight(t->m);
    int fetched = 0; /* each tile fetches its share of the next group's weights */
    for (int64_t tiles = (end - row + ROWS - 1) / ROWS; tiles; tiles--) {
        int64_t rows = (end - row + tiles - 1) / tiles;
        t->next = row_of(t->m, t->output + CHANNELS + fetched);
        t->next_rows = (CHANNELS - fetched + tiles - 1) / tiles;
        fetched += t->next_rows;
        compute_tile(t, type, row, rows, excess);
        row += rows;
    }
}

/* y (rows, outputs) = x (rows, inputs) · Wᵀ + bias (+ residual, which may be y itself). 0, or -1: out of memory. */
int bitdial_linear(const matrix *m, const float *x, int64_t rows, const float *residual, float *y, int threads) {
    enum format type = computes_in(m->format);
    int64_t stride = operand_stride(type, m->inputs), groups = (m->outputs + CHANNELS - 1) / CHANNELS;
    operand prepared = {aligned_alloc(64, rows * stride), stride, malloc(rows * sizeof(float))};
    int failed = !prepared.data || !prepared.ranges, few = rows * m->inputs <= FEW_VALUES;
    for (int64_t row = 0; !failed && few && row < rows; row++) prepare_row(&prepared, type, x, row, m->inputs);
    if (!failed) {
#pragma omp parallel num_threads(threads) reduction(| : failed)
        {
            char *scratch = (int64_t)type == m->format ? NULL : aligned_alloc(64, CHANNELS * stride);
            failed = (int64_t)type != m->format && !scratch;
            if (!few) {
#pragma omp for schedule(static)
                for (int64_t row = 0; row < rows; row++) prepare_row(&prepared, type, x, row, m->inputs);
            }
            for (int64_t block = 0; block < rows; block += BLOCK_ROWS) {
                int64_t end = block + BLOCK_ROWS < rows ? block + BLOCK_ROWS : rows;
#pragma omp for schedule(dynamic, 16) nowait
                for (int64_t group = 0; group < groups; group++) {
                    int64_t output = group * CHANNELS, left = m->outputs - output;
                    tile t = {.m = m, .x = &prepared, .residual = residual, .y = y, .output = output,
                              .channels = left < CHANNELS ? (int)left : CHANNELS};
                    if (!failed) compute_group(&t, type, block, end, scratch);
                }
            }
            free(scratch);
        }
    }
    free(prepared.data);
    free(prepared.ranges);
    return failed ? -1 : 0;
}

/* How many inputs a row of that format must be a multiple of. */
int64_t bitdial_multiple(int64_t format) {
    return format == FOUR_BIT ? 32 : format == INT8 ? INT8_STEP : computes_in(format) == BFLOAT16 ? 32 : WIDE;
}

int64_t bitdial_computes_in(int64_t format) { return computes_in(format); }
