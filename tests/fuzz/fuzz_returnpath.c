/*
 * The return path decoder, whole and in pieces; each request that it gives must survive being encoded and
 * decoded.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "pieces.h"
#include "returnpath.h"

static uint64_t mix_bytes(uint64_t hash, const void *bytes, size_t length) {
    const uint8_t *each = bytes;
    for (size_t i = 0; i < length; i++) {
        hash = mix(hash, each[i]);
    }
    return hash;
}

static void encode_again(const struct rf_returnpath_event *event) {
    uint8_t out[272];
    size_t length = rf_returnpath_encode_request_id(out, sizeof(out), event->name, event->name_length,
                                                    event->start, event->length);
    CHECK((length > 0) == (event->name_length > 0));
    if (length > 0) {
        struct rf_returnpath *path = rf_returnpath_new();
        struct rf_returnpath_event again;
        CHECK(path != NULL);
        CHECK(rf_returnpath_next(path, out, length, &again) == length);
        CHECK(again.type == RF_RETURN_REQUEST && again.named && again.start == event->start &&
              again.length == event->length && again.name_length == event->name_length &&
              memcmp(again.name, event->name, event->name_length) == 0);
        CHECK(rf_returnpath_at_boundary(path));
        rf_returnpath_free(path);
    }
}

static uint64_t mix_event(uint64_t hash, const struct rf_returnpath_event *event) {
    if (event->type == RF_RETURN_BITMAP_DATA) { /* its pieces follow the chunking */
        return mix_bytes(hash, event->data, event->data_length);
    }
    hash = mix(hash, event->type);
    switch (event->type) {
    case RF_RETURN_REQUEST:
        encode_again(event);
        hash = mix(mix(mix(hash, event->start), event->length), event->named);
        return mix_bytes(hash, event->name, event->name_length);
    case RF_RETURN_BITMAP_BEGIN:
    case RF_RETURN_BITMAP_END:
        return mix_bytes(mix(hash, event->size), event->name, event->name_length);
    case RF_RETURN_BAD:
    case RF_RETURN_UNKNOWN:
        return mix(hash, event->reason);
    case RF_RETURN_SWITCHOVER_ACK:
        return hash;
    default:
        return mix(hash, event->value);
    }
}

struct run {
    struct rf_returnpath *path;
    uint64_t hash;
    uint32_t unknown; /* the reason, where the event before was of that kind: it comes in pieces */
};

static size_t decode(void *context, const uint8_t *bytes, size_t length) {
    struct run *run = context;
    struct rf_returnpath_event event;
    size_t part = rf_returnpath_next(run->path, bytes, length, &event);
    if (event.type == RF_RETURN_NONE) {
        CHECK(part == length);
    } else {
        uint32_t unknown = event.type == RF_RETURN_UNKNOWN ? event.reason : RF_OPAQUE_NO;
        if (unknown == RF_OPAQUE_NO || unknown != run->unknown) {
            run->hash = mix_event(run->hash, &event);
        }
        run->unknown = unknown;
    }
    return part;
}

static uint64_t hash_of(const uint8_t *data, size_t size, size_t largest) {
    struct run run = {.path = rf_returnpath_new(), .hash = 1};
    CHECK(run.path != NULL);
    feed(data, size, largest, decode, &run);
    rf_returnpath_free(run.path);
    return run.hash;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    CHECK(hash_of(data, size, 0) == hash_of(data, size, 23));
    return 0;
}
