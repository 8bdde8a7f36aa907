/* Tiles: the products of a few rows with CHANNELS outputs, held in registers over the whole sum. */
#pragma once
#include "operand.h"

/* What a tile works on. Where fewer than CHANNELS outputs are left, the first stands in for the missing. */
typedef struct {
    const matrix *m;
    const operand *x;
    const float *residual; /* (rows, outputs) or NULL */
    float *y;              /* (rows, outputs) */
    int64_t output;        /* the first of CHANNELS */
    int channels;          /* how many of them there are */
    __m128 bias, scale;    /* of each; the scale of INT8 alone */
    const char *w[CHANNELS];
    const char *next;      /* weights that will be needed soon: */
    int64_t next_lines;    /* while a stretch is computed, so many lines of 64 bytes of them are asked for */
} tile;

enum {
    STRETCH = 64, /* weights of a row between two looks ahead */
    AGAIN = 4096  /* bytes between the two times that a line is asked for */
};

/* Asks for a line for the second-level cache; it is asked for twice, since a core that already waits for many forgets
 * some. (To the first level lines would come no sooner: it can wait for fewer than memory could deliver.) */
static inline __attribute__((always_inline)) void ask_twice(const char *at) {
    _mm_prefetch(at + AGAIN, _MM_HINT_T1);
    _mm_prefetch(at, _MM_HINT_T1);
}

/* Asks for what is needed next, line by line as it lies, so that the core sees a stream and helps. */
static inline __attribute__((always_inline)) void fetch(const tile *t, int64_t weight) {
    const char *at = t->next + weight * t->next_lines; /* 64 bytes a line, as many as weights in a stretch */
    for (int64_t i = 0; i < t->next_lines; i++) ask_twice(at + i * 64);
}

/* for (k …) in steps of STEP over a row, looking ahead once a stretch. */
#define ALONG_A_ROW(t, k, STEP) \
    for (int64_t k = 0, stop, count = operand_count((t)->m); k < count; k = stop) \
        for (stop = k + STRETCH < count ? k + STRETCH : count, fetch(t, k); k < stop; k += STEP)

/* Stores the sums of one row: + bias + residual. */
static inline void finish(const tile *t, int64_t row, __m128 sums) {
    int64_t at = row * t->m->outputs + t->output;
    if (t->channels == CHANNELS) {
        sums = _mm_add_ps(sums, t->bias);
        if (t->residual) sums = _mm_add_ps(_mm_loadu_ps(t->residual + at), sums);
        _mm_storeu_ps(t->y + at, sums);
        return;
    }
    float parts[CHANNELS];
    _mm_storeu_ps(parts, sums);
    for (int c = 0; c < t->channels; c++) {
        parts[c] += t->bias[c];
        t->y[at + c] = t->residual ? t->residual[at + c] + parts[c] : parts[c];
    }
}

#ifdef __AVX512BW__
/* Of four rows, a quarter each. */
static inline void finish_quarters(const tile *t, int64_t row, floats sums) {
    finish(t, row, _mm512_castps512_ps128(sums));
    finish(t, row + 1, _mm512_extractf32x4_ps(sums, 1));
    finish(t, row + 2, _mm512_extractf32x4_ps(sums, 2));
    finish(t, row + 3, _mm512_extractf32x4_ps(sums, 3));
}
#endif

/* `rows` is a constant where these are inlined. */
#define TILE static inline __attribute__((always_inline)) void

static inline const char *x_row(const tile *t, int64_t row) { return t->x->data + row * t->x->stride; }

/* All rows of a tile, four at a time as far as they go: where a matrix has few inputs, what comes after the sums takes as
 * long as a good part of them. */
TILE finish_floats(const tile *t, int64_t row, int rows, const floats (*sums)[CHANNELS]) {
    int done = 0;
#ifdef __AVX512BW__
    for (; done + 4 <= rows; done += 4) finish_quarters(t, row + done, sums4x4(sums + done));
#endif
    for (; done < rows; done++) finish(t, row + done, sums4(sums[done]));
}

TILE float_tile(const tile *t, int64_t row, int rows) {
    floats sums[ROWS][CHANNELS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < CHANNELS; c++) sums[r][c] = all(0);
    ALONG_A_ROW(t, k, WIDE) {
        floats values[ROWS];
        for (int r = 0; r < rows; r++) values[r] = load((const float *)x_row(t, row + r) + k);
        for (int c = 0; c < CHANNELS; c++) {
            floats weights = load((const float *)t->w[c] + k);
            for (int r = 0; r < rows; r++) sums[r][c] = multiply_add(values[r], weights, sums[r][c]);
        }
    }
    finish_floats(t, row, rows, (const floats(*)[CHANNELS])sums);
}

#ifdef __AVX512BF16__
TILE bfloat16_tile(const tile *t, int64_t row, int rows) {
    floats sums[ROWS][CHANNELS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < CHANNELS; c++) sums[r][c] = all(0);
    ALONG_A_ROW(t, k, 32) {
        __m512bh values[ROWS], weights;
        for (int r = 0; r < rows; r++) memcpy(&values[r], (const uint16_t *)x_row(t, row + r) + k, sizeof weights);
        for (int c = 0; c < CHANNELS; c++) {
            memcpy(&weights, (const uint16_t *)t->w[c] + k, sizeof weights);
            for (int r = 0; r < rows; r++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], values[r], weights);
        }
    }
    finish_floats(t, row, rows, (const floats(*)[CHANNELS])sums);
}
#endif

#ifdef __AVX512BW__
enum { INT8_STEP = 64 };

static inline integers load_int8(const char *at) { return _mm512_loadu_si512(at); }

/* sums += x · w over groups of four int8, x being 128 too high. */
static inline integers dot_int8(integers sums, integers x, integers w) { return _mm512_dpbusd_epi32(sums, x, w); }

/* What there is too much in the sums: 128 times the weights. */
static inline integers add_surplus(integers sums, integers w) { return dot_int8(sums, _mm512_set1_epi8(-128), w); }
#else
enum { INT8_STEP = 32 };

static inline integers load_int8(const char *at) { return _mm256_loadu_si256((const void *)at); }

/* sums += x · w over groups of four int8: |w| · (x with w's sign), in pairs that can't overflow 16 bits
 * (2 · 127 · 127 < 2¹⁵). */
static inline integers dot_int8(integers sums, integers x, integers w) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

static inline integers add_surplus(integers sums, integers w) {
    (void)w;
    return sums;
}
#endif

static inline __m128i surplus(const tile *t) {
    integers sums[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) {
        sums[c] = no_integers();
        for (int64_t k = 0; k < t->m->inputs; k += INT8_STEP) sums[c] = add_surplus(sums[c], load_int8(t->w[c] + k));
    }
    return sums4i(sums);
}

static inline void finish_int8(const tile *t, int64_t row, __m128i sums) {
    __m128 scale = _mm_mul_ps(_mm_set1_ps(t->x->ranges[row]), t->scale);
    finish(t, row, _mm_mul_ps(_mm_cvtepi32_ps(sums), scale));
}

#ifdef __AVX512BW__
TILE finish_four_int8(const tile *t, int64_t row, const integers (*sums)[CHANNELS], __m128i excess) {
    const __m512i row_of_lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    floats ranges = _mm512_permutexvar_ps(row_of_lane, _mm512_castps128_ps512(_mm_loadu_ps(t->x->ranges + row)));
    floats scales = times(ranges, _mm512_broadcast_f32x4(t->scale));
    integers total = _mm512_sub_epi32(sums4x4i(sums), _mm512_broadcast_i32x4(excess));
    finish_quarters(t, row, times(_mm512_cvtepi32_ps(total), scales));
}
#endif

TILE int8_tile(const tile *t, int64_t row, int rows, __m128i excess) {
    integers sums[ROWS][CHANNELS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < CHANNELS; c++) sums[r][c] = no_integers();
    ALONG_A_ROW(t, k, INT8_STEP) {
        integers values[ROWS];
        for (int r = 0; r < rows; r++) values[r] = load_int8(x_row(t, row + r) + k);
        for (int c = 0; c < CHANNELS; c++) {
            integers weights = load_int8(t->w[c] + k);
            for (int r = 0; r < rows; r++) sums[r][c] = dot_int8(sums[r][c], values[r], weights);
        }
    }
    int done = 0;
#ifdef __AVX512BW__
    for (; done + 4 <= rows; done += 4) finish_four_int8(t, row + done, (const integers(*)[CHANNELS])sums + done, excess);
#endif
    for (; done < rows; done++) finish_int8(t, row + done, _mm_sub_epi32(sums4i(sums[done]), excess));
}
