/*
 * The return path as it goes through a relay: passes every byte, save that
 *  - on the source's side page requests are held back between the reconnection and RESUME_ACK, for QEMU 10.0
 * with postcopy-preempt aborts on them (migration/migration.c, source_return_path_thread); they follow right
 * after it. So it is where nothing is read that the messages say, too. Where they cannot be told from each
 * other (TLS, which no relay can hold back; a message that no QEMU sends, behind which the source reads no
 * further) the rest passes as it comes, and what was held back by then does not;
 *  - where host pages are larger than target pages (huge pages) they, and the replay, wait on until the first
 * page behind RESUME has passed. A source queues a request in host pages and takes it off the queue in target
 * pages; lost while it sends the first, it has the rest in its queue yet (migration/ram.c, unqueue_page), and
 * after the recovery sends that page from its second piece on (ram_save_host_page). The destination refuses
 * it and pauses again, and what the source was serving then is the next to be cut. As long as requests come
 * the queue never empties, so that this can last for good; without new ones it ends after as many losses as
 * there were requests in the queue. A first page that begins where its host page does shows that none is
 * left;
 *  - after RESUME_ACK the page requests that the record holds and the received bitmaps do not confirm are
 * written, between two messages, oldest first, as REQ_PAGES_ID; the first of them together with RESUME_ACK,
 * for a source that has used up its bandwidth before they come serves none for up to 100 ms
 * (migration/savevm.c, qemu_savevm_state_iterate);
 *  - the next REQ_PAGES after one of ours, which carries no block name, is given the one it means, for the
 * source now remembers another (migration/ram.c, ram_save_queue_pages, last_req_rb);
 *  - a REQ_PAGES before any REQ_PAGES_ID of its channel is dropped. A destination makes one where it faults
 * between the reconnection and RESUME: it means the block of the channel before, which the source may never
 * have heard of or have forgotten over a replay, and a range beyond its block's end ends the source's
 * return-path thread. At RESUME the destination forgets the block and asks again (migration/savevm.c,
 * loadvm_postcopy_handle_resume).
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
    RF_REPLAY_HELD_MAX = 256 * 1024, /* of requests held back: more than 8000 threads can fault at once;
                                        those beyond it are replayed */
    RF_REPLAY_HOLD_S = 10, /* since RESUME_ACK: a source that sends no page, or a destination that takes it */
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
    bool holding;     /* from a reconnection on until release_held */
    bool by_pages;    /* RESUME_ACK does not end that, the first page does */
    bool may_replay;  /* as the caller said for this channel */
    bool replaying;   /* the list is being written */
    bool name_lost;   /* the source remembers another block than the destination thinks */

    uint8_t partial[RF_REPLAY_MESSAGE_MAX]; /* the beginning of a message whose end has not come */
    size_t partial_len;
    struct rf_bytes held;
    struct rf_bytes out;
    uint64_t after;     /* the last record that the list gave */
    uint64_t hold_till; /* ns; 0 before RESUME_ACK */

    uint64_t replayed;       /* requests written by us, over the whole migration */
    uint64_t held_count;     /* requests held back */
    uint64_t last_replay_ns; /* when the last of ours was written; 0 for never */
};

/* `input_max`: the most bytes that one rf_replay_feed is given. False when memory is short. */
bool rf_replay_init(struct rf_replay *replay, struct rf_tracker *tracker, bool source_side, size_t input_max);
void rf_replay_free(struct rf_replay *replay);

/*
 * A new channel begins. `recovered`: it resumes a lost one. `may_replay`: nothing forbids the replay.
 * `preempt`: the pages that are asked for go over another connection, and none is waited for.
 */
void rf_replay_channel(struct rf_replay *replay, bool recovered, bool may_replay, bool preempt);

/* Goes on with a channel that another process has had: the begin of a message whose end has not come, what
 * waited to be written, and its `name_lost`. They fit. */
void rf_replay_goes_on(struct rf_replay *replay, const uint8_t *partial, size_t partial_length,
                       const uint8_t *pending, size_t pending_length, bool name_lost, uint64_t now_ns);

/* Takes `len` bytes of the return path, at most `input_max`, only while nothing is pending. */
void rf_replay_feed(struct rf_replay *replay, const uint8_t *buf, size_t len, uint64_t now_ns);

/* To be called when something has passed from the source, and from time to time, while nothing is pending. */
void rf_replay_forward_passed(struct rf_replay *replay, uint64_t now_ns);

/* Puts more of the replay into `out`, behind what waits there, where one is under way. It looks at *looks
 * records at the most, and takes from it those that it has. */
void rf_replay_refill(struct rf_replay *replay, unsigned *looks, uint64_t now_ns);

/* Whether the next one to replay is yet to be found: refill again, without waiting for anything. */
bool rf_replay_looks_on(const struct rf_replay *replay);

/* Bytes that wait for the local leg: out.data[out.off] and on. */
size_t rf_replay_pending(const struct rf_replay *replay);

/* The local leg is gone: what waits for it goes too. */
void rf_replay_discard(struct rf_replay *replay);

#endif
