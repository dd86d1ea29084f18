/*
 * What another process needs to go on with a channel that is a session: the positions and rings of its stream
 * (session.h), and what was read of one leg and not yet given to the other. The descriptor of the local leg
 * goes there by another way, and the next connection to the other host is made there.
 *
 * One version of refault reads what the same one wrote, of the same machine; it is checked all the same, as
 * far as a ring or a length depends on it.
 */
#ifndef RF_HANDED_H
#define RF_HANDED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "session.h"

struct rf_bytes_of {
    const uint8_t *data;
    size_t length;
};

/* The bytes are in what it was read from, or the caller's. */
struct rf_handed {
    bool source_side;
    bool ended;                  /* a destination's QEMU has ended its leg: the stream is all there is */
    bool name_lost;              /* as struct rf_replay has it */
    uint32_t facts;              /* enum rf_fact, of the migration */
    uint32_t channel_facts;      /* and of the channel */
    uint8_t id[16];              /* of the session */
    struct rf_bytes_of block;    /* of the last page request */
    struct rf_bytes_of partial;  /* the begin of a message of the return path */
    struct rf_bytes_of forward;  /* read of the source, and not written */
    struct rf_bytes_of backward; /* the same of the return path */
    struct rf_bytes_of stream;   /* of rf_stream_save */
};

/* All of it but the stream, behind which there is room for that: *stream. NULL without memory; free it. */
uint8_t *rf_handed_write(const struct rf_handed *handed, size_t *length, uint8_t **stream);

/* False where it is none, or of another version. */
bool rf_handed_read(const uint8_t *bytes, size_t length, struct rf_handed *handed);

#endif
