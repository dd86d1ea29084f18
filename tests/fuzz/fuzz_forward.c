/*
 * The forward decoder: the first byte picks the kind of channel, the rest is the stream, fed twice: whole,
 * and in pieces whose sizes come from the stream itself. Both must give the same events.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "forward.h"

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

static uint64_t run(int mode, const uint8_t *data, size_t size, bool pieces) {
    struct rf_forward *forward = rf_forward_new(mode);
    CHECK(forward != NULL);
    uint64_t hash = 1;
    uint64_t behind = 0;
    size_t at = 0;
    while (at < size) {
        size_t piece = pieces ? 1U + data[(at * 7) % size] % 61 : size - at;
        piece = piece < size - at ? piece : size - at;
        /* A buffer of its own, so that the sanitizer sees a read beyond it. */
        uint8_t *copy = malloc(piece);
        CHECK(copy != NULL);
        memcpy(copy, data + at, piece);
        size_t done = 0;
        while (done < piece) {
            struct rf_forward_event event;
            size_t part = rf_forward_next(forward, copy + done, piece - done, &event);
            CHECK(part > 0 && part <= piece - done);
            done += part;
            if (event.type != RF_FORWARD_NONE) {
                CHECK(event.at >= behind && event.at < event.end && event.end <= at + done);
                behind = event.end;
                hash = mix_event(hash, &event);
            } else {
                CHECK(done == piece);
            }
        }
        free(copy);
        at += piece;
    }
    CHECK(rf_forward_position(forward) == size);
    CHECK(rf_forward_reason_text(rf_forward_opaque(forward)) != NULL);
    rf_forward_free(forward);
    return hash;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2) {
        return 0;
    }
    int mode = data[0] % 3;
    CHECK(run(mode, data + 1, size - 1, false) == run(mode, data + 1, size - 1, true));
    return 0;
}
