/*
 * The tracker: the decoders of both directions of one migration's main channel (and of its preempt channel),
 * and the page map that they fill, across losses of the channel.
 *
 * One thread feeds it; `facts`, `channel_facts`, the opaque reasons and the page map's statistics may be read
 * from any thread. It never holds or changes a byte: the caller passes on all it feeds.
 *
 * The pings around the switchover (migration/migration.c, the same in 7.2 and 10.0): migration_thread sends
 * PING 1 right after OPEN_RETURN_PATH; postcopy_start sends PING 2 before PACKAGED, PING 3 inside it, after
 * the device state and right before RUN, and PING 4 right behind it on the main stream. The destination's
 * main thread loads the package (migration/savevm.c, loadvm_handle_cmd_packaged) and answers 3 when all
 * device state is loaded; its listen thread, which starts at LISTEN at the head of the package, reads the
 * main stream meanwhile and may answer 4 *before* 3. So PONG 2 says that all that precopy sent was loaded,
 * and discarded where it had to be; PONG 3, not PONG 4, says that device state was loaded and that RUN is
 * next; nothing on the wire says that RUN was carried out (loadvm_postcopy_handle_run only schedules a bottom
 * half). None of the pings is sent where only dirty-bitmaps go postcopy.
 */
#ifndef RF_TRACKER_H
#define RF_TRACKER_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "forward.h"
#include "pagemap.h"
#include "returnpath.h"

/* cffi: begin */
enum rf_fact {
    RF_FACT_POSTCOPY_DISCARD_SEEN = 1, /* the source turns to postcopy: the first RAM_DISCARD passed */
    RF_FACT_PACKAGED_BEGUN = 2,        /* the switchover: PACKAGED's header passed */
    RF_FACT_PACKAGED_PASSED = 4,       /* and its last byte */
    RF_FACT_PONG_3 = 8,                /* the destination has loaded its device state */
    RF_FACT_COMPLETION_BEGUN = 16,     /* the first section END in postcopy: from here on a source does not
                                          pause, whatever happens */
    RF_FACT_EOF_PASSED = 32,           /* QEMU_VM_EOF: the source has sent all */
    RF_FACT_SHUT_PASSED = 64,          /* the destination has said good-bye */
    RF_FACT_RECV_BITMAP_ASKED = 128,   /* recovery handshake, in this order */
    RF_FACT_RESUME_SENT = 256,
    RF_FACT_RESUME_ACK_PASSED = 512,
    RF_FACT_RAM_DECLARED = 1024,  /* the block list passed */
    RF_FACT_IGNORE_SHARED = 2048, /* the configuration lists x-ignore-shared */
    RF_FACT_MULTIFD = 4096,       /* pages go over channels of their own */
    RF_FACT_FOREIGN_PAGES = 8192, /* a received bitmap claims pages that were never forwarded, and the whole
                                     stream was seen, or lacks some that are known to be loaded: it is
                                     another VM's */
    RF_FACT_WHOLE_STREAM_SEEN = 16384, /* of the migration, not of a channel; cleared when it ends to be so */
    /* Of a recovered channel, by the first page behind RESUME: it begins where its host page does, or inside
     * it (replay.h). */
    RF_FACT_HOST_PAGE_BEGUN = 32768,
    RF_FACT_HOST_PAGE_CUT = 65536,
};

struct rf_tracker;

/* `ceiling`: bytes for the page map. NULL without memory. */
struct rf_tracker *rf_tracker_new(uint64_t ceiling);

/*
 * The same, with a state file (statefile.h). `fd`: the new, empty file that what is tracked is to be kept in,
 * -1 for none; `old_fd`: the one that an earlier refault left of this migration, -1 for none. Both stay the
 * caller's. `key`: names the VM, the QEMU process and the migration.
 *
 * A tracker that has taken over an old file goes on with a recovered channel. Its forward stream was not seen
 * whole, for which pages have passed is not in the file. Where the file's writer crashed in a decoder, or a
 * received bitmap tells of other RAM blocks than the file, nothing that this migration says is read.
 */
struct rf_tracker *rf_tracker_new_kept(uint64_t ceiling, int fd, int old_fd, const uint8_t *key,
                                       size_t key_length);
void rf_tracker_free(struct rf_tracker *tracker);

/* `recovered`: 0 for the migration's first channel. Clears the channel's facts and opaque reasons. */
void rf_tracker_channel_begin(struct rf_tracker *tracker, int recovered);
void rf_tracker_channel_lost(struct rf_tracker *tracker);

/* A channel goes on of which another process has seen the beginning, of this migration of these facts. What
 * passes from the source is not read. `block`: of the last page request, at most 255 bytes. */
void rf_tracker_channel_goes_on(struct rf_tracker *tracker, uint32_t facts, uint32_t channel_facts,
                                const char *block, size_t block_length);
/* Whether it can go on so in another process: all that it was fed of the return path is read, but for a
 * message whose end has not come. `block`: what the other is to know; its length. */
int rf_tracker_may_go_on(const struct rf_tracker *tracker, const char **block, size_t *block_length);

/* What passed from the source, all of it. */
void rf_tracker_forward(struct rf_tracker *tracker, const uint8_t *bytes, size_t length, uint64_t now);

/* The preempt channel, where there is one. */
void rf_tracker_preempt_begin(struct rf_tracker *tracker);
void rf_tracker_preempt_forward(struct rf_tracker *tracker, const uint8_t *bytes, size_t length,
                                uint64_t now);

/*
 * From any thread: no received bitmap is taken for another VM's. For the destination's side, whose bitmaps
 * are its own QEMU's, and for a VM with virtio-mem: its destination marks an unplugged page that is touched
 * as received, though it never is sent (migration/postcopy-ram.c, postcopy_request_page).
 */
void rf_tracker_trust_bitmaps(struct rf_tracker *tracker);

/* Pages go over channels that the tracker is not fed (multifd). */
void rf_tracker_pages_elsewhere(struct rf_tracker *tracker);

/* One event of the return path; returns the bytes consumed, above 0 for length above 0. Where the path is
 * opaque for what a message says (a received bitmap of another size), or all is unread, messages are still
 * told from each other, and nothing is made of them; RF_RETURN_BAD: that has ended too. */
size_t rf_tracker_return_next(struct rf_tracker *tracker, const uint8_t *bytes, size_t length, uint64_t now,
                              struct rf_returnpath_event *event);
int rf_tracker_return_framed(const struct rf_tracker *tracker);
int rf_tracker_return_at_boundary(const struct rf_tracker *tracker);

/* The migration completed: every record ends. */
void rf_tracker_complete(struct rf_tracker *tracker);

/* From any thread. */
uint32_t rf_tracker_facts(const struct rf_tracker *tracker);         /* of the whole migration */
uint32_t rf_tracker_channel_facts(const struct rf_tracker *tracker); /* of the current channel */
uint32_t rf_tracker_forward_opaque(const struct rf_tracker *tracker);
uint32_t rf_tracker_return_opaque(const struct rf_tracker *tracker);
int rf_tracker_restored(const struct rf_tracker *tracker); /* enum rf_restored */
int rf_tracker_kept(const struct rf_tracker *tracker);     /* enum rf_kept */

/* For the thread that feeds (replay), and for the readers' functions of pagemap.h. */
struct rf_pagemap *rf_tracker_pagemap(struct rf_tracker *tracker);
/* cffi: end */

#endif
