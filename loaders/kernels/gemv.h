/* The product of a single row: weights are read once, straight into registers, output by output in address order. Sums
 * have the order of the microkernels, so the result of a row is the same bit for bit alone and in a batch. */
#pragma once
#include "microkernel.h"

enum { PREFETCH_DISTANCE = 4096 }; /* bytes; covers the latency of memory */

static inline __attribute__((always_inline)) void prefetch_ahead(const void *at) {
    prefetch((const char *)at + PREFETCH_DISTANCE);
}

static void gemv_float(const tile *t, int64_t row) {
    const float *x = (const float *)x_row(t, row);
    floats sums[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) {
        const float *w = (const float *)t->w[c];
        floats sum = broadcast(0);
        for (int64_t k = 0; k < t->m->inputs; k += SIMD_WIDTH) {
            prefetch_ahead(w + k);
            sum = fmadd(load(x + k), load(w + k), sum);
        }
        sums[c] = sum;
    }
    store_sums(t, row, hsum4(sums));
}

#ifdef __AVX512BF16__
static inline floats dot_bfloat16(floats sum, const uint16_t *x, __m512i w) {
    __m512bh left, right;
    memcpy(&left, x, sizeof left);
    memcpy(&right, &w, sizeof right);
    return _mm512_dpbf16_ps(sum, left, right);
}

static void gemv_bfloat16(const tile *t, int64_t row) {
    const uint16_t *x = (const uint16_t *)x_row(t, row);
    floats sums[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) {
        const uint16_t *w = (const uint16_t *)t->w[c];
        floats sum = broadcast(0);
        for (int64_t k = 0; k < t->m->inputs; k += 32) {
            prefetch_ahead(w + k);
            sum = dot_bfloat16(sum, x + k, _mm512_loadu_si512(w + k));
        }
        sums[c] = sum;
    }
    store_sums(t, row, hsum4(sums));
}

static void gemv_four_bit(const tile *t, int64_t row) {
    const uint16_t *x = (const uint16_t *)x_row(t, row);
    floats sums[CHANNELS], table = load(t->m->table);
    for (int c = 0; c < CHANNELS; c++) {
        int64_t output = t->output + (c < t->channels ? c : 0);
        const uint8_t *w = (const uint8_t *)row_of(t->m, output);
        floats sum = broadcast(0);
        for (int64_t k = 0; k < t->m->inputs; k += INTERLEAVE) {
            __m512i values[4];
            prefetch_ahead(w + k / 2);
            dequantize_interleaved(t->m, w, output, k, table, values);
            for (int i = 0; i < 4; i++) sum = dot_bfloat16(sum, x + k + 32 * i, values[i]);
        }
        sums[c] = sum;
    }
    store_sums(t, row, hsum4(sums));
}
#endif
