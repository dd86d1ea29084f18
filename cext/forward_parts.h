/*
 * What the parts of the forward decoder share (forward.h): its states and what it remembers, and what every
 * step of it does.
 *
 *     forward.c               the machine; header, configuration, sections, commands, the package
 *     forward_ram.c           RAM frames and the block list
 *     forward_dirty_bitmap.c  chunks of dirty bitmaps
 *
 * A step is called with the bytes that its state needs; true: *event is filled and the call returns.
 */
#ifndef RF_FORWARD_PARTS_H
#define RF_FORWARD_PARTS_H

#include "forward.h"

#define RF_FORWARD_MULTIFD_MAGIC 0x11223344U
#define RF_FORWARD_TLS_HANDSHAKE 0x1603U
#define RF_FORWARD_NAME_MAX 255
#define RF_FORWARD_NO_BLOCK UINT32_MAX

enum rf_forward_state {
    AT_HEADER,
    AT_CONFIGURATION_LENGTH,
    AT_CONFIGURATION_NAME,
    AT_SUBSECTION_NAME_LENGTH,
    AT_SUBSECTION_NAME,
    AT_PAGE_BITS,
    AT_CAPABILITY_COUNT,
    AT_CAPABILITY_LENGTH,
    AT_CAPABILITY,
    AT_UUID,
    AT_ITEM,
    AT_SECTION_ID,
    AT_SECTION_NAME_LENGTH,
    AT_SECTION_NAME,
    AT_SECTION_VERSION,
    AT_FOOTER,
    AT_VMDESCRIPTION,
    AT_FRAME,
    AT_FRAME_NAME_LENGTH,
    AT_FRAME_NAME,
    AT_ZERO,
    AT_XBZRLE,
    AT_COMPRESS,
    AT_BLOCK_NAME_LENGTH,
    AT_BLOCK_NAME,
    AT_BLOCK_LENGTH,
    AT_BLOCK_EXTRA,
    AT_BLOCK_LAST_EXTRA,
    AT_BITMAP_FLAGS,
    AT_BITMAP_NAME_LENGTH,
    AT_BITMAP_NAME,
    AT_BITMAP_START,
    AT_BITMAP_BITS,
    AT_BITMAP_SIZE,
    AT_COMMAND,
    AT_PING,
    AT_ADVISE,
    AT_PACKAGED,
    AT_DISCARD_HEAD,
    AT_DISCARD_NAME,
    AT_DISCARD_RANGE,
    AT_RECV_BITMAP_LENGTH,
    AT_RECV_BITMAP,
    AT_PACKAGE_BODY, /* passed unread up to the tail */
    AT_PACKAGE_TAIL,
};

/* What may stand before the next section besides sections. */
enum rf_forward_around {
    AROUND_SECTIONS,
    AROUND_HEADER,        /* the configuration */
    AROUND_CONFIGURATION, /* its subsections */
    AROUND_FOOTER,
    AROUND_EOF, /* the vmdescription and nothing else */
};

struct rf_forward_block {
    char name[RF_FORWARD_NAME_MAX];
    uint8_t name_length;
    bool declared;
    uint64_t used_length;
};

struct rf_forward {
    enum rf_forward_state state;
    enum rf_forward_around around;
    int mode;
    uint32_t opaque;
    uint32_t page_bits;

    /* The bytes of this call, and how far they are read. */
    const uint8_t *in;
    const uint8_t *in_end;
    const uint8_t *in_start;
    uint64_t position; /* of in_start in the channel */
    uint64_t item;     /* where the item began that is being read */

    size_t want; /* bytes that the present state needs, where they vary */
    size_t held;
    uint8_t hold[RF_FORWARD_NAME_MAX + 1];

    uint64_t skip; /* bytes of a body still to pass, then `pending` is given */
    struct rf_forward_event pending;

    bool packaged;
    uint64_t package_left; /* bytes up to the tail */
    size_t package_tail;

    bool configured; /* a configuration was seen, so the capabilities are known */
    bool ignore_shared;
    bool advised; /* POSTCOPY_ADVISE for RAM: page sizes may be given */
    bool ram_known;
    bool ram_started;
    uint32_t ram_id;
    bool dirty_bitmap_known;
    uint32_t dirty_bitmap_id;

    uint8_t section_type;
    uint32_t section_id;
    uint32_t capabilities_left;
    uint64_t frame;
    uint64_t list_left; /* bytes of RAM that the block list has still to name */
    uint64_t extra;     /* a u64 behind a block's length, not yet known for what it is */
    bool has_extra;
    uint32_t extras;   /* how many of them so far */
    uint32_t declared; /* the block declared last */
    uint32_t bitmap_flags;
    uint32_t bitmap_names;
    uint16_t command;
    uint16_t command_length;
    uint32_t discard_left;

    uint32_t current; /* the block that CONTINUE means */
    struct rf_forward_block *blocks;
    uint32_t blocks_length;
    uint32_t blocks_room;

    uint8_t name_length;
    char name[RF_FORWARD_NAME_MAX];
};

static inline uint16_t rf_be16(const uint8_t *bytes) { return (uint16_t)(bytes[0] << 8 | bytes[1]); }

static inline uint32_t rf_be32(const uint8_t *bytes) {
    return (uint32_t)rf_be16(bytes) << 16 | rf_be16(bytes + 2);
}

static inline uint64_t rf_be64(const uint8_t *bytes) {
    return (uint64_t)rf_be32(bytes) << 32 | rf_be32(bytes + 4);
}

static inline uint64_t rf_forward_page_size(const struct rf_forward *f) {
    return (uint64_t)1 << f->page_bits;
}

static inline uint64_t rf_forward_here(const struct rf_forward *f) {
    return f->position + (uint64_t)(f->in - f->in_start);
}

static inline void rf_forward_begin(struct rf_forward *f, enum rf_forward_state state) {
    f->state = state;
    f->item = rf_forward_here(f);
}

static inline void rf_forward_next_item(struct rf_forward *f, enum rf_forward_around around) {
    f->around = around;
    rf_forward_begin(f, AT_ITEM);
}

static inline void rf_forward_go(struct rf_forward *f, enum rf_forward_state state, size_t want) {
    f->state = state;
    f->want = want;
}

bool rf_forward_give(struct rf_forward *f, struct rf_forward_event *event, uint32_t type);
bool rf_forward_give_named(struct rf_forward *f, struct rf_forward_event *event, uint32_t type);
bool rf_forward_give_block(struct rf_forward *f, struct rf_forward_event *event, uint32_t type,
                           uint32_t block);

/* From here on the stream cannot be read; inside a package only its rest. */
bool rf_forward_give_up(struct rf_forward *f, struct rf_forward_event *event, enum rf_opaque reason);
bool rf_forward_skip_package(struct rf_forward *f);

/* A body of known length, after which `event`, as it stands, is given; false: not yet. */
bool rf_forward_pass(struct rf_forward *f, struct rf_forward_event *event, uint32_t type, uint64_t length,
                     enum rf_forward_state then);

void rf_forward_keep_name(struct rf_forward *f, const uint8_t *bytes, size_t length);
bool rf_forward_name_is(const struct rf_forward *f, const char *name);
bool rf_forward_set_page_bits(struct rf_forward *f, uint32_t bits);

/* RAM blocks, by index; RF_FORWARD_NO_BLOCK: there is none, or no room. */
uint32_t rf_forward_find_block(const struct rf_forward *f, const uint8_t *name, size_t length);
uint32_t rf_forward_add_block(struct rf_forward *f, const uint8_t *name, size_t length);
/* One that a frame or a command names: none where there is none and none may be learnt from it, which is so
 * wherever a block list was seen. */
uint32_t rf_forward_named_block(struct rf_forward *f, const uint8_t *name, size_t length);
bool rf_forward_is_beyond(const struct rf_forward *f, uint32_t block, uint64_t offset, uint64_t length);

#endif
