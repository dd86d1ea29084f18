#include "histogram.h"

#define STEPS ((uint64_t)1 << RF_HISTOGRAM_STEP_BITS)

/* Values below 32 have a bucket each; above, the exponent picks a row and the next 5 bits the step in it. */
static unsigned bucket_of(uint64_t ns) {
    if (ns < STEPS) {
        return (unsigned)ns;
    }
    unsigned exponent = 63u - (unsigned)__builtin_clzll(ns);
    unsigned shift = exponent - RF_HISTOGRAM_STEP_BITS;
    return ((shift + 1) << RF_HISTOGRAM_STEP_BITS) + (unsigned)((ns >> shift) - STEPS);
}

/* The largest value that falls into a bucket. */
static uint64_t bucket_top(unsigned bucket) {
    unsigned row = bucket >> RF_HISTOGRAM_STEP_BITS;
    uint64_t step = bucket & (STEPS - 1);
    if (row == 0) {
        return step;
    }
    return ((STEPS + step) << (row - 1)) + (((uint64_t)1 << (row - 1)) - 1);
}

static void add(_Atomic uint64_t *counter, uint64_t amount) {
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + amount,
                          memory_order_relaxed);
}

void rf_histogram_record(struct rf_histogram *histogram, uint64_t ns) {
    add(&histogram->buckets[bucket_of(ns)], 1);
    add(&histogram->sum, ns);
    if (ns > atomic_load_explicit(&histogram->max, memory_order_relaxed)) {
        atomic_store_explicit(&histogram->max, ns, memory_order_relaxed);
    }
}

void rf_histogram_snapshot(const struct rf_histogram *histogram, struct rf_histogram_snapshot *out) {
    out->count = 0;
    for (unsigned i = 0; i < RF_HISTOGRAM_BUCKETS; i++) {
        out->buckets[i] = atomic_load_explicit(&histogram->buckets[i], memory_order_relaxed);
        out->count += out->buckets[i];
    }
    out->sum = atomic_load_explicit(&histogram->sum, memory_order_relaxed);
    out->max = atomic_load_explicit(&histogram->max, memory_order_relaxed);
}

uint64_t rf_histogram_quantile(const struct rf_histogram_snapshot *snapshot, double share) {
    double wanted = share * (double)snapshot->count;
    uint64_t seen = 0;
    for (unsigned i = 0; i < RF_HISTOGRAM_BUCKETS; i++) {
        seen += snapshot->buckets[i];
        if (snapshot->buckets[i] != 0 && (double)seen >= wanted) {
            return bucket_top(i) < snapshot->max ? bucket_top(i) : snapshot->max;
        }
    }
    return snapshot->max;
}

uint64_t rf_histogram_at_most(const struct rf_histogram_snapshot *snapshot, uint64_t ns) {
    uint64_t sum = 0;
    for (unsigned i = 0; i < RF_HISTOGRAM_BUCKETS && bucket_top(i) <= ns; i++) {
        sum += snapshot->buckets[i];
    }
    return sum;
}
