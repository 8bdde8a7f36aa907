/* Memory for one call, in one piece: what is laid out in it is laid out twice, first to learn how much there is. */
#pragma once
#include <stdint.h>
#include <stdlib.h>

typedef struct {
    char *memory; /* NULL: only counts */
    int64_t used;
} workspace;

static inline void *take(workspace *w, int64_t bytes) {
    int64_t begin = w->used;
    w->used += (bytes + 63) & ~(int64_t)63;
    return w->memory ? w->memory + begin : NULL;
}

/* Whether there was enough. Free w->memory in the end. */
static inline int claim(workspace *w) {
    w->memory = aligned_alloc(64, w->used + 64);
    w->used = 0;
    return w->memory != NULL;
}
