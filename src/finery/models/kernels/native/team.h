/* Work that several threads share, phase after phase, inside one parallel region.

   A phase is over when its work is done, not when every thread has come: one that the system keeps from running is not waited for unless
   it has begun something. Waking threads costs more than a product of few rows, so they wait awake, and for others' sake not for long. */
#include <sched.h>

#define SPINS 2000

struct phase {
    _Alignas(64) int64_t taken;
    _Alignas(64) int64_t done;
};

static inline void rest(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

/* `work` of every number below `total`, which the threads take in turn; returns when all of it is done. */
static void together(struct phase *phase, int64_t total, void (*work)(const void *, int64_t), const void *with)
{
    int64_t own = 0;
    for (int64_t number; (number = __atomic_fetch_add(&phase->taken, 1, __ATOMIC_RELAXED)) < total; own++)
        work(with, number);
    if (own)
        __atomic_fetch_add(&phase->done, own, __ATOMIC_RELEASE);
    for (int spins = 0; __atomic_load_n(&phase->done, __ATOMIC_ACQUIRE) < total; spins++)
        if (spins < SPINS)
            rest();
        else
            sched_yield();
}
