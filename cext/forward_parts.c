#include "forward_parts.h"

#include <string.h>

#include "budget.h"

#define BLOCKS_MAX 4096

bool rf_forward_give(struct rf_forward *f, struct rf_forward_event *event, uint32_t type) {
    event->type = type;
    event->at = f->item;
    event->end = rf_forward_here(f);
    event->packaged = f->packaged;
    return true;
}

bool rf_forward_give_named(struct rf_forward *f, struct rf_forward_event *event, uint32_t type) {
    event->name = f->name;
    event->name_length = f->name_length;
    return rf_forward_give(f, event, type);
}

bool rf_forward_give_block(struct rf_forward *f, struct rf_forward_event *event, uint32_t type,
                           uint32_t block) {
    event->block = block;
    event->name = f->blocks[block].name;
    event->name_length = f->blocks[block].name_length;
    return rf_forward_give(f, event, type);
}

bool rf_forward_give_up(struct rf_forward *f, struct rf_forward_event *event, enum rf_opaque reason) {
    if (f->packaged) {
        return rf_forward_skip_package(f); /* the package's length is known, so the stream is not lost */
    }
    f->opaque = reason;
    f->held = 0;
    f->skip = 0;
    event->code = reason;
    event->id = 0;
    event->name = NULL;
    event->name_length = 0;
    return rf_forward_give(f, event, RF_FORWARD_OPAQUE);
}

void rf_forward_keep_name(struct rf_forward *f, const uint8_t *bytes, size_t length) {
    memcpy(f->name, bytes, length);
    f->name_length = (uint8_t)length;
}

bool rf_forward_name_is(const struct rf_forward *f, const char *name) {
    return f->name_length == strlen(name) && memcmp(f->name, name, f->name_length) == 0;
}

uint32_t rf_forward_find_block(const struct rf_forward *f, const uint8_t *name, size_t length) {
    for (uint32_t i = 0; i < f->blocks_length; i++) {
        if (f->blocks[i].name_length == length && memcmp(f->blocks[i].name, name, length) == 0) {
            return i;
        }
    }
    return RF_FORWARD_NO_BLOCK;
}

uint32_t rf_forward_add_block(struct rf_forward *f, const uint8_t *name, size_t length) {
    if (f->blocks_length == f->blocks_room) {
        uint32_t room = f->blocks_room == 0 ? 32 : f->blocks_room * 2;
        if (room > BLOCKS_MAX) {
            return RF_FORWARD_NO_BLOCK;
        }
        struct rf_forward_block *grown =
            rf_budget_grow(NULL, f->blocks, f->blocks_room * sizeof(struct rf_forward_block),
                           room * sizeof(struct rf_forward_block));
        if (grown == NULL) {
            return RF_FORWARD_NO_BLOCK;
        }
        f->blocks = grown;
        f->blocks_room = room;
    }
    struct rf_forward_block *block = &f->blocks[f->blocks_length];
    memcpy(block->name, name, length);
    block->name_length = (uint8_t)length;
    block->declared = false;
    block->used_length = 0;
    return f->blocks_length++;
}

static bool any_declared(const struct rf_forward *f) { return f->blocks_length > 0 && f->blocks[0].declared; }

uint32_t rf_forward_named_block(struct rf_forward *f, const uint8_t *name, size_t length) {
    uint32_t block = rf_forward_find_block(f, name, length);
    return block != RF_FORWARD_NO_BLOCK || any_declared(f) ? block : rf_forward_add_block(f, name, length);
}

bool rf_forward_is_beyond(const struct rf_forward *f, uint32_t block, uint64_t offset, uint64_t length) {
    const struct rf_forward_block *b = &f->blocks[block];
    return b->declared && (offset > b->used_length || length > b->used_length - offset);
}

bool rf_forward_set_page_bits(struct rf_forward *f, uint32_t bits) {
    if (bits < 10 || bits > 30) {
        return false;
    }
    f->page_bits = bits;
    return true;
}

bool rf_forward_pass(struct rf_forward *f, struct rf_forward_event *event, uint32_t type, uint64_t length,
                     enum rf_forward_state then) {
    event->value = length;
    event->type = type;
    event->at = f->item;
    event->packaged = f->packaged;
    f->state = then;
    f->skip = length;
    if (length <= (uint64_t)(f->in_end - f->in)) {
        f->in += length;
        f->skip = 0;
        event->end = rf_forward_here(f);
        f->item = event->end;
        return true;
    }
    f->pending = *event;
    return false;
}

bool rf_forward_skip_package(struct rf_forward *f) {
    f->held = 0;
    f->state = AT_PACKAGE_BODY;
    return false;
}
