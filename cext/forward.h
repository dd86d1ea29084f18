/*
 * Decoder of the forward stream (source to destination), incremental: feed it what arrives, in pieces of any
 * size, and it gives the same events at the same stream positions. It looks at headers only and passes page
 * bodies by their length without touching them.
 *
 * Facts: migration/savevm.c (qemu_savevm_state_header, save_section_header, qemu_savevm_command_send,
 * qemu_savevm_send_*), migration/ram.c (ram_save_setup, save_page_header, ram_load_precopy, parse_ramblock),
 * migration/block-dirty-bitmap.c (the comment at the top), read in QEMU 7.2 and 10.0.
 *
 * What it cannot decode ends in one OPAQUE event with a reason; from then on it swallows bytes. The stream is
 * the caller's to pass on in either case: the decoder never holds or changes a byte.
 */
#ifndef RF_FORWARD_H
#define RF_FORWARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "status.h"

/* cffi: begin */
enum rf_forward_mode {
    RF_FORWARD_FRESH = 0,     /* a new migration: magic, version, configuration */
    RF_FORWARD_RECOVERED = 1, /* starts at a section boundary */
    RF_FORWARD_PREEMPT = 2,   /* the postcopy-preempt channel: RAM frames only */
};

enum rf_forward_type {
    RF_FORWARD_NONE = 0,             /* needs more bytes; all that were given are consumed */
    RF_FORWARD_HEADER = 1,           /* value: version */
    RF_FORWARD_CONFIGURATION = 2,    /* name: machine type */
    RF_FORWARD_TARGET_PAGE_BITS = 3, /* value */
    RF_FORWARD_CAPABILITY = 4,       /* name; one event for each that the configuration lists */
    RF_FORWARD_UUID = 5,             /* name: 16 raw bytes */
    RF_FORWARD_SECTION = 6,          /* code: enum rf_section, id; START and FULL: name, value: version */
    RF_FORWARD_FOOTER = 7,           /* id */
    RF_FORWARD_BLOCK = 8,            /* a declared RAM block: block, name, length: used length in bytes */
    RF_FORWARD_PAGE = 9,     /* block, name, code: enum rf_frame, offset, length: target page size, value:
                                bytes of body on the wire; given when the last byte has passed */
    RF_FORWARD_RAM_EOS = 10, /* end of this section's RAM frames */
    RF_FORWARD_MULTIFD_FLUSH = 11,
    RF_FORWARD_DIRTY_BITMAP = 12, /* a chunk of a block-dirty bitmap; code: flags, value: bytes of body */
    RF_FORWARD_COMMAND = 13, /* code: enum rf_command, length: of the payload; PING: value; PACKAGED: value:
                                length of what follows; RECV_BITMAP: name; POSTCOPY_ADVISE: value: the OR
                                of all page sizes, offset: the target page size, if length is 16;
                                RAM_DISCARD: block, name, and DISCARD events follow */
    RF_FORWARD_DISCARD = 14, /* block, name, offset, length */
    RF_FORWARD_PACKAGED_END = 15, /* value: 1 if the package ended with RUN, as a whole one does */
    RF_FORWARD_EOF = 16,
    RF_FORWARD_VMDESCRIPTION = 17,   /* value: bytes of JSON, passed */
    RF_FORWARD_BLOCK_PAGE_SIZE = 18, /* of the block declared last: block, name, value: bytes; without this
                                        event it is the host's page size */
    RF_FORWARD_OPAQUE = 19, /* code: enum rf_opaque; name and id: the section's, where there is one */
};

enum rf_section {
    RF_SECTION_START = 1,
    RF_SECTION_PART = 2,
    RF_SECTION_END = 3,
    RF_SECTION_FULL = 4,
};

enum rf_frame {
    RF_FRAME_ZERO = 0x02,
    RF_FRAME_PAGE = 0x08,
    RF_FRAME_XBZRLE = 0x40,
    RF_FRAME_COMPRESS = 0x100,
};

enum rf_command {
    RF_COMMAND_OPEN_RETURN_PATH = 1,
    RF_COMMAND_PING = 2,
    RF_COMMAND_POSTCOPY_ADVISE = 3,
    RF_COMMAND_POSTCOPY_LISTEN = 4,
    RF_COMMAND_POSTCOPY_RUN = 5,
    RF_COMMAND_RAM_DISCARD = 6,
    RF_COMMAND_PACKAGED = 7,
    RF_COMMAND_ENABLE_COLO = 8,
    RF_COMMAND_POSTCOPY_RESUME = 9,
    RF_COMMAND_RECV_BITMAP = 10,
    RF_COMMAND_SWITCHOVER_START = 11,
};

/* Why a direction of a channel can no longer be read; shared with the return path. */
enum rf_opaque {
    RF_OPAQUE_NO = 0,
    RF_OPAQUE_DEVICE_STATE = 1,
    RF_OPAQUE_EARLY_DEVICE_STATE = 2,
    RF_OPAQUE_SECTION = 3,
    RF_OPAQUE_TLS = 4,
    RF_OPAQUE_MULTIFD = 5,
    RF_OPAQUE_MAGIC = 6,
    RF_OPAQUE_VERSION = 7,
    RF_OPAQUE_CONFIGURATION = 8,
    RF_OPAQUE_SECTION_TYPE = 9,
    RF_OPAQUE_SECTION_ID = 10,
    RF_OPAQUE_FOOTER = 11,
    RF_OPAQUE_RAM_FLAGS = 12,
    RF_OPAQUE_RAM_BLOCK_LIST = 13,
    RF_OPAQUE_RAM_BLOCK = 14,
    RF_OPAQUE_RAM_OFFSET = 15,
    RF_OPAQUE_RAM_BODY = 16,
    RF_OPAQUE_RAM_VERSION = 17,
    RF_OPAQUE_MAPPED_RAM = 18,
    RF_OPAQUE_RDMA = 19,
    RF_OPAQUE_COMMAND = 20,
    RF_OPAQUE_COLO = 21,
    RF_OPAQUE_DIRTY_BITMAP = 22,
    RF_OPAQUE_TRAILING = 23,
    RF_OPAQUE_NO_MEMORY = 24,
    RF_OPAQUE_MESSAGE_TYPE = 25,
    RF_OPAQUE_MESSAGE_LENGTH = 26,
    RF_OPAQUE_BITMAP_SIZE = 27,
    RF_OPAQUE_BITMAP_END = 28,
    RF_OPAQUE_BITMAP_BLOCK = 29,
    RF_OPAQUE_CRASHED = 30,
    RF_OPAQUE_KEPT_BLOCKS = 31,
    RF_OPAQUE_HANDED_OVER = 32,
};

/* For the operator: a phrase that goes on after "cannot be read: ". */
const char *rf_forward_reason_text(uint32_t reason);

/* Fields not named beside a type have no meaning for it. `at` and `end` are positions in this channel: the
 * item's first byte and the one after its last. Names are not terminated and stay valid until the next call.
 */
struct rf_forward_event {
    uint32_t type;
    uint32_t code;
    uint32_t id;
    uint32_t block;
    uint64_t at;
    uint64_t end;
    uint64_t offset;
    uint64_t length;
    uint64_t value;
    uint32_t packaged; /* not 0: inside MIG_CMD_PACKAGED */
    uint32_t name_length;
    const char *name;
};

struct rf_forward;

struct rf_forward *rf_forward_new(int mode);
void rf_forward_free(struct rf_forward *forward);

/* Starts a new channel of the same migration: RAM blocks, section ids and page size stay known. */
void rf_forward_restart(struct rf_forward *forward, int mode);

/* Consumes up to and including one event. Returns the bytes consumed, above 0 for length above 0. */
size_t rf_forward_next(struct rf_forward *forward, const uint8_t *bytes, size_t length,
                       struct rf_forward_event *event);

uint64_t rf_forward_position(const struct rf_forward *forward);
/* RF_OPAQUE_NO, or why the stream can no longer be read. */
uint32_t rf_forward_opaque(const struct rf_forward *forward);
uint32_t rf_forward_target_page_bits(const struct rf_forward *forward);
/* cffi: end */

/* Teaches this decoder the RAM blocks that another one of the same migration has seen declared (the preempt
 * channel names blocks and declares none). RF_OK or RF_NO_MEMORY. */
int rf_forward_learn(struct rf_forward *forward, const struct rf_forward *from);

/* The same of one RAM block, or of the target page size, that a state file tells of. */
int rf_forward_know_block(struct rf_forward *forward, const char *name, size_t name_length, bool declared,
                          uint64_t used_length);
int rf_forward_know_page_bits(struct rf_forward *forward, uint32_t bits);

/* Makes the stream opaque, for a reason that only the caller can see. */
void rf_forward_fail(struct rf_forward *forward, uint32_t reason);

#endif
