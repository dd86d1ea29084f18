#include "handed.h"

#include <stdlib.h>
#include <string.h>

/* To be changed with any of what is written here, or by rf_stream_save. */
#define MAGIC "rfhand\x00\x02"

enum { MAGIC_BYTES = 8, PARTS = 5 };

enum { SOURCE_SIDE = 1, NAME_LOST = 2, ENDED = 4 };

struct head {
    uint8_t magic[MAGIC_BYTES];
    uint8_t id[16];
    uint64_t flags;
    uint64_t facts;
    uint64_t channel_facts;
    uint64_t lengths[PARTS];
};

uint8_t *rf_handed_write(const struct rf_handed *handed, size_t *length, uint8_t **stream) {
    const struct rf_bytes_of parts[PARTS] = {handed->block, handed->partial, handed->forward,
                                             handed->backward, handed->stream};
    struct head head = {
        .flags = (handed->source_side ? SOURCE_SIDE : 0u) | (handed->name_lost ? NAME_LOST : 0u) |
                 (handed->ended ? ENDED : 0u),
        .facts = handed->facts,
        .channel_facts = handed->channel_facts,
    };
    size_t at = sizeof(head);
    uint8_t *bytes;

    memcpy(head.magic, MAGIC, MAGIC_BYTES);
    memcpy(head.id, handed->id, sizeof(head.id));
    *length = sizeof(head);
    for (int i = 0; i < PARTS; i++) {
        head.lengths[i] = parts[i].length;
        *length += parts[i].length;
    }
    bytes = malloc(*length);
    if (bytes == NULL) {
        return NULL;
    }
    memcpy(bytes, &head, sizeof(head));
    for (int i = 0; i < PARTS - 1; i++) {
        if (parts[i].length > 0) {
            memcpy(bytes + at, parts[i].data, parts[i].length);
        }
        at += parts[i].length;
    }
    *stream = bytes + at;
    return bytes;
}

bool rf_handed_read(const uint8_t *bytes, size_t length, struct rf_handed *handed) {
    struct rf_bytes_of *parts[PARTS] = {&handed->block, &handed->partial, &handed->forward, &handed->backward,
                                        &handed->stream};
    struct head head;
    size_t at = sizeof(head);

    if (length < sizeof(head)) {
        return false;
    }
    memcpy(&head, bytes, sizeof(head));
    if (memcmp(head.magic, MAGIC, MAGIC_BYTES) != 0) {
        return false;
    }
    for (int i = 0; i < PARTS; i++) {
        if (head.lengths[i] > length - at) {
            return false;
        }
        *parts[i] = (struct rf_bytes_of){.data = bytes + at, .length = (size_t)head.lengths[i]};
        at += (size_t)head.lengths[i];
    }
    handed->source_side = head.flags & SOURCE_SIDE;
    handed->name_lost = head.flags & NAME_LOST;
    handed->ended = head.flags & ENDED;
    handed->facts = (uint32_t)head.facts;
    handed->channel_facts = (uint32_t)head.channel_facts;
    memcpy(handed->id, head.id, sizeof(handed->id));
    return at == length;
}
