/* A forward pass of GPT-2 over rows of any sequences, as phases of a thread team: no thread waits for Python in between. */
#include <omp.h>
#include <string.h>

#include "attention.h"
#include "gemm.h"
#include "rowwise.h"

typedef struct {
    norm before_attention, before_mlp;
    const matrix *qkv, *attention_out, *up, *down;
} layer;

typedef struct {
    int64_t width, heads, layer_count;
    const matrix *tokens, *positions; /* embeddings */
    const layer *layers;
    norm last;
    const matrix *head;
    float epsilon;
} gpt2;

/* The tokens to compute, all (rows,). Rows of one slot are adjacent, in ascending order of position. */
typedef struct {
    const int64_t *ids, *slots, *positions;
    int64_t count;
} token_rows;

/* Keys and values per layer, (slots, heads, context, dim) each. */
typedef struct {
    char *const *keys, *const *values;
    int64_t context;
    int64_t kind; /* FLOAT, HALF or ROUNDED */
} cache;

struct block;

/* One call. Threads write only to the memory that it points to. */
typedef struct {
    const gpt2 *model;
    token_rows rows;
    cache cache;
    int64_t longest;     /* positions that the row with the longest past attends to */
    int64_t skipped;     /* rows before the first with logits */
    float *x;            /* (rows, width): the residual stream */
    float *normed;       /* (rows, width) */
    float *qkv;          /* (rows, 3 · width) */
    float *attended;     /* (rows, width) */
    float *inner;        /* (rows, inner width) */
    float *scores;       /* per thread: `longest` + 8 */
    float *scratch;      /* per thread: 2 · width */
    int *unfit;          /* set if a key or value does not fit into float16 */
    struct block *blocks;
    gemm head;
} step;

/* One layer of a step. */
typedef struct block {
    const step *step;
    const layer *layer;
    char *keys, *values;
    gemm qkv, attention_out, up, down;
} block;

/* All products share one buffer for packed activations: they are computed one after another. */
static void allocate_next_gemm(gemm *g, const matrix *m, int64_t rows, const float *x, const float *residual, float *y,
                               int threads, workspace *from, int64_t *end) {
    workspace again = *from;
    allocate_gemm(g, m, rows, threads, &again);
    g->x = x;
    g->residual = residual;
    g->y = y;
    *end = again.used > *end ? again.used : *end;
}

static void allocate_step(step *s, float *logits, int threads, workspace *from) {
    const gpt2 *model = s->model;
    int64_t rows = s->rows.count, width = model->width, inner = model->layers[0].up->outputs, end = 0;
    s->x = allocate(from, sizeof(float) * rows * width);
    s->normed = allocate(from, sizeof(float) * rows * width);
    s->qkv = allocate(from, sizeof(float) * rows * 3 * width);
    s->attended = allocate(from, sizeof(float) * rows * width);
    s->inner = allocate(from, sizeof(float) * rows * inner);
    s->scores = allocate(from, sizeof(float) * threads * (s->longest + LANES));
    s->scratch = allocate(from, sizeof(float) * threads * 2 * width);
    s->blocks = allocate(from, sizeof(block) * model->layer_count);
    block unused;
    for (int64_t i = 0; i < model->layer_count; i++) {
        const layer *l = &model->layers[i];
        block *b = s->blocks ? &s->blocks[i] : &unused;
        *b = (block){.step = s, .layer = l, .keys = s->cache.keys[i], .values = s->cache.values[i]};
        allocate_next_gemm(&b->qkv, l->qkv, rows, s->normed, NULL, s->qkv, threads, from, &end);
        allocate_next_gemm(&b->attention_out, l->attention_out, rows, s->attended, s->x, s->x, threads, from, &end);
        allocate_next_gemm(&b->up, l->up, rows, s->normed, NULL, s->inner, threads, from, &end);
        allocate_next_gemm(&b->down, l->down, rows, s->inner, s->x, s->x, threads, from, &end);
    }
    allocate_next_gemm(&s->head, model->head, rows - s->skipped, s->normed, NULL, logits, threads, from, &end);
    from->used = end;
}

static void embed(void *job, int64_t row, const worker *by) {
    const step *s = job;
    int64_t width = s->model->width;
    float *scratch = s->scratch + by->thread * 2 * width, *x = s->x + row * width;
    const float *token = dequantized(s->model->tokens, s->rows.ids[row], scratch);
    const float *position = dequantized(s->model->positions, s->rows.positions[row], scratch + width);
    for (int64_t k = 0; k < width; k += SIMD_WIDTH) store(x + k, add(load(token + k), load(position + k)));
}

/* Normalizes row `from` of the residual stream and packs it as row `to` of a product. */
static void normalize_row(const step *s, const norm *n, gemm *next, int64_t from, int64_t to, const worker *by) {
    int64_t width = s->model->width;
    float *scratch = s->scratch + by->thread * 2 * width;
    apply_norm(n, s->x + from * width, width, s->model->epsilon, scratch, s->normed + to * width);
    pack(next, to, by);
}

static void before_attention(void *job, int64_t row, const worker *by) {
    block *b = job;
    normalize_row(b->step, &b->layer->before_attention, &b->qkv, row, row, by);
}

static void before_mlp(void *job, int64_t row, const worker *by) {
    block *b = job;
    normalize_row(b->step, &b->layer->before_mlp, &b->up, row, row, by);
}

static void before_head(void *job, int64_t row, const worker *by) {
    step *s = job;
    normalize_row(s, &s->model->last, &s->head, s->skipped + row, row, by);
}

static void activate(void *job, int64_t row, const worker *by) {
    block *b = job;
    int64_t count = b->down.m->inputs;
    gelu(b->step->inner + row * count, count);
    pack(&b->down, row, by);
}

static inline int64_t head_dim(const step *s) { return s->model->width / s->model->heads; }

/* The offset of a head in a row's slot, in bytes of keys or values. */
static inline int64_t slot_head(const step *s, int64_t row, int64_t head) {
    int64_t place = (s->rows.slots[row] * s->model->heads + head) * s->cache.context * head_dim(s);
    return place * (s->cache.kind == HALF ? 2 : 4);
}

static void append_head(const step *s, char *to, int64_t at, const float *values) {
    int kind = (int)s->cache.kind, fits = kind == FLOAT || fits_half(values, head_dim(s));
    if (kind == HALF && !fits) __atomic_store_n(s->unfit, 1, __ATOMIC_RELAXED);
    store_head(to, at, values, head_dim(s), kind, fits);
}

static void append(void *job, int64_t row, const worker *by) {
    const block *b = job;
    const step *s = b->step;
    int64_t width = s->model->width, dim = head_dim(s), at = s->rows.positions[row] * dim;
    const float *key = s->qkv + row * 3 * width + width, *value = key + width;
    (void)by;
    for (int64_t head = 0; head < s->model->heads; head++, key += dim, value += dim) {
        int64_t slot = slot_head(s, row, head);
        append_head(s, b->keys + slot, at, key);
        append_head(s, b->values + slot, at, value);
    }
}

/* A chunk is one head of one row, ordered by heads, since the rows of a prompt share the keys of a head. */
static void attend_head(void *job, int64_t chunk, const worker *by) {
    const block *b = job;
    const step *s = b->step;
    int64_t head = chunk / s->rows.count, row = chunk % s->rows.count;
    int64_t width = s->model->width, dim = head_dim(s), slot = slot_head(s, row, head);
    float *scores = s->scores + by->thread * (s->longest + LANES);
    int64_t next_row = row + 1 < s->rows.count ? row + 1 : 0, next_head = next_row ? head : (head + 1) % s->model->heads;
    const char *next = b->keys + slot_head(s, next_row, next_head);
    (s->cache.kind == HALF ? attend_half : attend_float)(s->qkv + row * 3 * width + head * dim, b->keys + slot,
                                                         b->values + slot, s->rows.positions[row] + 1, dim, next,
                                                         scores, s->attended + row * width + head * dim);
}

enum { PHASES_PER_LAYER = 10, OTHER_PHASES = 3 };

/* All phases of a step, run by every thread. */
static void run(step *s, worker *me) {
    int64_t rows = s->rows.count;
    parallel_for(me, rows, embed, s);
    for (block *b = s->blocks, *end = b + s->model->layer_count; b < end; b++) {
        parallel_for(me, rows, before_attention, b);
        parallel_for(me, gemm_chunks(&b->qkv), multiply, &b->qkv);
        parallel_for(me, rows, append, b);
        parallel_for(me, rows * s->model->heads, attend_head, b);
        parallel_for(me, rows, pack, &b->attention_out);
        parallel_for(me, gemm_chunks(&b->attention_out), multiply, &b->attention_out);
        parallel_for(me, rows, before_mlp, b);
        parallel_for(me, gemm_chunks(&b->up), multiply, &b->up);
        parallel_for(me, rows, activate, b);
        parallel_for(me, gemm_chunks(&b->down), multiply, &b->down);
    }
    parallel_for(me, rows - s->skipped, before_head, s);
    parallel_for(me, gemm_chunks(&s->head), multiply, &s->head);
}

/* Compared by Python with its own structures when the library is loaded. */
const int64_t bitdial_sizeof_norm = sizeof(norm), bitdial_sizeof_layer = sizeof(layer);
const int64_t bitdial_sizeof_gpt2 = sizeof(gpt2), bitdial_sizeof_token_rows = sizeof(token_rows);
const int64_t bitdial_sizeof_cache = sizeof(cache);

/* Computes rows and appends their keys and values. logits (wanted, vocabulary): of the last `wanted` rows.
 * Widths are multiples of 32, head dimensions of 8. Returns 0; -1 if out of memory; 1 if the cache is float16 and keys or
 * values do not fit, which makes the results invalid; PHASES_MISCOUNTED. */
int bitdial_gpt2(const gpt2 *model, const token_rows *rows, const cache *kv, int64_t wanted, float *logits,
                 int threads) {
    int unfit = 0, status = 0;
    step s = {.model = model, .rows = *rows, .cache = *kv, .skipped = rows->count - wanted, .unfit = &unfit};
    for (int64_t row = 0; row < rows->count; row++)
        if (rows->positions[row] >= s.longest) s.longest = rows->positions[row] + 1;
    int64_t phases = model->layer_count * PHASES_PER_LAYER + OTHER_PHASES;
    int64_t counters = sizeof(counter) * counter_count(phases, threads);
    workspace space = {0};
    allocate(&space, counters);
    allocate_step(&s, logits, threads, &space);
    if (!reserve(&space)) return -1;
    counter *first = allocate(&space, counters);
    allocate_step(&s, logits, threads, &space);
    memset(first, 0, counters);
#pragma omp parallel num_threads(threads) reduction(min : status)
    {
        worker me = start_worker(first, phases, omp_get_thread_num(), threads);
        run(&s, &me);
        if (!phases_match(&me)) status = PHASES_MISCOUNTED;
    }
    free(space.memory);
    return status ? status : unfit;
}
