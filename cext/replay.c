#include "replay.h"

#include <stdlib.h>
#include <string.h>

static bool bytes_init(struct rf_bytes *bytes, size_t room) {
    *bytes = (struct rf_bytes){.data = malloc(room), .room = room};
    return bytes->data != NULL;
}

static void bytes_clear(struct rf_bytes *bytes) { bytes->off = bytes->len = 0; }

static bool bytes_put(struct rf_bytes *bytes, const uint8_t *data, size_t len) {
    if (len > bytes->room - bytes->len) {
        return false;
    }
    if (len > 0) {
        memcpy(bytes->data + bytes->len, data, len);
        bytes->len += len;
    }
    return true;
}

bool rf_replay_init(struct rf_replay *replay, struct rf_tracker *tracker, bool source_side,
                    size_t input_max) {
    /* One feed gives out no more than: the message begun before, all input, all that was held, and for each
     * request in the input (at least 16 bytes) a block name of 256 more. Then a burst of the replay. */
    const size_t room = 2 * RF_REPLAY_MESSAGE_MAX + input_max * 17 + RF_REPLAY_HELD_MAX + RF_REPLAY_BURST;

    *replay = (struct rf_replay){.tracker = tracker, .source_side = source_side};
    return bytes_init(&replay->out, room) && bytes_init(&replay->held, RF_REPLAY_HELD_MAX);
}

void rf_replay_free(struct rf_replay *replay) {
    free(replay->out.data);
    free(replay->held.data);
    replay->out.data = replay->held.data = NULL;
}

void rf_replay_channel(struct rf_replay *replay, bool recovered, bool may_replay, bool preempt) {
    replay->holding = replay->source_side && recovered;
    replay->by_pages = !preempt && rf_pagemap_has_large_pages(rf_tracker_pagemap(replay->tracker));
    replay->hold_till = 0;
    replay->may_replay = recovered && may_replay;
    replay->replaying = false;
    replay->foreign = false;
    replay->name_lost = false;
    replay->partial_len = 0;
    replay->after = 0;
    bytes_clear(&replay->held);
    bytes_clear(&replay->out);
}

size_t rf_replay_pending(const struct rf_replay *replay) { return replay->out.len - replay->out.off; }

void rf_replay_discard(struct rf_replay *replay) {
    bytes_clear(&replay->out);
    replay->replaying = false;
}

/* A page request as the source must get it: with its block's name where it might mean another one without. */
static size_t encode(const struct rf_replay *replay, const struct rf_returnpath_event *event, uint8_t *out,
                     size_t room) {
    if (event->named || !replay->name_lost) {
        return 0;
    }
    return rf_returnpath_encode_request_id(out, room, event->name, event->name_length, event->start,
                                           event->length);
}

static void take_request(struct rf_replay *replay, const struct rf_returnpath_event *event) {
    uint8_t message[RF_REPLAY_MESSAGE_MAX];
    size_t named = encode(replay, event, message, sizeof(message));
    const uint8_t *bytes = named > 0 ? message : replay->partial;
    size_t len = named > 0 ? named : replay->partial_len;

    replay->partial_len = 0;
    if (event->name_length == 0) {
        return; /* nobody knows which block the source would take it for */
    }
    replay->name_lost = false;
    if (!replay->holding) {
        bytes_put(&replay->out, bytes, len);
    } else {
        replay->held_count++;
        if (!bytes_put(&replay->held, bytes, len)) {
            rf_pagemap_not_asked(rf_tracker_pagemap(replay->tracker), event->name, event->name_length,
                                 event->start, event->length);
            replay->name_lost = true; /* the next may have counted on this one's name */
        }
    }
}

static void pass_partial(struct rf_replay *replay) {
    bytes_put(&replay->out, replay->partial, replay->partial_len);
    replay->partial_len = 0;
}

static void release_held(struct rf_replay *replay) {
    replay->holding = false;
    bytes_put(&replay->out, replay->held.data, replay->held.len);
    bytes_clear(&replay->held);
}

static void begin_replay(struct rf_replay *replay) {
    release_held(replay);
    replay->replaying = replay->may_replay && rf_tracker_return_opaque(replay->tracker) == RF_OPAQUE_NO;
}

/* No RESUME_ACK will be seen on this channel. Its source reads no further than what is bad, so that held
 * requests before it would do harm and no good; they stay on record. */
static void lose_frames(struct rf_replay *replay) {
    if (replay->hold_till == 0) {
        bytes_clear(&replay->held);
    }
    release_held(replay);
}

/* Whether the source is known to have nothing of a request left that it was serving at the loss. */
static bool first_page_is_whole(const struct rf_replay *replay) {
    return (rf_tracker_channel_facts(replay->tracker) & RF_FACT_HOST_PAGE_BEGUN) != 0 ||
           rf_tracker_forward_opaque(replay->tracker) != RF_OPAQUE_NO;
}

static void acknowledged(struct rf_replay *replay, uint64_t now_ns) {
    pass_partial(replay);
    if (replay->holding && replay->by_pages && !first_page_is_whole(replay)) {
        replay->hold_till = now_ns + (uint64_t)RF_REPLAY_HOLD_S * 1000000000u;
    } else {
        begin_replay(replay);
    }
}

/* What is neither a request nor a part of the handshake must not overtake requests. */
static void pass_other(struct rf_replay *replay) {
    if (replay->hold_till != 0 && replay->holding) {
        release_held(replay);
    }
    pass_partial(replay);
}

void rf_replay_forward_passed(struct rf_replay *replay, uint64_t now_ns) {
    if (replay->holding && replay->hold_till != 0 && replay->partial_len == 0 &&
        rf_tracker_return_at_boundary(replay->tracker) && rf_replay_pending(replay) == 0 &&
        (first_page_is_whole(replay) || now_ns >= replay->hold_till)) {
        bytes_clear(&replay->out);
        begin_replay(replay);
    }
}

void rf_replay_feed(struct rf_replay *replay, const uint8_t *buf, size_t len, uint64_t now_ns) {
    bytes_clear(&replay->out);
    while (len > 0 && !replay->foreign) {
        struct rf_returnpath_event event;
        size_t n = rf_tracker_return_next(replay->tracker, buf, len, now_ns, &event);

        if (event.type == RF_RETURN_BAD) {
            lose_frames(replay);
        }
        if (event.type == RF_RETURN_BITMAP_DATA || event.type == RF_RETURN_UNKNOWN ||
            !rf_tracker_return_framed(replay->tracker) || n > sizeof(replay->partial) - replay->partial_len) {
            /* Not a message that could have to wait: as it came, and at once. */
            pass_other(replay);
            bytes_put(&replay->out, buf, n);
        } else {
            memcpy(replay->partial + replay->partial_len, buf, n);
            replay->partial_len += n;
            switch (event.type) {
            case RF_RETURN_NONE:
                break;
            case RF_RETURN_BITMAP_END:
                replay->foreign = (rf_tracker_channel_facts(replay->tracker) & RF_FACT_FOREIGN_PAGES) != 0;
                if (!replay->foreign) {
                    pass_partial(replay);
                }
                break;
            case RF_RETURN_REQUEST:
                take_request(replay, &event);
                break;
            case RF_RETURN_RESUME_ACK:
                acknowledged(replay, now_ns);
                break;
            default:
                pass_other(replay);
                break;
            }
        }
        buf += n;
        len -= n;
    }
}

bool rf_replay_looks_on(const struct rf_replay *replay) {
    return replay->replaying && replay->partial_len == 0 && rf_replay_pending(replay) == 0 &&
           rf_tracker_return_at_boundary(replay->tracker);
}

void rf_replay_refill(struct rf_replay *replay, unsigned *looks, uint64_t now_ns) {
    struct rf_pagemap *map = rf_tracker_pagemap(replay->tracker);

    if (!replay->replaying || replay->partial_len > 0 || !rf_tracker_return_at_boundary(replay->tracker)) {
        return;
    }
    if (rf_replay_pending(replay) == 0) {
        bytes_clear(&replay->out);
    }
    while (*looks > 0 && rf_replay_pending(replay) < RF_REPLAY_BURST &&
           replay->out.room - replay->out.len >= RF_REPLAY_MESSAGE_MAX) {
        uint8_t message[RF_REPLAY_MESSAGE_MAX];
        struct rf_request request;
        int found = rf_pagemap_replay_next(map, replay->after, looks, &request);
        size_t n;

        if (found == 0) {
            replay->replaying = false;
            return;
        }
        replay->after = request.id;
        if (found == RF_LOOK_ON) {
            return;
        }
        n = rf_returnpath_encode_request_id(message, sizeof(message), request.name, request.name_length,
                                            request.start, request.length);
        if (n > 0 && bytes_put(&replay->out, message, n)) {
            (void)rf_pagemap_replayed(map, request.id); /* it was on record a moment ago */
            replay->replayed++;
            replay->last_replay_ns = now_ns;
            replay->name_lost = true;
        }
    }
}

void rf_replay_goes_on(struct rf_replay *replay, const uint8_t *partial, size_t partial_length,
                       const uint8_t *pending, size_t pending_length, bool name_lost, uint64_t now_ns) {
    rf_replay_feed(replay, partial, partial_length, now_ns);
    (void)bytes_put(&replay->out, pending, pending_length);
    replay->name_lost = name_lost;
}
