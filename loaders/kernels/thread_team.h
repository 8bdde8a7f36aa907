/* A team of threads that runs the same sequence of parallel loops, its phases.
 *
 * A phase ends when its chunks are done, not when every thread has arrived: a thread that the system has descheduled
 * (another process has its core) blocks none of the others, and later skips the phases that it missed. The threads are
 * those of the OpenMP runtime that torch has loaded; a second pool would compete with it for the cores.
 */
#pragma once
#include <immintrin.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

/* One per cache line, so that threads do not wait for each other's counts. */
typedef struct {
    _Alignas(64) _Atomic int64_t count;
} counter;

/* A phase has a counter of finished chunks, and one per thread of chunks taken from its range. All start at 0. */
static inline int64_t counter_count(int64_t phases, int team_size) { return phases * (1 + team_size); }

typedef struct {
    counter *at;        /* of this thread's current phase */
    const counter *end; /* behind the last phase */
    int thread;         /* from 0 */
    int team_size;
    int overrun;        /* set if a phase has no counters */
} worker;

static inline worker start_worker(counter *first, int64_t phases, int thread, int team_size) {
    return (worker){first, first + counter_count(phases, team_size), thread, team_size, 0};
}

/* Whether the worker went through exactly the phases that there are counters for. */
static inline int phases_match(const worker *me) { return !me->overrun && me->at == me->end; }

enum { PHASES_MISCOUNTED = -2 }; /* the status of a call whose phases didn't match */

typedef void chunk_function(void *job, int64_t chunk, const worker *by);

enum { SPINS_BEFORE_YIELD = 1000 };

/* Computes what is left of the range of thread `owner`; returns the number of chunks computed. */
static inline int64_t run_chunks(worker *me, int owner, int64_t chunks, chunk_function *function, void *job) {
    int64_t first = chunks * owner / me->team_size, end = chunks * (owner + 1) / me->team_size, chunk, found = 0;
    counter *taken = &me->at[1 + owner];
    while (atomic_load_explicit(&taken->count, memory_order_relaxed) < end - first &&
           (chunk = first + atomic_fetch_add_explicit(&taken->count, 1, memory_order_relaxed)) < end) {
        function(job, chunk, me);
        found++;
    }
    return found;
}

/* Runs one phase. Each thread takes consecutive chunks, so that it reads memory sequentially, then steals from the other
 * threads' ranges, and waits for the chunks that they have taken. */
static void parallel_for(worker *me, int64_t chunks, chunk_function *function, void *job) {
    if (me->at == me->end) {
        me->overrun = 1; /* all threads see it at the same phase, so none waits for another */
        return;
    }
    int64_t found = 0;
    for (int i = 0; i < me->team_size; i++)
        found += run_chunks(me, (me->thread + i) % me->team_size, chunks, function, job);
    counter *done = me->at;
    if (found) atomic_fetch_add_explicit(&done->count, found, memory_order_release);
    for (int spins = 0; atomic_load_explicit(&done->count, memory_order_acquire) < chunks; spins++)
        if (spins < SPINS_BEFORE_YIELD) _mm_pause();
        else sched_yield();
    me->at += 1 + me->team_size;
}
