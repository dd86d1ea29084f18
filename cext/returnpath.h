/*
 * Decoder and encoder of the return path (destination to source), incremental. It stops exactly after each
 * message, so that the caller always knows where messages may be put between.
 *
 * Facts: migration/migration.c (rp_cmd_args, source_return_path_thread, migrate_send_rp_message_req_pages),
 * migration/ram.c (ramblock_recv_bitmap_send, ram_dirty_bitmap_reload), read in QEMU 7.2 and 10.0.
 */
#ifndef RF_RETURNPATH_H
#define RF_RETURNPATH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "forward.h"

/* cffi: begin */
enum rf_message {
    RF_MESSAGE_SHUT = 1,
    RF_MESSAGE_PONG = 2,
    RF_MESSAGE_REQ_PAGES_ID = 3,
    RF_MESSAGE_REQ_PAGES = 4,
    RF_MESSAGE_RECV_BITMAP = 5,
    RF_MESSAGE_RESUME_ACK = 6,
    RF_MESSAGE_SWITCHOVER_ACK = 7,
};

enum rf_returnpath_type {
    RF_RETURN_NONE = 0,    /* needs more bytes; all that were given are consumed */
    RF_RETURN_SHUT = 1,    /* value: 0, or not 0 if the destination failed */
    RF_RETURN_PONG = 2,    /* value */
    RF_RETURN_REQUEST = 3, /* start, length; name: the block's; named: it stood in this message. A message
                              without a name and none before it on this channel has name_length 0. */
    RF_RETURN_BITMAP_BEGIN = 4, /* name, size: bytes of bitmap that follow */
    RF_RETURN_BITMAP_DATA = 5,  /* name, size, data, data_length, data_offset: from the bitmap's first byte */
    RF_RETURN_BITMAP_END = 6,   /* name, size; the end mark was right */
    RF_RETURN_RESUME_ACK = 7,   /* value: 1 */
    RF_RETURN_SWITCHOVER_ACK = 8,
    RF_RETURN_BAD = 9,      /* reason: enum rf_opaque; from here on bytes are swallowed */
    RF_RETURN_UNKNOWN = 10, /* a message, or a part of one, that no QEMU we know sends; reason: as above. Its
                               length tells where the next begins */
};

/* Fields not named beside a type have no meaning for it. Names are not terminated; they stay valid until the
 * next call. `data` points into the caller's bytes. */
struct rf_returnpath_event {
    uint32_t type;
    uint32_t reason;
    uint32_t value;
    uint32_t length; /* bytes requested */
    uint64_t start;  /* offset in the RAM block */
    uint64_t size;
    uint64_t data_offset;
    size_t data_length;
    const uint8_t *data;
    const char *name;
    uint32_t name_length;
    uint32_t named;
};

struct rf_returnpath;

struct rf_returnpath *rf_returnpath_new(void);
void rf_returnpath_free(struct rf_returnpath *path);
/* A new channel: at a boundary, no block remembered. */
void rf_returnpath_restart(struct rf_returnpath *path);

/* Consumes up to and including one event. Returns the bytes consumed, above 0 for length above 0. */
size_t rf_returnpath_next(struct rf_returnpath *path, const uint8_t *bytes, size_t length,
                          struct rf_returnpath_event *event);

/* 1 between two messages, 0 inside one and for ever after BAD. */
int rf_returnpath_at_boundary(const struct rf_returnpath *path);

/* Writes a REQ_PAGES_ID message. Returns its length (at most 272), or 0 if it does not fit or the name is
 * empty or longer than 255 bytes. */
size_t rf_returnpath_encode_request_id(uint8_t *out, size_t room, const char *name, size_t name_length,
                                       uint64_t start, uint32_t length);
/* cffi: end */

/* The block of the last request, by which the next one may go; its length, 0 for none. */
size_t rf_returnpath_block(const struct rf_returnpath *path, const char **name);
/* Of a path that was restarted: what that gave, at most 255 bytes. */
void rf_returnpath_know_block(struct rf_returnpath *path, const char *name, size_t length);

/* Whether it is between two messages, or inside one that it holds whole until its end. */
bool rf_returnpath_in_messages(const struct rf_returnpath *path);

/* Whether BAD has been given on this channel. */
bool rf_returnpath_is_bad(const struct rf_returnpath *path);

#endif
