#include "lane.h"

#include <stdlib.h>

enum {
    PREEMPT_CHUNK = 16 * 1024, /* what is queued here is latency */
    MULTIFD_CHUNK = RF_PIPE_ROOM,
    BACKWARD_CHUNK = 4 * 1024,
};

struct rf_lane *rf_lane_new(enum rf_lane_kind kind, bool source_side, int local_fd, int far_fd) {
    struct rf_lane *lane = calloc(1, sizeof(*lane));

    if (lane != NULL) {
        lane->kind = kind;
        lane->source_side = source_side;
        rf_leg_adopt(&lane->local, local_fd);
        rf_leg_adopt(&lane->far, far_fd);
    }
    return lane;
}

void rf_lane_free(struct rf_lane *lane) {
    if (lane != NULL) {
        rf_leg_close(&lane->local);
        rf_leg_close(&lane->far);
        free(lane);
    }
}

static struct rf_leg *forward_from(struct rf_lane *lane) {
    return lane->source_side ? &lane->local : &lane->far;
}

static struct rf_leg *forward_to(struct rf_lane *lane) {
    return lane->source_side ? &lane->far : &lane->local;
}

static const struct rf_pipe *inward(const struct rf_lane *lane) {
    return lane->source_side ? &lane->backward : &lane->forward;
}

static const struct rf_pipe *outward(const struct rf_lane *lane) {
    return lane->source_side ? &lane->forward : &lane->backward;
}

void rf_lane_want(const struct rf_lane *lane, struct pollfd *polls) {
    const struct rf_leg *from = lane->source_side ? &lane->local : &lane->far;
    const struct rf_leg *to = lane->source_side ? &lane->far : &lane->local;
    struct pollfd *from_poll = &polls[lane->source_side ? RF_LANE_LOCAL : RF_LANE_FAR];
    struct pollfd *to_poll = &polls[lane->source_side ? RF_LANE_FAR : RF_LANE_LOCAL];

    polls[RF_LANE_LOCAL] = polls[RF_LANE_FAR] = (struct pollfd){.fd = -1};
    rf_pipe_want(&lane->forward, from, to, from_poll, to_poll);
    rf_pipe_want(&lane->backward, to, from, to_poll, from_poll);
    if (lane->far.state != RF_LEG_OPEN && lane->local.state == RF_LEG_OPEN) {
        rf_leg_want(&lane->local, 0, &polls[RF_LANE_LOCAL]); /* not read, but its end must show */
    }
}

uint64_t rf_lane_move(struct rf_lane *lane, const struct pollfd *polls, struct rf_tracker *tracker,
                      uint64_t now_ns) {
    struct rf_leg *from = forward_from(lane);
    struct rf_leg *to = forward_to(lane);
    short from_events = rf_leg_events(from, &polls[lane->source_side ? RF_LANE_LOCAL : RF_LANE_FAR]);
    short to_events = rf_leg_events(to, &polls[lane->source_side ? RF_LANE_FAR : RF_LANE_LOCAL]);
    uint64_t passed = 0;

    if (rf_pipe_ready(&lane->forward, to, from_events, to_events)) {
        if (!rf_pipe_pending(&lane->forward)) {
            size_t most = lane->kind == RF_LANE_PREEMPT ? PREEMPT_CHUNK : MULTIFD_CHUNK;
            size_t n = rf_pipe_read(&lane->forward, from, to, most);

            if (n > 0 && lane->kind == RF_LANE_PREEMPT) {
                rf_tracker_preempt_forward(tracker, lane->forward.data, n, now_ns);
            }
        }
        passed = rf_pipe_pending(&lane->forward) ? rf_pipe_write(&lane->forward, to) : 0;
    }
    if (rf_pipe_ready(&lane->backward, from, to_events, from_events)) {
        if (!rf_pipe_pending(&lane->backward)) {
            (void)rf_pipe_read(&lane->backward, to, from, BACKWARD_CHUNK);
        }
        if (rf_pipe_pending(&lane->backward)) {
            (void)rf_pipe_write(&lane->backward, from);
        }
    }
    if (lane->far.state != RF_LEG_OPEN && !rf_pipe_pending(inward(lane))) {
        (void)rf_leg_hung_up(&lane->local, rf_leg_events(&lane->local, &polls[RF_LANE_LOCAL]));
    }
    return passed;
}

void rf_lane_pass_end(struct rf_lane *lane) {
    if (rf_leg_lost(&lane->local)) {
        rf_leg_close(&lane->local);
        if (!rf_pipe_pending(outward(lane))) {
            rf_leg_end_writing(&lane->far);
        }
    }
    if (lane->kind == RF_LANE_MULTIFD && lane->far.state == RF_LEG_ENDED && !rf_pipe_pending(inward(lane))) {
        rf_leg_end_writing(&lane->local);
    }
}

bool rf_lane_drained(const struct rf_lane *lane) {
    bool may_bring_more = lane->kind == RF_LANE_MULTIFD && lane->far.state == RF_LEG_OPEN;

    return !may_bring_more && !rf_pipe_pending(inward(lane));
}

uint64_t rf_lane_offer(struct rf_lane *lane) {
    if (lane->source_side || !rf_pipe_pending(&lane->forward)) {
        return 0;
    }
    return rf_pipe_write(&lane->forward, &lane->local);
}
