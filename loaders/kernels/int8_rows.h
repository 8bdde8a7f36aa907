/* Rows of activations in int8, with a scale per group of 16 values (4 at the end of a row).
 *
 * A product adds four neighbouring values per int32 lane, 64 values per step. Its sums over a few steps stay in their
 * lanes; so if the values that one lane adds up share a scale, a multiply-add per lane takes the scales into account.
 * A group is therefore strided: of GROUP_STEPS steps, the values of one lane. An outlier costs precision in its group only.
 */
#pragma once
#include "matrix.h"

enum {
    INT8_STEP = 64,       /* inputs in a step: 16 lanes of four */
    GROUP_STEPS = 4, /* steps that share their scales; each of the last steps of a row, if fewer, has its own */
    INT8_LANES = 16,
    LANE_BYTES = 4 * INT8_LANES, /* a float32 per lane */
#ifdef __AVX512BW__
    WEIGHT_ZERO_POINT = 128 /* added to weights, since the instruction needs them unsigned */
#else
    WEIGHT_ZERO_POINT = 0
#endif
};

/* Packed: per lane what the sums start from, then per group of steps its values in order and the scales of the lanes. The
 * sums start from what the zero point of the weights adds to them, negated: the same for every output. */
static inline int64_t int8_row_bytes(int64_t inputs) {
    int64_t steps = inputs / INT8_STEP, groups = steps / GROUP_STEPS + steps % GROUP_STEPS;
    return LANE_BYTES + inputs + groups * LANE_BYTES;
}

/* 1 / scale of groups with these largest magnitudes; 0 for groups of (almost) zeros, whose inverse is not finite. */
static inline __m128 inverse_scales(__m128 range) {
    __m128 nonzero = _mm_cmpge_ps(range, _mm_set1_ps(1e-30f));
    return _mm_and_ps(_mm_div_ps(_mm_set1_ps(127.0f), range), nonzero);
}

/* The largest magnitudes of four lanes; NaN for those with a value that is not finite. */
static inline __m128 ranges4(const float *x, int64_t steps) {
    __m128i most[4]; /* magnitudes as integers have the same order, and NaN is above infinity */
    for (int lane = 0; lane < 4; lane++) most[lane] = _mm_setzero_si128();
    for (int64_t k = 0; k < steps * INT8_STEP; k += INT8_STEP)
        for (int lane = 0; lane < 4; lane++) {
            __m128i values = _mm_loadu_si128((const void *)(x + k + 4 * lane));
            most[lane] = _mm_max_epi32(most[lane], _mm_and_si128(values, _mm_set1_epi32(0x7FFFFFFF)));
        }
    __m128i low01 = _mm_unpacklo_epi32(most[0], most[1]), high01 = _mm_unpackhi_epi32(most[0], most[1]);
    __m128i low23 = _mm_unpacklo_epi32(most[2], most[3]), high23 = _mm_unpackhi_epi32(most[2], most[3]);
    __m128i first = _mm_max_epi32(low01, high01), second = _mm_max_epi32(low23, high23);
    __m128i both = _mm_max_epi32(_mm_unpacklo_epi64(first, second), _mm_unpackhi_epi64(first, second));
    __m128 range = _mm_castsi128_ps(both);
    return _mm_add_ps(range, _mm_sub_ps(range, range));
}

/* Values of four lanes in one step → 16 int8. */
static inline __m128i round16(const float *x, __m128 inverse) {
    __m128i lanes[4];
    lanes[0] = _mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(x), _mm_permute_ps(inverse, 0x00)));
    lanes[1] = _mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(x + 4), _mm_permute_ps(inverse, 0x55)));
    lanes[2] = _mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(x + 8), _mm_permute_ps(inverse, 0xAA)));
    lanes[3] = _mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(x + 12), _mm_permute_ps(inverse, 0xFF)));
    return _mm_packs_epi16(_mm_packs_epi32(lanes[0], lanes[1]), _mm_packs_epi32(lanes[2], lanes[3]));
}

/* Quantizes `steps` steps of a row as one group of steps; returns the end of the output.
 * zero_points: per lane what the zero point of the weights adds to its sum. */
static char *quantize_group(const float *x, int64_t steps, int32_t *zero_points, char *out) {
    float *scales = (float *)(out + steps * INT8_STEP);
    for (int lane = 0; lane < INT8_LANES; lane += 4) {
        __m128 range = ranges4(x + 4 * lane, steps), inverse = inverse_scales(range);
        __m128 scale = _mm_div_ps(range, _mm_set1_ps(127.0f));
        __m128i total = _mm_setzero_si128();
        for (int64_t k = 0; k < steps * INT8_STEP; k += INT8_STEP) {
            __m128i values = round16(x + k + 4 * lane, inverse);
            __m128i pairs = _mm_maddubs_epi16(_mm_set1_epi8(1), values);
            total = _mm_add_epi32(total, _mm_madd_epi16(pairs, _mm_set1_epi16(WEIGHT_ZERO_POINT)));
            _mm_storeu_si128((void *)(out + k + 4 * lane), values);
        }
        _mm_storeu_ps(scales + lane, scale);
        _mm_storeu_si128((void *)(zero_points + lane), total);
    }
    return (char *)(scales + INT8_LANES);
}

/* Steps in the group that starts at input k. */
static inline int64_t steps_at(int64_t k, int64_t inputs) {
    return k + GROUP_STEPS * INT8_STEP <= inputs ? GROUP_STEPS : 1;
}

static void quantize_row(const float *x, int64_t inputs, char *out) {
    float *starts = memset(out, 0, LANE_BYTES);
    int32_t zero_points[INT8_LANES];
    out += LANE_BYTES;
    for (int64_t k = 0, steps; k < inputs; k += steps * INT8_STEP) {
        steps = steps_at(k, inputs);
        out = quantize_group(x + k, steps, zero_points, out);
        const float *scales = (const float *)out - INT8_LANES;
        for (int lane = 0; lane < INT8_LANES; lane++) starts[lane] -= (float)zero_points[lane] * scales[lane];
    }
}

/* Packed for four-bit weights, whose scales differ from group to group: per group of steps its values, the scales of the
 * lanes, and the int32 that their sums start from. */
static inline int64_t int4_row_bytes(int64_t inputs) { return 2 * int8_row_bytes(inputs) - inputs - 2 * LANE_BYTES; }

static void quantize_row_for_int4(const float *x, int64_t inputs, char *out) {
    for (int64_t k = 0, steps; k < inputs; k += steps * INT8_STEP) {
        int32_t zero_points[INT8_LANES];
        steps = steps_at(k, inputs);
        out = quantize_group(x + k, steps, zero_points, out);
        for (int lane = 0; lane < INT8_LANES; lane++) zero_points[lane] = -zero_points[lane];
        memcpy(out, zero_points, LANE_BYTES);
        out += LANE_BYTES;
    }
}
