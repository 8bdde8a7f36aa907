/* A forward pass of a decoder over rows of any sequences, as phases of a thread team: no thread waits for Python in
 * between. */
#include <omp.h>
#include <string.h>

#include "decoder_step.h"

static void embed(void *job, int64_t row, const worker *by) {
    const step *s = job;
    const decoder *model = s->model;
    int64_t width = model->width;
    float *scratch = s->scratch + by->thread * 2 * width, *x = s->x + row * width;
    const float *token = dequantized(model->tokens, s->rows.ids[row], scratch), *position = NULL;
    if (model->positions) position = dequantized(model->positions, s->rows.positions[row], scratch + width);
    for (int64_t k = 0; k < width; k += SIMD_WIDTH) {
        floats value = mul(load(token + k), load(model->token_scales + k));
        store(x + k, position ? add(value, load(position + k)) : value);
    }
}

/* Normalizes row `from` of the residual stream into row `to` of `normed`. */
static void normalize_row(const step *s, const norm *n, int64_t from, int64_t to, const worker *by) {
    int64_t width = s->model->width;
    float *scratch = s->scratch + by->thread * 2 * width;
    (s->model->norm_kind == RMS_NORM ? rms_norm : layer_norm)(n, s->x + from * width, width, s->model->epsilon, scratch,
                                                              s->normed + to * width);
}

static void before_attention(void *job, int64_t row, const worker *by) {
    block *b = job;
    normalize_row(b->step, &b->layer->before_attention, row, row, by);
    pack_group(&b->qkv, row, by);
}

static void before_mlp(void *job, int64_t row, const worker *by) {
    block *b = job;
    normalize_row(b->step, &b->layer->before_mlp, row, row, by);
    pack_group(&b->mlp_in, row, by);
}

static void before_head(void *job, int64_t row, const worker *by) {
    step *s = job;
    normalize_row(s, &s->model->last, s->skipped + row, row, by);
    pack(&s->head, row, by);
}

static void activate(void *job, int64_t row, const worker *by) {
    block *b = job;
    const step *s = b->step;
    int64_t inner = s->model->inner;
    const float *up = s->model->gated ? row_in(s->up, row) : NULL;
    apply_activation((enum activation)s->model->activation, row_in(s->gate, row), up, inner, s->inner + row * inner);
    pack(&b->down, row, by);
}

/* Normalizes and rotates the `count` heads of a query or a key. */
static void position_heads(const step *s, const norm *n, heads of, int64_t count, int64_t row, const worker *by) {
    const decoder *model = s->model;
    float *scratch = s->scratch + by->thread * 2 * model->width;
    const float *turn = model->turns + s->rows.positions[row] * 2 * model->rotary;
    for (int64_t i = 0; i < count; i++) {
        float *head = head_in(of, row, i);
        if (n->weight.data) rms_norm(n, head, model->head_dim, model->epsilon, scratch, head);
        if (model->rotary) rotate(head, turn, model->rotary);
    }
}

static inline head_blocks blocks_of(const block *b, int64_t row, int64_t kv_head) {
    const cache *c = &b->step->cache;
    int64_t offset = kv_head * b->step->model->head_dim * BLOCK_TOKENS * (c->kind == HALF ? 2 : 4);
    return (head_blocks){c->pool, c->tables + b->step->rows.slots[row] * c->table_length, c->block_bytes,
                         b->keys + offset, b->values + offset};
}

static void append_head(const step *s, char *to, int64_t at, const float *values) {
    int64_t dim = s->model->head_dim;
    int kind = (int)s->cache.kind, fits = kind == FLOAT || fits_half(values, dim);
    if (kind == HALF && !fits) __atomic_store_n(s->unfit, 1, __ATOMIC_RELAXED);
    store_head(to, at * dim, values, dim, kind, fits);
}

/* Positions a row's queries and keys, and appends its keys and values to the cache. */
static void append(void *job, int64_t row, const worker *by) {
    const block *b = job;
    const step *s = b->step;
    const decoder *model = s->model;
    int64_t position = s->rows.positions[row], at = position % BLOCK_TOKENS;
    position_heads(s, &b->layer->query, s->query, model->heads, row, by);
    position_heads(s, &b->layer->key, s->key, model->kv_heads, row, by);
    for (int64_t head = 0; head < model->kv_heads; head++) {
        head_blocks h = blocks_of(b, row, head);
        char *to = (char *)block_at(&h, position / BLOCK_TOKENS);
        append_head(s, to + h.keys, at, head_in(s->key, row, head));
        append_head(s, to + h.values, at, head_in(s->value, row, head));
    }
}

/* Query `q` of a tile: its row is row + (first + q) / group. */
static attention_query query_of(const block *b, const query_tile *t, int64_t kv_head, int q, float *scores) {
    const step *s = b->step;
    const decoder *model = s->model;
    int64_t group = model->heads / model->kv_heads, pair = t->first + q, row = t->row + pair / group;
    int64_t head = kv_head * group + pair % group, window = b->layer->window, end = s->rows.positions[row] + 1;
    return (attention_query){
        .query = head_in(s->query, row, head),
        .out = s->attended + row * query_width(model) + head * model->head_dim,
        .start = window && end > window ? end - window : 0,
        .end = end,
        .scores = scores + q * scores_stride(s),
    };
}

/* A chunk is a tile of one head of keys; tiles of the same head follow each other. */
static void attend_tile(void *job, int64_t chunk, const worker *by) {
    const block *b = job;
    const step *s = b->step;
    int64_t kv_head = chunk / s->tile_count, last = s->tile_count * s->model->kv_heads - 1;
    int64_t next = chunk < last ? chunk + 1 : chunk;
    const query_tile *t = &s->tiles[chunk % s->tile_count], *following = &s->tiles[next % s->tile_count];
    attention_tile a = {.of = blocks_of(b, t->row, kv_head),
                        .next = blocks_of(b, following->row, next / s->tile_count),
                        .dim = s->model->head_dim,
                        .scale = s->model->attention_scale};
    for (int q = 0; q < t->count; q++) {
        attention_query found = query_of(b, t, kv_head, q, s->scores + by->thread * QUERIES * scores_stride(s));
        a.start = q && a.start < found.start ? a.start : found.start;
        a.end = a.end > found.end ? a.end : found.end;
        a.queries[q] = found;
    }
    attend(&a, t->count, s->cache.kind == HALF);
}

enum { PHASES_PER_LAYER = 10, OTHER_PHASES = 3 };

static void run_mlp_in(const step *s, block *b, worker *me) {
    parallel_for(me, s->rows.count, before_mlp, b);
    parallel_for(me, group_chunks(&b->mlp_in), multiply_group, &b->mlp_in);
}

/* All phases of a step, run by every thread. */
static void run(step *s, worker *me) {
    const decoder *model = s->model;
    int64_t rows = s->rows.count;
    parallel_for(me, rows, embed, s);
    for (block *b = s->blocks, *end = b + model->layer_count; b < end; b++) {
        parallel_for(me, rows, before_attention, b);
        parallel_for(me, group_chunks(&b->qkv), multiply_group, &b->qkv);
        parallel_for(me, rows, append, b);
        parallel_for(me, s->tile_count * model->kv_heads, attend_tile, b);
        if (model->parallel) run_mlp_in(s, b, me); /* before attention adds to the residual stream */
        parallel_for(me, rows, pack, &b->attention_out);
        parallel_for(me, gemm_chunks(&b->attention_out), multiply, &b->attention_out);
        if (!model->parallel) run_mlp_in(s, b, me);
        parallel_for(me, rows, activate, b);
        parallel_for(me, gemm_chunks(&b->down), multiply, &b->down);
    }
    parallel_for(me, rows - s->skipped, before_head, s);
    parallel_for(me, gemm_chunks(&s->head), multiply, &s->head);
}

/* Compared by Python with its own structures when the library is loaded. */
const int64_t bitdial_sizeof_norm = sizeof(norm), bitdial_sizeof_layer = sizeof(layer);
const int64_t bitdial_sizeof_decoder = sizeof(decoder), bitdial_sizeof_token_rows = sizeof(token_rows);
const int64_t bitdial_sizeof_cache = sizeof(cache);
const int64_t bitdial_block_tokens = BLOCK_TOKENS;

/* Computes rows and appends their keys and values. logits (wanted, vocabulary): of the last `wanted` rows.
 * Widths are multiples of 32, head dimensions and inner widths of 8; a head dimension with norms of heads is a multiple of
 * 16. Returns 0; -1 if out of memory; 1 if the cache is float16 and keys or values do not fit, which makes the results
 * invalid; PHASES_MISCOUNTED. */
int bitdial_decode(const decoder *model, const token_rows *rows, const cache *kv, int64_t wanted, float *logits,
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
