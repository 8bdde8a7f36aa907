/* Memory for one call, in one block. Every buffer is allocated twice: first to add up the size, then for its address. */
#pragma once
#include <stdint.h>
#include <stdlib.h>

typedef struct {
    char *memory; /* NULL: only sizes are added up */
    int64_t used;
} workspace;

static inline void *allocate(workspace *w, int64_t bytes) {
    int64_t begin = w->used;
    w->used += (bytes + 63) & ~(int64_t)63;
    return w->memory ? w->memory + begin : NULL;
}

/* Allocates the block; returns 0 if there is no memory. The caller frees w->memory. */
static inline int reserve(workspace *w) {
    w->memory = aligned_alloc(64, w->used + 64);
    w->used = 0;
    return w->memory != NULL;
}
