/* A decoder-only transformer as data, the rows to compute and the cache. */
#pragma once
#include "attention.h"
#include "gemm_group.h"
#include "rowwise.h"

typedef struct {
    norm before_attention, before_mlp;
    norm query, key;        /* of each head; weight.data is NULL if there are none */
    const matrix *qkv[3];   /* query, key and value; or one that contains all of them, and NULL */
    const matrix *attention_out;
    const matrix *mlp_in[2]; /* gated: gate and up, or one that contains both, and NULL. Otherwise up, and NULL */
    const matrix *down;
    int64_t window;         /* tokens that a token attends to, itself included; 0: all */
} layer;

typedef struct {
    int64_t width, heads, kv_heads, head_dim, inner, layer_count;
    int64_t norm_kind, activation;
    int64_t gated;               /* the MLP is activation(gate) · up */
    int64_t interleaved;         /* a fused qkv has query, key and value of the first head, then of the second … */
    int64_t parallel;            /* attention and MLP read the same residual stream (GPT-NeoX) */
    int64_t rotary;              /* pairs of values of a head that are rotated; 0: none */
    const matrix *tokens;        /* embeddings */
    const float *token_scales;   /* (width,): of each of their channels */
    const matrix *positions;     /* embeddings, or NULL */
    const float *turns;          /* (positions, 2 · rotary): cosines, then sines */
    const layer *layers;
    norm last;
    const matrix *head;
    float epsilon;
    float attention_scale;       /* of scores */
} decoder;

/* The tokens to compute, all (rows,). Rows of one slot are adjacent, in ascending order of position. */
typedef struct {
    const int64_t *ids, *slots, *positions;
    int64_t count;
} token_rows;

/* Keys and values in blocks. A block is (layers, 2, kv heads, BLOCK_TOKENS, head_dim). */
typedef struct {
    char *pool;
    const int32_t *tables; /* (slots, table_length): the blocks of each slot */
    int64_t table_length;
    int64_t block_bytes;   /* from block to block */
    int64_t kind;          /* FLOAT, HALF or ROUNDED */
} cache;
