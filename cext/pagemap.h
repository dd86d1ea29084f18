/*
 * The page map: which pages the destination has asked for, which have passed on their way to it, and which of
 * them the destination says it has.
 *
 * Two things are kept apart. A request is *outstanding* from the moment it passes
 * until all its target pages have passed the other way: that is the live count, and what latencies are taken
 * from. Its *record* lives on, for the answer may be lost behind the relay: it ends when a received bitmap
 * that was resumed with confirms the pages, or with the migration. What is replayed after a recovery is what
 * is recorded and not received.
 *
 * One thread writes (everything that takes a plain pointer); any thread may read through the functions that
 * end in _stats and _latency. The writer never waits for a reader. Times are monotonic, in ns, the caller's.
 * Names are at most 255 bytes, not terminated. Memory is bounded by the ceiling: what does not fit is refused
 * with a code and counted.
 */
#ifndef RF_PAGEMAP_H
#define RF_PAGEMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "histogram.h"
#include "statefile.h"
#include "status.h"

/* cffi: begin */
struct rf_pagemap_stats {
    uint64_t requested;   /* requests recorded, each once; always arrived + outstanding */
    uint64_t repeated;    /* requests on the wire that were on record already */
    uint64_t refused;     /* requests that were impossible, or for which there was no room */
    uint64_t torn;        /* records of an earlier refault's that its state file no longer had whole */
    uint64_t arrived;     /* requests all of whose pages have passed, or are known to be there */
    uint64_t crossed;     /* times that all pages had passed before the request did: no latency to take */
    uint64_t outstanding; /* requests not answered yet: the live count */
    uint64_t recorded;    /* records that have not ended */
    uint64_t confirmed;   /* records ended by a received bitmap */
    uint64_t reopened;    /* answers found lost: outstanding again */
    uint64_t replayed;    /* requests written by us */
    uint64_t evicted;     /* answered records forgotten for want of room */
    uint64_t forwarded;   /* target pages passed, doubles included */
    uint64_t discarded;   /* target pages that RAM_DISCARD took back */
    uint64_t losses;      /* channels lost */
    uint64_t memory;      /* bytes held */
    uint64_t blocks;
};

struct rf_pagemap_block_stats {
    char name[256]; /* terminated */
    uint32_t name_length;
    uint32_t declared;    /* 1: the forward stream told the size */
    uint64_t used_length; /* bytes; 0: not known */
    uint64_t page_size;   /* bytes; 0: not known */
    uint64_t requested;
    uint64_t arrived;
    uint64_t outstanding;
    uint64_t recorded;
    uint64_t replayed;
    uint64_t forwarded; /* target pages passed, doubles included */
    uint64_t present;   /* bytes passed, doubles and what was discarded or lost in flight not included */
    uint32_t cells[64]; /* outstanding, by the 64th of the block that it begins in; where its size is known */
};

/* A request as it was made. `id` names the record for as long as it lives; ids grow with time. */
struct rf_request {
    uint64_t id;
    uint64_t start;
    uint64_t time; /* ns: when it first passed */
    uint32_t length;
    uint32_t block;
    uint32_t outstanding;
    uint32_t name_length;
    const char *name;
};

/* What a received bitmap said about one block, in target pages. */
struct rf_bitmap_report {
    uint64_t received;
    uint64_t forwarded_not_received; /* was in flight */
    uint64_t received_not_forwarded; /* never passed here: another VM's, if the whole stream was seen */
    uint64_t loaded_not_received;    /* known to be loaded: another VM's, or another QEMU's */
};

enum { RF_LOOK_ON = 2 };

struct rf_pagemap;

/* `ceiling`: bytes; `host_page_size`: bytes, the page size of blocks that the stream gives none for. */
struct rf_pagemap *rf_pagemap_new(uint64_t ceiling, uint64_t host_page_size);
void rf_pagemap_free(struct rf_pagemap *map);

/* Before the first block. 10 to 30, else RF_OUT_OF_RANGE. */
int rf_pagemap_set_target_page_bits(struct rf_pagemap *map, uint32_t bits);

/* The block's index, or a negative status. Declaring a block again with another length is RF_BAD_SIZE. */
int rf_pagemap_declare(struct rf_pagemap *map, const char *name, size_t name_length, uint64_t used_length,
                       uint64_t page_size);
int rf_pagemap_find(const struct rf_pagemap *map, const char *name, size_t name_length);

/* What one request of the block covers, in bytes: its page size, or as the first request says where the
 * stream has not told that; 0: not known. */
uint64_t rf_pagemap_unit(const struct rf_pagemap *map, uint32_t block);

/* Whether a host page of some block is more than one target page. */
bool rf_pagemap_has_large_pages(const struct rf_pagemap *map);

/* The index of a block by that name, made known without a size if there is none yet and none are declared. */
int rf_pagemap_know(struct rf_pagemap *map, const char *name, size_t name_length);

/* A request passed. 0: recorded; 1: on record already; negative: refused, and counted. */
int rf_pagemap_request(struct rf_pagemap *map, const char *name, size_t name_length, uint64_t start,
                       uint32_t length, uint64_t now);

/* A request that passed on this channel does not reach the source after all: it is to be replayed. */
void rf_pagemap_not_asked(struct rf_pagemap *map, const char *name, size_t name_length, uint64_t start,
                          uint32_t length);

/* Target pages passed towards the destination. Cut to the block; a negative status where nothing was noted.
 */
int rf_pagemap_arrived(struct rf_pagemap *map, uint32_t block, uint64_t offset, uint64_t length,
                       uint64_t now);

/* RAM_DISCARD: what had passed is to be sent again. */
int rf_pagemap_discarded(struct rf_pagemap *map, uint32_t block, uint64_t start, uint64_t length);

/* From here on, to the end of this channel, pages and discards pass unseen: what passed before no longer
 * answers a request, and nothing is known to be loaded. */
void rf_pagemap_forward_unseen(struct rf_pagemap *map);

/*
 * What the destination must have: the pages that are known to be loaded. It loads the main channel in order,
 * so that a PONG says so of all that passed before its PING; and a received bitmap that was resumed with says
 * so of what it holds, for received pages are taken back by RAM_DISCARD alone, which no destination takes
 * once it runs (migration/savevm.c, loadvm_postcopy_ram_handle_discard; ram.c, ram_discard_range).
 *
 * ping_passed: a PING that comes behind all discards has passed, and pages from here on are behind it.
 * pong_passed: its PONG has, on the same channel.
 */
void rf_pagemap_ping_passed(struct rf_pagemap *map);
void rf_pagemap_pong_passed(struct rf_pagemap *map);

/* Where the recovery handshake was not over, its received bitmaps, the one under way too, count for nothing,
 * for they may be another VM's: what was in flight before it may have been received after all, and no record
 * has ended. RF_NO_MEMORY: not all of that could be noted. */
int rf_pagemap_channel_lost(struct rf_pagemap *map);
void rf_pagemap_channel_begin(struct rf_pagemap *map);

/* A received bitmap, of `size` bytes. begin: the block's index, RF_BAD_SIZE, RF_UNKNOWN_BLOCK, RF_NO_MEMORY.
 * data: in order, any sizes. end: it has come whole; it says nothing of records before the handshake is over.
 * RF_NO_MEMORY of data: should the handshake fail, what was forwarded is no longer known whole. */
int rf_pagemap_bitmap_begin(struct rf_pagemap *map, const char *name, size_t name_length, uint64_t size);
int rf_pagemap_bitmap_data(struct rf_pagemap *map, uint64_t offset, const uint8_t *dense, size_t bytes);
int rf_pagemap_bitmap_end(struct rf_pagemap *map, struct rf_bitmap_report *report);

/* Whether the bitmap under way claims a page that was never forwarded. */
bool rf_pagemap_bitmap_is_foreign(const struct rf_pagemap *map);
/* Whether it lacks a page that is known to be loaded. */
bool rf_pagemap_bitmap_lacks_loaded(const struct rf_pagemap *map);
/* In place of end: it is another VM's, and counts for nothing, as those before it on this channel do. The
 * channel is to be lost. RF_NO_MEMORY as for that. */
int rf_pagemap_bitmap_disown(struct rf_pagemap *map);

/* Judges some more records by the received bitmaps, the oldest first, in well below a millisecond. Whether
 * some are left. */
bool rf_pagemap_sweep(struct rf_pagemap *map);
bool rf_pagemap_is_sweeping(const struct rf_pagemap *map);

/* RESUME_ACK: the received bitmaps of this channel hold, and what they say is known to be loaded. The records
 * of their blocks end that are confirmed, and the others are outstanding again, both as the sweep comes to
 * them or they are asked for; nothing else shows that it has not. */
void rf_pagemap_handshake_over(struct rf_pagemap *map);

/* The oldest record with an id above `after` (start with 0). 1 and *out filled, or 0. Cheap when `after` is
 * the id it gave before. */
int rf_pagemap_next_record(struct rf_pagemap *map, uint64_t after, struct rf_request *out);

/* The same among those to replay, once the handshake is over: recorded, of a block whose received bitmap has
 * come on this channel without confirming it, not answered and not asked for again by the destination since
 * the channel began, not replayed on it yet. It looks at *looks records at the most, above 0, fewer of huge
 * pages, and takes from it those that it has; RF_LOOK_ON: at all, and *out is the last: ask again behind
 * that. */
int rf_pagemap_replay_next(struct rf_pagemap *map, uint64_t after, unsigned *looks, struct rf_request *out);

/* The record was written to the source. RF_OUT_OF_RANGE: no such record. */
int rf_pagemap_replayed(struct rf_pagemap *map, uint64_t id);

/* The migration completed: every record ends, as answered. However many they are, it takes no longer. */
void rf_pagemap_complete(struct rf_pagemap *map);

/* From any thread. 1: a consistent picture; 0: the writer was too busy, counters may be a few events apart.
 */
int rf_pagemap_stats(const struct rf_pagemap *map, struct rf_pagemap_stats *out);
/* RF_UNKNOWN_BLOCK beyond the last. */
int rf_pagemap_block_stats(const struct rf_pagemap *map, uint32_t block, struct rf_pagemap_block_stats *out);
void rf_pagemap_latency(const struct rf_pagemap *map, struct rf_histogram_snapshot *out);
/* cffi: end */

/* From here on all that is known of blocks and records is in `file` too, which outlives the map. */
void rf_pagemap_keep(struct rf_pagemap *map, struct rf_statefile *file);

/* What a state file says, into a new map: RF_OK, or a negative status, after which the map is of no use. */
int rf_pagemap_restore(struct rf_pagemap *map, const struct rf_statefile_image *image);

#endif
