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

typedef struct {
    _Alignas(64) _Atomic int64_t next; /* the first chunk that nobody has taken */
    _Alignas(64) _Atomic int64_t done;
} phase;

typedef struct {
    phase *at;  /* the phase that this thread is in; all start with zeros */
    int thread; /* from 0 */
} worker;

typedef void work(void *job, int64_t chunk, const worker *by);

/* Spins this often before it lets others have the core. */
enum { PATIENCE = 1000 };

/* Takes chunks as long as there are any, then waits for those that other threads took. */
static void share(worker *me, int64_t chunks, work *work_on, void *job) {
    phase *now = me->at++;
    int64_t chunk;
    while ((chunk = atomic_fetch_add_explicit(&now->next, 1, memory_order_relaxed)) < chunks) {
        work_on(job, chunk, me);
        atomic_fetch_add_explicit(&now->done, 1, memory_order_release);
    }
    for (int spins = 0; atomic_load_explicit(&now->done, memory_order_acquire) < chunks; spins++)
        if (spins < PATIENCE) _mm_pause();
        else sched_yield();
}
