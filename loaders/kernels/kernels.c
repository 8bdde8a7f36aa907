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
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum format { FLOAT32, BFLOAT16, FLOAT16, FOUR_BIT, INT8 };
enum { ROWS = 3, CHANNELS = 4, LANES = 8 }; /* a tile of 12 accumulators leaves 4 registers for operands */

/* A weight matrix (outputs, inputs), row-major. */
typedef struct {
    int64_t format, outputs, inputs;
    const void *data;
    const float *scales;     /* INT8: one an output. FOUR_BIT: one a block of inputs, or NULL if they are nested */
    const float *bias;       /* (outputs,) or NULL */
    const float *table;      /* FOUR_BIT: the 16 values a code stands for */
    int64_t block;           /* FOUR_BIT: weights that share a scale; divides inputs */
    const uint8_t *codes;    /* FOUR_BIT, nested scales: scale = nested_table[code] * nested_scales[i / 256] + offset */
    const float *nested_table, *nested_scales;
    float nested_offset;
} matrix;

static inline float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* The sums of four vectors, side by side; the same pairs are added in the same order for each. */
static inline __m128 sum8x4(const __m256 *v) {
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

static inline __m128i sum8x4i(const __m256i *v) {
    __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}

/* ---- Widening one row of weights to float32 -------------------------------------------------------------------- */

static void widen_bfloat16(const uint16_t *w, int64_t count, float *out) {
    for (int64_t k = 0; k < count; k += LANES) {
        if (k % 32 == 0) _mm_prefetch((const char *)(w + CHANNELS * count + k), _MM_HINT_T0);
        __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(w + k)));
        _mm256_storeu_ps(out + k, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
    }
}

static void widen_float16(const uint16_t *w, int64_t count, float *out) {
    for (int64_t k = 0; k < count; k += LANES) {
        if (k % 32 == 0) _mm_prefetch((const char *)(w + CHANNELS * count + k), _MM_HINT_T0);
        _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + k))));
    }
}

static inline float block_scale(const matrix *m, int64_t block) {
    if (m->scales) return m->scales[block];
    return m->nested_table[m->codes[block]] * m->nested_scales[block / 256] + m->nested_offset;
}

/* Eight codes (one a 32-bit lane) → table values: two permutations of half the table, chosen by bit 3. */
static inline __m256 look_up(__m256i codes, __m256 low, __m256 high) {
    __m256 choice = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), choice);
}

/* The first of two weights is in a byte's upper half. */
static void widen_four_bit(const matrix *m, int64_t output, float *out) {
    const __m256 low = _mm256_loadu_ps(m->table), high = _mm256_loadu_ps(m->table + 8);
    const __m128i nibble = _mm_set1_epi8(15);
    const uint8_t *w = (const uint8_t *)m->data + output * m->inputs / 2;
    int64_t first_block = output * m->inputs / m->block;
    for (int64_t k = 0; k < m->inputs; k += 32) {
        __m256 scale = _mm256_set1_ps(block_scale(m, first_block + k / m->block));
        if (k % 128 == 0) _mm_prefetch((const char *)(w + (CHANNELS * m->inputs + k) / 2), _MM_HINT_T0);
        __m128i bytes = _mm_loadu_si128((const __m128i *)(w + k / 2));
        __m128i upper = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), lower = _mm_and_si128(bytes, nibble);
        __m128i first = _mm_unpacklo_epi8(upper, lower), second = _mm_unpackhi_epi8(upper, lower);
        __m256i codes[4] = {_mm256_cvtepu8_epi32(first), _mm256_cvtepu8_epi32(_mm_srli_si128(first, 8)),
                            _mm256_cvtepu8_epi32(second), _mm256_cvtepu8_epi32(_mm_srli_si128(second, 8))};
        for (int i = 0; i < 4; i++)
            _mm256_storeu_ps(out + k + i * LANES, _mm256_mul_ps(look_up(codes[i], low, high), scale));
    }
}

/* Row `output` in float32: where it lies, or widened into `scratch`. */
static const float *widened(const matrix *m, int64_t output, float *scratch) {
    const uint16_t *halves = (const uint16_t *)m->data + output * m->inputs;
    switch (m->format) {
    case BFLOAT16: widen_bfloat16(halves, m->inputs, scratch); return scratch;
    case FLOAT16: widen_float16(halves, m->inputs, scratch); return scratch;
    case FOUR_BIT: widen_four_bit(m, output, scratch); return scratch;
    default: return (const float *)m->data + output * m->inputs;
    }
}

/* ---- Products -------------------------------------------------------------------------------------------------- */

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

/* `rows` × CHANNELS dot products; rows is a constant where it is inlined, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void float_tile(const matrix *m, const float *x, const float *const *w,
                                                             const float *residual, float *y, int64_t row,
                                                             int64_t output, int rows, int channels,
                                                             int prefetch) {
    __m256 sums[ROWS][CHANNELS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < CHANNELS; c++) sums[r][c] = _mm256_setzero_ps();
    for (int64_t k = 0; k < m->inputs; k += LANES) {
        __m256 values[ROWS];
        for (int r = 0; r < rows; r++) values[r] = _mm256_loadu_ps(x + r * m->inputs + k);
        for (int c = 0; c < CHANNELS; c++) {
            __m256 weights = _mm256_loadu_ps(w[c] + k);
            if (prefetch) _mm_prefetch((const char *)(w[c] + CHANNELS * m->inputs + k), _MM_HINT_T0);
            for (int r = 0; r < rows; r++) sums[r][c] = _mm256_fmadd_ps(values[r], weights, sums[r][c]);
        }
    }
    for (int r = 0; r < rows; r++) finish(m, residual, y, row + r, output, sum8x4(sums[r]), channels);
}

/* All rows with CHANNELS outputs. Where fewer are left, the first stands in for the missing. */
static inline __attribute__((always_inline)) void float_channels(const matrix *m, const float *x, int64_t rows,
                                                                 const float *residual, float *y, int64_t output,
                                                                 int channels, float *scratch, int prefetch) {
    const float *w[CHANNELS];
    w[0] = widened(m, output, scratch);
    for (int c = 1; c < CHANNELS; c++)
        w[c] = c < channels ? widened(m, output + c, scratch + c * m->inputs) : w[0];
    /* only the first tile brings the next outputs' weights closer */
    if (rows == 1) float_tile(m, x, w, residual, y, 0, output, 1, channels, prefetch);
    else if (rows == 2 || rows == 4) float_tile(m, x, w, residual, y, 0, output, 2, channels, prefetch);
    else float_tile(m, x, w, residual, y, 0, output, 3, channels, prefetch);
    int64_t row = rows == 2 || rows == 4 ? 2 : 3;
    for (; rows - row >= 5 || rows - row == 3; row += 3)
        float_tile(m, x + row * m->inputs, w, residual, y, row, output, 3, channels, 0);
    for (; rows - row >= 2; row += 2)
        float_tile(m, x + row * m->inputs, w, residual, y, row, output, 2, channels, 0);
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
            if (failed) continue;
            if (m->format == FLOAT32) float_channels(m, x, rows, residual, y, output, channels, scratch, 1);
            else float_channels(m, x, rows, residual, y, output, channels, scratch, 0);
        }
        free(scratch);
    }
    return failed ? -1 : 0;
}

/* One row of x → int8 by its own largest magnitude; returns the scale. */
static float quantize_row(const float *x, int64_t count, int8_t *out) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 largest = _mm256_setzero_ps();
    for (int64_t k = 0; k < count; k += LANES)
        largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + k)));
    float lanes[LANES], range = 0;
    _mm256_storeu_ps(lanes, largest);
    for (int i = 0; i < LANES; i++) range = lanes[i] > range ? lanes[i] : range;
    __m256 inverse = _mm256_set1_ps(range > 0 ? 127.0f / range : 0.0f);
    for (int64_t k = 0; k < count; k += LANES) {
        __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k), inverse));
        __m128i q16 = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
        _mm_storel_epi64((__m128i *)(out + k), _mm_packs_epi16(q16, q16));
    }
    return range / 127.0f;
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
                                                            int prefetch) {
    __m256i sums[ROWS][CHANNELS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < CHANNELS; c++) sums[r][c] = _mm256_setzero_si256();
    for (int64_t k = 0; k < m->inputs; k += 32) {
        for (int c = 0; c < CHANNELS; c++) {
            __m256i weights = _mm256_loadu_si256((const __m256i *)(w[c] + k));
            if (prefetch) _mm_prefetch((const char *)(w[c] + CHANNELS * m->inputs + k), _MM_HINT_T0);
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
    /* only the first tile brings the next outputs' weights closer */
    if (rows == 1) int8_tile(m, x, w, ranges, residual, y, 0, output, 1, channels, 1);
    else if (rows == 2 || rows == 4) int8_tile(m, x, w, ranges, residual, y, 0, output, 2, channels, 1);
    else int8_tile(m, x, w, ranges, residual, y, 0, output, 3, channels, 1);
    int64_t row = rows == 2 || rows == 4 ? 2 : 3;
    for (; rows - row >= 5 || rows - row == 3; row += 3)
        int8_tile(m, x + row * m->inputs, w, ranges, residual, y, row, output, 3, channels, 0);
    for (; rows - row >= 2; row += 2)
        int8_tile(m, x + row * m->inputs, w, ranges, residual, y, row, output, 2, channels, 0);
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

/* ---- Attention over KV slots ----------------------------------------------------------------------------------- */

/* eˣ for x ≤ 0, relative error below 2⁻²²: 2ⁿ · 2^f with n = round(x / ln 2), the second by a polynomial
 * (minimax coefficients of Cephes' expf). Below -87 it is 0. */
static inline __m256 exp8(__m256 x) {
    const __m256 floor_ = _mm256_set1_ps(-87.0f);
    __m256 kept = _mm256_cmp_ps(x, floor_, _CMP_GT_OQ);
    x = _mm256_max_ps(x, floor_);
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                               _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), x);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(x, x), x), _mm256_set1_ps(1.0f));
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(exponent)), kept);
}

static inline float dot(const float *a, const float *b, int64_t count) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t d = 0; d < count; d += LANES)
        sum = _mm256_fmadd_ps(_mm256_loadu_ps(a + d), _mm256_loadu_ps(b + d), sum);
    return sum8(sum);
}

/* scores → weights that sum to 1, in place; `count` rounded up to a multiple of 8 may be written. */
static void softmax(float *scores, int64_t count) {
    float largest = scores[0];
    for (int64_t t = 1; t < count; t++) largest = scores[t] > largest ? scores[t] : largest;
    for (int64_t t = count; t % LANES; t++) scores[t] = -INFINITY;
    __m256 total = _mm256_setzero_ps();
    for (int64_t t = 0; t < count; t += LANES) {
        __m256 weight = exp8(_mm256_sub_ps(_mm256_loadu_ps(scores + t), _mm256_set1_ps(largest)));
        _mm256_storeu_ps(scores + t, weight);
        total = _mm256_add_ps(total, weight);
    }
    __m256 inverse = _mm256_set1_ps(1.0f / sum8(total));
    for (int64_t t = 0; t < count; t += LANES)
        _mm256_storeu_ps(scores + t, _mm256_mul_ps(_mm256_loadu_ps(scores + t), inverse));
}

/* out = Σ weights[t] · values[t]; four sums at a time stay in registers. */
static void weigh(const float *weights, const float *values, int64_t count, int64_t dim, float *out) {
    for (int64_t d = 0; d < dim; d += 4 * LANES) {
        int64_t left = (dim - d) / LANES, parts = left < 4 ? left : 4;
        __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        if (parts == 4)
            for (int64_t t = 0; t < count; t++) {
                __m256 weight = _mm256_set1_ps(weights[t]);
                const float *value = values + t * dim + d;
                for (int i = 0; i < 4; i++)
                    sums[i] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(value + i * LANES), sums[i]);
            }
        else
            for (int64_t t = 0; t < count; t++)
                for (int64_t i = 0; i < parts; i++)
                    sums[i] = _mm256_fmadd_ps(_mm256_set1_ps(weights[t]),
                                              _mm256_loadu_ps(values + t * dim + d + i * LANES), sums[i]);
        for (int64_t i = 0; i < parts; i++) _mm256_storeu_ps(out + d + i * LANES, sums[i]);
    }
}

/* Appends each row's key and value to its slot and attends to all the slot then holds up to that row.
 *
 * qkv (rows, 3 · heads · dim): query, key and value of each row, one after another. keys, values
 * (slots, heads, context, dim). slots, positions (rows,): where each row stands; rows of one slot lie side by side
 * in rising order of position. out (rows, heads · dim). dim is a multiple of 8. 0, or -1: out of memory. */
int bitdial_attention(const float *qkv, float *keys, float *values, const int64_t *slots, const int64_t *positions,
                      int64_t rows, int64_t heads, int64_t dim, int64_t context, float *out, int threads) {
    int64_t width = heads * dim, longest = 0;
    float scale = 1.0f / sqrtf((float)dim);
    int failed = 0;
    for (int64_t row = 0; row < rows; row++) longest = positions[row] > longest ? positions[row] : longest;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *scores = malloc(sizeof(float) * (longest + 1 + LANES));
        failed = scores == NULL;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * heads; i++) {
            int64_t row = i / heads, head = i % heads;
            int64_t at = ((slots[row] * heads + head) * context + positions[row]) * dim;
            const float *here = qkv + row * 3 * width + head * dim;
            memcpy(keys + at, here + width, sizeof(float) * dim);
            memcpy(values + at, here + 2 * width, sizeof(float) * dim);
        }
#pragma omp for schedule(dynamic, 4) nowait
        for (int64_t i = 0; i < rows * heads; i++) {
            int64_t row = i % rows, head = i / rows, count = positions[row] + 1;
            int64_t base = (slots[row] * heads + head) * context * dim;
            const float *query = qkv + row * 3 * width + head * dim;
            if (failed) continue;
            for (int64_t t = 0; t < count; t++) scores[t] = scale * dot(query, keys + base + t * dim, dim);
            softmax(scores, count);
            weigh(scores, values + base, count, dim, out + row * width + head * dim);
        }
        free(scores);
    }
    return failed ? -1 : 0;
}
