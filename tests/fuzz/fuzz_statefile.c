/*
 * A state file that may say anything: what the bytes ask for is written to it with right checksums, then some
 * of it is overwritten or cut off. A tracker takes it over and is driven on, and what that one leaves is read
 * again. The first byte is how many operations on the file come first.
 */
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "drive.h"
#include "statefile.h"

static const uint8_t key[] = "vm";

struct input {
    const uint8_t *data;
    size_t left;
};

static uint64_t next(struct input *in, unsigned bytes) {
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes && in->left > 0; i++) {
        value = value << 8 | *in->data++;
        in->left--;
    }
    return value;
}

/* Mostly small and whole pages, sometimes anything. */
static uint64_t offset(struct input *in) {
    uint8_t kind = (uint8_t)next(in, 1);
    return kind < 240 ? (uint64_t)kind * 4096 : next(in, 8);
}

static void write_to(struct rf_statefile *file, int fd, uint32_t *blocks, struct input *in) {
    char name[255];
    switch (next(in, 1) % 12) {
    case 0:
        rf_statefile_facts(file, (uint32_t)next(in, 4));
        break;
    case 1:
        rf_statefile_crashed(file, next(in, 1) % 8 == 0 ? RF_WORK_FRAMING : RF_WORK_NONE);
        break;
    case 2:
        rf_statefile_page_bits(file, (uint32_t)next(in, 1) % 40);
        break;
    case 3:
    case 4: {
        size_t length = 1 + next(in, 1) % sizeof(name);
        memset(name, 'a' + (int)(next(in, 1) % 26), sizeof(name));
        rf_statefile_block(file, (*blocks)++, name, length);
        break;
    }
    case 5:
    case 6: {
        uint32_t block = (uint32_t)next(in, 1);
        uint64_t pages = next(in, 1) < 200 ? next(in, 1) : next(in, 6);
        uint8_t bits = (uint8_t)next(in, 1);
        rf_statefile_block_size(file, block, pages, bits < 128 ? 0 : (uint64_t)1 << bits % 64, bits % 2 == 0);
        break;
    }
    case 7: {
        off_t size = lseek(fd, 0, SEEK_END);
        CHECK(size >= 0 && ftruncate(fd, (off_t)(next(in, 3) % ((uint64_t)size + 1))) == 0);
        CHECK(ftruncate(fd, size) == 0); /* zeroes: the writer still has it mapped */
        break;
    }
    case 8: {
        uint8_t byte = (uint8_t)next(in, 1);
        CHECK(pwrite(fd, &byte, 1, (off_t)(next(in, 3) % (1200 * 1024))) == 1);
        break;
    }
    default:
        rf_statefile_record(file, (uint32_t)next(in, 1) * 8,
                            &(struct rf_statefile_record){
                                .id = next(in, 1) + 1,
                                .start = offset(in),
                                .length = (uint32_t)offset(in),
                                .block = (uint32_t)next(in, 1) % 4,
                                .outstanding = next(in, 1) % 2 == 0,
                            });
        break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const uint64_t ceiling = 1 << 20;
    struct input in = {data, size};
    int old = memfd_create("old", MFD_CLOEXEC);
    int fd = memfd_create("new", MFD_CLOEXEC);
    CHECK(old >= 0 && fd >= 0);
    struct rf_statefile *file = rf_statefile_new(old, key, sizeof(key));
    CHECK(file != NULL);
    uint32_t blocks = 0;
    for (uint64_t count = next(&in, 1); count > 0; count--) {
        write_to(file, old, &blocks, &in);
    }
    rf_statefile_free(file);

    struct rf_tracker *tracker = rf_tracker_new_kept(ceiling, fd, old, key, sizeof(key));
    CHECK(tracker != NULL);
    check_counts(tracker, ceiling);
    rf_tracker_channel_begin(tracker, 1);
    drive(tracker, in.data, in.left, ceiling);

    struct rf_pagemap_stats before;
    struct rf_pagemap_stats after;
    struct rf_tracker *again = rf_tracker_new_kept(1 << 24, -1, fd, key, sizeof(key));
    CHECK(again != NULL);
    CHECK(rf_tracker_restored(again) == RF_RESTORED_WHOLE ||
          rf_tracker_restored(again) == RF_RESTORED_CRASHED);
    CHECK(rf_pagemap_stats(rf_tracker_pagemap(tracker), &before) == 1);
    CHECK(rf_pagemap_stats(rf_tracker_pagemap(again), &after) == 1);
    CHECK(before.recorded == after.recorded + after.refused);
    rf_tracker_free(again);
    rf_tracker_free(tracker);
    close(old);
    close(fd);
    return 0;
}
