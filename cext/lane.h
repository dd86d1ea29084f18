/*
 * A lane: a further connection of a channel beside the main one, for pages alone. With postcopy-preempt there
 * is one, for the pages that were asked for, without a magic number; with multifd there are several. QEMU
 * writes on them from the source to the destination; should anything come back it passes too.
 *
 *     source's side:      local ──▶ forward ──▶ far      destination's side:     far ──▶ forward ──▶ local
 *                         local ◀── backward ◀── far                              far ◀── backward ◀── local
 */
#ifndef RF_LANE_H
#define RF_LANE_H

#include <poll.h>
#include <stdbool.h>
#include <stdint.h>

#include "leg.h"
#include "pipe.h"
#include "tracker.h"

/* cffi: begin */
enum rf_lane_kind {
    RF_LANE_PREEMPT = 0,
    RF_LANE_MULTIFD = 1,
};
/* cffi: end */

enum {
    RF_LANE_CHUNK = 64 * 1024, /* there may be 255 of them */
    RF_LANE_BACKWARD = 4 * 1024,
};

enum { RF_LANE_LOCAL, RF_LANE_FAR, RF_LANE_POLLS };

struct rf_lane {
    enum rf_lane_kind kind;
    bool source_side;
    struct rf_leg local;
    struct rf_leg far;
    struct rf_pipe forward;
    struct rf_pipe backward;
    uint8_t forward_room[RF_LANE_CHUNK];
    uint8_t backward_room[RF_LANE_BACKWARD];
    bool far_dealt_with; /* what its far leg's end does is decided */
    bool passes_far_end; /* it is passed on to QEMU */
};

/* NULL without memory. */
struct rf_lane *rf_lane_new(enum rf_lane_kind kind, bool source_side);

/* Takes ownership of both descriptors. `link`: what its far leg may be carried by, or is; NULL for none. */
void rf_lane_join(struct rf_lane *lane, int local_fd, int far_fd, struct rf_link *link);

/* Frees it; both legs are closed. */
void rf_lane_free(struct rf_lane *lane);

/* What it waits for: RF_LANE_POLLS entries. */
void rf_lane_want(const struct rf_lane *lane, struct pollfd *polls);

/*
 * Moves what can be moved, and shows the tracker the pages that pass. Returns the bytes passed on towards the
 * destination.
 */
uint64_t rf_lane_move(struct rf_lane *lane, const struct pollfd *polls, struct rf_tracker *tracker,
                      uint64_t now_ns);

/* What the direction towards the destination does now. */
enum rf_flow rf_lane_flow(const struct rf_lane *lane);

/* Passes on the end of the local leg, and of the far one where it is to be, behind all that was written
 * before it; closes what is read out. */
void rf_lane_settle(struct rf_lane *lane);

/* We end the far leg, and that does nothing more. */
void rf_lane_shut_far(struct rf_lane *lane);

/* Whether QEMU, the source's, has written what has not been written to the far leg. */
bool rf_lane_unsent(const struct rf_lane *lane);

#endif
