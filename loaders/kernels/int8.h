/* Products of int8 rows (int8_rows.h) and int8 weights, a few rows × CHANNELS outputs. Per lane and group of steps the sum
 * is an exact int32; times the scale of the activations it is added in float32. Weights have a scale per output, or per
 * output and lane; it multiplies the sums once, after all inputs. */
#pragma once
#include "gemv.h"

/* HALVES: parts of a step; PASS_CHANNELS: outputs at a time; INT8_ROWS: rows of a tile. */
#ifdef __AVX512BW__
/* Of 32 registers a pass of INT8_ROWS × 2 outputs takes 12 for sums and 8 for a group of weights. */
enum { HALVES = 1, PASS_CHANNELS = 2, INT8_ROWS = ROWS };

/* Weights have zero point 128: the instruction multiplies unsigned by signed. */
static inline integers load_weights(const char *at) {
    return _mm512_xor_si512(_mm512_loadu_si512(at), _mm512_set1_epi8(-128));
}


/* One load for all channels of a pass: left to itself, gcc makes the load an operand of each product, and loads limit. */
static inline integers load_once(const char *at) {
    integers found = _mm512_loadu_si512(at);
    __asm__("" : "+v"(found));
    return found;
}

/* sums += x · w over groups of four. */
static inline integers dot_int8(integers sums, integers x, integers w) { return _mm512_dpbusd_epi32(sums, w, x); }
#else
/* A register has half a step: the halves are computed one after the other. Of 16 registers a pass of INT8_ROWS × 1
 * output takes 8 for a group of weights and their magnitudes. The sums of six rows don't fit beside them; but that costs
 * less than preparing the weights once for each three rows. */
enum { HALVES = 2, PASS_CHANNELS = 1, INT8_ROWS = 6 };

static inline integers load_weights(const char *at) { return _mm256_loadu_si256((const void *)at); }
static inline integers load_once(const char *at) { return _mm256_loadu_si256((const void *)at); }

/* sums += x · w over groups of four: |w| · (x with w's sign), in pairs that can't overflow 16 bits (2 · 127 · 127 < 2¹⁵). */
static inline integers dot_int8(integers sums, integers x, integers w) {
    __m256i signs = _mm256_sign_epi8(x, w);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), signs);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

enum {
    PASSES = HALVES * CHANNELS / PASS_CHANNELS,
    HALF_STEP = INT8_STEP / HALVES,
    HALF_LANES = INT8_LANES / HALVES,
    SCALES_AHEAD = 1024, /* bytes */
    BLOCK_INPUTS = 3 * GROUP_STEPS * INT8_STEP /* of all passes before the next: rows stay in the first-level cache */
};

/* A group of steps, in one half of the lanes: sums[r][c] += scale of x · Σ x · w. */
MICROKERNEL add_int8_group(const char *x, int64_t stride, int half, const char *const *w, int rows, int channels,
                           int steps, floats (*sums)[PASS_CHANNELS]) {
    integers weights[PASS_CHANNELS][GROUP_STEPS];
    for (int c = 0; c < channels; c++)
        for (int i = 0; i < steps; i++) weights[c][i] = load_weights(w[c] + i * INT8_STEP + half * HALF_STEP);
    for (int r = 0; r < rows; r++, x += stride) {
        integers parts[PASS_CHANNELS];
        for (int c = 0; c < channels; c++) parts[c] = zero_integers();
        for (int i = 0; i < steps; i++) {
            integers values = load_once(x + i * INT8_STEP + half * HALF_STEP);
            for (int c = 0; c < channels; c++) parts[c] = dot_int8(parts[c], values, weights[c][i]);
        }
        floats scale = load((const float *)(x + steps * INT8_STEP) + half * HALF_LANES);
        for (int c = 0; c < channels; c++) sums[r][c] = fmadd(to_floats(parts[c]), scale, sums[r][c]);
    }
}

static inline floats weight_scales(const matrix *m, int64_t output, int half) {
    if (!m->lane_scales) return broadcast(m->scales[output]);
    const uint16_t *at = m->lane_scales + output * INT8_LANES + half * HALF_LANES;
    _mm_prefetch((const char *)at + SCALES_AHEAD, _MM_HINT_T1);
    return load_bfloat16(at);
}

/* What a pass prefetches per group of steps. */
typedef struct {
    int64_t lines;    /* of the next outputs */
    const char *next; /* the first of them, in address order */
} pass_prefetch;

/* The sums of a few rows and `channels` outputs from `first` on, in one half of the lanes, over inputs `k` … `end` - 1,
 * added to those in `totals` over the inputs before. Multiplied by the weights' scales if these are the last inputs.
 * `ahead` is NULL for a gemv, which prefetches its own weights. */
MICROKERNEL int8_pass(const tile *t, int64_t row, int rows, int half, int first, int channels, int64_t k, int64_t end,
                      pass_prefetch *ahead, floats (*totals)[CHANNELS]) {
    floats sums[INT8_ROWS][PASS_CHANNELS];
    const char *w[PASS_CHANNELS], *x = x_row(t, row) + int8_row_bytes(k);
    for (int c = 0; c < channels; c++) w[c] = t->w[first + c] + k;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < channels; c++)
            sums[r][c] = k ? totals[r][first + c] : load((const float *)x_row(t, row + r) + half * HALF_LANES);
    for (; k + GROUP_STEPS * INT8_STEP <= end; k += GROUP_STEPS * INT8_STEP) {
        for (int i = 0; !ahead && i < GROUP_STEPS; i++) prefetch_ahead(w[0] + i * INT8_STEP);
        for (int64_t i = 0; ahead && i < ahead->lines; i++, ahead->next += 64) prefetch(ahead->next);
        add_int8_group(x, t->x->stride, half, w, rows, channels, GROUP_STEPS, sums);
        for (int c = 0; c < channels; c++) w[c] += GROUP_STEPS * INT8_STEP;
        x += GROUP_STEPS * INT8_STEP + LANE_BYTES;
    }
    for (; k < end; k += INT8_STEP, x += INT8_STEP + LANE_BYTES) {
        if (!ahead) prefetch_ahead(w[0]);
        add_int8_group(x, t->x->stride, half, w, rows, channels, 1, sums);
        for (int c = 0; c < channels; c++) w[c] += INT8_STEP;
    }
    for (int c = 0; c < channels; c++) {
        int64_t output = t->output + (first + c < t->channels ? first + c : 0);
        floats scales = end == t->m->inputs ? weight_scales(t->m, output, half) : broadcast(1);
        for (int r = 0; r < rows; r++) totals[r][first + c] = mul(sums[r][c], scales);
    }
}

/* sums[0] += sums[1], if there are two halves. */
MICROKERNEL add_lane_halves(int rows, floats (*sums)[INT8_ROWS][CHANNELS]) {
    for (int r = 0; HALVES > 1 && r < rows; r++)
        for (int c = 0; c < CHANNELS; c++) sums[0][r][c] = add(sums[0][r][c], sums[HALVES - 1][r][c]);
}

MICROKERNEL int8_microkernel(const tile *t, int64_t row, int rows) {
    floats sums[HALVES][INT8_ROWS][CHANNELS];
    pass_prefetch ahead = {.next = t->next};
    int64_t inputs = t->m->inputs, lines = t->next_lines * GROUP_STEPS;
    for (int64_t k = 0, end; k < inputs; k = end) {
        end = inputs - k > BLOCK_INPUTS ? k + BLOCK_INPUTS : inputs;
        for (int pass = 0; pass < PASSES; pass++) {
            int half = pass % HALVES, first = pass / HALVES * PASS_CHANNELS;
            ahead.lines = lines * (pass + 1) / PASSES - lines * pass / PASSES;
            int8_pass(t, row, rows, half, first, PASS_CHANNELS, k, end, &ahead, sums[half]);
        }
    }
    add_lane_halves(rows, sums);
    store_float_sums(t, row, rows, (const floats(*)[CHANNELS])sums[0]);
}

/* A single row: as in gemv.h, output by output. */
static void gemv_int8(const tile *t, int64_t row) {
    floats sums[HALVES][INT8_ROWS][CHANNELS];
    for (int c = 0; c < CHANNELS; c++)
        for (int half = 0; half < HALVES; half++) int8_pass(t, row, 1, half, c, 1, 0, t->m->inputs, NULL, sums[half]);
    add_lane_halves(1, sums);
    store_sums(t, row, hsum4(sums[0][0]));
}
