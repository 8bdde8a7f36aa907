/* The operations of a transformer on a single row: layer normalization and the activation. */
#pragma once
#include <math.h>

#include "matrix.h"

/* Weight and bias of a layer normalization: matrices of one row, in any format. */
typedef struct {
    matrix weight, bias;
} norm;

/* out = (x - mean) / √(variance + epsilon) · weight + bias; `scratch` holds 2 · count floats. */
static void apply_norm(const norm *n, const float *x, int64_t count, float epsilon, float *scratch, float *out) {
    const float *weight = dequantized(&n->weight, 0, scratch), *bias = dequantized(&n->bias, 0, scratch + count);
    floats total = broadcast(0), squares = broadcast(0);
    for (int64_t k = 0; k < count; k += SIMD_WIDTH) total = add(total, load(x + k));
    floats mean = broadcast(hsum(total) / (float)count);
    for (int64_t k = 0; k < count; k += SIMD_WIDTH) {
        floats off = sub(load(x + k), mean);
        squares = fmadd(off, off, squares);
    }
    floats inverse = broadcast(1.0f / sqrtf(hsum(squares) / (float)count + epsilon));
    for (int64_t k = 0; k < count; k += SIMD_WIDTH) {
        floats normed = mul(sub(load(x + k), mean), inverse);
        store(out + k, fmadd(normed, load(weight + k), load(bias + k)));
    }
}

/* x ← GELU(x) by the approximation with tanh (Hendrycks and Gimpel, arXiv:1606.08415): with
 * u = √(2/π) (x + 0.044715 x³) it is x (1 + tanh u) / 2 = x / (1 + e⁻²ᵘ). */
static void gelu(float *x, int64_t count) {
    const __m256 one = _mm256_set1_ps(1), minus_zero = _mm256_set1_ps(-0.0f);
    for (int64_t k = 0; k < count; k += LANES) {
        __m256 v = _mm256_loadu_ps(x + k), square = _mm256_mul_ps(v, v);
        __m256 inner = _mm256_fmadd_ps(square, _mm256_set1_ps(0.044715f), one);
        __m256 twice_u = _mm256_mul_ps(_mm256_mul_ps(v, inner), _mm256_set1_ps(1.5957691216057308f));
        /* only negative exponents, so that nothing overflows: 1 / (1 + e⁻ᵃ), or e⁻ᵃ / (1 + e⁻ᵃ) below 0 */
        __m256 e = exp8(_mm256_or_ps(twice_u, minus_zero));
        __m256 numerator = _mm256_blendv_ps(one, e, twice_u);
        __m256 sigmoid = _mm256_div_ps(numerator, _mm256_add_ps(one, e));
        _mm256_storeu_ps(x + k, _mm256_mul_ps(v, sigmoid));
    }
}
