/* A tracker with both directions at once: records of a direction, a length and bytes, across lost channels.
 */
#ifndef RF_FUZZ_DRIVE_H
#define RF_FUZZ_DRIVE_H

#include <stddef.h>
#include <stdint.h>

#include "check.h"
#include "tracker.h"

static inline void backward(struct rf_tracker *tracker, const uint8_t *bytes, size_t length, uint64_t now) {
    while (length > 0) {
        struct rf_returnpath_event event;
        size_t part = rf_tracker_return_next(tracker, bytes, length, now, &event);
        CHECK(part > 0 && part <= length);
        bytes += part;
        length -= part;
    }
}

static inline void check_counts(struct rf_tracker *tracker, uint64_t ceiling) {
    struct rf_pagemap_stats stats;
    CHECK(rf_pagemap_stats(rf_tracker_pagemap(tracker), &stats) == 1);
    CHECK(stats.requested == stats.arrived + stats.outstanding);
    CHECK(stats.memory <= ceiling);
}

static inline void drive(struct rf_tracker *tracker, const uint8_t *data, size_t size, uint64_t ceiling) {
    uint64_t now = 0;
    while (size >= 3) {
        uint8_t what = data[0];
        size_t length = (size_t)data[1] << 8 | data[2];
        data += 3;
        size -= 3;
        length = length < size ? length : size;
        now++;
        switch (what % 8) {
        case 0:
            rf_tracker_channel_lost(tracker);
            rf_tracker_channel_begin(tracker, 1);
            break;
        case 1:
            rf_tracker_preempt_begin(tracker);
            break;
        case 2:
            rf_tracker_preempt_forward(tracker, data, length, now);
            break;
        case 3:
        case 4:
            backward(tracker, data, length, now);
            break;
        default:
            rf_tracker_forward(tracker, data, length, now);
            break;
        }
        data += length;
        size -= length;
        check_counts(tracker, ceiling);
    }
}

#endif
