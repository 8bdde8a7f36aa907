/* Threads that work through the same phases, one after another.
 *
 * A phase is over when its chunks are done, not when every thread has come by: one that the system has put aside
 * (another process has its core) holds nobody up, and finds the phases it missed finished. The threads are those of the
 * OpenMP runtime that torch has loaded; a pool of our own would fight with it for the cores.
 */
#pragma once
#include <immintrin.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

/* A line of the cache for each, so that threads do not wait for each other's counts. */
typedef struct {
    _Alignas(64) _Atomic int64_t count;
} tally;

/* A phase is a tally of the chunks that are done, and one for each thread of those taken of its share. All start at 0. */
static inline int64_t tallies_of(int64_t phases, int crew) { return phases * (1 + crew); }

typedef struct {
    tally *at;  /* the phase that this thread is in */
    int thread; /* from 0 */
    int crew;   /* how many threads there are */
} worker;

typedef void work(void *job, int64_t chunk, const worker *by);

/* Spins this often before it lets others have the core. */
enum { PATIENCE = 1000 };

/* Computes what is left of the share of thread `whose`; returns how many chunks. */
static inline int64_t work_off(worker *me, int whose, int64_t chunks, work *work_on, void *job) {
    int64_t first = chunks * whose / me->crew, end = chunks * (whose + 1) / me->crew, chunk, found = 0;
    tally *taken = &me->at[1 + whose];
    while (atomic_load_explicit(&taken->count, memory_order_relaxed) < end - first &&
           (chunk = first + atomic_fetch_add_explicit(&taken->count, 1, memory_order_relaxed)) < end) {
        work_on(job, chunk, me);
        found++;
    }
    return found;
}

/* Each thread takes chunks that follow each other, so that what it reads is one stream; whoever has done its own helps
 * others. Then it waits for those that others took. */
static void share(worker *me, int64_t chunks, work *work_on, void *job) {
    int64_t found = 0;
    for (int i = 0; i < me->crew; i++) found += work_off(me, (me->thread + i) % me->crew, chunks, work_on, job);
    tally *done = me->at;
    if (found) atomic_fetch_add_explicit(&done->count, found, memory_order_release);
    for (int spins = 0; atomic_load_explicit(&done->count, memory_order_acquire) < chunks; spins++)
        if (spins < PATIENCE) _mm_pause();
        else sched_yield();
    me->at += 1 + me->crew;
}
