#include "forward.h"

#include <string.h>

#include "budget.h"
#include "forward_dirty_bitmap.h"
#include "forward_ram.h"

#define FILE_MAGIC 0x5145564dU
#define FILE_VERSION 3U
#define TYPE_EOF 0x00
#define TYPE_SUBSECTION 0x05
#define TYPE_VMDESCRIPTION 0x06
#define TYPE_CONFIGURATION 0x07
#define TYPE_COMMAND 0x08
#define TYPE_FOOTER 0x7e
#define RAM_VERSION 4
#define DIRTY_BITMAP_VERSION 1
#define DEFAULT_PAGE_BITS 12
/* COMMAND PING 3 and COMMAND RUN, with which a package ends (migration.c, postcopy_start). */
#define PACKAGE_TAIL 14
#define COMMAND_RUN_LENGTH 5

/* Header and configuration. */

static bool at_header(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    if (rf_be32(bytes) == RF_FORWARD_MULTIFD_MAGIC) {
        return rf_forward_give_up(f, event, RF_OPAQUE_MULTIFD);
    }
    if (rf_be16(bytes) == RF_FORWARD_TLS_HANDSHAKE) {
        return rf_forward_give_up(f, event, RF_OPAQUE_TLS);
    }
    if (rf_be32(bytes) != FILE_MAGIC) {
        return rf_forward_give_up(f, event, RF_OPAQUE_MAGIC);
    }
    event->value = rf_be32(bytes + 4);
    if (event->value != FILE_VERSION) {
        return rf_forward_give_up(f, event, RF_OPAQUE_VERSION);
    }
    rf_forward_give(f, event, RF_FORWARD_HEADER);
    rf_forward_next_item(f, AROUND_HEADER);
    return true;
}

static bool at_configuration_length(struct rf_forward *f, const uint8_t *bytes,
                                    struct rf_forward_event *event) {
    uint32_t length = rf_be32(bytes);
    if (length == 0 || length > RF_FORWARD_NAME_MAX) {
        return rf_forward_give_up(f, event, RF_OPAQUE_CONFIGURATION);
    }
    rf_forward_go(f, AT_CONFIGURATION_NAME, length);
    return false;
}

static bool at_configuration_name(struct rf_forward *f, const uint8_t *bytes,
                                  struct rf_forward_event *event) {
    rf_forward_keep_name(f, bytes, f->want);
    f->configured = true;
    rf_forward_give_named(f, event, RF_FORWARD_CONFIGURATION);
    rf_forward_next_item(f, AROUND_CONFIGURATION);
    return true;
}

static bool at_subsection_name_length(struct rf_forward *f, const uint8_t *bytes,
                                      struct rf_forward_event *event) {
    if (bytes[0] == 0 || bytes[0] > RF_FORWARD_NAME_MAX - 4) {
        return rf_forward_give_up(f, event, RF_OPAQUE_CONFIGURATION);
    }
    rf_forward_go(f, AT_SUBSECTION_NAME, (size_t)bytes[0] + 4); /* with the version */
    return false;
}

static bool at_subsection_name(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    rf_forward_keep_name(f, bytes, f->want - 4);
    if (rf_be32(bytes + f->name_length) == 1) {
        if (rf_forward_name_is(f, "configuration/target-page-bits")) {
            f->state = AT_PAGE_BITS;
            return false;
        }
        if (rf_forward_name_is(f, "configuration/capabilities")) {
            f->state = AT_CAPABILITY_COUNT;
            return false;
        }
        if (rf_forward_name_is(f, "configuration/uuid")) {
            f->state = AT_UUID;
            return false;
        }
    }
    return rf_forward_give_up(f, event, RF_OPAQUE_CONFIGURATION);
}

static bool at_page_bits(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    event->value = rf_be32(bytes);
    if (!rf_forward_set_page_bits(f, rf_be32(bytes))) {
        return rf_forward_give_up(f, event, RF_OPAQUE_CONFIGURATION);
    }
    rf_forward_give(f, event, RF_FORWARD_TARGET_PAGE_BITS);
    rf_forward_next_item(f, AROUND_CONFIGURATION);
    return true;
}

static void next_capability(struct rf_forward *f) {
    if (f->capabilities_left == 0) {
        rf_forward_next_item(f, AROUND_CONFIGURATION);
    } else {
        f->capabilities_left--;
        rf_forward_begin(f, AT_CAPABILITY_LENGTH);
    }
}

static bool at_capability_count(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    f->capabilities_left = rf_be32(bytes);
    if (f->capabilities_left > 255) {
        return rf_forward_give_up(f, event, RF_OPAQUE_CONFIGURATION);
    }
    next_capability(f);
    return false;
}

static bool at_capability_length(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    if (bytes[0] == 0) {
        return rf_forward_give_up(f, event, RF_OPAQUE_CONFIGURATION);
    }
    rf_forward_go(f, AT_CAPABILITY, bytes[0]);
    return false;
}

static bool at_capability(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    rf_forward_keep_name(f, bytes, f->want);
    if (rf_forward_name_is(f, "mapped-ram")) {
        return rf_forward_give_up(f, event, RF_OPAQUE_MAPPED_RAM);
    }
    f->ignore_shared = f->ignore_shared || rf_forward_name_is(f, "x-ignore-shared");
    rf_forward_give_named(f, event, RF_FORWARD_CAPABILITY);
    next_capability(f);
    return true;
}

static bool at_uuid(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    rf_forward_keep_name(f, bytes, 16);
    rf_forward_give_named(f, event, RF_FORWARD_UUID);
    rf_forward_next_item(f, AROUND_CONFIGURATION);
    return true;
}

/* Sections. */

static bool opaque_section(struct rf_forward *f, struct rf_forward_event *event, enum rf_opaque reason) {
    bool given = rf_forward_give_up(f, event, reason);
    event->id = f->section_id;
    event->name = f->name;
    event->name_length = f->name_length;
    return given;
}

static bool at_item(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    enum rf_forward_around around = f->around;
    uint8_t type = bytes[0];
    f->around = AROUND_SECTIONS;
    if (around == AROUND_EOF) {
        if (type != TYPE_VMDESCRIPTION) {
            return rf_forward_give_up(f, event, RF_OPAQUE_TRAILING);
        }
        f->state = AT_VMDESCRIPTION;
        return false;
    }
    if (f->packaged && type != TYPE_COMMAND && type != RF_SECTION_FULL) {
        return rf_forward_skip_package(f);
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
        rf_forward_give(f, event, RF_FORWARD_EOF);
        rf_forward_next_item(f, AROUND_EOF);
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
    if (f->item == 0 && type == RF_FORWARD_TLS_HANDSHAKE >> 8) {
        return rf_forward_give_up(f, event, RF_OPAQUE_TLS);
    }
    if (f->item == 0 && type == RF_FORWARD_MULTIFD_MAGIC >> 24) {
        return rf_forward_give_up(f, event, RF_OPAQUE_MULTIFD);
    }
    return rf_forward_give_up(f, event, RF_OPAQUE_SECTION_TYPE);
}

static bool give_section(struct rf_forward *f, struct rf_forward_event *event) {
    event->code = f->section_type;
    event->id = f->section_id;
    return rf_forward_give_named(f, event, RF_FORWARD_SECTION);
}

static bool at_section_id(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    f->section_id = rf_be32(bytes);
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
        rf_forward_begin(f, AT_FRAME);
        return true;
    }
    if (f->dirty_bitmap_known && f->section_id == f->dirty_bitmap_id) {
        give_section(f, event);
        rf_forward_begin(f, AT_BITMAP_FLAGS);
        return true;
    }
    return opaque_section(f, event, RF_OPAQUE_SECTION_ID);
}

static bool at_section_name_length(struct rf_forward *f, const uint8_t *bytes,
                                   struct rf_forward_event *event) {
    if (bytes[0] == 0) {
        return rf_forward_give_up(f, event, RF_OPAQUE_SECTION);
    }
    rf_forward_go(f, AT_SECTION_NAME, bytes[0]);
    return false;
}

static bool at_section_name(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    (void)event;
    rf_forward_keep_name(f, bytes, f->want);
    f->state = AT_SECTION_VERSION;
    return false;
}

static bool at_section_version(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    event->value = rf_be32(bytes + 4); /* behind the instance id */
    if (f->section_type == RF_SECTION_FULL) {
        if (f->packaged) {
            give_section(f, event);
            rf_forward_skip_package(f);
            return true;
        }
        return opaque_section(f, event,
                              f->ram_started ? RF_OPAQUE_DEVICE_STATE : RF_OPAQUE_EARLY_DEVICE_STATE);
    }
    if (rf_forward_name_is(f, "ram")) {
        if (event->value != RAM_VERSION) {
            return opaque_section(f, event, RF_OPAQUE_RAM_VERSION);
        }
        f->ram_known = true;
        f->ram_started = true;
        f->ram_id = f->section_id;
        give_section(f, event);
        rf_forward_begin(f, AT_FRAME);
        return true;
    }
    if (rf_forward_name_is(f, "dirty-bitmap") && event->value == DIRTY_BITMAP_VERSION) {
        f->dirty_bitmap_known = true;
        f->dirty_bitmap_id = f->section_id;
        give_section(f, event);
        rf_forward_begin(f, AT_BITMAP_FLAGS);
        return true;
    }
    return opaque_section(f, event, RF_OPAQUE_SECTION);
}

static bool at_footer(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    event->id = rf_be32(bytes);
    if (event->id != f->section_id) {
        return rf_forward_give_up(f, event, RF_OPAQUE_FOOTER);
    }
    rf_forward_give(f, event, RF_FORWARD_FOOTER);
    rf_forward_next_item(f, AROUND_SECTIONS);
    return true;
}

static bool at_vmdescription(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    f->around = AROUND_EOF;
    return rf_forward_pass(f, event, RF_FORWARD_VMDESCRIPTION, rf_be32(bytes), AT_ITEM);
}

/* Commands. */

static bool give_command(struct rf_forward *f, struct rf_forward_event *event) {
    event->code = f->command;
    event->length = f->command_length;
    rf_forward_give(f, event, RF_FORWARD_COMMAND);
    rf_forward_next_item(f, AROUND_SECTIONS);
    return true;
}

static bool at_command(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    uint16_t length = rf_be16(bytes + 2);
    f->command = rf_be16(bytes);
    f->command_length = length;
    event->name = NULL;
    event->name_length = 0;
    switch (f->command) {
    case RF_COMMAND_OPEN_RETURN_PATH:
    case RF_COMMAND_POSTCOPY_LISTEN:
    case RF_COMMAND_POSTCOPY_RUN:
    case RF_COMMAND_POSTCOPY_RESUME:
    case RF_COMMAND_SWITCHOVER_START:
        return length == 0 ? give_command(f, event) : rf_forward_give_up(f, event, RF_OPAQUE_COMMAND);
    case RF_COMMAND_PING:
    case RF_COMMAND_PACKAGED:
        if (length != 4 || (f->packaged && f->command == RF_COMMAND_PACKAGED)) {
            return rf_forward_give_up(f, event, RF_OPAQUE_COMMAND);
        }
        f->state = f->command == RF_COMMAND_PING ? AT_PING : AT_PACKAGED;
        return false;
    case RF_COMMAND_POSTCOPY_ADVISE:
        if (length == 0) {
            return give_command(f, event);
        }
        f->state = AT_ADVISE;
        return length == 16 ? false : rf_forward_give_up(f, event, RF_OPAQUE_COMMAND);
    case RF_COMMAND_RAM_DISCARD:
        f->state = AT_DISCARD_HEAD;
        return length >= 20 ? false : rf_forward_give_up(f, event, RF_OPAQUE_COMMAND);
    case RF_COMMAND_RECV_BITMAP:
        f->state = AT_RECV_BITMAP_LENGTH;
        return length >= 2 ? false : rf_forward_give_up(f, event, RF_OPAQUE_COMMAND);
    case RF_COMMAND_ENABLE_COLO:
        return rf_forward_give_up(f, event, RF_OPAQUE_COLO);
    default:
        return rf_forward_give_up(f, event, RF_OPAQUE_COMMAND);
    }
}

static bool at_ping(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    event->value = rf_be32(bytes);
    return give_command(f, event);
}

static bool at_advise(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    uint64_t sizes = rf_be64(bytes);
    uint64_t target = rf_be64(bytes + 8);
    if (target == 0 || (target & (target - 1)) != 0 ||
        !rf_forward_set_page_bits(f, (uint32_t)__builtin_ctzll(target))) {
        return rf_forward_give_up(f, event, RF_OPAQUE_COMMAND);
    }
    f->advised = true;
    event->value = sizes;
    event->offset = target;
    return give_command(f, event);
}

static bool at_packaged(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    uint32_t length = rf_be32(bytes);
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
        return rf_forward_give_up(f, event, RF_OPAQUE_COMMAND);
    }
    f->discard_left = (f->command_length - fixed) / 16;
    rf_forward_go(f, AT_DISCARD_NAME, (size_t)bytes[1] + 1);
    return false;
}

static bool at_discard_name(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    if (bytes[f->want - 1] != 0) {
        return rf_forward_give_up(f, event, RF_OPAQUE_COMMAND);
    }
    f->declared = rf_forward_named_block(f, bytes, f->want - 1);
    if (f->declared == RF_FORWARD_NO_BLOCK) {
        return rf_forward_give_up(f, event, RF_OPAQUE_RAM_BLOCK);
    }
    event->code = f->command;
    event->length = f->command_length;
    rf_forward_give_block(f, event, RF_FORWARD_COMMAND, f->declared);
    rf_forward_begin(f, AT_DISCARD_RANGE);
    return true;
}

static bool at_discard_range(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    event->offset = rf_be64(bytes);
    event->length = rf_be64(bytes + 8);
    if (rf_forward_is_beyond(f, f->declared, event->offset, event->length)) {
        return rf_forward_give_up(f, event, RF_OPAQUE_RAM_OFFSET);
    }
    rf_forward_give_block(f, event, RF_FORWARD_DISCARD, f->declared);
    if (--f->discard_left == 0) {
        rf_forward_next_item(f, AROUND_SECTIONS);
    } else {
        rf_forward_begin(f, AT_DISCARD_RANGE);
    }
    return true;
}

static bool at_recv_bitmap_length(struct rf_forward *f, const uint8_t *bytes,
                                  struct rf_forward_event *event) {
    if (bytes[0] == 0 || bytes[0] + 1 != f->command_length) {
        return rf_forward_give_up(f, event, RF_OPAQUE_COMMAND);
    }
    rf_forward_go(f, AT_RECV_BITMAP, bytes[0]);
    return false;
}

static bool at_recv_bitmap(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    rf_forward_keep_name(f, bytes, f->want);
    give_command(f, event);
    event->name = f->name;
    event->name_length = f->name_length;
    return true;
}

/* Inside MIG_CMD_PACKAGED: commands up to the first device state are read, the rest is passed by length. */

static bool at_package_tail(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    static const uint8_t run[COMMAND_RUN_LENGTH] = {TYPE_COMMAND, 0, RF_COMMAND_POSTCOPY_RUN, 0, 0};
    event->value = f->package_tail >= COMMAND_RUN_LENGTH &&
                   memcmp(bytes + f->package_tail - COMMAND_RUN_LENGTH, run, COMMAND_RUN_LENGTH) == 0;
    f->item = rf_forward_here(f) - f->package_tail;
    rf_forward_give(f, event, RF_FORWARD_PACKAGED_END);
    f->packaged = false;
    rf_forward_next_item(f, AROUND_SECTIONS);
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
    [AT_FRAME] = {8, rf_forward_at_frame},
    [AT_FRAME_NAME_LENGTH] = {1, rf_forward_at_frame_name_length},
    [AT_FRAME_NAME] = {0, rf_forward_at_frame_name},
    [AT_ZERO] = {1, rf_forward_at_zero},
    [AT_XBZRLE] = {3, rf_forward_at_xbzrle},
    [AT_COMPRESS] = {4, rf_forward_at_compress},
    [AT_BLOCK_NAME_LENGTH] = {1, rf_forward_at_block_name_length},
    [AT_BLOCK_NAME] = {0, rf_forward_at_block_name},
    [AT_BLOCK_LENGTH] = {8, rf_forward_at_block_length},
    [AT_BLOCK_EXTRA] = {7, rf_forward_at_block_extra},
    [AT_BLOCK_LAST_EXTRA] = {8, rf_forward_at_block_last_extra},
    [AT_BITMAP_FLAGS] = {1, rf_forward_at_bitmap_flags},
    [AT_BITMAP_NAME_LENGTH] = {1, rf_forward_at_bitmap_name_length},
    [AT_BITMAP_NAME] = {0, rf_forward_at_bitmap_name},
    [AT_BITMAP_START] = {5, rf_forward_at_bitmap_start},
    [AT_BITMAP_BITS] = {12, rf_forward_at_bitmap_bits},
    [AT_BITMAP_SIZE] = {8, rf_forward_at_bitmap_size},
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
            event->end = rf_forward_here(f);
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
        rf_forward_go(f, AT_PACKAGE_TAIL, f->package_tail);
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
        rf_budget_free(NULL, f->blocks, f->blocks_room * sizeof(struct rf_forward_block));
        rf_budget_free(NULL, f, sizeof(*f));
    }
}

void rf_forward_restart(struct rf_forward *f, int mode) {
    static const enum rf_forward_state first[] = {
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
    f->current = RF_FORWARD_NO_BLOCK;
    if (f->mode == RF_FORWARD_FRESH) {
        f->page_bits = DEFAULT_PAGE_BITS;
        f->configured = f->ignore_shared = f->advised = false;
        f->ram_known = f->ram_started = f->dirty_bitmap_known = false;
        f->blocks_length = 0;
    }
}

int rf_forward_know_block(struct rf_forward *f, const char *name, size_t name_length, bool declared,
                          uint64_t used_length) {
    uint32_t block = rf_forward_find_block(f, (const uint8_t *)name, name_length);
    if (block == RF_FORWARD_NO_BLOCK) {
        block = rf_forward_add_block(f, (const uint8_t *)name, name_length);
        if (block == RF_FORWARD_NO_BLOCK) {
            return RF_NO_MEMORY;
        }
    }
    f->blocks[block].declared = declared;
    f->blocks[block].used_length = used_length;
    return RF_OK;
}

int rf_forward_know_page_bits(struct rf_forward *f, uint32_t bits) {
    return rf_forward_set_page_bits(f, bits) ? RF_OK : RF_OUT_OF_RANGE;
}

int rf_forward_learn(struct rf_forward *f, const struct rf_forward *from) {
    f->page_bits = from->page_bits;
    for (uint32_t i = 0; i < from->blocks_length; i++) {
        const struct rf_forward_block *known = &from->blocks[i];
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
        [RF_OPAQUE_HANDED_OVER] = "refault was restarted in its midst",
    };
    return reason < sizeof(texts) / sizeof(texts[0]) ? texts[reason] : "unknown reason";
}
