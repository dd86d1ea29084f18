/*
 * A last word: a thread that dies of its own fault leaves a word in memory that outlives it. Before work that
 * it might not survive it says which word, and takes that back after.
 *
 * Its own fault is a signal that the kernel raises for what it did (SIGSEGV, SIGBUS, SIGFPE, SIGILL), or that
 * this process raised itself (SIGABRT of abort(3)). What others send is not: not kill -9, not the OOM killer,
 * not a watchdog's SIGABRT.
 *
 * The handler is the process's, and hands on to whoever had the signal before: to Python's faulthandler, or
 * to the default action, so that core dump and exit status are as without it. A thread that blocks these
 * signals dies without a last word, for then the kernel takes the default action.
 */
#ifndef RF_CRASH_H
#define RF_CRASH_H

#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>

/* Has the handler in place, also where somebody has put another one there since. */
void rf_crash_watch(void);

/* What the calling thread leaves if it dies now: `value` in *word; NULL: nothing. */
void rf_crash_last_word(_Atomic uint64_t *word, uint64_t value);

/* Takes the signals in question out of a set of blocked ones. */
void rf_crash_let_through(sigset_t *blocked);

#endif
