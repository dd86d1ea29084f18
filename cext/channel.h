/*
 * One channel of a relay: its two legs, its lanes, and how bytes move between them.
 *
 *     source's side                                        destination's side
 *
 *     local leg ──▶ forward pipe ──▶ far leg     ═TCP═     far leg ──▶ forward pipe ──▶ local leg
 *                       │ tracker                                          │ tracker
 *     local leg ◀── replay ◀── return pipe ◀── far leg     far leg ◀── replay ◀── return pipe ◀── local leg
 *
 * Each direction holds one chunk at the most: it is read only when the other leg can be sent to, so that a
 * requested page never waits behind what we have buffered. The two directions never wait for each other. How
 * they end is in ends.h, from which what is polled and what is moved follow.
 */
#ifndef RF_CHANNEL_H
#define RF_CHANNEL_H

#include <poll.h>
#include <stdbool.h>
#include <stdint.h>

#include "ends.h"
#include "handed.h"
#include "lane.h"
#include "leg.h"
#include "pipe.h"
#include "queues.h"
#include "replay.h"
#include "tracker.h"

enum {
    RF_FORWARD_CHUNK = 256 * 1024, /* the largest of rf_queues */
    RF_RETURN_CHUNK = 4 * 1024,
    RF_LANES_MAX = 255 + 1, /* multifd-channels (qapi/migration.json), and one for preempt */
    RF_SAY_MAX = 64,
};

enum {
    RF_POLL_LOCAL,
    RF_POLL_FAR,
    RF_POLL_LANES,
    RF_CHANNEL_POLLS = RF_POLL_LANES + RF_LANES_MAX * RF_LANE_POLLS
};

struct rf_channel {
    bool source_side;
    enum rf_stage stage;
    unsigned dead_after_s;
    struct rf_tracker *tracker;
    struct rf_replay replay;
    struct rf_leg local;
    struct rf_leg far;
    struct rf_lane *lanes[RF_LANES_MAX];
    struct rf_link *lane_links[RF_LANES_MAX]; /* of lanes that are not added yet, by their number less one */
    unsigned lane_count;
    unsigned lanes_wanted;
    bool no_more_lanes;       /* as told: those that have not come never do */
    bool in_postcopy;         /* as told, for a stream that cannot be read */
    bool probing;             /* postcopy: the far leg's silence counts */
    bool return_waits;        /* there is something to read, but no room to send it */
    uint64_t next_silence_ns; /* when to look at it again */
    uint64_t lost_ns;         /* when the first leg was told to be lost; 0 for not */
    uint64_t still_from_ns;   /* nothing has moved since, in DRAINING or UNACKED; 0 for not */
    uint64_t still_at;        /* what it was measured by */
    uint64_t missed_from_ns;  /* QEMU has more for a lane that is missed; 0 for not */
    uint64_t forward_bytes;   /* passed on, over all channels */
    uint64_t return_bytes;    /* likewise */
    enum rf_regime regime;
    struct rf_fullness fullness;
    struct rf_pipe forward;
    uint8_t forward_room[RF_FORWARD_CHUNK];
    uint8_t backward[RF_RETURN_CHUNK];
    uint8_t say[RF_SAY_MAX]; /* to be said to a source between two messages of the return path */
    size_t say_length;
};

/* False when memory is short; then rf_channel_free frees what there is. */
bool rf_channel_init(struct rf_channel *channel, struct rf_tracker *tracker, bool source_side,
                     unsigned dead_after_s);
void rf_channel_free(struct rf_channel *channel);

/* Joins two legs as the next channel. What is left of the one before is closed. */
void rf_channel_begin(struct rf_channel *channel, int local_fd, int far_fd, bool recovered, bool may_replay,
                      unsigned lanes);

/* What the far leg of the channel that has begun, or that of its lane `lane` from 1 on, may be carried by. */
void rf_channel_give_link(struct rf_channel *channel, unsigned lane, struct rf_link *link);

/* No session comes of what the channel may have become: its lanes go on with the connections that they have,
 * and those that have none are lost. */
void rf_channel_drop_lane_links(struct rf_channel *channel);

/* Takes the lane, whose legs are to be joined; where it is not of this channel (`its_own`), or that has all
 * or is closed, both are closed. `number`: of its link. `far_fd` -1: it begins as a session's. */
void rf_channel_add_lane(struct rf_channel *channel, struct rf_lane *lane, unsigned number, int local_fd,
                         int far_fd, bool its_own);

/* Says at most RF_SAY_MAX bytes to a source's QEMU, between two messages of its return path, if it hears. */
void rf_channel_say(struct rf_channel *channel, const uint8_t *bytes, size_t length);

/* The other host cannot be had whole: the far legs end as if one had broken with `error`. */
void rf_channel_lose(struct rf_channel *channel, int error);

/*
 * Closes what is open. Before that what the kernels take and hold at this moment is passed on, and the return
 * path is put on record to its end. `keep_local`: QEMU is not to see its legs end.
 */
void rf_channel_close(struct rf_channel *channel, bool keep_local);

/*
 * What another process needs to go on with it, but for its stream; false where it cannot: it is no session,
 * or more than one connection, one of its ends has shown itself, or a recovery is under way on it. Valid
 * until the channel moves again.
 */
bool rf_channel_hand_over(const struct rf_channel *channel, struct rf_handed *handed);
/* The same of a destination's whose QEMU has ended it, while the other host has yet to hear the last of that:
 * its session's `link` alone goes on. */
bool rf_channel_hand_over_last(const struct rf_channel *channel, const struct rf_link *link,
                               struct rf_handed *handed);
/* It goes on elsewhere, with its session, `link`: nothing of it is closed but our descriptors. */
void rf_channel_leave(struct rf_channel *channel, struct rf_link *link);
/* Goes on with what another process has had, its local leg and what it had in hand; false where that cannot
 * be. A link is to be given. Without any, `handed` NULL, the far leg is lost. */
bool rf_channel_go_on(struct rf_channel *channel, int local_fd, const struct rf_handed *handed);

/* What it waits for, RF_CHANNEL_POLLS entries at the most; the count. */
unsigned rf_channel_want(const struct rf_channel *channel, struct pollfd *polls);
/* Whether something of it is there without a poll. */
bool rf_channel_ready(const struct rf_channel *channel, const struct pollfd *polls);
int rf_channel_timeout_ms(const struct rf_channel *channel);

/* QEMU, the source's, opens no more lanes than have been added. */
void rf_channel_no_more_lanes(struct rf_channel *channel);

/* Moves what can be moved, and lets end what has ended. */
void rf_channel_move(struct rf_channel *channel, const struct pollfd *polls);

/* What is to be told of the legs (ends.h). */
enum rf_leg_state rf_channel_local_state(const struct rf_channel *channel);
enum rf_leg_state rf_channel_far_state(const struct rf_channel *channel);

/* Whether what is queued is latency: postcopy has begun, or is about to. */
bool rf_channel_is_short(const struct rf_channel *channel);

/* Whether the lanes must be added as soon as they come. */
bool rf_channel_lanes_due(const struct rf_channel *channel);

/* Whether QEMU, the source's, has ended its leg and what it had opened before is yet to be added. */
bool rf_channel_last_lanes(const struct rf_channel *channel);

#endif
