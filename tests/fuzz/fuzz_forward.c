/*
 * The forward decoder: the first byte picks the kind of channel, the rest is the stream, fed twice: whole,
 * and in pieces whose sizes come from the stream itself. Both must give the same events.
 */
#include <stdint.h>
#include <stdlib.h>

#include "check.h"
#include "forward.h"
#include "pieces.h"

static uint64_t mix_event(uint64_t hash, const struct rf_forward_event *event) {
    hash = mix(hash, event->type);
    hash = mix(hash, event->at);
    hash = mix(hash, event->end);
    switch (event->type) {
    case RF_FORWARD_PAGE:
        hash = mix(mix(mix(hash, event->block), event->offset), event->code);
        /* fall through */
    case RF_FORWARD_BLOCK:
    case RF_FORWARD_DISCARD:
    case RF_FORWARD_CAPABILITY:
        for (uint32_t i = 0; i < event->name_length; i++) {
            hash = mix(hash, (uint8_t)event->name[i]);
        }
        break;
    case RF_FORWARD_OPAQUE:
    case RF_FORWARD_COMMAND:
        hash = mix(hash, event->code);
        break;
    default:
        break;
    }
    return hash;
}

struct run {
    struct rf_forward *forward;
    uint64_t hash;
    uint64_t behind; /* the last event's end */
    uint64_t position;
};

static size_t decode(void *context, const uint8_t *bytes, size_t length) {
    struct run *run = context;
    struct rf_forward_event event;
    size_t part = rf_forward_next(run->forward, bytes, length, &event);
    run->position += part;
    if (event.type == RF_FORWARD_NONE) {
        CHECK(part == length);
        return part;
    }
    CHECK(event.at >= run->behind && event.at < event.end && event.end <= run->position);
    run->behind = event.end;
    run->hash = mix_event(run->hash, &event);
    return part;
}

static uint64_t hash_of(int mode, const uint8_t *data, size_t size, size_t largest) {
    struct run run = {.forward = rf_forward_new(mode), .hash = 1};
    CHECK(run.forward != NULL);
    feed(data, size, largest, decode, &run);
    CHECK(rf_forward_position(run.forward) == size);
    CHECK(rf_forward_reason_text(rf_forward_opaque(run.forward)) != NULL);
    rf_forward_free(run.forward);
    return run.hash;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2) {
        return 0;
    }
    int mode = data[0] % 3;
    CHECK(hash_of(mode, data + 1, size - 1, 0) == hash_of(mode, data + 1, size - 1, 61));
    return 0;
}
