/* The operations of a transformer on a single row: normalization, rotary positions and activation functions. */
#pragma once
#include <math.h>

#include "matrix.h"

enum norm_kind { LAYER_NORM, RMS_NORM };

/* Weight and bias of a normalization: matrices of one row, in any format. `bias.data` may be NULL. */
typedef struct {
    matrix weight, bias;
} norm;

static inline floats mean_of(floats total, int64_t count) { return broadcast(hsum(total) / (float)count); }

/* out = (x - mean) / √(variance + epsilon) · weight + bias; `scratch` holds 2 · count floats. */
static void layer_norm(const norm *n, const float *x, int64_t count, float epsilon, float *scratch, float *out) {
    const float *weight = dequantized(&n->weight, 0, scratch), *bias = NULL;
    if (n->bias.data) bias = dequantized(&n->bias, 0, scratch + count);
    floats total = broadcast(0), squares = broadcast(0);
    for (int64_t k = 0; k < count; k += SIMD_WIDTH) total = add(total, load(x + k));
    floats mean = mean_of(total, count);
    for (int64_t k = 0; k < count; k += SIMD_WIDTH) {
        floats off = sub(load(x + k), mean);
        squares = fmadd(off, off, squares);
    }
    floats inverse = broadcast(1.0f / sqrtf(hsum(squares) / (float)count + epsilon));
    for (int64_t k = 0; k < count; k += SIMD_WIDTH) {
        floats normed = mul(sub(load(x + k), mean), inverse);
        store(out + k, fmadd(normed, load(weight + k), bias ? load(bias + k) : broadcast(0)));
    }
}

/* out = x / √(mean of x² + epsilon) · weight (Zhang and Sennrich, arXiv:1910.07467). `out` may be x; `scratch` holds `count`
 * floats. */
static void rms_norm(const norm *n, const float *x, int64_t count, float epsilon, float *scratch, float *out) {
    const float *weight = dequantized(&n->weight, 0, scratch);
    floats squares = broadcast(0);
    for (int64_t k = 0; k < count; k += SIMD_WIDTH) squares = fmadd(load(x + k), load(x + k), squares);
    floats inverse = broadcast(1.0f / sqrtf(hsum(squares) / (float)count + epsilon));
    for (int64_t k = 0; k < count; k += SIMD_WIDTH) store(out + k, mul(mul(load(x + k), inverse), load(weight + k)));
}

/* Rotates the first 2 · half values of a head in pairs (i, i + half) by the angles of its position (Su et al.,
 * arXiv:2104.09864, in the order of GPT-NeoX and Llama). turn: `half` cosines, then `half` sines. */
static inline void rotate(float *restrict head, const float *restrict turn, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float first = head[i], second = head[i + half];
        head[i] = first * turn[i] - second * turn[half + i];
        head[i + half] = second * turn[i] + first * turn[half + i];
    }
}

enum activation { GELU_TANH, GELU, SILU, RELU };

/* 1 / (1 + e⁻ᵃ); only negative exponents, so that nothing overflows: e⁻ᵃ / (1 + e⁻ᵃ) of -|a| below 0. */
static inline __m256 sigmoid8(__m256 a) {
    const __m256 one = _mm256_set1_ps(1);
    __m256 e = exp8(_mm256_or_ps(a, _mm256_set1_ps(-0.0f)));
    return _mm256_div_ps(_mm256_blendv_ps(one, e, a), _mm256_add_ps(one, e));
}

/* GELU by the approximation with tanh (Hendrycks and Gimpel, arXiv:1606.08415): with u = √(2/π) (x + 0.044715 x³) it is
 * x (1 + tanh u) / 2 = x / (1 + e⁻²ᵘ). */
static inline __m256 gelu_tanh8(__m256 x) {
    __m256 square = _mm256_mul_ps(x, x), one = _mm256_set1_ps(1);
    __m256 inner = _mm256_fmadd_ps(square, _mm256_set1_ps(0.044715f), one);
    __m256 twice_u = _mm256_mul_ps(_mm256_mul_ps(x, inner), _mm256_set1_ps(1.5957691216057308f));
    return _mm256_mul_ps(x, sigmoid8(twice_u));
}

/* GELU: x Φ(x) = x (1 + erf(x / √2)) / 2; erf with an absolute error below 1.5e-7 (Abramowitz and Stegun, 7.1.26). */
static inline __m256 gelu8(__m256 x) {
    const __m256 one = _mm256_set1_ps(1), sign = _mm256_set1_ps(-0.0f);
    __m256 z = _mm256_andnot_ps(sign, _mm256_mul_ps(x, _mm256_set1_ps(0.70710678118654752f)));
    __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(z, _mm256_set1_ps(0.3275911f), one));
    __m256 p = _mm256_set1_ps(1.061405429f);
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(-1.453152027f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(1.421413741f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(-0.284496736f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(0.254829592f));
    __m256 tail = _mm256_mul_ps(_mm256_mul_ps(p, t), exp8(_mm256_xor_ps(_mm256_mul_ps(z, z), sign))); /* erfc(z) */
    __m256 twice = _mm256_blendv_ps(_mm256_sub_ps(_mm256_set1_ps(2), tail), tail, x); /* 1 + erf, or erfc(-z) below 0 */
    return _mm256_mul_ps(_mm256_mul_ps(x, twice), _mm256_set1_ps(0.5f));
}

static inline __m256 silu8(__m256 x) { return _mm256_mul_ps(x, sigmoid8(x)); }

/* NaN stays NaN: the second operand is returned if one is not a number. */
static inline __m256 relu8(__m256 x) { return _mm256_max_ps(_mm256_setzero_ps(), x); }

#define ACTIVATE(name, function) \
    static void name(const float *x, const float *up, int64_t count, float *out) { \
        for (int64_t k = 0; k < count; k += LANES) { \
            __m256 value = function(_mm256_loadu_ps(x + k)); \
            _mm256_storeu_ps(out + k, up ? _mm256_mul_ps(value, _mm256_loadu_ps(up + k)) : value); \
        } \
    }
ACTIVATE(activate_gelu_tanh, gelu_tanh8)
ACTIVATE(activate_gelu, gelu8)
ACTIVATE(activate_silu, silu8)
ACTIVATE(activate_relu, relu8)

/* out = function(x), multiplied by `up` if that is not NULL (a gated MLP). `out` may be x; `count` is a multiple of 8. */
static void apply_activation(enum activation kind, const float *x, const float *up, int64_t count, float *out) {
    switch (kind) {
    case GELU: activate_gelu(x, up, count, out); return;
    case SILU: activate_silu(x, up, count, out); return;
    case RELU: activate_relu(x, up, count, out); return;
    default: activate_gelu_tanh(x, up, count, out);
    }
}
