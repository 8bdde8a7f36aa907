/* The buffers of one forward pass, and their allocation. */
#pragma once
#include "decoder.h"

/* Columns of a buffer of rows: a projection that may be part of a fused one. */
typedef struct {
    float *data;
    int64_t stride; /* floats from row to row */
} columns;

static inline float *row_in(columns c, int64_t row) { return c.data + row * c.stride; }

/* The heads of a query, key or value, in such columns. */
typedef struct {
    columns in;
    int64_t head_stride; /* floats from head to head */
} heads;

static inline float *head_in(heads h, int64_t row, int64_t head) { return row_in(h.in, row) + head * h.head_stride; }

/* Queries of one head of keys that are computed together: `count` pairs (row, head of the group) from pair `first` of the
 * rows of a slot that begin with `row`. */
typedef struct {
    int64_t row, first;
    int count;
} query_tile;

struct block;

/* One call. Threads write only to the memory that it points to. */
typedef struct {
    const decoder *model;
    token_rows rows;
    cache cache;
    int64_t longest;          /* positions that the row with the longest past attends to */
    int64_t skipped;          /* rows before the first with logits */
    float *x;                 /* (rows, width): the residual stream */
    float *normed;            /* (rows, width) */
    heads query, key, value;
    float *attended;          /* (rows, heads · head_dim) */
    columns gate, up;         /* without a gate: `gate` is the input of the activation */
    float *inner;             /* (rows, inner): the output of the activation */
    int64_t tile_count;
    query_tile *tiles;        /* for each head of keys */
    float *scores;            /* per thread and query of a tile: scores_stride */
    float *scratch;           /* per thread: 2 · width */
    int *unfit;               /* set if a key or value does not fit into float16 */
    struct block *blocks;
    gemm head;
} step;

/* One layer of a step. */
typedef struct block {
    const step *step;
    const layer *layer;
    int64_t keys, values; /* offsets in a block of the cache */
    gemm_group qkv, mlp_in;
    gemm attention_out, down;
} block;

/* Divides the rows into tiles of up to `most` queries; returns their number. tiles may be NULL. */
static int64_t divide_queries(const decoder *model, const token_rows *rows, int most, query_tile *tiles) {
    int64_t group = model->heads / model->kv_heads, count = 0;
    for (int64_t row = 0, end; row < rows->count; row = end) {
        for (end = row + 1; end < rows->count && rows->slots[end] == rows->slots[row];) end++;
        for (int64_t first = 0, pairs = (end - row) * group; first < pairs; first += most, count++)
            if (tiles) tiles[count] = (query_tile){row, first, (int)(pairs - first < most ? pairs - first : most)};
    }
    return count;
}

/* Tiles are single queries if larger ones were too few for all threads. */
static void allocate_tiles(step *s, int threads, workspace *from) {
    int most = QUERIES;
    s->tile_count = divide_queries(s->model, &s->rows, most, NULL);
    if (s->tile_count * s->model->kv_heads < 2 * threads) s->tile_count = divide_queries(s->model, &s->rows, most = 1, NULL);
    s->tiles = allocate(from, sizeof(query_tile) * s->tile_count);
    if (s->tiles) divide_queries(s->model, &s->rows, most, s->tiles);
}

static inline int64_t scores_stride(const step *s) { return s->longest + SCORES_PADDING; }

static inline int64_t query_width(const decoder *model) { return model->heads * model->head_dim; }
static inline int64_t kv_width(const decoder *model) { return model->kv_heads * model->head_dim; }

static columns allocate_columns(int64_t rows, int64_t width, workspace *from) {
    return (columns){allocate(from, sizeof(float) * rows * width), width};
}

/* Part of fused columns. */
static columns columns_from(columns fused, int64_t first) {
    return (columns){fused.data ? fused.data + first : NULL, fused.stride};
}

static void allocate_heads(step *s, workspace *from) {
    const decoder *model = s->model;
    int64_t rows = s->rows.count, queries = query_width(model), kv = kv_width(model), dim = model->head_dim;
    int64_t stride = model->interleaved ? 3 * dim : dim;
    columns query, key, value;
    if (model->layers[0].qkv[1]) {
        query = allocate_columns(rows, queries, from);
        key = allocate_columns(rows, kv, from);
        value = allocate_columns(rows, kv, from);
    } else {
        query = allocate_columns(rows, queries + 2 * kv, from);
        key = columns_from(query, model->interleaved ? dim : queries);
        value = columns_from(query, model->interleaved ? 2 * dim : queries + kv);
    }
    s->query = (heads){query, stride};
    s->key = (heads){key, stride};
    s->value = (heads){value, stride};
}

static void allocate_mlp(step *s, workspace *from) {
    const decoder *model = s->model;
    int64_t rows = s->rows.count, inner = model->inner;
    int fused = model->gated && !model->layers[0].mlp_in[1];
    s->gate = allocate_columns(rows, fused ? 2 * inner : inner, from);
    if (model->gated) s->up = fused ? columns_from(s->gate, inner) : allocate_columns(rows, inner, from);
    s->inner = fused ? allocate(from, sizeof(float) * rows * inner) : s->gate.data;
}

static void allocate_product(gemm *g, const matrix *m, int64_t rows, const float *x, const float *residual, float *y,
                             int threads, workspace *from) {
    allocate_gemm(g, m, rows, threads, from);
    g->x = x;
    g->residual = residual;
    g->y = y;
}

static inline void keep_largest(int64_t *end, int64_t used) { *end = used > *end ? used : *end; }

/* All products share one buffer for packed activations: they are computed one after another. */
static void allocate_layer(block *b, int threads, const workspace *from, int64_t *end) {
    const step *s = b->step;
    const layer *l = b->layer;
    int64_t rows = s->rows.count;
    workspace again = *from;
    allocate_group(&b->qkv, l->qkv, l->qkv[1] ? 3 : 1, rows, s->normed, threads, &again);
    b->qkv.parts[0].y = s->query.in.data, b->qkv.parts[1].y = s->key.in.data, b->qkv.parts[2].y = s->value.in.data;
    keep_largest(end, again.used);
    again = *from;
    allocate_product(&b->attention_out, l->attention_out, rows, s->attended, s->x, s->x, threads, &again);
    keep_largest(end, again.used);
    again = *from;
    allocate_group(&b->mlp_in, l->mlp_in, l->mlp_in[1] ? 2 : 1, rows, s->normed, threads, &again);
    b->mlp_in.parts[0].y = s->gate.data, b->mlp_in.parts[1].y = s->up.data;
    keep_largest(end, again.used);
    again = *from;
    allocate_product(&b->down, l->down, rows, s->inner, s->x, s->x, threads, &again);
    keep_largest(end, again.used);
}

static void allocate_step(step *s, float *logits, int threads, workspace *from) {
    const decoder *model = s->model;
    int64_t rows = s->rows.count, width = model->width, end = 0;
    int64_t part = kv_width(model) * BLOCK_TOKENS * (s->cache.kind == HALF ? 2 : 4); /* bytes of a layer's keys */
    s->x = allocate(from, sizeof(float) * rows * width);
    s->normed = allocate(from, sizeof(float) * rows * width);
    allocate_heads(s, from);
    s->attended = allocate(from, sizeof(float) * rows * query_width(model));
    allocate_mlp(s, from);
    allocate_tiles(s, threads, from);
    s->scores = allocate(from, sizeof(float) * threads * QUERIES * scores_stride(s));
    s->scratch = allocate(from, sizeof(float) * threads * 2 * width);
    s->blocks = allocate(from, sizeof(block) * model->layer_count);
    block unused;
    for (int64_t i = 0; i < model->layer_count; i++) {
        block *b = s->blocks ? &s->blocks[i] : &unused;
        *b = (block){.step = s, .layer = &model->layers[i], .keys = 2 * i * part, .values = (2 * i + 1) * part};
        allocate_layer(b, threads, from, &end);
    }
    workspace again = *from;
    allocate_product(&s->head, model->head, rows - s->skipped, s->normed, NULL, logits, threads, &again);
    keep_largest(&end, again.used);
    from->used = end;
}
