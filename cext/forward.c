#include "forward.h"

#include <string.h>

#include "budget.h"

#define FILE_MAGIC 0x5145564dU
#define FILE_VERSION 3U
#define MULTIFD_MAGIC 0x11223344U
#define TLS_HANDSHAKE 0x1603U

#define TYPE_EOF 0x00
#define TYPE_SUBSECTION 0x05
#define TYPE_VMDESCRIPTION 0x06
#define TYPE_CONFIGURATION 0x07
#define TYPE_COMMAND 0x08
#define TYPE_FOOTER 0x7e

#define FRAME_MEM_SIZE 0x04
#define FRAME_EOS 0x10
#define FRAME_CONTINUE 0x20
#define FRAME_HOOK 0x80
#define FRAME_MULTIFD_FLUSH 0x200

#define RAM_VERSION 4
#define DIRTY_BITMAP_VERSION 1
#define BITMAP_EOS 0x01
#define BITMAP_ZEROES 0x02
#define BITMAP_BITMAP_NAME 0x04
#define BITMAP_DEVICE_NAME 0x08
#define BITMAP_START 0x10
#define BITMAP_COMPLETE 0x20
#define BITMAP_BITS 0x40
#define BITMAP_EXTRA_FLAGS 0x80
#define BITMAP_BODY_MAX 10240 /* dirty_bitmap_load_bits refuses more */

#define NAME_MAX_LENGTH 255
#define EXTRAS_MAX 2 /* behind a block's length: page size and address */
#define BLOCKS_MAX 4096
#define DEFAULT_PAGE_BITS 12
#define NO_BLOCK UINT32_MAX
/* COMMAND PING 3 and COMMAND RUN, with which a package ends (migration.c, postcopy_start). */
#define PACKAGE_TAIL 14
#define COMMAND_RUN_LENGTH 5

enum state {
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
enum around {
    AROUND_SECTIONS,
    AROUND_HEADER,        /* the configuration */
    AROUND_CONFIGURATION, /* its subsections */
    AROUND_FOOTER,
    AROUND_EOF, /* the vmdescription and nothing else */
};

struct block {
    char name[NAME_MAX_LENGTH];
    uint8_t name_length;
    bool declared;
    uint64_t used_length;
};

struct rf_forward {
    enum state state;
    enum around around;
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
    uint8_t hold[NAME_MAX_LENGTH + 1];

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
    struct block *blocks;
    uint32_t blocks_length;
    uint32_t blocks_room;

    uint8_t name_length;
    char name[NAME_MAX_LENGTH];
};

static uint16_t be16(const uint8_t *bytes) { return (uint16_t)(bytes[0] << 8 | bytes[1]); }

static uint32_t be32(const uint8_t *bytes) { return (uint32_t)be16(bytes) << 16 | be16(bytes + 2); }

static uint64_t be64(const uint8_t *bytes) { return (uint64_t)be32(bytes) << 32 | be32(bytes + 4); }

static uint64_t page_size(const struct rf_forward *f) { return (uint64_t)1 << f->page_bits; }

static uint64_t here(const struct rf_forward *f) { return f->position + (uint64_t)(f->in - f->in_start); }

/* Steps. Each is called with the bytes its state needs; true: *event is filled and the call returns. */

static void begin(struct rf_forward *f, enum state state) {
    f->state = state;
    f->item = here(f);
}

static void next_item(struct rf_forward *f, enum around around) {
    f->around = around;
    begin(f, AT_ITEM);
}

static void go(struct rf_forward *f, enum state state, size_t want) {
    f->state = state;
    f->want = want;
}

static bool give(struct rf_forward *f, struct rf_forward_event *event, uint32_t type) {
    event->type = type;
    event->at = f->item;
    event->end = here(f);
    event->packaged = f->packaged;
    return true;
}

static bool give_named(struct rf_forward *f, struct rf_forward_event *event, uint32_t type) {
    event->name = f->name;
    event->name_length = f->name_length;
    return give(f, event, type);
}

static bool give_block(struct rf_forward *f, struct rf_forward_event *event, uint32_t type, uint32_t block) {
    event->block = block;
    event->name = f->blocks[block].name;
    event->name_length = f->blocks[block].name_length;
    return give(f, event, type);
}

static bool skip_package(struct rf_forward *f);

static bool opaque(struct rf_forward *f, struct rf_forward_event *event, enum rf_opaque reason) {
    if (f->packaged) {
        return skip_package(f); /* the package's length is known, so the stream is not lost */
    }
    f->opaque = reason;
    f->held = 0;
    f->skip = 0;
    event->code = reason;
    event->id = 0;
    event->name = NULL;
    event->name_length = 0;
    return give(f, event, RF_FORWARD_OPAQUE);
}

static bool opaque_section(struct rf_forward *f, struct rf_forward_event *event, enum rf_opaque reason) {
    bool given = opaque(f, event, reason);
    event->id = f->section_id;
    event->name = f->name;
    event->name_length = f->name_length;
    return given;
}

static void keep_name(struct rf_forward *f, const uint8_t *bytes, size_t length) {
    memcpy(f->name, bytes, length);
    f->name_length = (uint8_t)length;
}

static bool name_is(const struct rf_forward *f, const char *name) {
    return f->name_length == strlen(name) && memcmp(f->name, name, f->name_length) == 0;
}

static uint32_t find_block(const struct rf_forward *f, const uint8_t *name, size_t length) {
    for (uint32_t i = 0; i < f->blocks_length; i++) {
        if (f->blocks[i].name_length == length && memcmp(f->blocks[i].name, name, length) == 0) {
            return i;
        }
    }
    return NO_BLOCK;
}

static uint32_t add_block(struct rf_forward *f, const uint8_t *name, size_t length) {
    if (f->blocks_length == f->blocks_room) {
        uint32_t room = f->blocks_room == 0 ? 32 : f->blocks_room * 2;
        if (room > BLOCKS_MAX) {
            return NO_BLOCK;
        }
        struct block *grown = rf_budget_grow(NULL, f->blocks, f->blocks_room * sizeof(struct block),
                                             room * sizeof(struct block));
        if (grown == NULL) {
            return NO_BLOCK;
        }
        f->blocks = grown;
        f->blocks_room = room;
    }
    struct block *block = &f->blocks[f->blocks_length];
    memcpy(block->name, name, length);
    block->name_length = (uint8_t)length;
    block->declared = false;
    block->used_length = 0;
    return f->blocks_length++;
}

static bool any_declared(const struct rf_forward *f) { return f->blocks_length > 0 && f->blocks[0].declared; }

/* A block that a frame or a command names: NO_BLOCK if there is none and none may be learnt from it, which is
 * so wherever a block list was seen. */
static uint32_t named_block(struct rf_forward *f, const uint8_t *name, size_t length) {
    uint32_t block = find_block(f, name, length);
    return block != NO_BLOCK || any_declared(f) ? block : add_block(f, name, length);
}

static bool beyond(const struct rf_forward *f, uint32_t block, uint64_t offset, uint64_t length) {
    const struct block *b = &f->blocks[block];
    return b->declared && (offset > b->used_length || length > b->used_length - offset);
}

static bool set_page_bits(struct rf_forward *f, uint32_t bits) {
    if (bits < 10 || bits > 30) {
        return false;
    }
    f->page_bits = bits;
    return true;
}

/* Header and configuration. */

static bool at_header(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    if (be32(bytes) == MULTIFD_MAGIC) {
        return opaque(f, event, RF_OPAQUE_MULTIFD);
    }
    if (be16(bytes) == TLS_HANDSHAKE) {
        return opaque(f, event, RF_OPAQUE_TLS);
    }
    if (be32(bytes) != FILE_MAGIC) {
        return opaque(f, event, RF_OPAQUE_MAGIC);
    }
    event->value = be32(bytes + 4);
    if (event->value != FILE_VERSION) {
        return opaque(f, event, RF_OPAQUE_VERSION);
    }
    give(f, event, RF_FORWARD_HEADER);
    next_item(f, AROUND_HEADER);
    return true;
}

static bool at_configuration_length(struct rf_forward *f, const uint8_t *bytes,
                                    struct rf_forward_event *event) {
    uint32_t length = be32(bytes);
    if (length == 0 || length > NAME_MAX_LENGTH) {
        return opaque(f, event, RF_OPAQUE_CONFIGURATION);
    }
    go(f, AT_CONFIGURATION_NAME, length);
    return false;
}

static bool at_configuration_name(struct rf_forward *f, const uint8_t *bytes,
                                  struct rf_forward_event *event) {
    keep_name(f, bytes, f->want);
    f->configured = true;
    give_named(f, event, RF_FORWARD_CONFIGURATION);
    next_item(f, AROUND_CONFIGURATION);
    return true;
}

static bool at_subsection_name_length(struct rf_forward *f, const uint8_t *bytes,
                                      struct rf_forward_event *event) {
    if (bytes[0] == 0 || bytes[0] > NAME_MAX_LENGTH - 4) {
        return opaque(f, event, RF_OPAQUE_CONFIGURATION);
    }
    go(f, AT_SUBSECTION_NAME, (size_t)bytes[0] + 4); /* with the version */
    return false;
}

static bool at_subsection_name(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    keep_name(f, bytes, f->want - 4);
    if (be32(bytes + f->name_length) == 1) {
        if (name_is(f, "configuration/target-page-bits")) {
            f->state = AT_PAGE_BITS;
            return false;
        }
        if (name_is(f, "configuration/capabilities")) {
            f->state = AT_CAPABILITY_COUNT;
            return false;
        }
        if (name_is(f, "configuration/uuid")) {
            f->state = AT_UUID;
            return false;
        }
    }
    return opaque(f, event, RF_OPAQUE_CONFIGURATION);
}

static bool at_page_bits(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    event->value = be32(bytes);
    if (!set_page_bits(f, be32(bytes))) {
        return opaque(f, event, RF_OPAQUE_CONFIGURATION);
    }
    give(f, event, RF_FORWARD_TARGET_PAGE_BITS);
    next_item(f, AROUND_CONFIGURATION);
    return true;
}

static void next_capability(struct rf_forward *f) {
    if (f->capabilities_left == 0) {
        next_item(f, AROUND_CONFIGURATION);
    } else {
        f->capabilities_left--;
        begin(f, AT_CAPABILITY_LENGTH);
    }
}

static bool at_capability_count(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    f->capabilities_left = be32(bytes);
    if (f->capabilities_left > 255) {
        return opaque(f, event, RF_OPAQUE_CONFIGURATION);
    }
    next_capability(f);
    return false;
}

static bool at_capability_length(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    if (bytes[0] == 0) {
        return opaque(f, event, RF_OPAQUE_CONFIGURATION);
    }
    go(f, AT_CAPABILITY, bytes[0]);
    return false;
}

static bool at_capability(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    keep_name(f, bytes, f->want);
    if (name_is(f, "mapped-ram")) {
        return opaque(f, event, RF_OPAQUE_MAPPED_RAM);
    }
    f->ignore_shared = f->ignore_shared || name_is(f, "x-ignore-shared");
    give_named(f, event, RF_FORWARD_CAPABILITY);
    next_capability(f);
    return true;
}

static bool at_uuid(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    keep_name(f, bytes, 16);
    give_named(f, event, RF_FORWARD_UUID);
    next_item(f, AROUND_CONFIGURATION);
    return true;
}

/* Sections. */

static bool at_item(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    enum around around = f->around;
    uint8_t type = bytes[0];
    f->around = AROUND_SECTIONS;
    if (around == AROUND_EOF) {
        if (type != TYPE_VMDESCRIPTION) {
            return opaque(f, event, RF_OPAQUE_TRAILING);
        }
        f->state = AT_VMDESCRIPTION;
        return false;
    }
    if (f->packaged && type != TYPE_COMMAND && type != RF_SECTION_FULL) {
        return skip_package(f);
    }
    switch (type) {
    case RF_SECTION_START:
    case RF_SECTION_FULL:
    case RF_SECTION_PART:
    case RF_SECTION_END:
        f->section_type = type;
        f->state = AT_SECTION_ID;
        return false;
    case TYPE_COMMAND:
        f->state = AT_COMMAND;
        return false;
    case TYPE_EOF:
        give(f, event, RF_FORWARD_EOF);
        next_item(f, AROUND_EOF);
        return true;
    case TYPE_CONFIGURATION:
        if (around == AROUND_HEADER) {
            f->state = AT_CONFIGURATION_LENGTH;
            return false;
        }
        break;
    case TYPE_SUBSECTION:
        if (around == AROUND_CONFIGURATION) {
            f->state = AT_SUBSECTION_NAME_LENGTH;
            return false;
        }
        break;
    case TYPE_FOOTER:
        if (around == AROUND_FOOTER) {
            f->state = AT_FOOTER;
            return false;
        }
        break;
    default:
        break;
    }
    if (f->item == 0 && type == TLS_HANDSHAKE >> 8) {
        return opaque(f, event, RF_OPAQUE_TLS);
    }
    if (f->item == 0 && type == MULTIFD_MAGIC >> 24) {
        return opaque(f, event, RF_OPAQUE_MULTIFD);
    }
    return opaque(f, event, RF_OPAQUE_SECTION_TYPE);
}

static bool give_section(struct rf_forward *f, struct rf_forward_event *event) {
    event->code = f->section_type;
    event->id = f->section_id;
    return give_named(f, event, RF_FORWARD_SECTION);
}

static bool at_section_id(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    f->section_id = be32(bytes);
    f->name_length = 0;
    if (f->section_type == RF_SECTION_START || f->section_type == RF_SECTION_FULL) {
        f->state = AT_SECTION_NAME_LENGTH;
        return false;
    }
    if (!f->ram_known && f->mode == RF_FORWARD_RECOVERED) {
        /* We came after the migration began. Its first section after a recovery is RAM: dirty-bitmap sections
         * do not survive a loss (migration/savevm.c, dirty_bitmap_mig_cancel_incoming). */
        f->ram_known = true;
        f->ram_id = f->section_id;
    }
    if (f->ram_known && f->section_id == f->ram_id) {
        give_section(f, event);
        begin(f, AT_FRAME);
        return true;
    }
    if (f->dirty_bitmap_known && f->section_id == f->dirty_bitmap_id) {
        give_section(f, event);
        begin(f, AT_BITMAP_FLAGS);
        return true;
    }
    return opaque_section(f, event, RF_OPAQUE_SECTION_ID);
}

static bool at_section_name_length(struct rf_forward *f, const uint8_t *bytes,
                                   struct rf_forward_event *event) {
    if (bytes[0] == 0) {
        return opaque(f, event, RF_OPAQUE_SECTION);
    }
    go(f, AT_SECTION_NAME, bytes[0]);
    return false;
}

static bool at_section_name(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    (void)event;
    keep_name(f, bytes, f->want);
    f->state = AT_SECTION_VERSION;
    return false;
}

static bool at_section_version(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    event->value = be32(bytes + 4); /* behind the instance id */
    if (f->section_type == RF_SECTION_FULL) {
        if (f->packaged) {
            give_section(f, event);
            skip_package(f);
            return true;
        }
        return opaque_section(f, event,
                              f->ram_started ? RF_OPAQUE_DEVICE_STATE : RF_OPAQUE_EARLY_DEVICE_STATE);
    }
    if (name_is(f, "ram")) {
        if (event->value != RAM_VERSION) {
            return opaque_section(f, event, RF_OPAQUE_RAM_VERSION);
        }
        f->ram_known = true;
        f->ram_started = true;
        f->ram_id = f->section_id;
        give_section(f, event);
        begin(f, AT_FRAME);
        return true;
    }
    if (name_is(f, "dirty-bitmap") && event->value == DIRTY_BITMAP_VERSION) {
        f->dirty_bitmap_known = true;
        f->dirty_bitmap_id = f->section_id;
        give_section(f, event);
        begin(f, AT_BITMAP_FLAGS);
        return true;
    }
    return opaque_section(f, event, RF_OPAQUE_SECTION);
}

static bool at_footer(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    event->id = be32(bytes);
    if (event->id != f->section_id) {
        return opaque(f, event, RF_OPAQUE_FOOTER);
    }
    give(f, event, RF_FORWARD_FOOTER);
    next_item(f, AROUND_SECTIONS);
    return true;
}

/* A body of known length, after which `event`, as it stands, is given; false: not yet. */
static bool pass(struct rf_forward *f, struct rf_forward_event *event, uint32_t type, uint64_t length,
                 enum state then) {
    event->value = length;
    event->type = type;
    event->at = f->item;
    event->packaged = f->packaged;
    f->state = then;
    f->skip = length;
    if (length <= (uint64_t)(f->in_end - f->in)) {
        f->in += length;
        f->skip = 0;
        event->end = here(f);
        f->item = event->end;
        return true;
    }
    f->pending = *event;
    return false;
}

static bool at_vmdescription(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    f->around = AROUND_EOF;
    return pass(f, event, RF_FORWARD_VMDESCRIPTION, be32(bytes), AT_ITEM);
}

/* RAM frames. */

static bool pass_page(struct rf_forward *f, struct rf_forward_event *event, uint64_t body) {
    const struct block *block = &f->blocks[f->current];
    event->code =
        (uint32_t)(f->frame & (RF_FRAME_ZERO | RF_FRAME_PAGE | RF_FRAME_XBZRLE | RF_FRAME_COMPRESS));
    event->block = f->current;
    event->name = block->name;
    event->name_length = block->name_length;
    event->offset = f->frame & ~(page_size(f) - 1);
    event->length = page_size(f);
    return pass(f, event, RF_FORWARD_PAGE, body, AT_FRAME);
}

static bool page_body(struct rf_forward *f, struct rf_forward_event *event) {
    if (beyond(f, f->current, f->frame & ~(page_size(f) - 1), page_size(f))) {
        return opaque(f, event, RF_OPAQUE_RAM_OFFSET);
    }
    switch (f->frame & (page_size(f) - 1) & ~(uint64_t)FRAME_CONTINUE) {
    case RF_FRAME_PAGE:
        return pass_page(f, event, page_size(f));
    case RF_FRAME_ZERO:
        f->state = AT_ZERO;
        return false;
    case RF_FRAME_XBZRLE:
        f->state = AT_XBZRLE;
        return false;
    default:
        f->state = AT_COMPRESS;
        return false;
    }
}

static bool frame(struct rf_forward *f, struct rf_forward_event *event) {
    uint64_t flags = f->frame & (page_size(f) - 1);
    switch (flags & ~(uint64_t)FRAME_CONTINUE) {
    case RF_FRAME_PAGE:
    case RF_FRAME_ZERO:
    case RF_FRAME_XBZRLE:
    case RF_FRAME_COMPRESS:
        if ((flags & FRAME_CONTINUE) == 0) {
            f->state = AT_FRAME_NAME_LENGTH;
            return false;
        }
        return f->current == NO_BLOCK ? opaque(f, event, RF_OPAQUE_RAM_BLOCK) : page_body(f, event);
    default:
        break;
    }
    switch (flags) {
    case FRAME_EOS:
        give(f, event, RF_FORWARD_RAM_EOS);
        if (f->mode == RF_FORWARD_PREEMPT) {
            begin(f, AT_FRAME);
        } else {
            next_item(f, AROUND_FOOTER);
        }
        return true;
    case FRAME_MEM_SIZE:
        if (f->mode != RF_FORWARD_FRESH) {
            break;
        }
        f->list_left = f->frame - flags;
        f->extras = EXTRAS_MAX; /* the list begins with a name */
        if (f->list_left == 0) {
            begin(f, AT_FRAME);
        } else {
            begin(f, AT_BLOCK_NAME_LENGTH);
        }
        return false;
    case FRAME_MULTIFD_FLUSH:
        give(f, event, RF_FORWARD_MULTIFD_FLUSH);
        begin(f, AT_FRAME);
        return true;
    case FRAME_HOOK:
        return opaque(f, event, RF_OPAQUE_RDMA);
    default:
        break;
    }
    return opaque(f, event, RF_OPAQUE_RAM_FLAGS);
}

static bool at_frame(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    f->frame = be64(bytes);
    if (f->item == 0) { /* a preempt channel's first bytes */
        if (be16(bytes) == TLS_HANDSHAKE) {
            return opaque(f, event, RF_OPAQUE_TLS);
        }
        if (be32(bytes) == MULTIFD_MAGIC) {
            return opaque(f, event, RF_OPAQUE_MULTIFD);
        }
    }
    return frame(f, event);
}

static bool at_frame_name_length(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    if (bytes[0] == 0) {
        return opaque(f, event, RF_OPAQUE_RAM_BLOCK);
    }
    go(f, AT_FRAME_NAME, bytes[0]);
    return false;
}

static bool at_frame_name(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    f->current = named_block(f, bytes, f->want);
    if (f->current == NO_BLOCK) {
        return opaque(f, event, RF_OPAQUE_RAM_BLOCK);
    }
    return page_body(f, event);
}

static bool at_zero(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    (void)bytes;
    pass_page(f, event, 0);
    event->value = 1;
    return true;
}

static bool at_xbzrle(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    uint16_t length = be16(bytes + 1);
    if (bytes[0] != 1 || length > page_size(f)) {
        return opaque(f, event, RF_OPAQUE_RAM_BODY);
    }
    return pass_page(f, event, length);
}

static bool at_compress(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    uint32_t length = be32(bytes);
    if (length > 2 * page_size(f)) {
        return opaque(f, event, RF_OPAQUE_RAM_BODY);
    }
    return pass_page(f, event, length);
}

/* The block list (ram.c, ram_save_setup). Behind a block's length may stand its page size, its address, or
 * both in this order; neither is announced. A name length is never 0 and both values are below 2^56 and
 * multiples of a page, so a 0x00 byte tells a value from a name, and the low bits tell it from the frame
 * after the list. */

static bool at_block_name_length(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    (void)event;
    if (bytes[0] == 0) {
        go(f, AT_BLOCK_EXTRA, 7);
        return false;
    }
    f->has_extra = false; /* one alone with ignore-shared: the address */
    f->item = here(f) - 1;
    go(f, AT_BLOCK_NAME, bytes[0]);
    return false;
}

static bool at_block_name(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    f->declared = find_block(f, bytes, f->want);
    if (f->declared == NO_BLOCK) {
        f->declared = add_block(f, bytes, f->want);
        if (f->declared == NO_BLOCK) {
            return opaque(f, event, RF_OPAQUE_NO_MEMORY);
        }
    } else if (f->blocks[f->declared].declared) {
        return opaque(f, event, RF_OPAQUE_RAM_BLOCK_LIST);
    }
    f->state = AT_BLOCK_LENGTH;
    return false;
}

static bool at_block_length(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    struct block *block = &f->blocks[f->declared];
    uint64_t length = be64(bytes);
    if (length > f->list_left || length % page_size(f) != 0) {
        return opaque(f, event, RF_OPAQUE_RAM_BLOCK_LIST);
    }
    f->list_left -= length;
    block->used_length = length;
    block->declared = true;
    event->length = length;
    f->extras = 0;
    give_block(f, event, RF_FORWARD_BLOCK, f->declared);
    begin(f, f->list_left == 0 ? AT_BLOCK_LAST_EXTRA : AT_BLOCK_NAME_LENGTH);
    return true;
}

/* One u64 behind the length. False with state untouched: it needs no event. */
static bool block_extra(struct rf_forward *f, struct rf_forward_event *event, uint64_t value) {
    bool size_fits = value >= page_size(f) && (value & (value - 1)) == 0;
    uint64_t size = value;
    if (++f->extras > EXTRAS_MAX) {
        return opaque(f, event, RF_OPAQUE_RAM_BLOCK_LIST);
    }
    if (f->has_extra) { /* two of them: size, address */
        size = f->extra;
        f->has_extra = false;
        size_fits = size >= page_size(f) && (size & (size - 1)) == 0;
        if (!size_fits) {
            return opaque(f, event, RF_OPAQUE_RAM_BLOCK_LIST);
        }
    } else if (f->ignore_shared || (!f->configured && !(f->advised && size_fits))) {
        f->extra = value;
        f->has_extra = true;
        return false;
    } else if (!size_fits) {
        return opaque(f, event, RF_OPAQUE_RAM_BLOCK_LIST);
    }
    event->value = size;
    give_block(f, event, RF_FORWARD_BLOCK_PAGE_SIZE, f->declared);
    begin(f, f->state);
    return true;
}

static bool at_block_extra(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    uint64_t value = (uint64_t)be32(bytes) << 24 | (uint64_t)be16(bytes + 4) << 8 | bytes[6];
    f->state = AT_BLOCK_NAME_LENGTH;
    return block_extra(f, event, value);
}

static bool at_block_last_extra(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    uint64_t value = be64(bytes);
    if ((value & (page_size(f) - 1)) != 0) {
        f->has_extra = false;
        f->item = here(f) - 8;
        f->frame = value;
        return frame(f, event);
    }
    return block_extra(f, event, value);
}

/* The dirty-bitmap section: chunks up to one with the EOS flag. */

static bool give_bitmap_chunk(struct rf_forward *f, struct rf_forward_event *event, uint64_t body) {
    bool last = (f->bitmap_flags & BITMAP_EOS) != 0;
    event->code = f->bitmap_flags;
    if (last) {
        f->around = AROUND_FOOTER;
    }
    return pass(f, event, RF_FORWARD_DIRTY_BITMAP, body, last ? AT_ITEM : AT_BITMAP_FLAGS);
}

static bool after_bitmap_names(struct rf_forward *f, struct rf_forward_event *event) {
    if ((f->bitmap_names & BITMAP_DEVICE_NAME) != 0) {
        f->bitmap_names &= ~(uint32_t)BITMAP_DEVICE_NAME;
        f->state = AT_BITMAP_NAME_LENGTH;
        return false;
    }
    if ((f->bitmap_names & BITMAP_BITMAP_NAME) != 0) {
        f->bitmap_names &= ~(uint32_t)BITMAP_BITMAP_NAME;
        f->state = AT_BITMAP_NAME_LENGTH;
        return false;
    }
    if ((f->bitmap_flags & BITMAP_START) != 0) {
        f->state = AT_BITMAP_START;
        return false;
    }
    if ((f->bitmap_flags & BITMAP_COMPLETE) == 0 && (f->bitmap_flags & BITMAP_BITS) != 0) {
        f->state = AT_BITMAP_BITS;
        return false;
    }
    return give_bitmap_chunk(f, event, 0);
}

static bool at_bitmap_flags(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    if ((bytes[0] & BITMAP_EXTRA_FLAGS) != 0) { /* no QEMU sends more than one byte of them */
        return opaque(f, event, RF_OPAQUE_DIRTY_BITMAP);
    }
    f->bitmap_flags = bytes[0];
    f->bitmap_names = bytes[0] & (BITMAP_DEVICE_NAME | BITMAP_BITMAP_NAME);
    return after_bitmap_names(f, event);
}

static bool at_bitmap_name_length(struct rf_forward *f, const uint8_t *bytes,
                                  struct rf_forward_event *event) {
    if (bytes[0] == 0) {
        return opaque(f, event, RF_OPAQUE_DIRTY_BITMAP);
    }
    go(f, AT_BITMAP_NAME, bytes[0]);
    return false;
}

static bool at_bitmap_name(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    (void)bytes;
    return after_bitmap_names(f, event);
}

static bool at_bitmap_start(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    (void)bytes;
    return give_bitmap_chunk(f, event, 0);
}

static bool at_bitmap_bits(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    (void)bytes;
    if ((f->bitmap_flags & BITMAP_ZEROES) != 0) {
        return give_bitmap_chunk(f, event, 0);
    }
    f->state = AT_BITMAP_SIZE;
    return false;
}

static bool at_bitmap_size(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    if (be64(bytes) > BITMAP_BODY_MAX) {
        return opaque(f, event, RF_OPAQUE_DIRTY_BITMAP);
    }
    return give_bitmap_chunk(f, event, be64(bytes));
}

/* Commands. */

static bool give_command(struct rf_forward *f, struct rf_forward_event *event) {
    event->code = f->command;
    event->length = f->command_length;
    give(f, event, RF_FORWARD_COMMAND);
    next_item(f, AROUND_SECTIONS);
    return true;
}

static bool at_command(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    uint16_t length = be16(bytes + 2);
    f->command = be16(bytes);
    f->command_length = length;
    event->name = NULL;
    event->name_length = 0;
    switch (f->command) {
    case RF_COMMAND_OPEN_RETURN_PATH:
    case RF_COMMAND_POSTCOPY_LISTEN:
    case RF_COMMAND_POSTCOPY_RUN:
    case RF_COMMAND_POSTCOPY_RESUME:
    case RF_COMMAND_SWITCHOVER_START:
        return length == 0 ? give_command(f, event) : opaque(f, event, RF_OPAQUE_COMMAND);
    case RF_COMMAND_PING:
    case RF_COMMAND_PACKAGED:
        if (length != 4 || (f->packaged && f->command == RF_COMMAND_PACKAGED)) {
            return opaque(f, event, RF_OPAQUE_COMMAND);
        }
        f->state = f->command == RF_COMMAND_PING ? AT_PING : AT_PACKAGED;
        return false;
    case RF_COMMAND_POSTCOPY_ADVISE:
        if (length == 0) {
            return give_command(f, event);
        }
        f->state = AT_ADVISE;
        return length == 16 ? false : opaque(f, event, RF_OPAQUE_COMMAND);
    case RF_COMMAND_RAM_DISCARD:
        f->state = AT_DISCARD_HEAD;
        return length >= 20 ? false : opaque(f, event, RF_OPAQUE_COMMAND);
    case RF_COMMAND_RECV_BITMAP:
        f->state = AT_RECV_BITMAP_LENGTH;
        return length >= 2 ? false : opaque(f, event, RF_OPAQUE_COMMAND);
    case RF_COMMAND_ENABLE_COLO:
        return opaque(f, event, RF_OPAQUE_COLO);
    default:
        return opaque(f, event, RF_OPAQUE_COMMAND);
    }
}

static bool at_ping(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    event->value = be32(bytes);
    return give_command(f, event);
}

static bool at_advise(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    uint64_t sizes = be64(bytes);
    uint64_t target = be64(bytes + 8);
    if (target == 0 || (target & (target - 1)) != 0 || !set_page_bits(f, (uint32_t)__builtin_ctzll(target))) {
        return opaque(f, event, RF_OPAQUE_COMMAND);
    }
    f->advised = true;
    event->value = sizes;
    event->offset = target;
    return give_command(f, event);
}

static bool at_packaged(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    uint32_t length = be32(bytes);
    event->value = length;
    give_command(f, event);
    f->packaged = length > 0;
    f->package_tail = length < PACKAGE_TAIL ? length : PACKAGE_TAIL;
    f->package_left = length - f->package_tail;
    return true;
}

static bool at_discard_head(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    uint32_t fixed = 3u + bytes[1];
    if (bytes[0] != 0 || bytes[1] == 0 || f->command_length < fixed + 16 ||
        (f->command_length - fixed) % 16 != 0) {
        return opaque(f, event, RF_OPAQUE_COMMAND);
    }
    f->discard_left = (f->command_length - fixed) / 16;
    go(f, AT_DISCARD_NAME, (size_t)bytes[1] + 1);
    return false;
}

static bool at_discard_name(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    if (bytes[f->want - 1] != 0) {
        return opaque(f, event, RF_OPAQUE_COMMAND);
    }
    f->declared = named_block(f, bytes, f->want - 1);
    if (f->declared == NO_BLOCK) {
        return opaque(f, event, RF_OPAQUE_RAM_BLOCK);
    }
    event->code = f->command;
    event->length = f->command_length;
    give_block(f, event, RF_FORWARD_COMMAND, f->declared);
    begin(f, AT_DISCARD_RANGE);
    return true;
}

static bool at_discard_range(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    event->offset = be64(bytes);
    event->length = be64(bytes + 8);
    if (beyond(f, f->declared, event->offset, event->length)) {
        return opaque(f, event, RF_OPAQUE_RAM_OFFSET);
    }
    give_block(f, event, RF_FORWARD_DISCARD, f->declared);
    if (--f->discard_left == 0) {
        next_item(f, AROUND_SECTIONS);
    } else {
        begin(f, AT_DISCARD_RANGE);
    }
    return true;
}

static bool at_recv_bitmap_length(struct rf_forward *f, const uint8_t *bytes,
                                  struct rf_forward_event *event) {
    if (bytes[0] == 0 || bytes[0] + 1 != f->command_length) {
        return opaque(f, event, RF_OPAQUE_COMMAND);
    }
    go(f, AT_RECV_BITMAP, bytes[0]);
    return false;
}

static bool at_recv_bitmap(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    keep_name(f, bytes, f->want);
    give_command(f, event);
    event->name = f->name;
    event->name_length = f->name_length;
    return true;
}

/* Inside MIG_CMD_PACKAGED: commands up to the first device state are read, the rest is passed by length. */

static bool skip_package(struct rf_forward *f) {
    f->held = 0;
    f->state = AT_PACKAGE_BODY;
    return false;
}

static bool at_package_tail(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    static const uint8_t run[COMMAND_RUN_LENGTH] = {TYPE_COMMAND, 0, RF_COMMAND_POSTCOPY_RUN, 0, 0};
    event->value = f->package_tail >= COMMAND_RUN_LENGTH &&
                   memcmp(bytes + f->package_tail - COMMAND_RUN_LENGTH, run, COMMAND_RUN_LENGTH) == 0;
    f->item = here(f) - f->package_tail;
    give(f, event, RF_FORWARD_PACKAGED_END);
    f->packaged = false;
    next_item(f, AROUND_SECTIONS);
    return true;
}

/* The machine: for each state the bytes it needs (0: f->want) and its step. */

static const struct {
    uint8_t bytes;
    bool (*run)(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event);
} steps[] = {
    [AT_HEADER] = {8, at_header},
    [AT_CONFIGURATION_LENGTH] = {4, at_configuration_length},
    [AT_CONFIGURATION_NAME] = {0, at_configuration_name},
    [AT_SUBSECTION_NAME_LENGTH] = {1, at_subsection_name_length},
    [AT_SUBSECTION_NAME] = {0, at_subsection_name},
    [AT_PAGE_BITS] = {4, at_page_bits},
    [AT_CAPABILITY_COUNT] = {4, at_capability_count},
    [AT_CAPABILITY_LENGTH] = {1, at_capability_length},
    [AT_CAPABILITY] = {0, at_capability},
    [AT_UUID] = {16, at_uuid},
    [AT_ITEM] = {1, at_item},
    [AT_SECTION_ID] = {4, at_section_id},
    [AT_SECTION_NAME_LENGTH] = {1, at_section_name_length},
    [AT_SECTION_NAME] = {0, at_section_name},
    [AT_SECTION_VERSION] = {8, at_section_version},
    [AT_FOOTER] = {4, at_footer},
    [AT_VMDESCRIPTION] = {4, at_vmdescription},
    [AT_FRAME] = {8, at_frame},
    [AT_FRAME_NAME_LENGTH] = {1, at_frame_name_length},
    [AT_FRAME_NAME] = {0, at_frame_name},
    [AT_ZERO] = {1, at_zero},
    [AT_XBZRLE] = {3, at_xbzrle},
    [AT_COMPRESS] = {4, at_compress},
    [AT_BLOCK_NAME_LENGTH] = {1, at_block_name_length},
    [AT_BLOCK_NAME] = {0, at_block_name},
    [AT_BLOCK_LENGTH] = {8, at_block_length},
    [AT_BLOCK_EXTRA] = {7, at_block_extra},
    [AT_BLOCK_LAST_EXTRA] = {8, at_block_last_extra},
    [AT_BITMAP_FLAGS] = {1, at_bitmap_flags},
    [AT_BITMAP_NAME_LENGTH] = {1, at_bitmap_name_length},
    [AT_BITMAP_NAME] = {0, at_bitmap_name},
    [AT_BITMAP_START] = {5, at_bitmap_start},
    [AT_BITMAP_BITS] = {12, at_bitmap_bits},
    [AT_BITMAP_SIZE] = {8, at_bitmap_size},
    [AT_COMMAND] = {4, at_command},
    [AT_PING] = {4, at_ping},
    [AT_ADVISE] = {16, at_advise},
    [AT_PACKAGED] = {4, at_packaged},
    [AT_DISCARD_HEAD] = {2, at_discard_head},
    [AT_DISCARD_NAME] = {0, at_discard_name},
    [AT_DISCARD_RANGE] = {16, at_discard_range},
    [AT_RECV_BITMAP_LENGTH] = {1, at_recv_bitmap_length},
    [AT_RECV_BITMAP] = {0, at_recv_bitmap},
    [AT_PACKAGE_TAIL] = {0, at_package_tail},
};

/* `count` contiguous bytes, or NULL until they have come. */
static const uint8_t *need(struct rf_forward *f, size_t count) {
    size_t there = (size_t)(f->in_end - f->in);
    if (f->held == 0 && there >= count) {
        const uint8_t *bytes = f->in;
        f->in += count;
        return bytes;
    }
    size_t part = count - f->held < there ? count - f->held : there;
    memcpy(f->hold + f->held, f->in, part);
    f->in += part;
    f->held += part;
    if (f->held < count) {
        return NULL;
    }
    f->held = 0;
    return f->hold;
}

/* Reads up to one event from the bytes given; false: they are all read and there is none. */
static bool advance(struct rf_forward *f, struct rf_forward_event *event) {
    for (;;) {
        if (f->skip > 0) {
            uint64_t there = (uint64_t)(f->in_end - f->in);
            uint64_t part = f->skip < there ? f->skip : there;
            f->in += part;
            f->skip -= part;
            if (f->skip > 0) {
                return false;
            }
            *event = f->pending;
            event->end = here(f);
            f->item = event->end;
            return true;
        }
        if (f->state == AT_PACKAGE_BODY) {
            f->in = f->in_end;
            return false;
        }
        size_t count = steps[f->state].bytes != 0 ? steps[f->state].bytes : f->want;
        const uint8_t *bytes = need(f, count);
        if (bytes == NULL) {
            return false;
        }
        if (steps[f->state].run(f, bytes, event)) {
            return true;
        }
    }
}

/* The same inside a package, whose tail is not read as commands: nothing in it may reach beyond it. */
static bool advance_packaged(struct rf_forward *f, struct rf_forward_event *event) {
    if (f->package_left > 0) {
        const uint8_t *end = f->in_end;
        const uint8_t *before = f->in;
        if ((uint64_t)(end - f->in) > f->package_left) {
            f->in_end = f->in + f->package_left;
        }
        bool given = advance(f, event);
        f->package_left -= (uint64_t)(f->in - before);
        f->in_end = end;
        if (given || f->package_left > 0) {
            return given;
        }
    }
    if (f->state != AT_PACKAGE_TAIL) {
        f->held = 0;
        f->skip = 0;
        go(f, AT_PACKAGE_TAIL, f->package_tail);
    }
    return advance(f, event);
}

size_t rf_forward_next(struct rf_forward *f, const uint8_t *bytes, size_t length,
                       struct rf_forward_event *event) {
    event->type = RF_FORWARD_NONE;
    if (length == 0) {
        return 0;
    }
    f->in = bytes;
    f->in_start = bytes;
    f->in_end = bytes + length;
    if (f->opaque != RF_OPAQUE_NO) {
        f->in = f->in_end;
    } else {
        bool given = f->packaged ? advance_packaged(f, event) : advance(f, event);
        if (!given) {
            event->type = RF_FORWARD_NONE;
        }
    }
    size_t consumed = (size_t)(f->in - bytes);
    f->position += consumed;
    f->in_start = f->in;
    return consumed;
}

struct rf_forward *rf_forward_new(int mode) {
    struct rf_forward *f = rf_budget_alloc(NULL, sizeof(*f));
    if (f != NULL) {
        f->page_bits = DEFAULT_PAGE_BITS;
        rf_forward_restart(f, mode);
    }
    return f;
}

void rf_forward_free(struct rf_forward *f) {
    if (f != NULL) {
        rf_budget_free(NULL, f->blocks, f->blocks_room * sizeof(struct block));
        rf_budget_free(NULL, f, sizeof(*f));
    }
}

void rf_forward_restart(struct rf_forward *f, int mode) {
    static const enum state first[] = {
        [RF_FORWARD_FRESH] = AT_HEADER, [RF_FORWARD_RECOVERED] = AT_ITEM, [RF_FORWARD_PREEMPT] = AT_FRAME};
    f->mode = mode == RF_FORWARD_RECOVERED || mode == RF_FORWARD_PREEMPT ? mode : RF_FORWARD_FRESH;
    f->state = first[f->mode];
    f->around = AROUND_SECTIONS;
    f->opaque = RF_OPAQUE_NO;
    f->in = f->in_start = f->in_end = NULL;
    f->position = 0;
    f->item = 0;
    f->held = 0;
    f->skip = 0;
    f->packaged = false;
    f->has_extra = false;
    f->current = NO_BLOCK;
    if (f->mode == RF_FORWARD_FRESH) {
        f->page_bits = DEFAULT_PAGE_BITS;
        f->configured = f->ignore_shared = f->advised = false;
        f->ram_known = f->ram_started = f->dirty_bitmap_known = false;
        f->blocks_length = 0;
    }
}

int rf_forward_know_block(struct rf_forward *f, const char *name, size_t name_length, bool declared,
                          uint64_t used_length) {
    uint32_t block = find_block(f, (const uint8_t *)name, name_length);
    if (block == NO_BLOCK) {
        block = add_block(f, (const uint8_t *)name, name_length);
        if (block == NO_BLOCK) {
            return RF_NO_MEMORY;
        }
    }
    f->blocks[block].declared = declared;
    f->blocks[block].used_length = used_length;
    return RF_OK;
}

int rf_forward_know_page_bits(struct rf_forward *f, uint32_t bits) {
    return set_page_bits(f, bits) ? RF_OK : RF_OUT_OF_RANGE;
}

int rf_forward_learn(struct rf_forward *f, const struct rf_forward *from) {
    f->page_bits = from->page_bits;
    for (uint32_t i = 0; i < from->blocks_length; i++) {
        const struct block *known = &from->blocks[i];
        int status =
            rf_forward_know_block(f, known->name, known->name_length, known->declared, known->used_length);
        if (status != RF_OK) {
            return status;
        }
    }
    return RF_OK;
}

void rf_forward_fail(struct rf_forward *f, uint32_t reason) { f->opaque = reason; }

uint64_t rf_forward_position(const struct rf_forward *f) { return f->position; }

uint32_t rf_forward_opaque(const struct rf_forward *f) { return f->opaque; }

uint32_t rf_forward_target_page_bits(const struct rf_forward *f) { return f->page_bits; }

const char *rf_forward_reason_text(uint32_t reason) {
    static const char *const texts[] = {
        [RF_OPAQUE_NO] = "it can be read",
        [RF_OPAQUE_DEVICE_STATE] =
            "device state, which carries no length (normal where a precopy migration ends)",
        [RF_OPAQUE_EARLY_DEVICE_STATE] = "device state before RAM, which carries no length (virtio-mem)",
        [RF_OPAQUE_SECTION] = "a section of a kind that carries no length",
        [RF_OPAQUE_TLS] = "it is encrypted (TLS)",
        [RF_OPAQUE_MULTIFD] = "a multifd channel",
        [RF_OPAQUE_MAGIC] = "it does not begin as a QEMU migration stream",
        [RF_OPAQUE_VERSION] = "a version of the migration stream other than 3",
        [RF_OPAQUE_CONFIGURATION] = "an unknown part in the configuration section",
        [RF_OPAQUE_SECTION_TYPE] = "an unknown section type",
        [RF_OPAQUE_SECTION_ID] = "a section that was never started",
        [RF_OPAQUE_FOOTER] = "a section footer of another section",
        [RF_OPAQUE_RAM_FLAGS] = "an unknown combination of RAM flags",
        [RF_OPAQUE_RAM_BLOCK_LIST] = "an inconsistent list of RAM blocks",
        [RF_OPAQUE_RAM_BLOCK] = "a page of a RAM block that was not declared",
        [RF_OPAQUE_RAM_OFFSET] = "a page beyond the end of its RAM block",
        [RF_OPAQUE_RAM_BODY] = "a compressed page longer than it can be",
        [RF_OPAQUE_RAM_VERSION] = "a version of the RAM section other than 4",
        [RF_OPAQUE_MAPPED_RAM] = "the mapped-ram format",
        [RF_OPAQUE_RDMA] = "RDMA",
        [RF_OPAQUE_COMMAND] = "an unknown or malformed command",
        [RF_OPAQUE_COLO] = "COLO",
        [RF_OPAQUE_DIRTY_BITMAP] = "a malformed dirty-bitmap section",
        [RF_OPAQUE_TRAILING] = "bytes after the end of the stream",
        [RF_OPAQUE_NO_MEMORY] = "no memory left under the ceiling",
        [RF_OPAQUE_MESSAGE_TYPE] = "an unknown return path message",
        [RF_OPAQUE_MESSAGE_LENGTH] = "a return path message of a wrong length",
        [RF_OPAQUE_BITMAP_SIZE] = "a received bitmap of another size than its RAM block",
        [RF_OPAQUE_BITMAP_END] = "a received bitmap with a wrong end mark",
        [RF_OPAQUE_BITMAP_BLOCK] = "a received bitmap of an unknown RAM block",
        [RF_OPAQUE_CRASHED] = "refault crashed while it read it; a new migration is read again",
        [RF_OPAQUE_KEPT_BLOCKS] = "the state file's RAM blocks are not those of this migration",
    };
    return reason < sizeof(texts) / sizeof(texts[0]) ? texts[reason] : "unknown reason";
}
