#include "tracker.h"

#include <stdbool.h>
#include <unistd.h>

#include "budget.h"

#define BLOCKS_MAX 4096
#define NONE UINT32_MAX
/* Behind all RAM_DISCARDs (tracker.h). */
#define PING_BEFORE_PACKAGED 2
#define PING_BEHIND_DEVICE_STATE 3

/* A decoder of pages, and which of the page map's blocks its own are. */
struct pages {
    struct rf_forward *decoder;
    uint32_t blocks[BLOCKS_MAX];
};

struct rf_tracker {
    struct rf_pagemap *map;
    struct rf_returnpath *path;
    struct pages main;
    struct pages preempt;
    struct rf_statefile *file; /* NULL for none */
    enum rf_restored restored;
    atomic_bool trusts_bitmaps;
    uint32_t unread; /* why nothing that this migration says is read, or RF_OPAQUE_NO */
    bool unframed;   /* nor are the return path's messages told from each other */
    _Atomic uint32_t facts;
    _Atomic uint32_t channel_facts;
    _Atomic uint32_t forward_opaque;
    _Atomic uint32_t return_opaque;
};

static uint32_t get(const _Atomic uint32_t *word) { return atomic_load_explicit(word, memory_order_acquire); }

static void put(_Atomic uint32_t *word, uint32_t value) {
    atomic_store_explicit(word, value, memory_order_release);
}

static void put_facts(struct rf_tracker *tracker, uint32_t facts) {
    put(&tracker->facts, facts);
    rf_statefile_facts(tracker->file, facts);
}

static void note(struct rf_tracker *tracker, uint32_t fact) {
    put_facts(tracker, get(&tracker->facts) | fact);
    put(&tracker->channel_facts, get(&tracker->channel_facts) | fact);
}

static void no_longer_whole(struct rf_tracker *tracker) {
    put_facts(tracker, get(&tracker->facts) & ~(uint32_t)RF_FACT_WHOLE_STREAM_SEEN);
}

static void forget_blocks(struct pages *pages) {
    for (uint32_t i = 0; i < BLOCKS_MAX; i++) {
        pages->blocks[i] = NONE;
    }
}

struct rf_tracker *rf_tracker_new(uint64_t ceiling) {
    long host_page = sysconf(_SC_PAGESIZE);
    struct rf_tracker *tracker = rf_budget_alloc(NULL, sizeof(*tracker));
    if (tracker == NULL) {
        return NULL;
    }
    tracker->map = rf_pagemap_new(ceiling, host_page > 0 ? (uint64_t)host_page : 0);
    tracker->path = rf_returnpath_new();
    tracker->main.decoder = rf_forward_new(RF_FORWARD_FRESH);
    tracker->preempt.decoder = rf_forward_new(RF_FORWARD_PREEMPT);
    forget_blocks(&tracker->main);
    forget_blocks(&tracker->preempt);
    if (tracker->map == NULL || tracker->path == NULL || tracker->main.decoder == NULL ||
        tracker->preempt.decoder == NULL) {
        rf_tracker_free(tracker);
        return NULL;
    }
    return tracker;
}

/* What a state file says, into a new tracker. A negative status leaves it of no use. */
static int take_over(struct rf_tracker *tracker, const struct rf_statefile_image *image) {
    int status = rf_pagemap_restore(tracker->map, image);
    if (status == RF_OK && image->page_bits != 0) {
        status = rf_forward_know_page_bits(tracker->main.decoder, image->page_bits);
    }
    for (uint32_t i = 0; i < image->blocks_length && status == RF_OK; i++) {
        const struct rf_statefile_block *block = &image->blocks[i];
        status = rf_forward_know_block(tracker->main.decoder, block->name, block->name_length,
                                       block->declared, block->pages << image->page_bits);
    }
    put(&tracker->facts, image->facts & ~(uint32_t)RF_FACT_WHOLE_STREAM_SEEN);
    return status;
}

static struct rf_tracker *new_from(uint64_t ceiling, int old_fd, const uint8_t *key, size_t key_length) {
    struct rf_statefile_image image;
    struct rf_tracker *tracker = rf_tracker_new(ceiling);
    if (tracker == NULL || old_fd < 0) {
        return tracker;
    }
    enum rf_restored found = rf_statefile_load(old_fd, key, key_length, &image);
    enum rf_work crashed = image.crashed;
    if (found == RF_RESTORED_WHOLE || found == RF_RESTORED_CRASHED) {
        int status = take_over(tracker, &image);
        rf_statefile_image_free(&image);
        if (status != RF_OK) {
            found = status == RF_NO_MEMORY ? RF_RESTORED_NO_MEMORY : RF_RESTORED_TORN;
            rf_tracker_free(tracker);
            tracker = rf_tracker_new(ceiling);
        }
    }
    if (tracker != NULL) {
        tracker->restored = found;
        tracker->unread = found == RF_RESTORED_CRASHED ? RF_OPAQUE_CRASHED : RF_OPAQUE_NO;
        tracker->unframed = found == RF_RESTORED_CRASHED && crashed == RF_WORK_FRAMING;
    }
    return tracker;
}

struct rf_tracker *rf_tracker_new_kept(uint64_t ceiling, int fd, int old_fd, const uint8_t *key,
                                       size_t key_length) {
    struct rf_tracker *tracker = new_from(ceiling, old_fd, key, key_length);
    if (tracker == NULL || fd < 0) {
        return tracker;
    }
    tracker->file = rf_statefile_new(fd, key, key_length);
    rf_pagemap_keep(tracker->map, tracker->file);
    rf_statefile_facts(tracker->file, get(&tracker->facts));
    if (tracker->unread != RF_OPAQUE_NO) {
        rf_statefile_crashed(tracker->file, tracker->unframed ? RF_WORK_FRAMING : RF_WORK_READING);
    }
    return tracker;
}

void rf_tracker_free(struct rf_tracker *tracker) {
    if (tracker == NULL) {
        return;
    }
    rf_forward_free(tracker->main.decoder);
    rf_forward_free(tracker->preempt.decoder);
    rf_returnpath_free(tracker->path);
    rf_pagemap_free(tracker->map);
    rf_statefile_free(tracker->file);
    rf_budget_free(NULL, tracker, sizeof(*tracker));
}

/* Bytes pass unread from here on, on this channel and all that follow. */
static void pass_unread(struct rf_tracker *tracker, uint32_t reason) {
    tracker->unread = reason;
    rf_pagemap_forward_unseen(tracker->map);
    no_longer_whole(tracker);
    put(&tracker->forward_opaque, reason);
    put(&tracker->return_opaque, reason);
}

/* The state file was of other RAM blocks than this migration's: nothing of it is used. */
static void disown(struct rf_tracker *tracker) {
    rf_pagemap_complete(tracker->map);
    pass_unread(tracker, RF_OPAQUE_KEPT_BLOCKS);
}

static bool took_over(const struct rf_tracker *tracker) {
    return tracker->restored == RF_RESTORED_WHOLE && tracker->unread == RF_OPAQUE_NO;
}

void rf_tracker_channel_begin(struct rf_tracker *tracker, int recovered) {
    rf_forward_restart(tracker->main.decoder, recovered ? RF_FORWARD_RECOVERED : RF_FORWARD_FRESH);
    rf_returnpath_restart(tracker->path);
    rf_pagemap_channel_begin(tracker->map);
    put(&tracker->channel_facts, 0);
    put(&tracker->forward_opaque, RF_OPAQUE_NO);
    put(&tracker->return_opaque, RF_OPAQUE_NO);
    if (!recovered) {
        forget_blocks(&tracker->main);
        put_facts(tracker, RF_FACT_WHOLE_STREAM_SEEN);
    }
    if (tracker->unread != RF_OPAQUE_NO) {
        pass_unread(tracker, tracker->unread);
    }
}

static void went_opaque(struct rf_tracker *tracker, const struct rf_forward *decoder);

void rf_tracker_channel_goes_on(struct rf_tracker *tracker, uint32_t facts, uint32_t channel_facts,
                                const char *block, size_t block_length) {
    rf_tracker_channel_begin(tracker, 1);
    put_facts(tracker, (get(&tracker->facts) | facts) & ~(uint32_t)RF_FACT_WHOLE_STREAM_SEEN);
    put(&tracker->channel_facts, channel_facts & ~(uint32_t)RF_FACT_WHOLE_STREAM_SEEN);
    rf_returnpath_know_block(tracker->path, block, block_length);
    rf_forward_fail(tracker->main.decoder, RF_OPAQUE_HANDED_OVER);
    went_opaque(tracker, tracker->main.decoder);
}

int rf_tracker_may_go_on(const struct rf_tracker *tracker, const char **block, size_t *block_length) {
    *block_length = rf_returnpath_block(tracker->path, block);
    return tracker->unread == RF_OPAQUE_NO && get(&tracker->return_opaque) == RF_OPAQUE_NO &&
           rf_returnpath_in_messages(tracker->path);
}

void rf_tracker_channel_lost(struct rf_tracker *tracker) {
    if (rf_pagemap_channel_lost(tracker->map) < 0) {
        no_longer_whole(tracker);
    }
}

/* The page map's block of an event that names one, or a negative status. */
static int map_block(struct rf_tracker *tracker, struct pages *pages, const struct rf_forward_event *event) {
    if (event->block >= BLOCKS_MAX) {
        return RF_FULL;
    }
    if (pages->blocks[event->block] == NONE) {
        int block = rf_pagemap_know(tracker->map, event->name, event->name_length);
        if (block < 0) {
            return block;
        }
        pages->blocks[event->block] = (uint32_t)block;
    }
    return (int)pages->blocks[event->block];
}

static void declare(struct rf_tracker *tracker, const struct rf_forward_event *event, uint64_t page_size) {
    int block = rf_pagemap_find(tracker->map, event->name, event->name_length);
    uint64_t length = event->length;
    if (page_size != 0 && block >= 0) {
        struct rf_pagemap_block_stats stats;
        if (rf_pagemap_block_stats(tracker->map, (uint32_t)block, &stats) == RF_OK) {
            length = stats.used_length;
        }
    }
    block = rf_pagemap_declare(tracker->map, event->name, event->name_length, length, page_size);
    if (block < 0) {
        rf_forward_fail(tracker->main.decoder, block == RF_NO_MEMORY || block == RF_FULL
                                                   ? RF_OPAQUE_NO_MEMORY
                                                   : RF_OPAQUE_RAM_BLOCK_LIST);
        return;
    }
    tracker->main.blocks[event->block] = (uint32_t)block;
    note(tracker, RF_FACT_RAM_DECLARED);
}

static void command(struct rf_tracker *tracker, const struct rf_forward_event *event) {
    switch (event->code) {
    case RF_COMMAND_PING:
        if (event->value == PING_BEFORE_PACKAGED && (get(&tracker->facts) & RF_FACT_WHOLE_STREAM_SEEN) != 0) {
            rf_pagemap_ping_passed(tracker->map);
        }
        break;
    case RF_COMMAND_POSTCOPY_ADVISE:
        rf_pagemap_set_target_page_bits(tracker->map, rf_forward_target_page_bits(tracker->main.decoder));
        break;
    case RF_COMMAND_RAM_DISCARD:
        note(tracker, RF_FACT_POSTCOPY_DISCARD_SEEN);
        break;
    case RF_COMMAND_PACKAGED:
        note(tracker, RF_FACT_PACKAGED_BEGUN);
        break;
    case RF_COMMAND_RECV_BITMAP:
        note(tracker, RF_FACT_RECV_BITMAP_ASKED);
        if (took_over(tracker) && rf_pagemap_know(tracker->map, event->name, event->name_length) < 0) {
            disown(tracker);
        }
        break;
    case RF_COMMAND_POSTCOPY_RESUME:
        note(tracker, RF_FACT_RESUME_SENT);
        break;
    default:
        break;
    }
}

static void capability(struct rf_tracker *tracker, const struct rf_forward_event *event) {
    static const char ignore_shared[] = "x-ignore-shared";
    size_t length = sizeof(ignore_shared) - 1;
    if (event->name_length == length && __builtin_memcmp(event->name, ignore_shared, length) == 0) {
        note(tracker, RF_FACT_IGNORE_SHARED);
    }
}

static void page_event(struct rf_tracker *tracker, struct pages *pages, const struct rf_forward_event *event,
                       uint64_t now) {
    int block = map_block(tracker, pages, event);
    if (block < 0) {
        no_longer_whole(tracker);
    } else if (event->type == RF_FORWARD_DISCARD) {
        rf_pagemap_discarded(tracker->map, (uint32_t)block, event->offset, event->length);
    } else if (rf_pagemap_arrived(tracker->map, (uint32_t)block, event->offset, event->length, now) < 0) {
        no_longer_whole(tracker);
    }
}

static void first_page(struct rf_tracker *tracker, const struct rf_forward_event *event) {
    uint32_t channel = get(&tracker->channel_facts);
    if ((channel & RF_FACT_RESUME_SENT) == 0 ||
        (channel & (RF_FACT_HOST_PAGE_BEGUN | RF_FACT_HOST_PAGE_CUT)) != 0) {
        return;
    }
    int block = map_block(tracker, &tracker->main, event);
    uint64_t host_page = block >= 0 ? rf_pagemap_unit(tracker->map, (uint32_t)block) : 0;
    bool inside = host_page != 0 && event->offset % host_page != 0;
    put(&tracker->channel_facts, channel | (inside ? RF_FACT_HOST_PAGE_CUT : RF_FACT_HOST_PAGE_BEGUN));
}

static void section(struct rf_tracker *tracker, const struct rf_forward_event *event) {
    bool in_postcopy = get(&tracker->facts) & RF_FACT_PACKAGED_BEGUN ||
                       get(&tracker->channel_facts) & RF_FACT_RECV_BITMAP_ASKED;
    if (event->code == RF_SECTION_END && !event->packaged && in_postcopy) {
        note(tracker, RF_FACT_COMPLETION_BEGUN);
    }
}

static void forward_event(struct rf_tracker *tracker, const struct rf_forward_event *event, uint64_t now) {
    switch (event->type) {
    case RF_FORWARD_PAGE:
        first_page(tracker, event);
        page_event(tracker, &tracker->main, event, now);
        break;
    case RF_FORWARD_DISCARD:
        page_event(tracker, &tracker->main, event, now);
        break;
    case RF_FORWARD_TARGET_PAGE_BITS:
        rf_pagemap_set_target_page_bits(tracker->map, (uint32_t)event->value);
        break;
    case RF_FORWARD_CAPABILITY:
        capability(tracker, event);
        break;
    case RF_FORWARD_BLOCK:
        declare(tracker, event, 0);
        break;
    case RF_FORWARD_BLOCK_PAGE_SIZE:
        declare(tracker, event, event->value);
        break;
    case RF_FORWARD_MULTIFD_FLUSH:
        rf_tracker_pages_elsewhere(tracker);
        break;
    case RF_FORWARD_COMMAND:
        command(tracker, event);
        break;
    case RF_FORWARD_PACKAGED_END:
        note(tracker, RF_FACT_PACKAGED_PASSED);
        break;
    case RF_FORWARD_SECTION:
        section(tracker, event);
        break;
    case RF_FORWARD_EOF:
        note(tracker, RF_FACT_EOF_PASSED);
        break;
    default:
        break;
    }
}

/* Pages pass unseen from here on, on one channel or the other. */
static void went_opaque(struct rf_tracker *tracker, const struct rf_forward *decoder) {
    if (rf_forward_opaque(decoder) != RF_OPAQUE_NO && get(&tracker->forward_opaque) == RF_OPAQUE_NO) {
        rf_pagemap_forward_unseen(tracker->map);
        no_longer_whole(tracker);
        put(&tracker->forward_opaque, rf_forward_opaque(decoder));
    }
}

void rf_tracker_forward(struct rf_tracker *tracker, const uint8_t *bytes, size_t length, uint64_t now) {
    struct rf_forward *decoder = tracker->main.decoder;
    rf_statefile_at_work(tracker->file, RF_WORK_READING);
    while (length > 0 && tracker->unread == RF_OPAQUE_NO) {
        struct rf_forward_event event;
        size_t part = rf_forward_next(decoder, bytes, length, &event);
        forward_event(tracker, &event, now);
        bytes += part;
        length -= part;
    }
    went_opaque(tracker, decoder);
    rf_statefile_at_work(tracker->file, RF_WORK_NONE);
}

void rf_tracker_preempt_begin(struct rf_tracker *tracker) {
    rf_forward_restart(tracker->preempt.decoder, RF_FORWARD_PREEMPT);
}

void rf_tracker_preempt_forward(struct rf_tracker *tracker, const uint8_t *bytes, size_t length,
                                uint64_t now) {
    struct rf_forward *decoder = tracker->preempt.decoder;
    rf_statefile_at_work(tracker->file, RF_WORK_READING);
    if (rf_forward_position(decoder) == 0 && rf_forward_learn(decoder, tracker->main.decoder) < 0) {
        rf_forward_fail(decoder, RF_OPAQUE_NO_MEMORY);
    }
    while (length > 0 && tracker->unread == RF_OPAQUE_NO) {
        struct rf_forward_event event;
        size_t part = rf_forward_next(decoder, bytes, length, &event);
        if (event.type == RF_FORWARD_PAGE) {
            page_event(tracker, &tracker->preempt, &event, now);
        }
        bytes += part;
        length -= part;
    }
    went_opaque(tracker, decoder);
    rf_statefile_at_work(tracker->file, RF_WORK_NONE);
}

void rf_tracker_pages_elsewhere(struct rf_tracker *tracker) {
    no_longer_whole(tracker);
    note(tracker, RF_FACT_MULTIFD);
}

static void bitmap_begin(struct rf_tracker *tracker, const struct rf_returnpath_event *event) {
    int block = rf_pagemap_bitmap_begin(tracker->map, event->name, event->name_length, event->size);
    if (block == RF_UNKNOWN_BLOCK || block == RF_BAD_SIZE) {
        put(&tracker->return_opaque, block == RF_BAD_SIZE ? RF_OPAQUE_BITMAP_SIZE : RF_OPAQUE_BITMAP_BLOCK);
        if (took_over(tracker)) {
            disown(tracker);
        }
    }
}

static bool another_vms(const struct rf_tracker *tracker) {
    uint32_t facts = get(&tracker->facts);
    if (atomic_load(&tracker->trusts_bitmaps) || (facts & RF_FACT_RAM_DECLARED) == 0 ||
        (facts & RF_FACT_IGNORE_SHARED) != 0) {
        return false;
    }
    return rf_pagemap_bitmap_lacks_loaded(tracker->map) ||
           (rf_pagemap_bitmap_is_foreign(tracker->map) && (facts & RF_FACT_WHOLE_STREAM_SEEN) != 0);
}

static void bitmap_end(struct rf_tracker *tracker) {
    struct rf_bitmap_report report;
    if (another_vms(tracker)) {
        note(tracker, RF_FACT_FOREIGN_PAGES);
        if (rf_pagemap_bitmap_disown(tracker->map) == RF_NO_MEMORY) {
            no_longer_whole(tracker);
        }
    } else {
        (void)rf_pagemap_bitmap_end(tracker->map,
                                    &report); /* RF_UNKNOWN_BLOCK: it was refused at its begin */
    }
}

void rf_tracker_trust_bitmaps(struct rf_tracker *tracker) { atomic_store(&tracker->trusts_bitmaps, true); }

static void return_event(struct rf_tracker *tracker, const struct rf_returnpath_event *event, uint64_t now) {
    switch (event->type) {
    case RF_RETURN_REQUEST:
        rf_pagemap_request(tracker->map, event->name, event->name_length, event->start, event->length, now);
        break;
    case RF_RETURN_PONG:
        note(tracker, event->value == PING_BEHIND_DEVICE_STATE ? RF_FACT_PONG_3 : 0);
        if (event->value == PING_BEFORE_PACKAGED) {
            rf_pagemap_pong_passed(tracker->map);
        }
        break;
    case RF_RETURN_BITMAP_BEGIN:
        bitmap_begin(tracker, event);
        break;
    case RF_RETURN_BITMAP_DATA:
        if (rf_pagemap_bitmap_data(tracker->map, event->data_offset, event->data, event->data_length) ==
            RF_NO_MEMORY) {
            no_longer_whole(tracker);
        }
        break;
    case RF_RETURN_BITMAP_END:
        bitmap_end(tracker);
        break;
    case RF_RETURN_RESUME_ACK:
        note(tracker, RF_FACT_RESUME_ACK_PASSED);
        rf_pagemap_handshake_over(tracker->map);
        break;
    case RF_RETURN_SHUT:
        note(tracker, RF_FACT_SHUT_PASSED);
        break;
    case RF_RETURN_UNKNOWN:
    case RF_RETURN_BAD:
        put(&tracker->return_opaque, event->reason);
        break;
    default:
        break;
    }
}

size_t rf_tracker_return_next(struct rf_tracker *tracker, const uint8_t *bytes, size_t length, uint64_t now,
                              struct rf_returnpath_event *event) {
    if (tracker->unframed) {
        *event = (struct rf_returnpath_event){.type = RF_RETURN_BAD, .reason = tracker->unread};
        return length;
    }
    rf_statefile_at_work(tracker->file, RF_WORK_FRAMING);
    size_t consumed = rf_returnpath_next(tracker->path, bytes, length, event);
    if (get(&tracker->return_opaque) == RF_OPAQUE_NO) {
        rf_statefile_at_work(tracker->file, RF_WORK_READING);
        return_event(tracker, event, now);
    }
    rf_statefile_at_work(tracker->file, RF_WORK_NONE);
    return consumed;
}

int rf_tracker_return_framed(const struct rf_tracker *tracker) {
    return !tracker->unframed && !rf_returnpath_is_bad(tracker->path);
}

int rf_tracker_return_at_boundary(const struct rf_tracker *tracker) {
    return !tracker->unframed && rf_returnpath_at_boundary(tracker->path);
}

void rf_tracker_complete(struct rf_tracker *tracker) { rf_pagemap_complete(tracker->map); }

uint32_t rf_tracker_facts(const struct rf_tracker *tracker) { return get(&tracker->facts); }

uint32_t rf_tracker_channel_facts(const struct rf_tracker *tracker) { return get(&tracker->channel_facts); }

uint32_t rf_tracker_forward_opaque(const struct rf_tracker *tracker) { return get(&tracker->forward_opaque); }

uint32_t rf_tracker_return_opaque(const struct rf_tracker *tracker) { return get(&tracker->return_opaque); }

int rf_tracker_restored(const struct rf_tracker *tracker) { return (int)tracker->restored; }

int rf_tracker_kept(const struct rf_tracker *tracker) { return (int)rf_statefile_kept(tracker->file); }

struct rf_pagemap *rf_tracker_pagemap(struct rf_tracker *tracker) { return tracker->map; }
