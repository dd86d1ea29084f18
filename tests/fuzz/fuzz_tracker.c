/*
 * The tracker with both directions at once, from a migration's beginning.
 */
#include <stdint.h>

#include "drive.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const uint64_t ceiling = 1 << 20;
    struct rf_tracker *tracker = rf_tracker_new(ceiling);
    CHECK(tracker != NULL);
    rf_tracker_channel_begin(tracker, 0);
    drive(tracker, data, size, ceiling);
    rf_tracker_complete(tracker);
    rf_tracker_free(tracker);
    return 0;
}
