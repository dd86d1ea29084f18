/*
 * The return path decoder, whole and in pieces; each request that it gives must survive being encoded and
 * decoded.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
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
        return mix(hash, event->reason);
    case RF_RETURN_SWITCHOVER_ACK:
        return hash;
    default:
        return mix(hash, event->value);
    }
}

static uint64_t run(const uint8_t *data, size_t size, bool pieces) {
    struct rf_returnpath *path = rf_returnpath_new();
    CHECK(path != NULL);
    uint64_t hash = 1;
    size_t at = 0;
    while (at < size) {
        size_t piece = pieces ? 1U + data[(at * 7) % size] % 23 : size - at;
        piece = piece < size - at ? piece : size - at;
        uint8_t *copy = malloc(piece);
        CHECK(copy != NULL);
        memcpy(copy, data + at, piece);
        size_t done = 0;
        while (done < piece) {
            struct rf_returnpath_event event;
            size_t part = rf_returnpath_next(path, copy + done, piece - done, &event);
            CHECK(part > 0 && part <= piece - done);
            done += part;
            if (event.type != RF_RETURN_NONE) {
                hash = mix_event(hash, &event);
            } else {
                CHECK(done == piece);
            }
        }
        free(copy);
        at += piece;
    }
    rf_returnpath_free(path);
    return hash;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    CHECK(size == 0 || run(data, size, false) == run(data, size, true));
    return 0;
}
