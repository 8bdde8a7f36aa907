/* Matrix products and attention of a decode step on x86-64 CPUs with AVX2, FMA and F16C.
 *
 * Why not the BLAS in torch: a decode step multiplies 1 … 16 rows with each weight matrix, so it is bound by how fast
 * weights stream from memory. Here they are read once, row by row as they lie, in whatever format they are kept, and
 * widened in the first-level cache. Every output is one sum in one order that depends on nothing but its own row: a
 * sequence's result is the same, bit for bit, alone and in any batch, in one prompt chunk or in ten.
 *
 * Threads are those of the OpenMP runtime that torch has loaded: the library is linked without one of its own, because
 * two pools would fight for the cores. x86-64-v3 is enough; compiled with VNNI as well, int8 takes one instruction
 * where AVX2 takes four, with the same integers as result.
 */
#include <stdlib.h>

#include "matrix.h"

/* Stores CHANNELS sums of one row, or the first `channels` of them: + bias + residual. */
static inline void finish(const matrix *m, const float *residual, float *y, int64_t row, int64_t output, __m128 sums,
                          int channels) {
    int64_t at = row * m->outputs + output;
    if (channels == CHANNELS) {
        if (m->bias) sums = _mm_add_ps(sums, _mm_loadu_ps(m->bias + output));
        if (residual) sums = _mm_add_ps(_mm_loadu_ps(residual + at), sums);
        _mm_storeu_ps(y + at, sums);
        return;
    }
    float parts[CHANNELS];
    _mm_storeu_ps(parts, sums);
    for (int c = 0; c < channels; c++) {
        if (m->bias) parts[c] += m->bias[output + c];
        y[at + c] = residual ? residual[at + c] + parts[c] : parts[c];
    }
}

/* The weights of the next CHANNELS outputs, brought closer in equal shares, one a tile: memory is read while the
 * tiles compute, and never more at once than the core can wait for. */
typedef struct {
    const char *at;
    int64_t share;
} ahead;

static inline ahead weights_ahead(const matrix *m, int64_t output, int64_t rows) {
    int64_t bytes = CHANNELS * row_bytes(m), tiles = rows == 1 ? 1 : (rows + ROWS - 1) / ROWS;
    return (ahead){(const char *)m->data + (output + CHANNELS) * row_bytes(m), (bytes / tiles + 63) & ~(int64_t)63};
}

static inline void fetch(ahead *next) {
    for (int64_t i = 0; i < next->share; i += 64) _mm_prefetch(next->at + i, _MM_HINT_T0);
    next->at += next->share;
}

/* `rows` × CHANNELS dot products; rows is a constant where it is inlined, so that the sums stay in registers.
 * `stream`: fetches the next outputs' weights as it goes. */
static inline __attribute__((always_inline)) void float_tile(const matrix *m, const float *x, const float *const *w,
                                                             const float *residual, float *y, int64_t row,
                                                             int64_t output, int rows, int channels, int stream) {
    __m256 sums[ROWS][CHANNELS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < CHANNELS; c++) sums[r][c] = _mm256_setzero_ps();
    for (int64_t k = 0; k < m->inputs; k += LANES) {
        __m256 values[ROWS];
        for (int r = 0; r < rows; r++) values[r] = _mm256_loadu_ps(x + r * m->inputs + k);
        for (int c = 0; c < CHANNELS; c++) {
            __m256 weights = _mm256_loadu_ps(w[c] + k);
            if (stream) _mm_prefetch((const char *)(w[c] + CHANNELS * m->inputs + k), _MM_HINT_T0);
            for (int r = 0; r < rows; r++) sums[r][c] = _mm256_fmadd_ps(values[r], weights, sums[r][c]);
        }
    }
    for (int r = 0; r < rows; r++) finish(m, residual, y, row + r, output, sum8x4(sums[r]), channels);
}

/* All rows with CHANNELS outputs. Where fewer are left, the first stands in for the missing. */
static void float_channels(const matrix *m, const float *x, int64_t rows, const float *residual, float *y,
                           int64_t output, int channels, float *scratch) {
    const float *w[CHANNELS];
    w[0] = widened(m, output, scratch);
    for (int c = 1; c < CHANNELS; c++)
        w[c] = c < channels ? widened(m, output + c, scratch + c * m->inputs) : w[0];
    if (rows <= ROWS && m->format == FLOAT32) { /* a single tile fetches ahead step by step, not in one burst */
        if (rows == 1) float_tile(m, x, w, residual, y, 0, output, 1, channels, 1);
        else if (rows == 2) float_tile(m, x, w, residual, y, 0, output, 2, channels, 1);
        else float_tile(m, x, w, residual, y, 0, output, 3, channels, 1);
        return;
    }
    ahead next = weights_ahead(m, output, rows);
    int64_t row = 0;
    for (; rows - row >= 5 || rows - row == 3; row += 3) {
        fetch(&next);
        float_tile(m, x + row * m->inputs, w, residual, y, row, output, 3, channels, 0);
    }
    for (; rows - row >= 2; row += 2) {
        fetch(&next);
        float_tile(m, x + row * m->inputs, w, residual, y, row, output, 2, channels, 0);
    }
    if (row < rows) {
        fetch(&next);
        float_tile(m, x + row * m->inputs, w, residual, y, row, output, 1, channels, 0);
    }
}

static int linear_float(const matrix *m, const float *x, int64_t rows, const float *residual, float *y, int threads) {
    int64_t groups = (m->outputs + CHANNELS - 1) / CHANNELS;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *scratch = m->format == FLOAT32 ? NULL : malloc(sizeof(float) * CHANNELS * m->inputs);
        failed = m->format != FLOAT32 && scratch == NULL;
#pragma omp for schedule(dynamic, 16) nowait
        for (int64_t group = 0; group < groups; group++) {
            int64_t output = group * CHANNELS, left = m->outputs - output;
            int channels = left < CHANNELS ? (int)left : CHANNELS;
            if (!failed) float_channels(m, x, rows, residual, y, output, channels, scratch);
        }
        free(scratch);
    }
    return failed ? -1 : 0;
}

/* One row of x → int8 by its own largest magnitude; returns the scale. */
static float quantize_row(const float *x, int64_t count, int8_t *out) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 largest = _mm256_setzero_ps(), poison = _mm256_setzero_ps();
    for (int64_t k = 0; k < count; k += LANES) {
        __m256 values = _mm256_loadu_ps(x + k);
        largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, values));
        poison = _mm256_fmadd_ps(values, _mm256_setzero_ps(), poison); /* not a number if one of them isn't finite */
    }
    float lanes[LANES], range = 0;
    _mm256_storeu_ps(lanes, largest);
    for (int i = 0; i < LANES; i++) range = lanes[i] > range ? lanes[i] : range;
    __m256 inverse = _mm256_set1_ps(range > 0 ? 127.0f / range : 0.0f);
    for (int64_t k = 0; k < count; k += LANES) {
        __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k), inverse));
        __m128i q16 = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
        _mm_storel_epi64((__m128i *)(out + k), _mm_packs_epi16(q16, q16));
    }
    return range / 127.0f + sum8(poison);
}

/* sums += x · w over groups of four int8. AVX2: |w| · (x with w's sign), in pairs that can't overflow 16 bits
 * (2 · 127 · 127 < 2¹⁵). */
static inline __m256i dot_int8(__m256i sums, __m256i x, __m256i w) {
    __m256i magnitude = _mm256_abs_epi8(w), turned = _mm256_sign_epi8(x, w);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sums, magnitude, turned);
#else
    __m256i pairs = _mm256_maddubs_epi16(magnitude, turned);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

static inline __attribute__((always_inline)) void int8_tile(const matrix *m, const int8_t *x, const int8_t *const *w,
                                                            const float *ranges, const float *residual, float *y,
                                                            int64_t row, int64_t output, int rows, int channels,
                                                            int stream) {
    __m256i sums[ROWS][CHANNELS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < CHANNELS; c++) sums[r][c] = _mm256_setzero_si256();
    for (int64_t k = 0; k < m->inputs; k += 32) {
        for (int c = 0; c < CHANNELS; c++) {
            __m256i weights = _mm256_loadu_si256((const __m256i *)(w[c] + k));
            if (stream) _mm_prefetch((const char *)(w[c] + CHANNELS * m->inputs + k), _MM_HINT_T0);
            for (int r = 0; r < rows; r++) {
                __m256i values = _mm256_loadu_si256((const __m256i *)(x + r * m->inputs + k));
                sums[r][c] = dot_int8(sums[r][c], values, weights);
            }
        }
    }
    float scales[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) scales[c] = m->scales[output + (c < channels ? c : 0)];
    for (int r = 0; r < rows; r++) {
        __m128 scale = _mm_mul_ps(_mm_set1_ps(ranges[row + r]), _mm_loadu_ps(scales));
        __m128 products = _mm_mul_ps(_mm_cvtepi32_ps(sum8x4i(sums[r])), scale);
        finish(m, residual, y, row + r, output, products, channels);
    }
}

static void int8_channels(const matrix *m, const int8_t *x, const float *ranges, int64_t rows, const float *residual,
                          float *y, int64_t output, int channels) {
    const int8_t *w[CHANNELS];
    for (int c = 0; c < CHANNELS; c++)
        w[c] = (const int8_t *)m->data + (output + (c < channels ? c : 0)) * m->inputs;
    if (rows <= ROWS) { /* a single tile fetches ahead step by step, not in one burst */
        if (rows == 1) int8_tile(m, x, w, ranges, residual, y, 0, output, 1, channels, 1);
        else if (rows == 2) int8_tile(m, x, w, ranges, residual, y, 0, output, 2, channels, 1);
        else int8_tile(m, x, w, ranges, residual, y, 0, output, 3, channels, 1);
        return;
    }
    ahead next = weights_ahead(m, output, rows);
    int64_t row = 0;
    for (; rows - row >= 5 || rows - row == 3; row += 3) {
        fetch(&next);
        int8_tile(m, x + row * m->inputs, w, ranges, residual, y, row, output, 3, channels, 0);
    }
    for (; rows - row >= 2; row += 2) {
        fetch(&next);
        int8_tile(m, x + row * m->inputs, w, ranges, residual, y, row, output, 2, channels, 0);
    }
    if (row < rows) {
        fetch(&next);
        int8_tile(m, x + row * m->inputs, w, ranges, residual, y, row, output, 1, channels, 0);
    }
}

static int linear_int8(const matrix *m, const float *x, int64_t rows, const float *residual, float *y, int threads) {
    int8_t *quantized = malloc(rows * m->inputs);
    float *ranges = malloc(rows * sizeof(float));
    int64_t groups = (m->outputs + CHANNELS - 1) / CHANNELS;
    if (quantized && ranges) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++)
                ranges[row] = quantize_row(x + row * m->inputs, m->inputs, quantized + row * m->inputs);
#pragma omp for schedule(dynamic, 32) nowait
            for (int64_t group = 0; group < groups; group++) {
                int64_t output = group * CHANNELS, left = m->outputs - output;
                int channels = left < CHANNELS ? (int)left : CHANNELS;
                int8_channels(m, quantized, ranges, rows, residual, y, output, channels);
            }
        }
    }
    int status = quantized && ranges ? 0 : -1;
    free(quantized);
    free(ranges);
    return status;
}

/* y (rows, outputs) = x (rows, inputs) · Wᵀ + bias (+ residual, which may be y itself). 0, or -1: out of memory. */
int bitdial_linear(const matrix *m, const float *x, int64_t rows, const float *residual, float *y, int threads) {
    if (m->format == INT8) return linear_int8(m, x, rows, residual, y, threads);
    return linear_float(m, x, rows, residual, y, threads);
}
