#include "lane.h"

#include <stdlib.h>

#include "queues.h"

/* A preempt lane has what is waited for, and is of postcopy; multifd's are of precopy alone. */
static const struct rf_queues *queues_of(const struct rf_lane *lane) {
    return &rf_queues[lane->kind == RF_LANE_PREEMPT ? RF_REGIME_FULL : RF_REGIME_PRECOPY];
}

struct rf_lane *rf_lane_new(enum rf_lane_kind kind, bool source_side) {
    struct rf_lane *lane = calloc(1, sizeof(*lane));

    if (lane != NULL) {
        lane->kind = kind;
        lane->source_side = source_side;
        rf_leg_init(&lane->local);
        rf_leg_init(&lane->far);
        rf_pipe_init(&lane->forward, lane->forward_room, sizeof(lane->forward_room));
        rf_pipe_init(&lane->backward, lane->backward_room, sizeof(lane->backward_room));
    }
    return lane;
}

static struct rf_leg *forward_from(struct rf_lane *lane) {
    return lane->source_side ? &lane->local : &lane->far;
}

static struct rf_leg *forward_to(struct rf_lane *lane) {
    return lane->source_side ? &lane->far : &lane->local;
}

void rf_lane_join(struct rf_lane *lane, int local_fd, int far_fd, struct rf_link *link) {
    rf_leg_adopt(&lane->local, local_fd);
    rf_leg_adopt(&lane->far, far_fd);
    if (link != NULL) {
        link->bulk = lane->kind == RF_LANE_MULTIFD;
    }
    rf_leg_adopt_link(&lane->far, link);
    rf_leg_set_unsent(forward_to(lane), queues_of(lane)->unsent);
    rf_leg_set_send_buffer(forward_to(lane), queues_of(lane)->to_qemu);
    if (!lane->source_side && lane->kind == RF_LANE_PREEMPT) {
        rf_leg_bound_unread(&lane->far, RF_QUEUE_FAR, RF_LAN_ROUND_TRIP_US);
    }
}

void rf_lane_free(struct rf_lane *lane) {
    if (lane != NULL) {
        rf_leg_close(&lane->local);
        rf_leg_close(&lane->far);
        free(lane);
    }
}

static const struct rf_pipe *inward(const struct rf_lane *lane) {
    return lane->source_side ? &lane->backward : &lane->forward;
}

static const struct rf_pipe *outward(const struct rf_lane *lane) {
    return lane->source_side ? &lane->forward : &lane->backward;
}

enum rf_flow rf_lane_flow(const struct rf_lane *lane) {
    const struct rf_leg *from = lane->source_side ? &lane->local : &lane->far;
    const struct rf_leg *to = lane->source_side ? &lane->far : &lane->local;

    return rf_pipe_flow(&lane->forward, RF_FORWARD, from, to, false);
}

static enum rf_flow backward_flow(const struct rf_lane *lane) {
    const struct rf_leg *from = lane->source_side ? &lane->far : &lane->local;
    const struct rf_leg *to = lane->source_side ? &lane->local : &lane->far;

    return rf_pipe_flow(&lane->backward, RF_RETURN, from, to, false);
}

void rf_lane_want(const struct rf_lane *lane, struct pollfd *polls) {
    const struct rf_leg *from = lane->source_side ? &lane->local : &lane->far;
    const struct rf_leg *to = lane->source_side ? &lane->far : &lane->local;
    struct pollfd *from_poll = &polls[lane->source_side ? RF_LANE_LOCAL : RF_LANE_FAR];
    struct pollfd *to_poll = &polls[lane->source_side ? RF_LANE_FAR : RF_LANE_LOCAL];

    polls[RF_LANE_LOCAL] = polls[RF_LANE_FAR] = (struct pollfd){.fd = -1};
    rf_flow_want(RF_FORWARD, rf_lane_flow(lane), from, to, from_poll, to_poll);
    rf_flow_want(RF_RETURN, backward_flow(lane), to, from, to_poll, from_poll);
}

static uint64_t pass_last(struct rf_lane *lane, struct rf_tracker *tracker, uint64_t now_ns) {
    size_t n = rf_pipe_pass_last(&lane->forward, forward_from(lane), forward_to(lane));

    if (n > 0 && lane->kind == RF_LANE_PREEMPT) {
        rf_tracker_preempt_forward(tracker, lane->forward.data, n, now_ns);
    }
    return n;
}

static uint64_t move_forward(struct rf_lane *lane, struct rf_tracker *tracker, uint64_t now_ns) {
    if (!rf_pipe_pending(&lane->forward) && forward_to(lane)->at_last) {
        return pass_last(lane, tracker, now_ns);
    }
    if (!rf_pipe_pending(&lane->forward)) {
        size_t n = rf_pipe_read(&lane->forward, forward_from(lane), forward_to(lane), queues_of(lane)->chunk);

        if (n > 0 && lane->kind == RF_LANE_PREEMPT) {
            rf_tracker_preempt_forward(tracker, lane->forward.data, n, now_ns);
        }
    }
    return rf_pipe_pending(&lane->forward) ? rf_pipe_write(&lane->forward, forward_to(lane)) : 0;
}

static void move_backward(struct rf_lane *lane, enum rf_flow flow) {
    struct rf_pipe *pipe = &lane->backward;
    struct rf_leg *from = forward_to(lane);
    struct rf_leg *to = forward_from(lane);

    if (flow == RF_FLOW_DROP) {
        (void)rf_leg_read(from, pipe->data, RF_LANE_BACKWARD);
        rf_pipe_clear(pipe);
        return;
    }
    if (!rf_pipe_pending(pipe)) {
        (void)rf_pipe_read(pipe, from, to, RF_LANE_BACKWARD);
    }
    if (rf_pipe_pending(pipe)) {
        (void)rf_pipe_write(pipe, to);
    }
}

uint64_t rf_lane_move(struct rf_lane *lane, const struct pollfd *polls, struct rf_tracker *tracker,
                      uint64_t now_ns) {
    struct rf_leg *from = forward_from(lane);
    struct rf_leg *to = forward_to(lane);
    short from_events = rf_leg_events(from, &polls[lane->source_side ? RF_LANE_LOCAL : RF_LANE_FAR]);
    short to_events = rf_leg_events(to, &polls[lane->source_side ? RF_LANE_FAR : RF_LANE_LOCAL]);
    enum rf_flow backward = backward_flow(lane);
    uint64_t passed = 0;

    if (rf_flow_due(RF_FORWARD, rf_lane_flow(lane), from, from_events, to_events)) {
        passed = move_forward(lane, tracker, now_ns);
    }
    if (rf_flow_due(RF_RETURN, backward, to, to_events, from_events)) {
        move_backward(lane, backward);
    }
    return passed;
}

/* Whether a session is offered that nobody has taken up yet. A destination's lane does not end before that is
 * decided: who takes it up then would find it gone, which is a loss there. */
static bool is_undecided(const struct rf_lane *lane) {
    const struct rf_link *link = lane->far.link;

    return !lane->source_side && link != NULL && link->state == RF_LINK_OFFERED && !link->in_being;
}

void rf_lane_settle(struct rf_lane *lane) {
    rf_leg_see_failed_write(&lane->far);
    if (rf_leg_lost(&lane->local)) {
        bool out = !lane->local.may_read;

        if (out || lane->source_side) { /* a source's is read for as long as the far leg takes it */
            rf_leg_close(&lane->local);
        }
        if (out && !rf_pipe_pending(outward(lane)) && !is_undecided(lane)) {
            rf_leg_end_writing(&lane->far);
            if (!lane->source_side) {
                rf_leg_close(&lane->far); /* as QEMU's own would, so that the source notices */
            }
        }
    }
    if (rf_leg_lost(&lane->far) && !lane->far.may_read && lane->far_dealt_with) {
        if (lane->passes_far_end && !rf_pipe_pending(inward(lane))) {
            rf_leg_end_writing(&lane->local);
        }
        if (!lane->passes_far_end || !lane->far.may_write) { /* else it has only ended its writing */
            rf_leg_close(&lane->far);
        }
    }
}

void rf_lane_shut_far(struct rf_lane *lane) {
    rf_leg_shut(&lane->far);
    lane->far_dealt_with = true;
}

bool rf_lane_unsent(const struct rf_lane *lane) {
    return lane->far.may_write && (rf_pipe_pending(&lane->forward) || rf_leg_unread(&lane->local) > 0);
}
