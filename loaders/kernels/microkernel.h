/* Microkernels: a tile of a few rows × CHANNELS outputs, whose sums stay in registers over all inputs. */
#pragma once
#include "activations.h"

/* If fewer than CHANNELS outputs are left, the first takes the place of the missing ones and is not stored again. */
typedef struct {
    const matrix *m;
    const packed_activations *x;
    const float *residual; /* (rows, outputs) or NULL */
    float *y;              /* (rows, outputs) */
    int64_t output;        /* the first of CHANNELS */
    int channels;          /* how many of them exist */
    __m128 bias;           /* per channel */
    const char *w[CHANNELS];
    const char *next;      /* weights of the next group, to prefetch */
    int64_t next_lines;    /* cache lines of them to prefetch per PREFETCH_INTERVAL */
} tile;

enum {
    PREFETCH_INTERVAL = 64, /* inputs between two prefetches */
    PREFETCH_REPEAT = 4096  /* bytes between the two prefetches of a line */
};

/* Prefetches a line into the second-level cache, twice, since a core with many outstanding loads drops some. (Prefetching
 * into the first level is no faster: it has fewer outstanding loads than memory could serve.) */
static inline __attribute__((always_inline)) void prefetch(const char *at) {
    _mm_prefetch(at + PREFETCH_REPEAT, _MM_HINT_T1);
    _mm_prefetch(at, _MM_HINT_T1);
}

/* Prefetches the next group in address order, so that the hardware prefetcher recognizes the stream. */
static inline __attribute__((always_inline)) void prefetch_next(const tile *t, int64_t weight) {
    const char *at = t->next + weight * t->next_lines; /* 64 bytes per line, 64 inputs per interval */
    for (int64_t i = 0; i < t->next_lines; i++) prefetch(at + i * 64);
}

/* for (k …) in steps of STEP over a packed row, prefetching once per interval. */
#define FOR_EACH_K(t, k, STEP) \
    for (int64_t k = 0, stop, count = packed_count((t)->m); k < count; k = stop) \
        for (stop = k + PREFETCH_INTERVAL < count ? k + PREFETCH_INTERVAL : count, prefetch_next(t, k); k < stop; k += STEP)

/* Stores the sums of one row, plus bias and residual. */
static inline void store_sums(const tile *t, int64_t row, __m128 sums) {
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
/* Four rows, one per quarter. */
static inline void store_quarters(const tile *t, int64_t row, floats sums) {
    store_sums(t, row, _mm512_castps512_ps128(sums));
    store_sums(t, row + 1, _mm512_extractf32x4_ps(sums, 1));
    store_sums(t, row + 2, _mm512_extractf32x4_ps(sums, 2));
    store_sums(t, row + 3, _mm512_extractf32x4_ps(sums, 3));
}
#endif

/* `rows` is a compile-time constant after inlining. */
#define MICROKERNEL static inline __attribute__((always_inline)) void

static inline const char *x_row(const tile *t, int64_t row) { return t->x->data + row * t->x->stride; }

/* All rows of a tile, four at a time if possible: for a matrix with few inputs the reduction and the stores take a good
 * part of the time. */
MICROKERNEL store_float_sums(const tile *t, int64_t row, int rows, const floats (*sums)[CHANNELS]) {
    int done = 0;
#ifdef __AVX512BW__
    for (; done + 4 <= rows; done += 4) store_quarters(t, row + done, hsum4x4(sums + done));
#endif
    for (; done < rows; done++) store_sums(t, row + done, hsum4(sums[done]));
}

MICROKERNEL float_microkernel(const tile *t, int64_t row, int rows) {
    floats sums[ROWS][CHANNELS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < CHANNELS; c++) sums[r][c] = broadcast(0);
    FOR_EACH_K(t, k, SIMD_WIDTH) {
        floats values[ROWS];
        for (int r = 0; r < rows; r++) values[r] = load((const float *)x_row(t, row + r) + k);
        for (int c = 0; c < CHANNELS; c++) {
            floats weights = load((const float *)t->w[c] + k);
            for (int r = 0; r < rows; r++) sums[r][c] = fmadd(values[r], weights, sums[r][c]);
        }
    }
    store_float_sums(t, row, rows, (const floats(*)[CHANNELS])sums);
}

#ifdef __AVX512BF16__
MICROKERNEL bfloat16_microkernel(const tile *t, int64_t row, int rows) {
    floats sums[ROWS][CHANNELS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < CHANNELS; c++) sums[r][c] = broadcast(0);
    FOR_EACH_K(t, k, 32) {
        __m512bh values[ROWS], weights;
        for (int r = 0; r < rows; r++) memcpy(&values[r], (const uint16_t *)x_row(t, row + r) + k, sizeof weights);
        for (int c = 0; c < CHANNELS; c++) {
            memcpy(&weights, (const uint16_t *)t->w[c] + k, sizeof weights);
            for (int r = 0; r < rows; r++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], values[r], weights);
        }
    }
    store_float_sums(t, row, rows, (const floats(*)[CHANNELS])sums);
}
#endif
