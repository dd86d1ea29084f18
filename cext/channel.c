#include "channel.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    RETURN_AT_ONCE = 64 * 1024, /* a replay of millions of requests is not to keep all else waiting */
    LOOKS_AT_ONCE = 4096,       /* nor is the search for what is to be replayed among millions of records */
    LAST_ROUNDS = 64,           /* of moves, before a channel is closed */
    SILENCE_LOOK_MS = 250,
    STILL_LOOK_MS = 100,
    STILL_MS = 1000,    /* what is being drained brings nothing and does not end */
    MISSED_MS = 1000,   /* the end of a lane that QEMU goes on to write on was not that of the channel */
    ACKED_LOOK_MS = 10, /* nothing tells of it */
    LINGER_MS = 200,    /* a source in postcopy has been told that its destination pauses */
    ACKED_MS = 30000,   /* the other host acknowledges nothing more of what QEMU wrote before it ended */
};

static uint64_t now_ns(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t ms(uint64_t count) { return count * 1000000u; }

/* ---- what has passed ---- */

/* Whether the forward stream cannot be read, so that its facts tell nothing. */
static bool unread(const struct rf_channel *channel) {
    return rf_tracker_forward_opaque(channel->tracker) != RF_OPAQUE_NO;
}

static bool has_passed(const struct rf_channel *channel, uint32_t facts) {
    return (rf_tracker_channel_facts(channel->tracker) & facts) != 0;
}

static bool in_postcopy(const struct rf_channel *channel) {
    return rf_tracker_facts(channel->tracker) & RF_FACT_PACKAGED_BEGUN ||
           has_passed(channel, RF_FACT_RECV_BITMAP_ASKED);
}

/* Whether what is read must not pass before the lanes are there. */
static bool forward_gated(const struct rf_channel *channel) {
    return channel->lane_count < channel->lanes_wanted &&
           has_passed(channel, RF_FACT_PACKAGED_BEGUN | RF_FACT_RESUME_SENT);
}

bool rf_channel_lanes_due(const struct rf_channel *channel) {
    /* Where nothing can be read nothing is held back. */
    return channel->lane_count < channel->lanes_wanted &&
           (unread(channel) || (forward_gated(channel) && rf_pipe_pending(&channel->forward)));
}

/* Whether lanes are yet to be added that a source's QEMU has opened, or will. */
static bool lanes_come(const struct rf_channel *channel) {
    return channel->source_side && channel->stage == RF_STAGE_JOINED && !channel->no_more_lanes &&
           channel->lane_count < channel->lanes_wanted;
}

bool rf_channel_last_lanes(const struct rf_channel *channel) {
    return rf_leg_lost(&channel->local) && lanes_come(channel);
}

/* Behind device state, as every precopy migration ends, EOF cannot be read. */
static enum rf_seen seen(const struct rf_channel *channel) {
    if (has_passed(channel, RF_FACT_EOF_PASSED)) {
        return RF_SEEN_ALL;
    }
    if (!unread(channel)) {
        return has_passed(channel, RF_FACT_MULTIFD) && !channel->in_postcopy && !in_postcopy(channel)
                   ? RF_SEEN_MORE_DUE_LANES
                   : RF_SEEN_MORE_DUE;
    }
    return has_passed(channel, RF_FACT_MULTIFD) || channel->lane_count < channel->lanes_wanted
               ? RF_SEEN_UNREAD_LANES
               : RF_SEEN_UNREAD;
}

/* ---- the two directions of the main connection ---- */

static struct rf_leg *forward_from(struct rf_channel *channel) {
    return channel->source_side ? &channel->local : &channel->far;
}

static struct rf_leg *forward_to(struct rf_channel *channel) {
    return channel->source_side ? &channel->far : &channel->local;
}

static enum rf_flow forward_flow(const struct rf_channel *channel) {
    const struct rf_leg *from = channel->source_side ? &channel->local : &channel->far;
    const struct rf_leg *to = channel->source_side ? &channel->far : &channel->local;

    return rf_pipe_flow(&channel->forward, RF_FORWARD, from, to, forward_gated(channel));
}

/* Whether it can be said now: QEMU has been given whole messages. */
static bool say_due(const struct rf_channel *channel) {
    return channel->say_length > 0 && rf_replay_pending(&channel->replay) == 0 &&
           (channel->replay.partial_len > 0 || rf_tracker_return_at_boundary(channel->tracker));
}

/* Whether QEMU, or the other host, is to be given something of the return path now. */
static bool return_in_hand(const struct rf_channel *channel) {
    return rf_replay_pending(&channel->replay) > 0 || say_due(channel);
}

static enum rf_flow return_flow(const struct rf_channel *channel) {
    const struct rf_leg *from = channel->source_side ? &channel->far : &channel->local;
    const struct rf_leg *to = channel->source_side ? &channel->local : &channel->far;
    enum rf_taker taker = !to->may_write          ? RF_TAKER_GONE
                          : channel->return_waits ? RF_TAKER_FULL
                                                  : RF_TAKER_READY;

    return rf_ends_flow(RF_RETURN, from->may_read, return_in_hand(channel), taker);
}

static void forward_write(struct rf_channel *channel) {
    if (!forward_gated(channel)) {
        channel->forward_bytes += rf_pipe_write(&channel->forward, forward_to(channel));
        if (rf_pipe_pending(&channel->forward)) {
            rf_fullness_note(&channel->fullness, false);
        }
    }
}

static void forward_pass_last(struct rf_channel *channel) {
    size_t n;

    if (!unread(channel) && channel->lane_count < channel->lanes_wanted) {
        return; /* it might be what is not to pass before the lanes are there */
    }
    n = rf_pipe_pass_last(&channel->forward, forward_from(channel), forward_to(channel));
    if (n > 0) {
        rf_tracker_forward(channel->tracker, channel->forward.data, n, now_ns());
        channel->forward_bytes += n;
    }
}

static void set_queues(struct rf_channel *channel, enum rf_regime regime) {
    channel->regime = regime;
    rf_leg_set_unsent(forward_to(channel), rf_queues[regime].unsent);
    rf_leg_set_send_buffer(forward_to(channel), rf_queues[regime].to_qemu);
}

static enum rf_regime regime_now(const struct rf_channel *channel) {
    if (rf_channel_is_short(channel)) {
        return rf_fullness_regime(&channel->fullness);
    }
    return channel->source_side && channel->forward_bytes < RF_BEGIN_BYTES ? RF_REGIME_BEGIN
                                                                           : RF_REGIME_PRECOPY;
}

static void forward_read(struct rf_channel *channel) {
    enum rf_regime regime = regime_now(channel);
    size_t n;

    if (regime != channel->regime) {
        set_queues(channel, regime);
    }
    n = rf_pipe_read(&channel->forward, forward_from(channel), forward_to(channel), rf_queues[regime].chunk);
    if (rf_channel_is_short(channel) && (n > 0 || channel->forward.waits)) {
        rf_fullness_note(&channel->fullness, !channel->forward.waits);
    }
    if (n > 0) {
        rf_tracker_forward(channel->tracker, channel->forward.data, n, now_ns());
        forward_write(channel);
    }
}

static void say(struct rf_channel *channel) {
    size_t n = rf_leg_write(&channel->local, channel->say, channel->say_length);

    channel->say_length -= n;
    memmove(channel->say, channel->say + n, channel->say_length);
}

static void return_write(struct rf_channel *channel) {
    struct rf_leg *to = forward_from(channel);
    struct rf_replay *replay = &channel->replay;
    unsigned looks = LOOKS_AT_ONCE;
    size_t written = 0;

    for (;;) {
        size_t n;

        rf_replay_refill(replay, &looks, now_ns());
        if (rf_replay_pending(replay) == 0) {
            break;
        }
        n = written < RETURN_AT_ONCE
                ? rf_leg_write(to, replay->out.data + replay->out.off, rf_replay_pending(replay))
                : 0;
        replay->out.off += n;
        channel->return_bytes += n;
        written += n;
        if (n == 0) {
            break;
        }
    }
    if (say_due(channel)) {
        say(channel);
    }
    if (!to->may_write) {
        rf_replay_discard(replay);
    }
}

static void return_read(struct rf_channel *channel) {
    struct rf_leg *to = forward_from(channel);
    size_t n;

    /* With the far leg lost, what the destination says is still read: its PONG ends a hold (legs.py). */
    if (to->may_write && !rf_leg_writable(to)) {
        channel->return_waits = true;
        return;
    }
    channel->return_waits = false;
    n = rf_leg_read(forward_to(channel), channel->backward, sizeof(channel->backward));
    if (n > 0) {
        rf_replay_feed(&channel->replay, channel->backward, n, now_ns());
        if (channel->replay.foreign && channel->far.state == RF_LEG_OPEN) {
            channel->far.state = RF_LEG_REFUSED;
            rf_leg_shut(&channel->far);
            channel->far.may_read = false;
        }
        if (to->may_write) {
            return_write(channel);
        } else {
            rf_replay_discard(&channel->replay);
        }
    }
}

static void move_forward(struct rf_channel *channel, short from_events, short to_events) {
    if (rf_flow_due(RF_FORWARD, forward_flow(channel), forward_from(channel), from_events, to_events)) {
        if (rf_pipe_pending(&channel->forward)) {
            forward_write(channel);
        } else if (forward_to(channel)->at_last) {
            forward_pass_last(channel);
        } else {
            forward_read(channel);
        }
    }
}

static void move_return(struct rf_channel *channel, short from_events, short to_events) {
    if (!forward_from(channel)->may_write) {
        rf_replay_discard(&channel->replay);
    } else if (!return_in_hand(channel)) {
        rf_replay_forward_passed(&channel->replay, now_ns());
        if (return_in_hand(channel) || channel->replay.replaying) {
            return_write(channel);
        }
    }
    if (rf_flow_due(RF_RETURN, return_flow(channel), forward_to(channel), from_events, to_events)) {
        if (return_in_hand(channel) && forward_from(channel)->may_write) {
            return_write(channel);
        } else {
            return_read(channel);
        }
    }
}

/* ---- lanes ---- */

static enum rf_connection connection_of(const struct rf_lane *lane) {
    return lane->kind == RF_LANE_PREEMPT ? RF_PREEMPT : RF_MULTIFD;
}

static enum rf_deed deed_of(const struct rf_channel *channel, const struct rf_lane *lane) {
    return rf_ends_deed(connection_of(lane), false, channel->source_side, lane->far.state == RF_LEG_ENDED,
                        seen(channel));
}

/* Whether a lane has ended in order that may be written on yet, which was not the end then. */
static bool lane_is_missed(const struct rf_channel *channel, const struct rf_lane *lane) {
    return channel->stage == RF_STAGE_JOINED && rf_leg_lost(&lane->far) && lane->local.state == RF_LEG_OPEN &&
           !has_passed(channel, RF_FACT_SHUT_PASSED) && deed_of(channel, lane) == RF_DEED_MISSED;
}

static void settle_lane(struct rf_channel *channel, struct rf_lane *lane) {
    rf_leg_see_failed_write(&lane->far);
    if (rf_leg_lost(&lane->far) && !lane->far_dealt_with) {
        enum rf_deed deed = deed_of(channel, lane);

        lane->far_dealt_with = true;
        lane->passes_far_end = deed == RF_DEED_PASS_ON;
        if (deed == RF_DEED_LOSS && channel->far.state == RF_LEG_OPEN) {
            channel->far.state = lane->far.state;
            channel->far.error = lane->far.error;
            rf_leg_shut(&channel->far);
        }
    }
    rf_lane_settle(lane);
}

/*
 * A channel that misses a lane is lost, unless it ends by itself: a source may write a last word on the lane
 * behind EOF, when the destination has ended it already (migration/migration.c,
 * migration_completion_postcopy), and must have SHUT then.
 */
static void mind_missed_lane(struct rf_channel *channel) {
    bool missed = false;

    for (unsigned i = 0; i < channel->lane_count; i++) {
        missed = missed || lane_is_missed(channel, channel->lanes[i]);
    }
    if (!missed) {
        channel->missed_from_ns = 0;
    } else if (channel->missed_from_ns != 0 && now_ns() - channel->missed_from_ns >= ms(MISSED_MS)) {
        channel->far.state = RF_LEG_ENDED;
        rf_leg_shut(&channel->far);
    }
}

/* ---- the ends ---- */

static void go(struct rf_channel *channel, enum rf_occasion occasion) {
    enum rf_stage next = rf_ends_next(channel->stage, occasion);

    if (next != channel->stage) {
        channel->stage = next;
        channel->still_from_ns = 0;
    }
}

static void mark_lost(struct rf_channel *channel) {
    if (channel->lost_ns == 0) {
        channel->lost_ns = now_ns();
        rf_tracker_channel_lost(channel->tracker);
    }
}

static void shut_far_legs(struct rf_channel *channel) {
    rf_leg_shut(&channel->far);
    for (unsigned i = 0; i < channel->lane_count; i++) {
        rf_lane_shut_far(channel->lanes[i]);
    }
}

/* How long nothing has changed of what is measured, in ns. */
static uint64_t still_for(struct rf_channel *channel, uint64_t measure) {
    uint64_t now = now_ns();

    if (channel->still_from_ns == 0 || channel->still_at != measure) {
        channel->still_from_ns = now;
        channel->still_at = measure;
    }
    return now - channel->still_from_ns;
}

static bool moves(enum rf_flow flow) { return flow == RF_FLOW_READ || flow == RF_FLOW_WRITE; }

static bool lanes_move(const struct rf_channel *channel) {
    for (unsigned i = 0; i < channel->lane_count; i++) {
        if (moves(rf_lane_flow(channel->lanes[i]))) {
            return true;
        }
    }
    return seen(channel) == RF_SEEN_UNREAD_LANES && channel->lane_count < channel->lanes_wanted;
}

/*
 * Whether a destination's QEMU may wait for ever for what a lane of multifd brings. Its threads wait at each
 * round's end for the main one, which waits for what will not come on the main connection, and, where it has
 * come to a round's end, for each thread to have come there too (migration/multifd.c, multifd_recv_thread,
 * multifd_recv_sync_main). Behind device state a source that was cut off looks like one that has completed.
 */
static bool multifd_waits(const struct rf_channel *channel) {
    enum rf_seen now = seen(channel);

    return (now == RF_SEEN_UNREAD_LANES || now == RF_SEEN_MORE_DUE_LANES) &&
           channel->lane_count == channel->lanes_wanted;
}

/*
 * Whether QEMU, the destination's, has been given what had arrived. Where its lanes bring nothing and do not
 * end, that is all there is; but not while multifd may wait. Then QEMU, when it has read all there was on the
 * main connection, is shown its end, as it would be without a relay, and goes on or ends: one that has all
 * reads no further.
 */
static bool destination_has_all(struct rf_channel *channel) {
    if (moves(forward_flow(channel))) {
        return false;
    }
    if (!lanes_move(channel)) {
        return true;
    }
    if (rf_leg_unconfirmed(&channel->local) > 0 ||
        still_for(channel, channel->forward_bytes) < ms(STILL_MS)) {
        channel->still_from_ns = rf_leg_unconfirmed(&channel->local) > 0 ? 0 : channel->still_from_ns;
        return false;
    }
    if (multifd_waits(channel)) {
        rf_leg_end_writing(&channel->local);
        return false;
    }
    return true;
}

/* On the source's side the return path is read on behind what is told: a QEMU that does not take it now keeps
 * nobody waiting. */
static bool delivered(struct rf_channel *channel) {
    return channel->source_side
               ? return_flow(channel) == RF_FLOW_OVER || return_flow(channel) == RF_FLOW_WRITE
               : destination_has_all(channel);
}

static bool lanes_unsent(const struct rf_channel *channel) {
    for (unsigned i = 0; i < channel->lane_count; i++) {
        if (channel->lanes[i]->kind == RF_LANE_MULTIFD && rf_lane_unsent(channel->lanes[i])) {
            return true;
        }
    }
    return false;
}

/* Whether QEMU has ended its leg and all that it wrote has been taken from it. Its lanes are a part of that,
 * those too that it has opened and that are yet to be added: a source that has completed in precopy closes
 * all, and nobody sends it again. */
static bool local_is_over(const struct rf_channel *channel) {
    bool lanes_left = channel->source_side && channel->stage == RF_STAGE_JOINED &&
                      (lanes_come(channel) || lanes_unsent(channel));

    return rf_leg_lost(&channel->local) && !lanes_left;
}

static bool all_is_sent(const struct rf_channel *channel) {
    return channel->source_side ? !rf_pipe_pending(&channel->forward) : return_flow(channel) == RF_FLOW_OVER;
}

bool rf_channel_is_short(const struct rf_channel *channel) {
    /* Before the device state comes, of which the less is under way the better where the channel is lost. */
    const uint32_t turned = RF_FACT_POSTCOPY_DISCARD_SEEN | RF_FACT_PACKAGED_BEGUN;

    return channel->in_postcopy || rf_tracker_facts(channel->tracker) & turned ||
           has_passed(channel, RF_FACT_RECV_BITMAP_ASKED);
}

static bool all_is_acked(struct rf_channel *channel) {
    size_t unconfirmed = rf_leg_unconfirmed(&channel->far);

    if (channel->source_side || unconfirmed > 1) { /* the end itself is one at the most */
        return unconfirmed == 0 || still_for(channel, unconfirmed) >= ms(ACKED_MS);
    }
    if (rf_leg_unread(&channel->far) == 0) {
        return true;
    }
    /* With something unread a close is a reset, which takes with it what has not been acknowledged. It is
     * what tells a source in precopy; in postcopy the end of the return path does, and the source's is waited
     * for. */
    if (in_postcopy(channel) && still_for(channel, 0) < ms(LINGER_MS)) {
        return false;
    }
    rf_leg_break(&channel->far, ECONNABORTED);
    return true;
}

static void settle_far(struct rf_channel *channel) {
    rf_leg_see_failed_write(&channel->far);
    if (channel->stage == RF_STAGE_JOINED && rf_leg_lost(&channel->far)) {
        go(channel, RF_FAR_LOST);
        if (rf_ends_deed(RF_MAIN, false, channel->source_side, channel->far.state == RF_LEG_ENDED,
                         seen(channel)) == RF_DEED_LOSS) {
            shut_far_legs(channel);
        }
    }
    if (channel->stage == RF_STAGE_DRAINING && delivered(channel)) {
        go(channel, RF_DELIVERED);
        mark_lost(channel);
        shut_far_legs(channel);
    }
}

/* Whether a destination's QEMU has ended a session in precopy and has not said SHUT, which its source may
 * wait for unless it has ended, too. */
static bool ended_without_a_word(const struct rf_channel *channel) {
    const struct rf_link *link = channel->far.link;

    return !channel->source_side && rf_link_carries(link) && !rf_link_end_in_sight(link) &&
           !in_postcopy(channel) && !channel->in_postcopy && !has_passed(channel, RF_FACT_SHUT_PASSED);
}

static void settle_local(struct rf_channel *channel) {
    if (!local_is_over(channel)) {
        return;
    }
    mark_lost(channel);
    go(channel, RF_LOCAL_OVER);
    if (!channel->local.may_read || channel->source_side) {
        rf_leg_close(&channel->local); /* QEMU has closed its end, or it is dead */
    }
    if (channel->stage == RF_STAGE_UNSENT && all_is_sent(channel)) {
        if (ended_without_a_word(channel)) {
            rf_link_await_word(channel->far.link);
        }
        rf_leg_end_writing(&channel->far);
        go(channel, RF_SENT);
    }
    if (channel->far.state == RF_LEG_FAILED) {
        go(channel, RF_FAR_BROKE);
    }
    if (channel->stage == RF_STAGE_UNACKED && all_is_acked(channel)) {
        go(channel, RF_ACKED);
    }
    if (channel->stage == RF_STAGE_LEFT) {
        rf_leg_shut(&channel->far); /* the lanes end on their own, each behind what QEMU wrote on it */
        if (!channel->source_side) {
            rf_leg_close(&channel->far); /* nobody takes what is left of it */
        }
    }
}

static void settle(struct rf_channel *channel) {
    for (unsigned i = 0; i < channel->lane_count; i++) {
        settle_lane(channel, channel->lanes[i]);
    }
    mind_missed_lane(channel);
    settle_far(channel);
    settle_local(channel);
    if (!channel->far.may_read && (channel->stage == RF_STAGE_LOST || channel->stage == RF_STAGE_LEFT)) {
        rf_leg_close(&channel->far);
    }
}

enum rf_leg_state rf_channel_local_state(const struct rf_channel *channel) {
    return rf_leg_lost(&channel->local) && !local_is_over(channel) ? RF_LEG_OPEN : channel->local.state;
}

enum rf_leg_state rf_channel_far_state(const struct rf_channel *channel) {
    bool untold = channel->stage == RF_STAGE_DRAINING || channel->stage == RF_STAGE_UNSENT ||
                  channel->stage == RF_STAGE_UNACKED;

    return untold && rf_leg_lost(&channel->far) ? RF_LEG_OPEN : channel->far.state;
}

/* ---- silence ---- */

static bool silence_counts(const struct rf_channel *channel) {
    return channel->in_postcopy ||
           rf_tracker_facts(channel->tracker) & (RF_FACT_PONG_3 | RF_FACT_RESUME_ACK_PASSED) ||
           has_passed(channel, RF_FACT_RECV_BITMAP_ASKED);
}

static void mind_silence(struct rf_channel *channel) {
    uint64_t now;

    if (channel->far.state != RF_LEG_OPEN || (!channel->probing && !silence_counts(channel))) {
        return;
    }
    if (!channel->probing) {
        channel->probing = true;
        rf_leg_probe(&channel->far, channel->dead_after_s);
        for (unsigned i = 0; i < channel->lane_count; i++) {
            rf_leg_probe(&channel->lanes[i]->far, channel->dead_after_s);
        }
    }
    now = now_ns();
    if (now >= channel->next_silence_ns) {
        channel->next_silence_ns = now + ms(SILENCE_LOOK_MS);
        rf_leg_check_silence(&channel->far, channel->dead_after_s);
        for (unsigned i = 0; i < channel->lane_count; i++) {
            rf_leg_check_silence(&channel->lanes[i]->far, channel->dead_after_s);
        }
        if (channel->far.state == RF_LEG_FAILED) {
            shut_far_legs(channel);
        }
    }
}

/* ---- polls and moves, as they follow ---- */

unsigned rf_channel_want(const struct rf_channel *channel, struct pollfd *polls) {
    const struct rf_leg *from = channel->source_side ? &channel->local : &channel->far;
    const struct rf_leg *to = channel->source_side ? &channel->far : &channel->local;
    struct pollfd *from_poll = &polls[channel->source_side ? RF_POLL_LOCAL : RF_POLL_FAR];
    struct pollfd *to_poll = &polls[channel->source_side ? RF_POLL_FAR : RF_POLL_LOCAL];

    polls[RF_POLL_LOCAL] = polls[RF_POLL_FAR] = (struct pollfd){.fd = -1};
    rf_flow_want(RF_FORWARD, forward_flow(channel), from, to, from_poll, to_poll);
    rf_flow_want(RF_RETURN, return_flow(channel), to, from, to_poll, from_poll);
    for (unsigned i = 0; i < channel->lane_count; i++) {
        struct pollfd *lane_polls = &polls[RF_POLL_LANES + i * RF_LANE_POLLS];

        rf_lane_want(channel->lanes[i], lane_polls);
        if (channel->missed_from_ns == 0 && lane_is_missed(channel, channel->lanes[i])) {
            rf_leg_want(&channel->lanes[i]->local, POLLIN, &lane_polls[RF_LANE_LOCAL]);
        }
    }
    return RF_POLL_LANES + channel->lane_count * RF_LANE_POLLS;
}

int rf_channel_timeout_ms(const struct rf_channel *channel) {
    /* The replay goes on behind what is to be said, and that when QEMU takes it. */
    if (rf_pagemap_is_sweeping(rf_tracker_pagemap(channel->tracker)) ||
        (rf_replay_looks_on(&channel->replay) && !say_due(channel))) {
        return 0;
    }
    if (channel->stage == RF_STAGE_UNACKED) {
        return ACKED_LOOK_MS;
    }
    if (channel->stage == RF_STAGE_DRAINING || channel->missed_from_ns != 0) {
        return STILL_LOOK_MS;
    }
    /* In precopy no deadline: the legs may be silent for as long as the guest and the network are. */
    return channel->probing && channel->far.state == RF_LEG_OPEN ? SILENCE_LOOK_MS : -1;
}

bool rf_channel_ready(const struct rf_channel *channel, const struct pollfd *polls) {
    if (rf_leg_ready(&channel->far, &polls[RF_POLL_FAR])) {
        return true;
    }
    for (unsigned i = 0; i < channel->lane_count; i++) {
        const struct pollfd *lane_polls = &polls[RF_POLL_LANES + i * RF_LANE_POLLS];

        if (rf_leg_ready(&channel->lanes[i]->far, &lane_polls[RF_LANE_FAR])) {
            return true;
        }
    }
    return false;
}

static void move_lanes(struct rf_channel *channel, const struct pollfd *polls) {
    for (unsigned i = 0; i < channel->lane_count; i++) {
        struct rf_lane *lane = channel->lanes[i];
        const struct pollfd *lane_polls = &polls[i * RF_LANE_POLLS];

        channel->forward_bytes += rf_lane_move(lane, lane_polls, channel->tracker, now_ns());
        bool more = rf_pipe_pending(&lane->forward) ||
                    rf_leg_events(&lane->local, &lane_polls[RF_LANE_LOCAL]) & POLLIN;
        if (more && channel->missed_from_ns == 0 && lane_is_missed(channel, lane)) {
            channel->missed_from_ns = now_ns();
        }
    }
}

void rf_channel_move(struct rf_channel *channel, const struct pollfd *polls) {
    short local_events = rf_leg_events(&channel->local, &polls[RF_POLL_LOCAL]);
    short far_events = rf_leg_events(&channel->far, &polls[RF_POLL_FAR]);
    short from_events = channel->source_side ? local_events : far_events;
    short to_events = channel->source_side ? far_events : local_events;

    move_lanes(channel, &polls[RF_POLL_LANES]); /* the preempt lane's pages are waited for */
    move_forward(channel, from_events, to_events);
    move_return(channel, to_events, from_events);
    (void)rf_pagemap_sweep(rf_tracker_pagemap(channel->tracker));
    mind_silence(channel);
    settle(channel);
}

/* ---- life ---- */

bool rf_channel_init(struct rf_channel *channel, struct rf_tracker *tracker, bool source_side,
                     unsigned dead_after_s) {
    channel->source_side = source_side;
    channel->dead_after_s = dead_after_s;
    channel->tracker = tracker;
    rf_leg_init(&channel->local);
    rf_leg_init(&channel->far);
    rf_pipe_init(&channel->forward, channel->forward_room, sizeof(channel->forward_room));
    return rf_replay_init(&channel->replay, tracker, source_side, RF_RETURN_CHUNK);
}

void rf_channel_free(struct rf_channel *channel) { rf_replay_free(&channel->replay); }

static void forget(struct rf_channel *channel) {
    channel->return_waits = false;
    channel->say_length = 0;
    rf_pipe_clear(&channel->forward);
    rf_replay_discard(&channel->replay);
}

static bool is_open(const struct rf_channel *channel) {
    return channel->local.fd >= 0 || rf_leg_is_open(&channel->far) || channel->lane_count > 0;
}

/* Those of lanes that are not added any more. */
static void leave_lane_links(struct rf_channel *channel) {
    for (unsigned i = 0; i < channel->lanes_wanted; i++) {
        if (rf_link_carries(channel->lane_links[i])) {
            rf_link_leave(channel->lane_links[i]);
        } else if (channel->lane_links[i] != NULL) {
            rf_link_drop(channel->lane_links[i]);
        }
        channel->lane_links[i] = NULL;
    }
}

void rf_channel_begin(struct rf_channel *channel, int local_fd, int far_fd, bool recovered, bool may_replay,
                      unsigned lanes) {
    if (is_open(channel)) {
        rf_channel_close(channel, false);
    }
    leave_lane_links(channel); /* which QEMU's own end of it left */
    forget(channel);           /* where both legs were lost the end of a channel may have stayed */
    channel->stage = RF_STAGE_JOINED;
    channel->lost_ns = channel->still_from_ns = channel->missed_from_ns = 0;
    channel->lanes_wanted = lanes < RF_LANES_MAX ? lanes : RF_LANES_MAX;
    channel->no_more_lanes = false;
    channel->probing = false;
    rf_tracker_channel_begin(channel->tracker, recovered);
    rf_replay_channel(&channel->replay, recovered, may_replay, lanes > 0);
    rf_leg_adopt(&channel->local, local_fd);
    rf_leg_adopt(&channel->far, far_fd);
    channel->fullness = (struct rf_fullness){0};
    set_queues(channel, recovered ? RF_REGIME_FULL : regime_now(channel));
    if (!channel->source_side) {
        rf_leg_bound_unread(&channel->far, RF_QUEUE_FAR, RF_LAN_ROUND_TRIP_US);
    }
}

void rf_channel_give_link(struct rf_channel *channel, unsigned lane, struct rf_link *link) {
    if (lane == 0) {
        channel->far.link = link;
    } else {
        channel->lane_links[lane - 1] = link;
    }
}

void rf_channel_drop_lane_links(struct rf_channel *channel) {
    for (unsigned i = 0; i < channel->lane_count; i++) {
        struct rf_leg *leg = &channel->lanes[i]->far;

        if (rf_link_carries(leg->link)) {
            rf_link_give_up(leg->link, ECONNRESET);
        } else {
            rf_leg_drop_link(leg);
        }
    }
    for (unsigned i = 0; i < channel->lanes_wanted; i++) {
        if (channel->lane_links[i] != NULL) {
            rf_link_drop(channel->lane_links[i]);
            channel->lane_links[i] = NULL;
        }
    }
    settle(channel);
}

void rf_channel_add_lane(struct rf_channel *channel, struct rf_lane *lane, unsigned number, int local_fd,
                         int far_fd, bool its_own) {
    bool is_wanted = its_own && channel->local.fd >= 0 && channel->lane_count < channel->lanes_wanted;

    bool may_be_session = is_wanted && number >= 1 && number <= channel->lanes_wanted;

    rf_lane_join(lane, local_fd, far_fd, may_be_session ? channel->lane_links[number - 1] : NULL);
    if (!is_wanted) {
        rf_lane_free(lane);
        return;
    }
    if (may_be_session) {
        channel->lane_links[number - 1] = NULL;
    }
    channel->lanes[channel->lane_count++] = lane;
    if (lane->kind == RF_LANE_PREEMPT) {
        rf_tracker_preempt_begin(channel->tracker);
    } else {
        rf_tracker_pages_elsewhere(channel->tracker);
    }
    if (!channel->far.may_write && channel->stage != RF_STAGE_JOINED) {
        rf_lane_shut_far(lane);
    } else if (channel->probing) {
        rf_leg_probe(&lane->far, channel->dead_after_s);
    }
}

void rf_channel_no_more_lanes(struct rf_channel *channel) {
    channel->no_more_lanes = true;
    settle(channel);
}

void rf_channel_say(struct rf_channel *channel, const uint8_t *bytes, size_t length) {
    if (channel->source_side && channel->local.may_write && length <= RF_SAY_MAX - channel->say_length) {
        memcpy(channel->say + channel->say_length, bytes, length);
        channel->say_length += length;
        if (say_due(channel)) {
            say(channel);
        }
    }
}

void rf_channel_lose(struct rf_channel *channel, int error) {
    if (channel->stage == RF_STAGE_JOINED || channel->stage == RF_STAGE_DRAINING) {
        rf_leg_break(&channel->far, error);
        shut_far_legs(channel);
        settle(channel);
    }
}

static void take_all(struct rf_channel *channel) {
    rf_leg_take_all(&channel->local);
    rf_leg_take_all(&channel->far);
    for (unsigned i = 0; i < channel->lane_count; i++) {
        rf_leg_take_all(&channel->lanes[i]->local);
        rf_leg_take_all(&channel->lanes[i]->far);
    }
}

/* What the kernels take and hold at this moment passes on as ever, but that room is tried for, not asked. */
static void last_moves(struct rf_channel *channel) {
    struct pollfd polls[RF_CHANNEL_POLLS];
    uint64_t before;

    take_all(channel);
    for (int round = 0; round < LAST_ROUNDS; round++) {
        unsigned count = rf_channel_want(channel, polls);

        before = channel->forward_bytes + channel->return_bytes;
        (void)poll(polls, count, 0); /* without memory nothing is known of ends */
        for (unsigned i = 0; i < count; i++) {
            polls[i].revents |= polls[i].events & (POLLIN | POLLOUT);
        }
        rf_channel_move(channel, polls);
        if (before == channel->forward_bytes + channel->return_bytes) {
            break;
        }
    }
}

/* The return path's rest belongs on record: not every QEMU asks again, and PONG and SHUT are facts. What is
 * written on it from now on is refused, so that there is an end. */
static void record_rest(struct rf_channel *channel, bool keep_local) {
    struct rf_leg *leg = forward_to(channel);
    size_t left;

    if (channel->source_side || !keep_local) {
        rf_leg_shut(leg);
    }
    left = rf_leg_unread(leg);
    while (left > 0) {
        size_t most = left < sizeof(channel->backward) ? left : sizeof(channel->backward);
        size_t n = rf_leg_read(leg, channel->backward, most);

        if (n == 0) {
            break;
        }
        rf_replay_discard(&channel->replay);
        rf_replay_feed(&channel->replay, channel->backward, n, now_ns());
        left -= n;
    }
}

void rf_channel_close(struct rf_channel *channel, bool keep_local) {
    last_moves(channel);
    record_rest(channel, keep_local);
    for (unsigned i = 0; i < channel->lane_count; i++) {
        if (keep_local) {
            rf_leg_let_go(&channel->lanes[i]->local);
        }
        rf_lane_free(channel->lanes[i]);
        channel->lanes[i] = NULL;
    }
    leave_lane_links(channel);
    channel->lane_count = 0;
    if (keep_local) {
        rf_leg_let_go(&channel->local);
    }
    rf_leg_close(&channel->local);
    rf_leg_close(&channel->far);
    mark_lost(channel);
    channel->stage = RF_STAGE_NONE;
    forget(channel);
}

/* ---- from one process to the next ---- */

bool rf_channel_hand_over(const struct rf_channel *channel, struct rf_handed *handed) {
    const struct rf_replay *replay = &channel->replay;
    const struct rf_leg *local = &channel->local;
    const struct rf_link *link = channel->far.link;
    const char *block;
    size_t block_length;

    if (channel->stage != RF_STAGE_JOINED || channel->lanes_wanted > 0 || channel->say_length > 0 ||
        local->state != RF_LEG_OPEN || !local->may_read || !local->may_write ||
        channel->far.state != RF_LEG_OPEN || !channel->far.may_read || !channel->far.may_write ||
        !rf_link_carries(link) || link->state == RF_LINK_OVER || link->shut || link->parting ||
        replay->holding || replay->replaying || replay->foreign ||
        !rf_tracker_may_go_on(channel->tracker, &block, &block_length)) {
        return false;
    }
    *handed = (struct rf_handed){
        .source_side = channel->source_side,
        .name_lost = replay->name_lost,
        .facts = rf_tracker_facts(channel->tracker),
        .channel_facts = rf_tracker_channel_facts(channel->tracker),
        .block = {(const uint8_t *)block, block_length},
        .partial = {replay->partial, replay->partial_len},
        .forward = {channel->forward.data + channel->forward.off,
                    channel->forward.len - channel->forward.off},
        .backward = {replay->out.data + replay->out.off, rf_replay_pending(replay)},
        .stream = {NULL, rf_stream_saved_size(link->stream)},
    };
    memcpy(handed->id, link->id, sizeof(handed->id));
    return true;
}

bool rf_channel_hand_over_last(const struct rf_channel *channel, const struct rf_link *link,
                               struct rf_handed *handed) {
    bool is_alone = channel->lanes_wanted == 0 && link != NULL && link->next == NULL;
    bool all_is_in_it = is_alone && (!link->has_leg || channel->stage == RF_STAGE_UNACKED);

    if (channel->source_side || !all_is_in_it || !rf_link_carries(link) || link->state == RF_LINK_OVER ||
        link->parting) {
        return false;
    }
    *handed = (struct rf_handed){.ended = true, .stream = {NULL, rf_stream_saved_size(link->stream)}};
    memcpy(handed->id, link->id, sizeof(handed->id));
    return true;
}

void rf_channel_leave(struct rf_channel *channel, struct rf_link *link) {
    rf_link_detach(link);
    rf_link_drop(link);
    rf_leg_let_go(&channel->local);
    rf_leg_init(&channel->far);
    channel->stage = RF_STAGE_NONE;
    forget(channel);
}

bool rf_channel_go_on(struct rf_channel *channel, int local_fd, const struct rf_handed *handed) {
    struct rf_replay *replay = &channel->replay;
    const struct rf_handed nothing = {.block = {(const uint8_t *)"", 0}};
    bool is_lost = handed == NULL;

    handed = is_lost ? &nothing : handed;
    if (handed->block.length > UINT8_MAX || handed->partial.length > sizeof(replay->partial) ||
        handed->forward.length > sizeof(channel->forward_room) ||
        handed->backward.length > replay->out.room ||
        (!is_lost && handed->source_side != channel->source_side)) {
        return false;
    }
    channel->stage = RF_STAGE_JOINED;
    rf_tracker_channel_goes_on(channel->tracker, handed->facts, handed->channel_facts,
                               (const char *)handed->block.data, handed->block.length);
    rf_replay_channel(replay, false, false, false);
    rf_replay_goes_on(replay, handed->partial.data, handed->partial.length, handed->backward.data,
                      handed->backward.length, handed->name_lost, now_ns());
    if (handed->forward.length > 0) {
        memcpy(channel->forward_room, handed->forward.data, handed->forward.length);
        channel->forward.len = handed->forward.length;
    }
    rf_leg_adopt(&channel->local, local_fd);
    rf_leg_adopt(&channel->far, -1);
    set_queues(channel, rf_channel_is_short(channel) ? RF_REGIME_FULL : RF_REGIME_PRECOPY);
    return true;
}
