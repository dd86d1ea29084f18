/*
 * Log-linear histogram of latencies in nanoseconds: 32 steps to each doubling, so a value read back is at
 * most 1/32 above the one recorded. One writer, any number of readers, relaxed atomics: a reader sees each
 * counter whole, and counters that may be a few records apart.
 */
#ifndef RF_HISTOGRAM_H
#define RF_HISTOGRAM_H

#include <stdatomic.h>
#include <stdint.h>

#define RF_HISTOGRAM_STEP_BITS 5
#define RF_HISTOGRAM_BUCKETS ((64 - RF_HISTOGRAM_STEP_BITS + 1) << RF_HISTOGRAM_STEP_BITS)

struct rf_histogram {
    _Atomic uint64_t buckets[RF_HISTOGRAM_BUCKETS];
    _Atomic uint64_t sum;
    _Atomic uint64_t max;
};

/* cffi: begin */
struct rf_histogram_snapshot {
    uint64_t count;
    uint64_t sum; /* ns */
    uint64_t max; /* ns, exact */
    uint64_t buckets[1920];
};

/* The smallest upper bound of a bucket such that at least this share (0 to 1) of the records lie at or below
 * it, never above the maximum; 0 when there are none. */
uint64_t rf_histogram_quantile(const struct rf_histogram_snapshot *snapshot, double share);

/* How many records lie in buckets wholly at or below this many ns. */
uint64_t rf_histogram_at_most(const struct rf_histogram_snapshot *snapshot, uint64_t ns);
/* cffi: end */

void rf_histogram_record(struct rf_histogram *histogram, uint64_t ns);
void rf_histogram_snapshot(const struct rf_histogram *histogram, struct rf_histogram_snapshot *out);

#endif
