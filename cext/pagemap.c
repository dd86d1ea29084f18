#include "pagemap.h"

#include <stdatomic.h>
#include <string.h>

#include "bitmap.h"
#include "budget.h"
#include "records.h"

#define BLOCKS_MAX 4096
#define NAME_MAX_LENGTH 255
#define LENGTH_MAX ((uint64_t)1 << 56)
#define DEFAULT_PAGE_BITS 12
#define NONE RF_NO_RECORD
/* Requests for something else than one page of their block. QEMU makes none, so a few are plenty. */
#define IRREGULAR_MAX 64
/* How far from the oldest record an answered one is looked for when room is needed. */
#define EVICTION_REACH 256
#define SWEEP_STEP 1024 /* records of one page; each may be several misses of the cache */
#define READ_RETRIES 64
#define CELLS 64

/* Written by one thread, read by any: relaxed atomics, bracketed by a sequence number. */
struct counters {
    _Atomic uint64_t requested;
    _Atomic uint64_t repeated;
    _Atomic uint64_t refused;
    _Atomic uint64_t torn;
    _Atomic uint64_t arrived;
    _Atomic uint64_t crossed;
    _Atomic uint64_t outstanding;
    _Atomic uint64_t recorded;
    _Atomic uint64_t confirmed;
    _Atomic uint64_t reopened;
    _Atomic uint64_t replayed;
    _Atomic uint64_t evicted;
    _Atomic uint64_t forwarded;
    _Atomic uint64_t discarded;
    _Atomic uint64_t losses;
    _Atomic uint64_t memory;
};

struct block {
    char name[NAME_MAX_LENGTH];
    uint8_t name_length;
    _Atomic bool declared;
    _Atomic uint64_t used_length; /* 0: not known, and then there are no bitmaps */
    _Atomic uint64_t page_size;   /* 0: not known */
    _Atomic uint64_t requested;
    _Atomic uint64_t arrived;
    _Atomic uint64_t outstanding;
    _Atomic uint64_t recorded;
    _Atomic uint64_t replayed;
    _Atomic uint64_t forwarded_pages;
    _Atomic uint64_t present; /* bytes of `forwarded` */
    _Atomic uint32_t cells[CELLS];
    uint64_t unit;                 /* what one request covers: the page size, or as the first request says */
    uint32_t bitmap_channel;       /* the channel on which its received bitmap came whole */
    bool disowned;                 /* that counts for nothing: what it has confirmed is to be taken back */
    struct rf_bitmap *forwarded;   /* has passed towards the destination */
    struct rf_bitmap *missing;     /* requested, and has not passed since */
    struct rf_bitmap *unconfirmed; /* requested, and not confirmed by a received bitmap */
    struct rf_bitmap *in_flight;   /* taken out of `forwarded` in a handshake that is not over; NULL: none */
    struct rf_bitmap *unproven;    /* of `forwarded`, not known to be loaded; NULL: none. See enum proof */
};

/* What is known of which forwarded pages the destination has loaded. */
enum proof {
    PROOF_NONE = 0,  /* nothing */
    PROOF_ASKED = 1, /* nothing yet, and after a PONG all that is not `unproven` */
    PROOF_GIVEN = 2, /* all that is not `unproven` */
};

struct rf_pagemap {
    struct rf_budget budget;
    struct rf_statefile *kept; /* NULL: the map is in memory alone */
    uint64_t host_page_size;
    uint32_t page_bits;
    uint32_t channel; /* counts channels, from 1 */
    bool forward_seen;
    bool any_declared;
    bool pages_passed; /* on this channel */
    bool agreed;       /* likewise, RESUME_ACK: its received bitmaps hold */
    enum proof proof;

    struct rf_records records;
    uint32_t cursor; /* the slot given last, or the one before it if that has ended */
    uint32_t sweep;  /* the next slot to be judged by the received bitmaps; NONE: all are */
    uint32_t irregular[IRREGULAR_MAX];
    uint32_t irregular_length;

    uint32_t bitmap_block; /* of the received bitmap under way, or NONE */
    uint64_t bitmap_size;
    struct rf_bitmap_report report;

    _Atomic uint32_t sequence; /* odd: being written */
    struct counters counters;
    struct rf_histogram latency;
    _Atomic uint32_t blocks_length;
    struct block *_Atomic blocks[BLOCKS_MAX];
};

static uint64_t get(const _Atomic uint64_t *counter) {
    return atomic_load_explicit(counter, memory_order_relaxed);
}

static void put(_Atomic uint64_t *counter, uint64_t value) {
    atomic_store_explicit(counter, value, memory_order_relaxed);
}

static void add(_Atomic uint64_t *counter, uint64_t amount) { put(counter, get(counter) + amount); }

static void subtract(_Atomic uint64_t *counter, uint64_t amount) { put(counter, get(counter) - amount); }

static void write_begin(struct rf_pagemap *map) {
    uint32_t sequence = atomic_load_explicit(&map->sequence, memory_order_relaxed);
    atomic_store_explicit(&map->sequence, sequence + 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
}

static void write_end(struct rf_pagemap *map) {
    put(&map->counters.memory, map->budget.used);
    uint32_t sequence = atomic_load_explicit(&map->sequence, memory_order_relaxed);
    atomic_store_explicit(&map->sequence, sequence + 1, memory_order_release);
}

static uint32_t blocks_length(const struct rf_pagemap *map) {
    return atomic_load_explicit(&map->blocks_length, memory_order_acquire);
}

static struct block *block_at(const struct rf_pagemap *map, uint32_t index) {
    return atomic_load_explicit(&map->blocks[index], memory_order_acquire);
}

static uint64_t target_page(const struct rf_pagemap *map) { return (uint64_t)1 << map->page_bits; }

struct rf_pagemap *rf_pagemap_new(uint64_t ceiling, uint64_t host_page_size) {
    struct rf_budget budget = {.used = 0, .ceiling = ceiling};
    struct rf_pagemap *map = rf_budget_alloc(&budget, sizeof(*map));
    if (map == NULL) {
        return NULL;
    }
    map->budget = budget;
    map->host_page_size = host_page_size;
    map->page_bits = DEFAULT_PAGE_BITS;
    map->channel = 1;
    map->forward_seen = true;
    rf_records_init(&map->records, &map->budget);
    map->cursor = map->sweep = map->bitmap_block = NONE;
    put(&map->counters.memory, map->budget.used);
    return map;
}

/* After each change of `forwarded`. */
static void tell_present(const struct rf_pagemap *map, struct block *block) {
    put(&block->present, rf_bitmap_count(block->forwarded) << map->page_bits);
}

static void free_bitmaps(struct block *block) {
    rf_bitmap_free(block->forwarded);
    rf_bitmap_free(block->missing);
    rf_bitmap_free(block->unconfirmed);
    rf_bitmap_free(block->in_flight);
    rf_bitmap_free(block->unproven);
    block->forwarded = block->missing = block->unconfirmed = block->in_flight = block->unproven = NULL;
}

void rf_pagemap_free(struct rf_pagemap *map) {
    if (map == NULL) {
        return;
    }
    for (uint32_t i = 0; i < blocks_length(map); i++) {
        free_bitmaps(block_at(map, i));
        rf_budget_free(&map->budget, block_at(map, i), sizeof(struct block));
    }
    rf_records_free(&map->records);
    rf_budget_free(NULL, map, sizeof(*map));
}

int rf_pagemap_set_target_page_bits(struct rf_pagemap *map, uint32_t bits) {
    if (bits < 10 || bits > 30) {
        return RF_OUT_OF_RANGE;
    }
    if (bits != map->page_bits && blocks_length(map) > 0) {
        return RF_BAD_SIZE;
    }
    map->page_bits = bits;
    rf_statefile_page_bits(map->kept, bits);
    return RF_OK;
}

/* Records. */

static struct rf_record *record_at(const struct rf_pagemap *map, uint32_t slot) {
    return rf_records_at(&map->records, slot);
}

static uint64_t first_page(const struct rf_pagemap *map, const struct rf_record *record) {
    return record->start >> map->page_bits;
}

static uint64_t page_count(const struct rf_pagemap *map, const struct rf_record *record) {
    return record->length >> map->page_bits;
}

/* Among those outstanding, by where in the block it is; not before the size is known. */
static void count_in_cell(struct block *block, const struct rf_record *record, bool more) {
    uint64_t size = get(&block->used_length);
    if (size == 0) {
        return;
    }
    uint64_t cell = record->start / ((size + CELLS - 1) / CELLS);
    _Atomic uint32_t *count = &block->cells[cell < CELLS ? cell : CELLS - 1];
    uint32_t now = atomic_load_explicit(count, memory_order_relaxed);
    atomic_store_explicit(count, more ? now + 1 : now - 1, memory_order_relaxed);
}

/* Between the two states of a request: requested is arrived + outstanding, always. */
static void set_outstanding(struct rf_pagemap *map, uint32_t slot, bool outstanding) {
    struct rf_record *record = record_at(map, slot);
    struct block *block = block_at(map, record->block);
    if (outstanding == record->outstanding) {
        return;
    }
    record->outstanding = outstanding;
    rf_statefile_outstanding(map->kept, slot, outstanding);
    count_in_cell(block, record, outstanding);
    if (outstanding) {
        add(&map->counters.outstanding, 1);
        add(&block->outstanding, 1);
        subtract(&map->counters.arrived, 1);
        subtract(&block->arrived, 1);
    } else {
        subtract(&map->counters.outstanding, 1);
        subtract(&block->outstanding, 1);
        add(&map->counters.arrived, 1);
        add(&block->arrived, 1);
    }
}

/* What ends is answered, whether or not we saw it pass. */
static void end_record(struct rf_pagemap *map, uint32_t slot) {
    struct rf_record *record = record_at(map, slot);
    struct block *block = block_at(map, record->block);
    rf_statefile_end(map->kept, slot);
    set_outstanding(map, slot, false);
    subtract(&map->counters.recorded, 1);
    subtract(&block->recorded, 1);
    if (block->missing != NULL && map->irregular_length == 0) { /* else others may stand on the same pages */
        rf_bitmap_clear_range(block->missing, first_page(map, record), page_count(map, record));
        rf_bitmap_clear_range(block->unconfirmed, first_page(map, record), page_count(map, record));
    }
    for (uint32_t i = 0; i < map->irregular_length; i++) {
        if (map->irregular[i] == slot) {
            map->irregular[i] = map->irregular[--map->irregular_length];
            break;
        }
    }
    if (map->sweep == slot) {
        map->sweep = record->next;
    }
    if (map->cursor == slot) {
        map->cursor = record->previous;
    }
    rf_records_remove(&map->records, slot);
}

static void keep_record(struct rf_pagemap *map, uint32_t slot) {
    const struct rf_record *record = record_at(map, slot);
    rf_statefile_record(map->kept, slot,
                        &(struct rf_statefile_record){
                            .id = record->id,
                            .start = record->start,
                            .time = record->time,
                            .length = record->length,
                            .block = record->block,
                            .outstanding = record->outstanding,
                        });
}

/* Ends a record that should not have been made. */
static void refuse_record(struct rf_pagemap *map, uint32_t slot) {
    struct block *block = block_at(map, record_at(map, slot)->block);
    end_record(map, slot);
    subtract(&map->counters.arrived, 1);
    subtract(&block->arrived, 1);
    subtract(&map->counters.requested, 1);
    subtract(&block->requested, 1);
}

/* Notes the record's pages as missing and recorded; false without memory. */
static bool note_pages(struct rf_pagemap *map, struct block *block, const struct rf_record *record) {
    uint64_t first = first_page(map, record);
    uint64_t count = page_count(map, record);
    if (rf_bitmap_set_range(block->unconfirmed, first, count) < 0) {
        return false;
    }
    if (!record->outstanding) {
        return true;
    }
    if (!map->forward_seen || rf_bitmap_count_range(block->forwarded, first, count) == 0) {
        return rf_bitmap_set_range(block->missing, first, count) >= 0;
    }
    for (uint64_t page = first; page < first + count; page++) {
        if (!rf_bitmap_test(block->forwarded, page) && rf_bitmap_set(block->missing, page) < 0) {
            return false;
        }
    }
    return true;
}

/* The pages that no received bitmap has confirmed and that have not passed are missing. Whether there are
 * any; without memory for all of them it stays outstanding until a bitmap confirms it. */
static bool miss_pages(const struct rf_pagemap *map, const struct rf_record *record) {
    struct block *block = block_at(map, record->block);
    uint64_t first = first_page(map, record);
    uint64_t count = page_count(map, record);
    if (rf_bitmap_count_range(block->unconfirmed, first, count) == count &&
        rf_bitmap_count_range(block->forwarded, first, count) == 0) {
        (void)rf_bitmap_set_range(block->missing, first, count);
        return true;
    }
    bool any = false;
    for (uint64_t page = rf_bitmap_next(block->unconfirmed, first); page < first + count;
         page = rf_bitmap_next(block->unconfirmed, page + 1)) {
        if (!rf_bitmap_test(block->forwarded, page)) {
            any = true;
            (void)rf_bitmap_set(block->missing, page);
        }
    }
    return any;
}

/* An answer was lost. */
static void reopen(struct rf_pagemap *map, uint32_t slot) {
    const struct rf_record *record = record_at(map, slot);
    if (record->outstanding) {
        return;
    }
    set_outstanding(map, slot, true);
    add(&map->counters.reopened, 1);
    if (block_at(map, record->block)->missing != NULL) {
        (void)miss_pages(map, record);
    }
}

/* Whether its block's received bitmap, once it holds, confirms all pages of the record. */
static bool is_confirmed(const struct rf_pagemap *map, const struct rf_record *record) {
    const struct block *block = block_at(map, record->block);
    uint64_t end = first_page(map, record) + page_count(map, record);
    return block->bitmap_channel == map->channel &&
           rf_bitmap_next(block->unconfirmed, first_page(map, record)) >= end;
}

/* What a bitmap that counts for nothing has confirmed is not. Without memory it stays so, and the
 * destination's own repetition must do. */
static void take_back(const struct rf_pagemap *map, const struct rf_record *record) {
    const struct block *block = block_at(map, record->block);
    (void)rf_bitmap_set_range(block->unconfirmed, first_page(map, record), page_count(map, record));
}

/* Pages that a received bitmap has confirmed are not missing. */
static void find_confirmed(const struct rf_pagemap *map, const struct rf_record *record) {
    const struct block *block = block_at(map, record->block);
    uint64_t first = first_page(map, record);
    uint64_t end = first + page_count(map, record);
    if (rf_bitmap_count_range(block->unconfirmed, first, end - first) == end - first) {
        return;
    }
    uint64_t page = rf_bitmap_next(block->missing, first);
    while (page < end) {
        uint64_t kept = rf_bitmap_next(block->unconfirmed, page);
        uint64_t upto = kept < end ? kept : end;
        rf_bitmap_clear_range(block->missing, page, upto - page);
        page = rf_bitmap_next(block->missing, upto > page ? upto : page + 1);
    }
}

/*
 * Makes of the record what its block's received bitmap says, if one has come on this channel and holds: it
 * ends, or what has not passed again since is missing. As often as one likes; a record that the sweep has not
 * come to is judged before anything else is made of it. False if it has ended.
 */
static bool judge(struct rf_pagemap *map, uint32_t slot) {
    const struct rf_record *record = record_at(map, slot);
    const struct block *block = block_at(map, record->block);
    if (block->disowned) {
        take_back(map, record);
    }
    if (!map->agreed || block->bitmap_channel != map->channel) {
        return true;
    }
    if (is_confirmed(map, record)) {
        end_record(map, slot);
        add(&map->counters.confirmed, 1);
        return false;
    }
    find_confirmed(map, record);
    if (miss_pages(map, record)) {
        add(&map->counters.reopened, !record->outstanding);
        set_outstanding(map, slot, true);
    } else if (rf_bitmap_next(block->missing, first_page(map, record)) >=
               first_page(map, record) + page_count(map, record)) {
        set_outstanding(map, slot, false);
    }
    return true;
}

/* What judging it takes, as so many records of one page. */
static unsigned weight(const struct rf_pagemap *map, const struct rf_record *record) {
    return 1 + (unsigned)(page_count(map, record) / 64);
}

/* Forgets an old answered record: the least loss when there is no room. */
static bool evict(struct rf_pagemap *map) {
    uint32_t slot = map->records.oldest;
    for (unsigned reach = 0; slot != NONE && reach < EVICTION_REACH; reach++) {
        uint32_t next = record_at(map, slot)->next;
        if (!judge(map, slot)) {
            return true;
        }
        if (!record_at(map, slot)->outstanding) {
            end_record(map, slot);
            add(&map->counters.evicted, 1);
            return true;
        }
        slot = next;
    }
    return false;
}

/* Blocks. */

static bool name_fits(size_t name_length) { return name_length > 0 && name_length <= NAME_MAX_LENGTH; }

int rf_pagemap_find(const struct rf_pagemap *map, const char *name, size_t name_length) {
    for (uint32_t i = 0; i < blocks_length(map); i++) {
        const struct block *block = block_at(map, i);
        if (block->name_length == name_length && memcmp(block->name, name, name_length) == 0) {
            return (int)i;
        }
    }
    return RF_UNKNOWN_BLOCK;
}

uint64_t rf_pagemap_unit(const struct rf_pagemap *map, uint32_t block) {
    return block < blocks_length(map) ? block_at(map, block)->unit : 0;
}

bool rf_pagemap_has_large_pages(const struct rf_pagemap *map) {
    for (uint32_t i = 0; i < blocks_length(map); i++) {
        if (rf_pagemap_unit(map, i) > target_page(map)) {
            return true;
        }
    }
    return false;
}

static void keep_sizes(struct rf_pagemap *map, uint32_t index) {
    const struct block *block = block_at(map, index);
    rf_statefile_block_size(map->kept, index, get(&block->used_length) >> map->page_bits,
                            get(&block->page_size),
                            atomic_load_explicit(&block->declared, memory_order_relaxed));
}

static int add_block(struct rf_pagemap *map, const char *name, size_t name_length) {
    uint32_t length = blocks_length(map);
    if (length == BLOCKS_MAX) {
        return RF_FULL;
    }
    struct block *block = rf_budget_alloc(&map->budget, sizeof(*block));
    if (block == NULL) {
        return RF_NO_MEMORY;
    }
    memcpy(block->name, name, name_length);
    block->name_length = (uint8_t)name_length;
    atomic_store_explicit(&map->blocks[length], block, memory_order_release);
    atomic_store_explicit(&map->blocks_length, length + 1, memory_order_release);
    rf_statefile_block(map->kept, length, name, name_length);
    return (int)length;
}

int rf_pagemap_know(struct rf_pagemap *map, const char *name, size_t name_length) {
    if (!name_fits(name_length)) {
        return RF_BAD_NAME;
    }
    int index = rf_pagemap_find(map, name, name_length);
    if (index >= 0 || map->any_declared) {
        return index;
    }
    return add_block(map, name, name_length);
}

/* The block's size has become known: from here on it has bitmaps. Records that do not fit end, as refused. */
static int set_size(struct rf_pagemap *map, uint32_t index, uint64_t used_length) {
    struct block *block = block_at(map, index);
    uint64_t pages = used_length >> map->page_bits;
    block->forwarded = rf_bitmap_new_within(&map->budget, pages);
    block->missing = rf_bitmap_new_within(&map->budget, pages);
    block->unconfirmed = rf_bitmap_new_within(&map->budget, pages);
    if (block->forwarded == NULL || block->missing == NULL || block->unconfirmed == NULL) {
        free_bitmaps(block);
        return RF_NO_MEMORY;
    }
    put(&block->used_length, used_length);
    uint32_t slot = map->records.oldest;
    while (slot != NONE) {
        struct rf_record *record = record_at(map, slot);
        uint32_t next = record->next;
        if (record->block == index) {
            if (record->outstanding) {
                count_in_cell(block, record, true);
            }
            bool inside = record->start <= used_length && record->length <= used_length - record->start;
            if (!inside || !note_pages(map, block, record)) {
                refuse_record(map, slot);
                add(&map->counters.refused, 1);
            }
        }
        slot = next;
    }
    return RF_OK;
}

static int set_page_size(struct rf_pagemap *map, struct block *block, uint64_t page_size) {
    uint64_t least = target_page(map);
    uint64_t host = map->host_page_size > least ? map->host_page_size : least;
    uint64_t size = page_size == 0 ? host : page_size;
    if (size < least || (size & (size - 1)) != 0) {
        return RF_MISALIGNED;
    }
    put(&block->page_size, size);
    block->unit = size;
    return RF_OK;
}

static int declare(struct rf_pagemap *map, const char *name, size_t name_length, uint64_t used_length,
                   uint64_t page_size) {
    if (!name_fits(name_length)) {
        return RF_BAD_NAME;
    }
    if (used_length > LENGTH_MAX || used_length % target_page(map) != 0) {
        return RF_BAD_SIZE;
    }
    int index = rf_pagemap_find(map, name, name_length);
    if (index < 0) {
        index = add_block(map, name, name_length);
        if (index < 0) {
            return index;
        }
    }
    struct block *block = block_at(map, (uint32_t)index);
    bool declared = atomic_load_explicit(&block->declared, memory_order_relaxed);
    if (declared || block->forwarded != NULL) {
        uint64_t known = get(&block->used_length);
        /* A received bitmap is padded to whole words of 64 pages: the declaration is the exact one. */
        uint64_t padding = declared ? 0 : 63 * target_page(map);
        if (used_length > known || known - used_length > padding) {
            return RF_BAD_SIZE;
        }
    } else {
        int status = set_size(map, (uint32_t)index, used_length);
        if (status < 0) {
            return status;
        }
    }
    if (!declared || page_size != 0) {
        int status = set_page_size(map, block, page_size);
        if (status < 0) {
            return status;
        }
    }
    put(&block->used_length, used_length);
    atomic_store_explicit(&block->declared, true, memory_order_relaxed);
    map->any_declared = true;
    keep_sizes(map, (uint32_t)index);
    return index;
}

int rf_pagemap_declare(struct rf_pagemap *map, const char *name, size_t name_length, uint64_t used_length,
                       uint64_t page_size) {
    write_begin(map);
    int index = declare(map, name, name_length, used_length, page_size);
    write_end(map);
    return index;
}

/* Requests and arrivals. */

static int check_request(struct rf_pagemap *map, struct block *block, uint64_t start, uint32_t length) {
    uint64_t page = get(&block->page_size) != 0 ? get(&block->page_size) : target_page(map);
    if (length == 0 || start % page != 0 || length % page != 0) {
        return RF_MISALIGNED;
    }
    uint64_t end = block->forwarded != NULL ? get(&block->used_length) : LENGTH_MAX;
    if (start > end || length > end - start) {
        return RF_OUT_OF_RANGE;
    }
    if (block->unit == 0) {
        block->unit = length;
    }
    return RF_OK;
}

static bool all_forwarded(const struct rf_pagemap *map, const struct block *block, uint64_t start,
                          uint32_t length) {
    uint64_t count = length >> map->page_bits;
    return map->forward_seen && block->forwarded != NULL &&
           rf_bitmap_count_range(block->forwarded, start >> map->page_bits, count) == count;
}

static void repeat(struct rf_pagemap *map, uint32_t slot) {
    struct rf_record *record = record_at(map, slot);
    struct block *block = block_at(map, record->block);
    add(&map->counters.repeated, 1);
    record->requested_on = map->channel;
    if (block->bitmap_channel == map->channel && !map->agreed) {
        return; /* the end of the handshake shows whether its answer was lost */
    }
    if (!record->outstanding && !all_forwarded(map, block, record->start, record->length)) {
        reopen(map, slot);
    }
}

static int record_request(struct rf_pagemap *map, uint32_t index, uint64_t start, uint32_t length,
                          uint64_t now, bool answered) {
    struct block *block = block_at(map, index);
    bool regular = length == block->unit && start % block->unit == 0;
    if (!regular && map->irregular_length == IRREGULAR_MAX) {
        return RF_FULL;
    }
    const struct rf_record made = {
        .start = start,
        .time = now,
        .length = length,
        .block = index,
        .requested_on = map->channel,
    };
    uint32_t slot = rf_records_add(&map->records, &made);
    if (slot == NONE && evict(map)) {
        slot = rf_records_add(&map->records, &made);
    }
    if (slot == NONE) {
        return RF_FULL;
    }
    add(&map->counters.recorded, 1);
    add(&block->recorded, 1);
    add(&map->counters.requested, 1);
    add(&block->requested, 1);
    add(&map->counters.arrived, 1);
    add(&block->arrived, 1);
    set_outstanding(map, slot, !answered);
    if (!regular) {
        map->irregular[map->irregular_length++] = slot;
    }
    if (block->forwarded != NULL && !note_pages(map, block, record_at(map, slot))) {
        refuse_record(map, slot);
        return RF_NO_MEMORY;
    }
    keep_record(map, slot);
    return RF_OK;
}

static int request(struct rf_pagemap *map, const char *name, size_t name_length, uint64_t start,
                   uint32_t length, uint64_t now) {
    int index = rf_pagemap_know(map, name, name_length);
    if (index < 0) {
        return index;
    }
    int status = check_request(map, block_at(map, (uint32_t)index), start, length);
    if (status < 0) {
        return status;
    }
    uint32_t slot = rf_records_find(&map->records, (uint32_t)index, start, length);
    if (slot != NONE && judge(map, slot)) {
        repeat(map, slot);
        return 1;
    }
    bool crossed = all_forwarded(map, block_at(map, (uint32_t)index), start, length);
    status = record_request(map, (uint32_t)index, start, length, now, crossed);
    add(&map->counters.crossed, status == RF_OK && crossed);
    return status;
}

int rf_pagemap_request(struct rf_pagemap *map, const char *name, size_t name_length, uint64_t start,
                       uint32_t length, uint64_t now) {
    write_begin(map);
    int status = request(map, name, name_length, start, length, now);
    add(&map->counters.refused, status < 0);
    write_end(map);
    return status;
}

void rf_pagemap_not_asked(struct rf_pagemap *map, const char *name, size_t name_length, uint64_t start,
                          uint32_t length) {
    int index = rf_pagemap_find(map, name, name_length);
    uint32_t slot = index < 0 ? NONE : rf_records_find(&map->records, (uint32_t)index, start, length);
    if (slot != NONE) {
        record_at(map, slot)->requested_on = 0;
    }
}

/* Answered, if none of its pages is missing any more. */
static void settle(struct rf_pagemap *map, struct block *block, uint32_t slot, uint64_t now) {
    struct rf_record *record = record_at(map, slot);
    uint64_t end = first_page(map, record) + page_count(map, record);
    if (!record->outstanding || rf_bitmap_next(block->missing, first_page(map, record)) < end) {
        return;
    }
    set_outstanding(map, slot, false);
    rf_histogram_record(&map->latency, now > record->time ? now - record->time : 0);
}

/* Before they are noted as forwarded: those of the pages that were not so before are not known to be loaded.
 */
static void note_unproven(struct rf_pagemap *map, struct block *block, uint64_t first, uint64_t count) {
    if (map->proof == PROOF_NONE || rf_bitmap_count_range(block->forwarded, first, count) == count) {
        return;
    }
    if (block->unproven == NULL) {
        block->unproven = rf_bitmap_new_within(&map->budget, rf_bitmap_bits(block->forwarded));
    }
    for (uint64_t page = first; page < first + count; page++) {
        if (!rf_bitmap_test(block->forwarded, page) &&
            (block->unproven == NULL || rf_bitmap_set(block->unproven, page) < 0)) {
            map->proof = PROOF_NONE;
            return;
        }
    }
}

static int arrived(struct rf_pagemap *map, uint32_t index, uint64_t offset, uint64_t length, uint64_t now) {
    if (index >= blocks_length(map)) {
        return RF_UNKNOWN_BLOCK;
    }
    struct block *block = block_at(map, index);
    uint64_t first = offset >> map->page_bits;
    if (block->forwarded == NULL || first >= rf_bitmap_bits(block->forwarded)) {
        return RF_OUT_OF_RANGE;
    }
    uint64_t room = rf_bitmap_bits(block->forwarded) - first;
    uint64_t count = length >> map->page_bits;
    count = count < room ? count : room;
    int status = RF_OK;
    map->pages_passed = true;
    note_unproven(map, block, first, count);
    if (rf_bitmap_set_range(block->forwarded, first, count) < 0) {
        map->forward_seen = false;
        status = RF_NO_MEMORY;
    }
    tell_present(map, block);
    add(&map->counters.forwarded, count);
    add(&block->forwarded_pages, count);
    if (rf_bitmap_count(block->missing) == 0) {
        return status;
    }
    uint64_t page = rf_bitmap_next(block->missing, first);
    while (page < first + count) {
        uint64_t unit_start = (page << map->page_bits) / block->unit * block->unit;
        uint64_t unit_end = (unit_start + block->unit) >> map->page_bits;
        uint64_t upto = unit_end < first + count ? unit_end : first + count;
        rf_bitmap_clear_range(block->missing, page, upto - page);
        uint32_t slot = rf_records_find(&map->records, index, unit_start, block->unit);
        if (slot != NONE) {
            settle(map, block, slot, now);
        }
        for (uint32_t i = 0; i < map->irregular_length; i++) {
            if (record_at(map, map->irregular[i])->block == index) {
                settle(map, block, map->irregular[i], now);
            }
        }
        page = rf_bitmap_next(block->missing, upto);
    }
    return status;
}

int rf_pagemap_arrived(struct rf_pagemap *map, uint32_t block, uint64_t offset, uint64_t length,
                       uint64_t now) {
    write_begin(map);
    int status = arrived(map, block, offset, length, now);
    write_end(map);
    return status;
}

int rf_pagemap_discarded(struct rf_pagemap *map, uint32_t index, uint64_t start, uint64_t length) {
    if (index >= blocks_length(map)) {
        return RF_UNKNOWN_BLOCK;
    }
    struct block *block = block_at(map, index);
    if (block->forwarded == NULL) {
        return RF_OUT_OF_RANGE;
    }
    write_begin(map);
    int64_t taken =
        rf_bitmap_clear_range(block->forwarded, start >> map->page_bits, length >> map->page_bits);
    add(&map->counters.discarded, (uint64_t)taken);
    tell_present(map, block);
    write_end(map);
    return RF_OK;
}

void rf_pagemap_forward_unseen(struct rf_pagemap *map) {
    map->forward_seen = false;
    map->proof = PROOF_NONE;
}

/* Losses and received bitmaps. */

/* False without memory: then some of what has passed counts as never forwarded. */
static bool put_back_in_flight(const struct rf_pagemap *map, struct block *block) {
    uint64_t pages[256];
    size_t count;
    bool whole = true;
    while ((count = rf_bitmap_drain(block->in_flight, pages, sizeof(pages) / sizeof(pages[0]))) > 0) {
        for (size_t i = 0; i < count; i++) {
            whole = rf_bitmap_set(block->forwarded, pages[i]) >= 0 && whole;
        }
    }
    tell_present(map, block);
    return whole;
}

static void forget_in_flight(struct block *block) {
    rf_bitmap_free(block->in_flight);
    block->in_flight = NULL;
}

static void forget_unproven(struct rf_pagemap *map) {
    for (uint32_t i = 0; i < blocks_length(map); i++) {
        rf_bitmap_free(block_at(map, i)->unproven);
        block_at(map, i)->unproven = NULL;
    }
}

void rf_pagemap_ping_passed(struct rf_pagemap *map) {
    forget_unproven(map);
    map->proof = PROOF_ASKED;
}

void rf_pagemap_pong_passed(struct rf_pagemap *map) {
    if (map->proof == PROOF_ASKED) {
        map->proof = PROOF_GIVEN;
    }
}

void rf_pagemap_handshake_over(struct rf_pagemap *map) {
    /* No page passes in a handshake of QEMU's: one that did would be behind the bitmaps. */
    bool whole = !map->pages_passed;
    for (uint32_t i = 0; i < blocks_length(map); i++) {
        forget_in_flight(block_at(map, i));
        whole &= block_at(map, i)->bitmap_channel == map->channel;
    }
    forget_unproven(map);
    map->proof = whole ? PROOF_GIVEN : PROOF_NONE;
    map->agreed = true;
    map->sweep = map->records.oldest;
}

/* The received bitmaps of this channel, whole or not, count for nothing. */
static int disown_bitmaps(struct rf_pagemap *map) {
    int status = RF_OK;
    for (uint32_t i = 0; i < blocks_length(map); i++) {
        struct block *block = block_at(map, i);
        if (block->bitmap_channel == map->channel || i == map->bitmap_block) {
            block->bitmap_channel = 0;
            block->disowned = true;
            map->sweep = map->records.oldest;
        }
        if (block->in_flight != NULL && !put_back_in_flight(map, block)) {
            status = RF_NO_MEMORY;
        }
        forget_in_flight(block);
    }
    map->bitmap_block = NONE;
    return status;
}

int rf_pagemap_channel_lost(struct rf_pagemap *map) {
    write_begin(map);
    add(&map->counters.losses, 1);
    if (map->proof == PROOF_ASKED) {
        map->proof = PROOF_NONE; /* a PONG of another channel answers another PING */
    }
    int status = map->agreed ? RF_OK : disown_bitmaps(map);
    write_end(map);
    return status;
}

void rf_pagemap_channel_begin(struct rf_pagemap *map) {
    map->channel++;
    map->bitmap_block = NONE;
    map->pages_passed = map->agreed = false;
    map->forward_seen = true; /* the received bitmaps set right what was missed */
}

static int bitmap_begin(struct rf_pagemap *map, const char *name, size_t name_length, uint64_t size) {
    int index = rf_pagemap_know(map, name, name_length);
    if (index < 0) {
        return index;
    }
    struct block *block = block_at(map, (uint32_t)index);
    if (block->disowned) {
        while (rf_pagemap_sweep(map)) { /* else what that has confirmed is mixed with what this one does */
        }
        block->disowned = false;
    }
    if (block->forwarded == NULL) {
        if (size % 8 != 0 || size > LENGTH_MAX >> map->page_bits >> 3) {
            return RF_BAD_SIZE;
        }
        write_begin(map);
        int status = set_size(map, (uint32_t)index, size * 8 << map->page_bits);
        write_end(map);
        if (status < 0) {
            return status;
        }
        keep_sizes(map, (uint32_t)index);
    } else if (size != ((get(&block->used_length) >> map->page_bits) + 63) / 64 * 8) {
        return RF_BAD_SIZE;
    }
    map->bitmap_block = (uint32_t)index;
    map->bitmap_size = size;
    map->agreed = false;
    map->report = (struct rf_bitmap_report){0};
    return index;
}

int rf_pagemap_bitmap_begin(struct rf_pagemap *map, const char *name, size_t name_length, uint64_t size) {
    map->bitmap_block = NONE;
    return bitmap_begin(map, name, name_length, size);
}

static bool known_loaded(const struct rf_pagemap *map, const struct block *block, uint64_t page) {
    return map->proof == PROOF_GIVEN && (block->unproven == NULL || !rf_bitmap_test(block->unproven, page));
}

/* Keeps what the received bitmap is about to take out of `forwarded`; false without memory. */
static bool keep_in_flight(struct rf_pagemap *map, struct block *block, uint64_t offset, const uint8_t *dense,
                           size_t bytes) {
    const uint64_t end = (offset + bytes) * 8;
    uint64_t from = offset * 8;
    uint64_t pages[256];
    if (block->in_flight == NULL) {
        block->in_flight = rf_bitmap_new_within(&map->budget, rf_bitmap_bits(block->forwarded));
    }
    while (block->in_flight != NULL && from < end) {
        size_t count = rf_bitmap_list(block->forwarded, &from, pages, sizeof(pages) / sizeof(pages[0]));
        if (count == 0) {
            break;
        }
        for (size_t i = 0; i < count && pages[i] < end; i++) {
            uint64_t bit = pages[i] - offset * 8;
            if ((dense[bit / 8] >> bit % 8 & 1) != 0) {
                continue;
            }
            map->report.loaded_not_received += known_loaded(map, block, pages[i]);
            if (rf_bitmap_set(block->in_flight, pages[i]) < 0) {
                return false;
            }
        }
    }
    return block->in_flight != NULL;
}

int rf_pagemap_bitmap_data(struct rf_pagemap *map, uint64_t offset, const uint8_t *dense, size_t bytes) {
    if (map->bitmap_block == NONE) {
        return RF_UNKNOWN_BLOCK;
    }
    if (offset > map->bitmap_size || bytes > map->bitmap_size - offset) {
        return RF_OUT_OF_RANGE;
    }
    struct block *block = block_at(map, map->bitmap_block);
    uint64_t only_forwarded = 0;
    uint64_t only_received = 0;
    uint64_t before = rf_bitmap_count_range(block->forwarded, offset * 8, (uint64_t)bytes * 8);
    rf_bitmap_compare(block->forwarded, offset, dense, bytes, &only_forwarded, &only_received);
    map->report.received += before - only_forwarded + only_received;
    map->report.forwarded_not_received += only_forwarded;
    map->report.received_not_forwarded += only_received;
    rf_bitmap_and_not(block->unconfirmed, offset, dense, bytes);
    int status =
        only_forwarded > 0 && !keep_in_flight(map, block, offset, dense, bytes) ? RF_NO_MEMORY : RF_OK;
    rf_bitmap_and(block->forwarded, offset, dense, bytes); /* what was in flight will be sent again */
    tell_present(map, block);
    return status;
}

bool rf_pagemap_bitmap_is_foreign(const struct rf_pagemap *map) {
    return map->bitmap_block != NONE && map->report.received_not_forwarded > 0;
}

bool rf_pagemap_bitmap_lacks_loaded(const struct rf_pagemap *map) {
    return map->bitmap_block != NONE && map->report.loaded_not_received > 0;
}

int rf_pagemap_bitmap_disown(struct rf_pagemap *map) {
    if (map->bitmap_block == NONE) {
        return RF_UNKNOWN_BLOCK;
    }
    write_begin(map);
    int status = disown_bitmaps(map);
    write_end(map);
    return status;
}

int rf_pagemap_bitmap_end(struct rf_pagemap *map, struct rf_bitmap_report *report) {
    if (map->bitmap_block == NONE) {
        return RF_UNKNOWN_BLOCK;
    }
    block_at(map, map->bitmap_block)->bitmap_channel = map->channel;
    map->bitmap_block = NONE;
    *report = map->report;
    return RF_OK;
}

bool rf_pagemap_is_sweeping(const struct rf_pagemap *map) { return map->sweep != NONE; }

bool rf_pagemap_sweep(struct rf_pagemap *map) {
    if (map->sweep == NONE) {
        return false;
    }
    write_begin(map);
    for (unsigned done = 0; done < SWEEP_STEP && map->sweep != NONE;) {
        uint32_t slot = map->sweep;
        done += weight(map, record_at(map, slot));
        map->sweep = record_at(map, slot)->next;
        (void)judge(map, slot);
    }
    for (uint32_t i = 0; map->sweep == NONE && i < blocks_length(map); i++) {
        block_at(map, i)->disowned = false;
    }
    write_end(map);
    return map->sweep != NONE;
}

/* The state file. */

void rf_pagemap_keep(struct rf_pagemap *map, struct rf_statefile *file) {
    map->kept = file;
    rf_statefile_page_bits(file, map->page_bits);
    for (uint32_t i = 0; i < blocks_length(map); i++) {
        rf_statefile_block(file, i, block_at(map, i)->name, block_at(map, i)->name_length);
        keep_sizes(map, i);
    }
    for (uint32_t slot = map->records.oldest; slot != NONE; slot = record_at(map, slot)->next) {
        keep_record(map, slot);
    }
}

static int restore_block(struct rf_pagemap *map, const struct rf_statefile_block *kept) {
    if (rf_pagemap_find(map, kept->name, kept->name_length) >= 0 ||
        kept->pages > LENGTH_MAX >> map->page_bits) {
        return RF_BAD_SIZE;
    }
    int index = add_block(map, kept->name, kept->name_length);
    if (index < 0) {
        return index;
    }
    struct block *block = block_at(map, (uint32_t)index);
    int status = kept->page_size != 0 ? set_page_size(map, block, kept->page_size) : RF_OK;
    if (status == RF_OK && (kept->pages != 0 || kept->declared)) {
        status = set_size(map, (uint32_t)index, kept->pages << map->page_bits);
    }
    atomic_store_explicit(&block->declared, kept->declared, memory_order_relaxed);
    map->any_declared |= kept->declared;
    return status;
}

/* One that cannot be, by what is known of its block, is left out. */
static int restore_record(struct rf_pagemap *map, const struct rf_statefile_record *kept) {
    struct block *block = block_at(map, kept->block);
    if (check_request(map, block, kept->start, kept->length) < 0 ||
        rf_records_find(&map->records, kept->block, kept->start, kept->length) != NONE) {
        add(&map->counters.refused, 1);
        return RF_OK;
    }
    int status = record_request(map, kept->block, kept->start, kept->length, kept->time, !kept->outstanding);
    add(&map->counters.refused, status == RF_FULL);
    return status == RF_FULL ? RF_OK : status;
}

static int restore(struct rf_pagemap *map, const struct rf_statefile_image *image) {
    int status = image->page_bits == 0 ? RF_OK : rf_pagemap_set_target_page_bits(map, image->page_bits);
    for (uint32_t i = 0; i < image->blocks_length && status == RF_OK; i++) {
        status = restore_block(map, &image->blocks[i]);
    }
    for (uint32_t i = 0; i < image->records_length && status == RF_OK; i++) {
        status = restore_record(map, &image->records[i]);
    }
    return status;
}

int rf_pagemap_restore(struct rf_pagemap *map, const struct rf_statefile_image *image) {
    write_begin(map);
    add(&map->counters.torn, image->torn);
    int status = restore(map, image);
    write_end(map);
    return status;
}

/* Walking the records. */

static uint32_t slot_after(const struct rf_pagemap *map, uint64_t after) {
    bool behind = map->cursor != NONE && record_at(map, map->cursor)->id <= after;
    uint32_t slot = behind ? map->cursor : map->records.oldest;
    while (slot != NONE && record_at(map, slot)->id <= after) {
        slot = record_at(map, slot)->next;
    }
    return slot;
}

static int give_record(struct rf_pagemap *map, uint32_t slot, struct rf_request *out) {
    if (slot == NONE) {
        return 0;
    }
    const struct rf_record *record = record_at(map, slot);
    const struct block *block = block_at(map, record->block);
    map->cursor = slot;
    out->id = record->id;
    out->start = record->start;
    out->time = record->time;
    out->length = record->length;
    out->block = record->block;
    out->outstanding = record->outstanding;
    out->name = block->name;
    out->name_length = block->name_length;
    return 1;
}

int rf_pagemap_next_record(struct rf_pagemap *map, uint64_t after, struct rf_request *out) {
    return give_record(map, slot_after(map, after), out);
}

/* The sweep ends those that are confirmed: here they would keep the others waiting. */
static bool to_replay(struct rf_pagemap *map, uint32_t slot) {
    const struct rf_record *record = record_at(map, slot);
    return map->agreed && block_at(map, record->block)->bitmap_channel == map->channel &&
           record->requested_on != map->channel && record->replayed_on != map->channel &&
           !is_confirmed(map, record) && judge(map, slot) && record->outstanding;
}

int rf_pagemap_replay_next(struct rf_pagemap *map, uint64_t after, unsigned *looks, struct rf_request *out) {
    uint32_t slot = slot_after(map, after);
    bool found = false;
    write_begin(map);
    while (slot != NONE && *looks > 0) {
        unsigned taken = weight(map, record_at(map, slot));
        *looks -= taken < *looks ? taken : *looks;
        found = to_replay(map, slot);
        if (found || *looks == 0) {
            break;
        }
        slot = record_at(map, slot)->next;
    }
    write_end(map);
    if (give_record(map, slot, out) == 0) {
        return 0;
    }
    return found ? 1 : RF_LOOK_ON;
}

int rf_pagemap_replayed(struct rf_pagemap *map, uint64_t id) {
    if (id == 0) {
        return RF_OUT_OF_RANGE;
    }
    uint32_t slot = map->cursor;
    if (slot == NONE || record_at(map, slot)->id != id) {
        slot = slot_after(map, id - 1);
    }
    if (slot == NONE || record_at(map, slot)->id != id) {
        return RF_OUT_OF_RANGE;
    }
    write_begin(map);
    record_at(map, slot)->replayed_on = map->channel;
    add(&map->counters.replayed, 1);
    add(&block_at(map, record_at(map, slot)->block)->replayed, 1);
    write_end(map);
    return RF_OK;
}

void rf_pagemap_complete(struct rf_pagemap *map) {
    write_begin(map);
    rf_statefile_end_all(map->kept, map->records.last_id);
    for (uint32_t i = 0; i < blocks_length(map); i++) {
        struct block *block = block_at(map, i);
        add(&block->arrived, get(&block->outstanding));
        put(&block->outstanding, 0);
        put(&block->recorded, 0);
        block->disowned = false;
        for (uint32_t cell = 0; cell < CELLS; cell++) {
            atomic_store_explicit(&block->cells[cell], 0, memory_order_relaxed);
        }
        if (block->missing != NULL) {
            rf_bitmap_clear_all(block->missing);
            rf_bitmap_clear_all(block->unconfirmed);
        }
    }
    add(&map->counters.arrived, get(&map->counters.outstanding));
    put(&map->counters.outstanding, 0);
    put(&map->counters.recorded, 0);
    rf_records_forget(&map->records);
    map->irregular_length = 0;
    map->cursor = map->sweep = NONE;
    write_end(map);
}

/* Readers. */

int rf_pagemap_stats(const struct rf_pagemap *map, struct rf_pagemap_stats *out) {
    const struct counters *c = &map->counters;
    for (unsigned retry = 0; retry < READ_RETRIES; retry++) {
        uint32_t before = atomic_load_explicit(&map->sequence, memory_order_acquire);
        *out = (struct rf_pagemap_stats){
            .requested = get(&c->requested),
            .repeated = get(&c->repeated),
            .refused = get(&c->refused),
            .torn = get(&c->torn),
            .arrived = get(&c->arrived),
            .crossed = get(&c->crossed),
            .outstanding = get(&c->outstanding),
            .recorded = get(&c->recorded),
            .confirmed = get(&c->confirmed),
            .reopened = get(&c->reopened),
            .replayed = get(&c->replayed),
            .evicted = get(&c->evicted),
            .forwarded = get(&c->forwarded),
            .discarded = get(&c->discarded),
            .losses = get(&c->losses),
            .memory = get(&c->memory),
            .blocks = blocks_length(map),
        };
        atomic_thread_fence(memory_order_acquire);
        if (before % 2 == 0 && atomic_load_explicit(&map->sequence, memory_order_relaxed) == before) {
            return 1;
        }
    }
    return 0;
}

int rf_pagemap_block_stats(const struct rf_pagemap *map, uint32_t index, struct rf_pagemap_block_stats *out) {
    if (index >= blocks_length(map)) {
        return RF_UNKNOWN_BLOCK;
    }
    const struct block *block = block_at(map, index);
    memcpy(out->name, block->name, block->name_length);
    out->name[block->name_length] = '\0';
    out->name_length = block->name_length;
    out->declared = atomic_load_explicit(&block->declared, memory_order_relaxed);
    out->used_length = get(&block->used_length);
    out->page_size = get(&block->page_size);
    out->requested = get(&block->requested);
    out->arrived = get(&block->arrived);
    out->outstanding = get(&block->outstanding);
    out->recorded = get(&block->recorded);
    out->replayed = get(&block->replayed);
    out->forwarded = get(&block->forwarded_pages);
    out->present = get(&block->present);
    for (uint32_t i = 0; i < CELLS; i++) {
        out->cells[i] = atomic_load_explicit(&block->cells[i], memory_order_relaxed);
    }
    return RF_OK;
}

void rf_pagemap_latency(const struct rf_pagemap *map, struct rf_histogram_snapshot *out) {
    rf_histogram_snapshot(&map->latency, out);
}
