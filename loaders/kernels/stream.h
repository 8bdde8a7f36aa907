/* The product of a single row: weights are read once, straight into registers, one output after another as they lie.
 * Sums are made in the order of the tiles, so a row's result is the same to the bit alone and among others. */
#pragma once
#include "tiles.h"

enum { AHEAD = 4096 }; /* bytes; by when memory has answered */

static inline __attribute__((always_inline)) void look_ahead(const void *at) { ask_twice((const char *)at + AHEAD); }

static void stream_float(const tile *t, int64_t row) {
    const float *x = (const float *)x_row(t, row);
    floats sums[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) {
        const float *w = (const float *)t->w[c];
        floats sum = all(0);
        for (int64_t k = 0; k < t->m->inputs; k += WIDE) {
            look_ahead(w + k);
            sum = multiply_add(load(x + k), load(w + k), sum);
        }
        sums[c] = sum;
    }
    finish(t, row, sums4(sums));
}

#ifdef __AVX512BF16__
static inline floats dot_bfloat16(floats sum, const uint16_t *x, __m512i w) {
    __m512bh left, right;
    memcpy(&left, x, sizeof left);
    memcpy(&right, &w, sizeof right);
    return _mm512_dpbf16_ps(sum, left, right);
}

static void stream_bfloat16(const tile *t, int64_t row) {
    const uint16_t *x = (const uint16_t *)x_row(t, row);
    floats sums[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) {
        const uint16_t *w = (const uint16_t *)t->w[c];
        floats sum = all(0);
        for (int64_t k = 0; k < t->m->inputs; k += 32) {
            look_ahead(w + k);
            sum = dot_bfloat16(sum, x + k, _mm512_loadu_si512(w + k));
        }
        sums[c] = sum;
    }
    finish(t, row, sums4(sums));
}

static void stream_four_bit(const tile *t, int64_t row) {
    const uint16_t *x = (const uint16_t *)x_row(t, row);
    floats sums[CHANNELS], table = load(t->m->table);
    for (int c = 0; c < CHANNELS; c++) {
        int64_t output = t->output + (c < t->channels ? c : 0);
        const uint8_t *w = (const uint8_t *)row_of(t->m, output);
        floats sum = all(0);
        for (int64_t k = 0; k < t->m->inputs; k += SPREAD) {
            __m512i values[4];
            look_ahead(w + k / 2);
            spread_four_bit(t->m, w, output, k, table, values);
            for (int i = 0; i < 4; i++) sum = dot_bfloat16(sum, x + k + 32 * i, values[i]);
        }
        sums[c] = sum;
    }
    finish(t, row, sums4(sums));
}
#endif

static void stream_int8(const tile *t, int64_t row) {
    const char *x = x_row(t, row);
    integers sums[CHANNELS], excess[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) {
        integers sum = no_integers(), over = no_integers();
        for (int64_t k = 0; k < t->m->inputs; k += INT8_STEP) {
            integers w = load_int8(t->w[c] + k);
            if (INT8_STEP == 64 || k % 64 == 0) look_ahead(t->w[c] + k);
            sum = dot_int8(sum, load_int8(x + k), w);
            over = add_surplus(over, w);
        }
        sums[c] = sum;
        excess[c] = over;
    }
    finish_int8(t, row, _mm_sub_epi32(sums4i(sums), sums4i(excess)));
}
