/*
 * The return path as it goes through a relay: passes every byte, save that
 *  - on the source's side page requests are held back between the reconnection and RESUME_ACK, for QEMU 10.0
 * with postcopy-preempt aborts on them (migration/migration.c, source_return_path_thread); they follow right
 * after it;
 *  - after RESUME_ACK the page requests that the record holds and the received bitmaps do not confirm are
 * written, between two messages, oldest first, as REQ_PAGES_ID; the first of them together with RESUME_ACK,
 * for a source that has used up its bandwidth before they come serves none for up to 100 ms
 * (migration/savevm.c, qemu_savevm_state_iterate);
 *  - the next REQ_PAGES after one of ours, which carries no block name, is given the one it means, for the
 * source now remembers another (migration/ram.c, ram_save_queue_pages, last_req_rb).
 *
 * A received bitmap that is another VM's (RF_FACT_FOREIGN_PAGES) is never passed whole: its end and all
 * behind it is dropped, so that the source cannot send RESUME, and the caller is to end the channel.
 *
 * Both sides replay. A request that was lost between the relays is on record at the destination's side alone;
 * one that was lost between the source's relay and a QEMU that died, or whose answer was, may be on record at
 * either. What one side has replayed the other sees as asked for again, and leaves.
 *
 *      in ──▶ rf_replay_feed ──▶ out ──▶ towards the source
 *                  │              ▲
 *                  ▼              │ rf_replay_refill, before each write
 *               tracker ──▶ replay list
 */
#ifndef RF_REPLAY_H
#define RF_REPLAY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tracker.h"

enum {
    RF_REPLAY_MESSAGE_MAX = 512,     /* more than any return-path message: 4 + 8 + 4 + 1 + 255 */
    RF_REPLAY_BURST = 4096,          /* at most so many bytes of replay wait for the source at once */
    RF_REPLAY_HELD_MAX = 256 * 1024, /* of requests held back: more than 8000 threads can fault at once */
};

/* Bytes in order, in room that is fixed when it is made. */
struct rf_bytes {
    uint8_t *data;
    size_t room;
    size_t off;
    size_t len;
};

struct rf_replay {
    struct rf_tracker *tracker;
    bool source_side; /* where requests are held back */
    bool foreign;     /* the far side is another VM's: nothing passes any more */
    bool holding;     /* between a reconnection and RESUME_ACK */
    bool may_replay;  /* as the caller said for this channel */
    bool replaying;   /* the list is being written */
    bool name_lost;   /* the source remembers another block than the destination thinks */

    uint8_t partial[RF_REPLAY_MESSAGE_MAX]; /* the beginning of a message whose end has not come */
    size_t partial_len;
    struct rf_bytes held;
    struct rf_bytes out;
    uint64_t after; /* the last record that the list gave */

    uint64_t replayed;       /* requests written by us, over the whole migration */
    uint64_t held_count;     /* requests held back */
    uint64_t held_lost;      /* of those, dropped for want of room */
    uint64_t last_replay_ns; /* when the last of ours was written; 0 for never */
};

/* `input_max`: the most bytes that one rf_replay_feed is given. False when memory is short. */
bool rf_replay_init(struct rf_replay *replay, struct rf_tracker *tracker, bool source_side, size_t input_max);
void rf_replay_free(struct rf_replay *replay);

/* A new channel begins. `recovered`: it resumes a lost one. `may_replay`: nothing forbids the replay. */
void rf_replay_channel(struct rf_replay *replay, bool recovered, bool may_replay);

/* Takes `len` bytes of the return path, at most `input_max`, only while nothing is pending. */
void rf_replay_feed(struct rf_replay *replay, const uint8_t *buf, size_t len, uint64_t now_ns);

/* Puts more of the replay into `out`, behind what waits there, where one is under way. */
void rf_replay_refill(struct rf_replay *replay, uint64_t now_ns);

/* Bytes that wait for the local leg: out.data[out.off] and on. */
size_t rf_replay_pending(const struct rf_replay *replay);

/* The local leg is gone: what waits for it goes too. */
void rf_replay_discard(struct rf_replay *replay);

#endif
