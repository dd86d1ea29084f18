/*
 * The page map under a low ceiling, driven by the bytes: each operation is one byte, its operands follow.
 * After each, what is counted must add up and what is held must stay below the ceiling.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap.h"
#include "check.h"
#include "pagemap.h"

#define PAGE 4096u

static const char *const names[] = {"a", "pc.ram", "b", "mem0"};

struct input {
    const uint8_t *data;
    size_t left;
};

static uint8_t next(struct input *in) {
    if (in->left == 0) {
        return 0;
    }
    in->left--;
    return *in->data++;
}

static uint64_t next64(struct input *in) {
    uint64_t value = 0;
    for (unsigned i = 0; i < 8; i++) {
        value = value << 8 | next(in);
    }
    return value;
}

/* Mostly small and whole pages, sometimes anything. */
static uint64_t offset(struct input *in) {
    uint8_t kind = next(in);
    return kind < 240 ? (uint64_t)kind * PAGE : next64(in);
}

static uint64_t confirmed(const struct rf_pagemap *map) {
    struct rf_pagemap_stats stats;
    CHECK(rf_pagemap_stats(map, &stats) == 1);
    return stats.confirmed;
}

static void received(struct rf_pagemap *map, struct input *in, const char *name) {
    uint64_t size = next(in) < 250 ? (uint64_t)(next(in) % 9) * 8 : next64(in);
    uint8_t fill = next(in);
    struct rf_bitmap_report report;
    if (rf_pagemap_bitmap_begin(map, name, strlen(name), size) >= 0) {
        const uint64_t before = confirmed(map);
        uint8_t dense[72];
        memset(dense, fill, sizeof(dense));
        for (uint64_t done = 0; done < size && done < 4096;) {
            uint64_t part = 1 + next(in) % sizeof(dense);
            part = part < size - done ? part : size - done;
            int status = rf_pagemap_bitmap_data(map, done, dense, part);
            CHECK(status == RF_OK || status == RF_NO_MEMORY);
            done += part;
        }
        if (size % 7 == 0) { /* its end never comes */
            rf_pagemap_channel_lost(map);
            rf_pagemap_channel_begin(map);
        } else if ((rf_pagemap_bitmap_is_foreign(map) || rf_pagemap_bitmap_lacks_loaded(map)) &&
                   size % 3 == 0) {
            rf_pagemap_bitmap_disown(map);
        } else {
            CHECK(rf_pagemap_bitmap_end(map, &report) == RF_OK);
        }
        rf_pagemap_sweep(map);
        CHECK(confirmed(map) == before); /* no received bitmap ends a record before RESUME_ACK */
        if (size % 5 == 0) {
            rf_pagemap_handshake_over(map);
        }
    }
    CHECK(rf_pagemap_bitmap_end(map, &report) == RF_UNKNOWN_BLOCK);
}

static void replay(struct rf_pagemap *map, uint64_t limit) {
    struct rf_request request;
    uint64_t after = 0;
    unsigned looks = 1000;
    while (limit-- > 0 && rf_pagemap_replay_next(map, after, &looks, &request) == 1) {
        CHECK(request.id > after && request.outstanding);
        after = request.id;
        CHECK(rf_pagemap_replayed(map, request.id) == RF_OK);
    }
}

static void step(struct rf_pagemap *map, struct input *in, uint64_t now) {
    uint8_t operation = next(in);
    const char *name = names[operation / 16 % 4];
    switch (operation % 16) {
    case 0:
        rf_pagemap_declare(map, name, strlen(name), offset(in), next(in) % 4 == 0 ? 16 * PAGE : 0);
        break;
    case 1:
        rf_pagemap_set_target_page_bits(map, next(in) % 40);
        break;
    case 2:
        rf_pagemap_discarded(map, operation / 16 % 4, offset(in), offset(in));
        break;
    case 3:
        rf_pagemap_channel_lost(map);
        rf_pagemap_channel_begin(map);
        break;
    case 4:
        rf_pagemap_forward_unseen(map);
        break;
    case 5:
    case 6:
        received(map, in, name);
        break;
    case 7:
        replay(map, next(in));
        break;
    case 8:
        switch (next(in) / 16) {
        case 0:
            rf_pagemap_complete(map);
            break;
        case 1:
            rf_pagemap_ping_passed(map);
            break;
        case 2:
            rf_pagemap_pong_passed(map);
            break;
        case 3:
        case 4:
            rf_pagemap_sweep(map);
            break;
        default:
            break;
        }
        break;
    case 9:
    case 10:
    case 11:
        rf_pagemap_arrived(map, operation / 16 % 4, offset(in), PAGE * (uint64_t)(next(in) % 20), now);
        break;
    default:
        rf_pagemap_request(map, name, strlen(name), offset(in), next(in) < 200 ? PAGE : (uint32_t)offset(in),
                           now);
        break;
    }
}

static void check(struct rf_pagemap *map, uint64_t ceiling) {
    struct rf_pagemap_stats stats;
    CHECK(rf_pagemap_stats(map, &stats) == 1);
    CHECK(stats.requested == stats.arrived + stats.outstanding);
    CHECK(stats.outstanding <= stats.recorded);
    CHECK(stats.memory <= ceiling);
    uint64_t outstanding = 0;
    uint64_t recorded = 0;
    struct rf_pagemap_block_stats block;
    for (uint32_t i = 0; rf_pagemap_block_stats(map, i, &block) == RF_OK; i++) {
        CHECK(block.requested == block.arrived + block.outstanding);
        outstanding += block.outstanding;
        recorded += block.recorded;
    }
    CHECK(outstanding == stats.outstanding && recorded == stats.recorded);
    struct rf_request request;
    for (uint64_t after = 0; rf_pagemap_next_record(map, after, &request); after = request.id) {
        CHECK(request.id > after);
        recorded--;
        outstanding -= request.outstanding;
    }
    CHECK(outstanding == 0 && recorded == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct input in = {data, size};
    uint64_t ceiling = 40000 + (uint64_t)next(&in) * 512;
    struct rf_pagemap *map = rf_pagemap_new(ceiling, PAGE);
    if (map == NULL) {
        return 0;
    }
    for (uint64_t now = 1; in.left > 0 && now < 400; now++) {
        step(map, &in, now);
        check(map, ceiling);
    }
    rf_pagemap_free(map);
    return 0;
}
