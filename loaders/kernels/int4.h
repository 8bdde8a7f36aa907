/* Products of int8 rows (int8_rows.h) and four-bit weights. A weight is a code in a table of 16 int8 values. The 16 weights
 * that are multiplied with a group of activations share a scale, an int8 times a float32 of the output; so per lane and
 * group of steps the sum is an exact int32, as in int8.h. Where a step is a group, four lanes share a scale.
 *
 * Codes of two steps of a group are in the same 64 bytes, those of the first in the lower halves. Of a step that is a
 * group, the lower halves of 32 bytes are its first 32 weights. */
#pragma once
#include "int8.h"

enum { INT4_GROUP = 16 /* weights that share a scale */ };

#ifdef __AVX512BW__
/* Weights have zero point 128, as in int8.h. */
static inline integers int4_table(const matrix *m) {
    __m128i values = _mm_loadu_si128((const void *)m->values);
    return _mm512_broadcast_i32x4(_mm_xor_si128(values, _mm_set1_epi8(-128)));
}

/* The values of the lower halves of bytes. */
static inline integers int4_values(integers bytes, integers table) {
    return _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, _mm512_set1_epi8(15)));
}

static inline integers load_pair(const char *at, int half) {
    (void)half;
    return _mm512_loadu_si512(at);
}

static inline integers load_single(const char *at, int half) {
    __m256i bytes = _mm256_loadu_si256((const void *)at);
    (void)half;
    return _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
}

static inline integers upper_halves(integers bytes) { return _mm512_srli_epi16(bytes, 4); }
static inline floats int8_to_floats(__m128i v) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(v)); }
static inline integers load_starts(const char *at, int half) {
    (void)half;
    return _mm512_loadu_si512(at);
}
#else
static inline integers int4_table(const matrix *m) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)m->values));
}

static inline integers int4_values(integers bytes, integers table) {
    return _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, _mm256_set1_epi8(15)));
}

static inline integers load_pair(const char *at, int half) {
    return _mm256_loadu_si256((const void *)(at + half * HALF_STEP));
}

static inline integers upper_halves(integers bytes) { return _mm256_srli_epi16(bytes, 4); }

static inline integers load_single(const char *at, int half) {
    integers bytes = _mm256_loadu_si256((const void *)at);
    return half ? upper_halves(bytes) : bytes;
}

static inline floats int8_to_floats(__m128i v) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)); }
static inline integers load_starts(const char *at, int half) {
    (void)at, (void)half;
    return zero_integers(); /* the weights have no zero point */
}
#endif

MICROKERNEL unpack_int4(const char *w, int half, int steps, integers table, integers *weights) {
    if (steps == 1) weights[0] = int4_values(load_single(w, half), table);
    for (int i = 0; i + 1 < steps; i += 2) {
        integers bytes = load_pair(w + i * INT8_STEP / 2, half);
        weights[i] = int4_values(bytes, table);
        weights[i + 1] = int4_values(upper_halves(bytes), table);
    }
}

/* The scales of the lanes of one half. */
static inline floats int4_scales(const int8_t *at, int half, int steps) {
    if (steps == GROUP_STEPS) {
        _mm_prefetch((const char *)at + SCALES_AHEAD, _MM_HINT_T1);
        return int8_to_floats(HALVES == 1 ? _mm_loadu_si128((const void *)at)
                                          : _mm_loadl_epi64((const void *)(at + half * HALF_LANES)));
    }
    int32_t four;
    memcpy(&four, at, sizeof four);
    const __m128i each = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    __m128i which = _mm_add_epi8(each, _mm_set1_epi8((char)(2 * half)));
    return int8_to_floats(_mm_shuffle_epi8(_mm_cvtsi32_si128(four), which));
}

/* A group of steps, in one half of the lanes: sums[r][c] += scale of x · scale of w · Σ x · w. */
MICROKERNEL add_int4_group(const char *x, int64_t stride, int half, const char *const *w, const int8_t *const *scales,
                           integers table, int rows, int channels, int steps, floats (*sums)[PASS_CHANNELS]) {
    integers weights[PASS_CHANNELS][GROUP_STEPS];
    floats of_weights[PASS_CHANNELS];
    for (int c = 0; c < channels; c++) {
        unpack_int4(w[c], half, steps, table, weights[c]);
        of_weights[c] = int4_scales(scales[c], half, steps);
    }
    for (int r = 0; r < rows; r++, x += stride) {
        const char *behind = x + steps * INT8_STEP;
        integers parts[PASS_CHANNELS];
        for (int c = 0; c < channels; c++) parts[c] = load_starts(behind + LANE_BYTES, half);
        for (int i = 0; i < steps; i++) {
            integers values = load_once(x + i * INT8_STEP + half * HALF_STEP);
            for (int c = 0; c < channels; c++) parts[c] = dot_int8(parts[c], values, weights[c][i]);
        }
        floats scale = load((const float *)behind + half * HALF_LANES);
        for (int c = 0; c < channels; c++)
            sums[r][c] = fmadd(to_floats(parts[c]), mul(scale, of_weights[c]), sums[r][c]);
    }
}

/* As int8_pass. */
MICROKERNEL int4_pass(const tile *t, int64_t row, int rows, int half, int first, int channels, int64_t k, int64_t end,
                      pass_prefetch *ahead, floats (*totals)[CHANNELS]) {
    floats sums[INT8_ROWS][PASS_CHANNELS];
    integers table = int4_table(t->m);
    const char *w[PASS_CHANNELS], *x = x_row(t, row) + int4_row_bytes(k);
    const int8_t *scales[PASS_CHANNELS];
    int64_t outputs[PASS_CHANNELS];
    for (int c = 0; c < channels; c++) {
        outputs[c] = t->output + (first + c < t->channels ? first + c : 0);
        w[c] = t->w[first + c] + k / 2;
        scales[c] = t->m->group_scales + (outputs[c] * t->m->inputs + k) / INT4_GROUP;
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < channels; c++) sums[r][c] = k ? totals[r][first + c] : broadcast(0);
    for (; k + GROUP_STEPS * INT8_STEP <= end; k += GROUP_STEPS * INT8_STEP) {
        for (int i = 0; !ahead && i < GROUP_STEPS / 2; i++) prefetch_ahead(w[0] + i * INT8_STEP);
        for (int64_t i = 0; ahead && i < ahead->lines; i++, ahead->next += 64) prefetch(ahead->next);
        add_int4_group(x, t->x->stride, half, w, scales, table, rows, channels, GROUP_STEPS, sums);
        for (int c = 0; c < channels; c++) {
            w[c] += GROUP_STEPS * INT8_STEP / 2;
            scales[c] += GROUP_STEPS * INT8_STEP / INT4_GROUP;
        }
        x += GROUP_STEPS * INT8_STEP + 2 * LANE_BYTES;
    }
    for (; k < end; k += INT8_STEP, x += INT8_STEP + 2 * LANE_BYTES) {
        if (!ahead) prefetch_ahead(w[0]);
        add_int4_group(x, t->x->stride, half, w, scales, table, rows, channels, 1, sums);
        for (int c = 0; c < channels; c++) w[c] += INT8_STEP / 2, scales[c] += INT8_STEP / INT4_GROUP;
    }
    for (int c = 0; c < channels; c++) {
        floats of_output = broadcast(end == t->m->inputs ? t->m->scales[outputs[c]] : 1);
        for (int r = 0; r < rows; r++) totals[r][first + c] = mul(sums[r][c], of_output);
    }
}

MICROKERNEL int4_microkernel(const tile *t, int64_t row, int rows) {
    floats sums[HALVES][INT8_ROWS][CHANNELS];
    pass_prefetch ahead = {.next = t->next};
    int64_t inputs = t->m->inputs, lines = t->next_lines * GROUP_STEPS;
    for (int64_t k = 0, end; k < inputs; k = end) {
        end = inputs - k > BLOCK_INPUTS ? k + BLOCK_INPUTS : inputs;
        for (int pass = 0; pass < PASSES; pass++) {
            int half = pass % HALVES, first = pass / HALVES * PASS_CHANNELS;
            ahead.lines = lines * (pass + 1) / PASSES - lines * pass / PASSES;
            int4_pass(t, row, rows, half, first, PASS_CHANNELS, k, end, &ahead, sums[half]);
        }
    }
    add_lane_halves(rows, sums);
    store_float_sums(t, row, rows, (const floats(*)[CHANNELS])sums[0]);
}

static void gemv_int4(const tile *t, int64_t row) {
    floats sums[HALVES][INT8_ROWS][CHANNELS];
    for (int c = 0; c < CHANNELS; c++)
        for (int half = 0; half < HALVES; half++) int4_pass(t, row, 1, half, c, 1, 0, t->m->inputs, NULL, sums[half]);
    add_lane_halves(1, sums);
    store_sums(t, row, hsum4(sums[0][0]));
}
