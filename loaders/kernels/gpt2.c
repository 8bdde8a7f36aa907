/* A forward pass of GPT-2 over rows of any sequences, as phases for a crew: no thread waits for Python in between. */
#include <omp.h>
#include <string.h>

#include "attention.h"
#include "product.h"
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

/* Where the rows stand. All (rows,); rows of one slot lie side by side in rising order of position. */
typedef struct {
    const int64_t *ids, *slots, *positions;
    int64_t count;
} rows_of_ids;

/* Keys and values of each layer, (slots, heads, context, dim) each. */
typedef struct {
    char *const *keys, *const *values;
    int64_t context;
    int64_t kind; /* FLOAT, HALF or ROUNDED */
} cache;

struct block;

/* One call. Nothing in it changes while threads are at work, but what its pointers lead to. */
typedef struct {
    const gpt2 *model;
    rows_of_ids rows;
    cache cache;
    int64_t longest;     /* positions that the farthest row attends to */
    int64_t skipped;     /* rows before the first whose logits are wanted */
    float *x;            /* (rows, width): the residual stream */
    float *normed;       /* (rows, width) */
    float *qkv;          /* (rows, 3 · width) */
    float *attended;     /* (rows, width) */
    float *inner;        /* (rows, inner width) */
    float *scores;       /* for each thread, `longest` and 8 */
    float *scratch;      /* for each thread, 2 · width */
    int *unfit;          /* set where a key or value does not fit into half precision */
    struct block *blocks;
    product head;
} step;

/* One layer of a step. */
typedef struct block {
    const step *step;
    const layer *layer;
    char *keys, *values;
    product qkv, attention_out, up, down;
} block;

/* All products have the same memory for their operands: they are computed one after another. */
static void lay_out_next(product *p, const matrix *m, int64_t rows, const float *x, const float *residual, float *y,
                         int threads, workspace *from, int64_t *end) {
    workspace again = *from;
    lay_out_product(p, m, rows, threads, &again);
    p->x = x;
    p->residual = residual;
    p->y = y;
    *end = again.used > *end ? again.used : *end;
}

static void lay_out(step *s, float *logits, int threads, workspace *from) {
    const gpt2 *model = s->model;
    int64_t rows = s->rows.count, width = model->width, inner = model->layers[0].up->outputs, end = 0;
    s->x = take(from, sizeof(float) * rows * width);
    s->normed = take(from, sizeof(float) * rows * width);
    s->qkv = take(from, sizeof(float) * rows * 3 * width);
    s->attended = take(from, sizeof(float) * rows * width);
    s->inner = take(from, sizeof(float) * rows * inner);
    s->scores = take(from, sizeof(float) * threads * (s->longest + LANES));
    s->scratch = take(from, sizeof(float) * threads * 2 * width);
    s->blocks = take(from, sizeof(block) * model->layer_count);
    block unused;
    for (int64_t i = 0; i < model->layer_count; i++) {
        const layer *l = &model->layers[i];
        block *b = s->blocks ? &s->blocks[i] : &unused;
        *b = (block){.step = s, .layer = l, .keys = s->cache.keys[i], .values = s->cache.values[i]};
        lay_out_next(&b->qkv, l->qkv, rows, s->normed, NULL, s->qkv, threads, from, &end);
        lay_out_next(&b->attention_out, l->attention_out, rows, s->attended, s->x, s->x, threads, from, &end);
        lay_out_next(&b->up, l->up, rows, s->normed, NULL, s->inner, threads, from, &end);
        lay_out_next(&b->down, l->down, rows, s->inner, s->x, s->x, threads, from, &end);
    }
    lay_out_next(&s->head, model->head, rows - s->skipped, s->normed, NULL, logits, threads, from, &end);
    from->used = end;
}

static void embed(void *job, int64_t row, const worker *by) {
    const step *s = job;
    int64_t width = s->model->width;
    float *scratch = s->scratch + by->thread * 2 * width, *x = s->x + row * width;
    const float *token = widened(s->model->tokens, s->rows.ids[row], scratch);
    const float *position = widened(s->model->positions, s->rows.positions[row], scratch + width);
    for (int64_t k = 0; k < width; k += WIDE) store(x + k, plus(load(token + k), load(position + k)));
}

/* Row `from` of the residual stream, normalized, becomes row `to` of a product's operand. */
static void normalize_row(const step *s, const norm *n, product *next, int64_t from, int64_t to, const worker *by) {
    int64_t width = s->model->width;
    float *scratch = s->scratch + by->thread * 2 * width;
    normalize(n, s->x + from * width, width, s->model->epsilon, scratch, s->normed + to * width);
    prepare(next, to, by);
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
    prepare(&b->down, row, by);
}

static inline int64_t head_dim(const step *s) { return s->model->width / s->model->heads; }

/* Where a head of a row's slot begins, in bytes of keys or values. */
static inline int64_t slot_head(const step *s, int64_t row, int64_t head) {
    int64_t place = (s->rows.slots[row] * s->model->heads + head) * s->cache.context * head_dim(s);
    return place * (s->cache.kind == HALF ? 2 : 4);
}

static void append_head(const step *s, char *to, int64_t at, const float *values) {
    int kind = (int)s->cache.kind, fits = kind == FLOAT || fits_half(values, head_dim(s));
    if (kind == HALF && !fits) __atomic_store_n(s->unfit, 1, __ATOMIC_RELAXED);
    keep_head(to, at, values, head_dim(s), kind, fits);
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

/* A chunk is one head of one row; all rows of a head follow each other, since those of a prompt share its keys. */
static void attend_head(void *job, int64_t chunk, const worker *by) {
    const block *b = job;
    const step *s = b->step;
    int64_t head = chunk / s->rows.count, row = chunk % s->rows.count;
    int64_t width = s->model->width, dim = head_dim(s), slot = slot_head(s, row, head);
    float *scores = s->scores + by->thread * (s->longest + LANES);
    int64_t next_row = row + 1 < s->rows.count ? row + 1 : 0, next_head = next_row ? head : (head + 1) % s->model->heads;
    (s->cache.kind == HALF ? attend_half : attend_float)(s->qkv + row * 3 * width + head * dim, b->keys + slot, b->values + slot,
                                                 s->rows.positions[row] + 1, dim,
                                                 b->keys + slot_head(s, next_row, next_head), scores,
                                                 s->attended + row * width + head * dim);
}

/* What every thread goes through. */
static void run(step *s, worker *me) {
    int64_t rows = s->rows.count;
    share(me, rows, embed, s);
    for (block *b = s->blocks, *end = b + s->model->layer_count; b < end; b++) {
        share(me, rows, before_attention, b);
        share(me, chunks_of(&b->qkv), multiply, &b->qkv);
        share(me, rows, append, b);
        share(me, rows * s->model->heads, attend_head, b);
        share(me, rows, prepare, &b->attention_out);
        share(me, chunks_of(&b->attention_out), multiply, &b->attention_out);
        share(me, rows, before_mlp, b);
        share(me, chunks_of(&b->up), multiply, &b->up);
        share(me, rows, activate, b);
        share(me, chunks_of(&b->down), multiply, &b->down);
    }
    share(me, rows - s->skipped, before_head, s);
    share(me, chunks_of(&s->head), multiply, &s->head);
}

enum { PHASES_OF_A_LAYER = 10, OTHER_PHASES = 3 };

/* Computes rows and appends their keys and values. logits (wanted, vocabulary): of the last `wanted` rows.
 * Widths are multiples of 32, heads of 8. 0; -1: out of memory; 1: keys or values do not fit into half precision, in
 * which the cache is, and what was computed is of no use. */
int bitdial_gpt2(const gpt2 *model, const rows_of_ids *rows, const cache *kept, int64_t wanted, float *logits,
                 int threads) {
    int unfit = 0;
    step s = {.model = model, .rows = *rows, .cache = *kept, .skipped = rows->count - wanted, .unfit = &unfit};
    for (int64_t row = 0; row < rows->count; row++)
        if (rows->positions[row] >= s.longest) s.longest = rows->positions[row] + 1;
    int64_t tallies = sizeof(tally) * tallies_of(model->layer_count * PHASES_OF_A_LAYER + OTHER_PHASES, threads);
    workspace space = {0};
    take(&space, tallies);
    lay_out(&s, logits, threads, &space);
    if (!claim(&space)) return -1;
    tally *first = take(&space, tallies);
    lay_out(&s, logits, threads, &space);
    memset(first, 0, tallies);
#pragma omp parallel num_threads(threads)
    {
        worker me = {first, omp_get_thread_num(), threads};
        run(&s, &me);
    }
    free(space.memory);
    return unfit;
}
