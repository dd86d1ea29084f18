#include "crash.h"

#include <stdbool.h>
#include <stddef.h>
#include <unistd.h>

static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};

enum { SIGNALS = sizeof(signals) / sizeof(signals[0]) };

/* Whoever had each signal before us; the default action once we have handed it on, so that a handler that
 * hands it back to us comes to an end. */
static struct sigaction before[SIGNALS];

/* Not allocated on first use, which no signal handler may do. */
#define IN_STATIC_TLS __attribute__((tls_model("initial-exec")))
static _Thread_local _Atomic uint64_t *volatile last_word IN_STATIC_TLS;
static _Thread_local volatile uint64_t last_value IN_STATIC_TLS;

static void on_fault(int number, siginfo_t *info, void *context) {
    (void)context;
    bool own = info->si_code > 0 || (info->si_code == SI_TKILL && info->si_pid == getpid());
    if (own && last_word != NULL) {
        atomic_store_explicit(last_word, last_value, memory_order_release);
    }
    for (size_t i = 0; i < SIGNALS; i++) {
        if (signals[i] == number) {
            sigaction(number, &before[i], NULL);
            before[i] = (struct sigaction){.sa_handler = SIG_DFL};
        }
    }
    if (info->si_code <= 0) {
        raise(number);
    } /* else what the thread did is done again, and faults again */
}

void rf_crash_watch(void) {
    struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigemptyset(&ours.sa_mask);
    for (size_t i = 0; i < SIGNALS; i++) {
        struct sigaction now;
        if (sigaction(signals[i], NULL, &now) == 0 &&
            ((now.sa_flags & SA_SIGINFO) == 0 || now.sa_sigaction != on_fault)) {
            before[i] = now;
            sigaction(signals[i], &ours, NULL);
        }
    }
}

void rf_crash_last_word(_Atomic uint64_t *word, uint64_t value) {
    last_word = NULL;
    last_value = value;
    last_word = word;
    atomic_signal_fence(memory_order_seq_cst); /* what may fault is not touched before */
}

void rf_crash_let_through(sigset_t *blocked) {
    for (size_t i = 0; i < SIGNALS; i++) {
        sigdelset(blocked, signals[i]);
    }
}
