/*
 * How much of the forward stream is read at once and how much of it may wait in the kernels, as a table: a
 * page that a vCPU waits for stands behind all of it, and a queue that is too short costs a wake-up for every
 * few KiB.
 *
 *     QEMU ──▶ its end of a pair ──▶ pump ──▶ far leg ═TCP═ far leg ──▶ pump ──▶ our end of a pair ──▶ QEMU
 *              RF_QUEUE_SOURCE               unsent       RF_QUEUE_FAR          to_qemu
 */
#ifndef RF_QUEUES_H
#define RF_QUEUES_H

#include <stdbool.h>
#include <stddef.h>

/* cffi: begin */
enum rf_queue {
    /* SO_SNDBUF of a source's end, for good. 8 KiB are a switch of processes for every 8 to 12 KiB that pass,
     * on links that are faster than the CPUs 1.6 times direct's time; more gains little and is latency. */
    RF_QUEUE_SOURCE = 64 * 1024,
    /* SO_RCVBUF of a destination's far leg in a LAN, for good. Where the destination is slower than the link
     * the queue stands here, and TCP lets it grow to megabytes, out of reach of the source's `unsent`. */
    RF_QUEUE_FAR = 208 * 1024,
};
/* cffi: end */

enum {
    /* Microseconds of round trip, at the most, that say LAN: so long RF_QUEUE_FAR carries 8 Gbit/s and more.
     */
    RF_LAN_ROUND_TRIP_US = 200,
    /* The destination's QEMU refuses a stream by its first bytes: the machine, the RAM blocks. Without a
     * return path a source has completed as soon as all that it sends fits into the queues, whatever becomes
     * of it. */
    RF_BEGIN_BYTES = 1024 * 1024,
};

enum rf_regime {
    RF_REGIME_BEGIN,   /* a source's first RF_BEGIN_BYTES */
    RF_REGIME_PRECOPY, /* nobody waits for a page: throughput counts */
    RF_REGIME_FREE,    /* postcopy, and who is written to takes all at once: a queue passes in no time */
    RF_REGIME_FULL,    /* postcopy, and who is written to does not: a queue is latency */
    RF_REGIMES
};

struct rf_queues {
    size_t chunk;     /* bytes that are read at once */
    unsigned unsent;  /* TCP_NOTSENT_LOWAT of a source's far leg */
    unsigned to_qemu; /* SO_SNDBUF of our end at a destination */
};

extern const struct rf_queues rf_queues[RF_REGIMES];

/* Which of postcopy's regimes it is: told by whether there was room for what was to be written. */
struct rf_fullness {
    unsigned chunks; /* written since there was no room, as far as it matters */
};

void rf_fullness_note(struct rf_fullness *fullness, bool room);
enum rf_regime rf_fullness_regime(const struct rf_fullness *fullness);

#endif
