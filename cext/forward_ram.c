#include "forward_ram.h"

#define FRAME_MEM_SIZE 0x04
#define FRAME_EOS 0x10
#define FRAME_CONTINUE 0x20
#define FRAME_HOOK 0x80
#define FRAME_MULTIFD_FLUSH 0x200
#define EXTRAS_MAX 2 /* behind a block's length: page size and address */

/* RAM frames. */

static bool pass_page(struct rf_forward *f, struct rf_forward_event *event, uint64_t body) {
    const struct rf_forward_block *block = &f->blocks[f->current];
    event->code =
        (uint32_t)(f->frame & (RF_FRAME_ZERO | RF_FRAME_PAGE | RF_FRAME_XBZRLE | RF_FRAME_COMPRESS));
    event->block = f->current;
    event->name = block->name;
    event->name_length = block->name_length;
    event->offset = f->frame & ~(rf_forward_page_size(f) - 1);
    event->length = rf_forward_page_size(f);
    return rf_forward_pass(f, event, RF_FORWARD_PAGE, body, AT_FRAME);
}

static bool page_body(struct rf_forward *f, struct rf_forward_event *event) {
    if (rf_forward_is_beyond(f, f->current, f->frame & ~(rf_forward_page_size(f) - 1),
                             rf_forward_page_size(f))) {
        return rf_forward_give_up(f, event, RF_OPAQUE_RAM_OFFSET);
    }
    switch (f->frame & (rf_forward_page_size(f) - 1) & ~(uint64_t)FRAME_CONTINUE) {
    case RF_FRAME_PAGE:
        return pass_page(f, event, rf_forward_page_size(f));
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
    uint64_t flags = f->frame & (rf_forward_page_size(f) - 1);
    switch (flags & ~(uint64_t)FRAME_CONTINUE) {
    case RF_FRAME_PAGE:
    case RF_FRAME_ZERO:
    case RF_FRAME_XBZRLE:
    case RF_FRAME_COMPRESS:
        if ((flags & FRAME_CONTINUE) == 0) {
            f->state = AT_FRAME_NAME_LENGTH;
            return false;
        }
        return f->current == RF_FORWARD_NO_BLOCK ? rf_forward_give_up(f, event, RF_OPAQUE_RAM_BLOCK)
                                                 : page_body(f, event);
    default:
        break;
    }
    switch (flags) {
    case FRAME_EOS:
        rf_forward_give(f, event, RF_FORWARD_RAM_EOS);
        if (f->mode == RF_FORWARD_PREEMPT) {
            rf_forward_begin(f, AT_FRAME);
        } else {
            rf_forward_next_item(f, AROUND_FOOTER);
        }
        return true;
    case FRAME_MEM_SIZE:
        if (f->mode != RF_FORWARD_FRESH) {
            break;
        }
        f->list_left = f->frame - flags;
        f->extras = EXTRAS_MAX; /* the list begins with a name */
        if (f->list_left == 0) {
            rf_forward_begin(f, AT_FRAME);
        } else {
            rf_forward_begin(f, AT_BLOCK_NAME_LENGTH);
        }
        return false;
    case FRAME_MULTIFD_FLUSH:
        rf_forward_give(f, event, RF_FORWARD_MULTIFD_FLUSH);
        rf_forward_begin(f, AT_FRAME);
        return true;
    case FRAME_HOOK:
        return rf_forward_give_up(f, event, RF_OPAQUE_RDMA);
    default:
        break;
    }
    return rf_forward_give_up(f, event, RF_OPAQUE_RAM_FLAGS);
}

bool rf_forward_at_frame(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    f->frame = rf_be64(bytes);
    if (f->item == 0) { /* a preempt channel's first bytes */
        if (rf_be16(bytes) == RF_FORWARD_TLS_HANDSHAKE) {
            return rf_forward_give_up(f, event, RF_OPAQUE_TLS);
        }
        if (rf_be32(bytes) == RF_FORWARD_MULTIFD_MAGIC) {
            return rf_forward_give_up(f, event, RF_OPAQUE_MULTIFD);
        }
    }
    return frame(f, event);
}

bool rf_forward_at_frame_name_length(struct rf_forward *f, const uint8_t *bytes,
                                     struct rf_forward_event *event) {
    if (bytes[0] == 0) {
        return rf_forward_give_up(f, event, RF_OPAQUE_RAM_BLOCK);
    }
    rf_forward_go(f, AT_FRAME_NAME, bytes[0]);
    return false;
}

bool rf_forward_at_frame_name(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    f->current = rf_forward_named_block(f, bytes, f->want);
    if (f->current == RF_FORWARD_NO_BLOCK) {
        return rf_forward_give_up(f, event, RF_OPAQUE_RAM_BLOCK);
    }
    return page_body(f, event);
}

bool rf_forward_at_zero(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    (void)bytes;
    pass_page(f, event, 0);
    event->value = 1;
    return true;
}

bool rf_forward_at_xbzrle(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    uint16_t length = rf_be16(bytes + 1);
    if (bytes[0] != 1 || length > rf_forward_page_size(f)) {
        return rf_forward_give_up(f, event, RF_OPAQUE_RAM_BODY);
    }
    return pass_page(f, event, length);
}

bool rf_forward_at_compress(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    uint32_t length = rf_be32(bytes);
    if (length > 2 * rf_forward_page_size(f)) {
        return rf_forward_give_up(f, event, RF_OPAQUE_RAM_BODY);
    }
    return pass_page(f, event, length);
}

/* The block list (ram.c, ram_save_setup). Behind a block's length may stand its page size, its address, or
 * both in this order; neither is announced. A name length is never 0 and both values are below 2^56 and
 * multiples of a page, so a 0x00 byte tells a value from a name, and the low bits tell it from the frame
 * after the list. */

bool rf_forward_at_block_name_length(struct rf_forward *f, const uint8_t *bytes,
                                     struct rf_forward_event *event) {
    (void)event;
    if (bytes[0] == 0) {
        rf_forward_go(f, AT_BLOCK_EXTRA, 7);
        return false;
    }
    f->has_extra = false; /* one alone with ignore-shared: the address */
    f->item = rf_forward_here(f) - 1;
    rf_forward_go(f, AT_BLOCK_NAME, bytes[0]);
    return false;
}

bool rf_forward_at_block_name(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    f->declared = rf_forward_find_block(f, bytes, f->want);
    if (f->declared == RF_FORWARD_NO_BLOCK) {
        f->declared = rf_forward_add_block(f, bytes, f->want);
        if (f->declared == RF_FORWARD_NO_BLOCK) {
            return rf_forward_give_up(f, event, RF_OPAQUE_NO_MEMORY);
        }
    } else if (f->blocks[f->declared].declared) {
        return rf_forward_give_up(f, event, RF_OPAQUE_RAM_BLOCK_LIST);
    }
    f->state = AT_BLOCK_LENGTH;
    return false;
}

bool rf_forward_at_block_length(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    struct rf_forward_block *block = &f->blocks[f->declared];
    uint64_t length = rf_be64(bytes);
    if (length > f->list_left || length % rf_forward_page_size(f) != 0) {
        return rf_forward_give_up(f, event, RF_OPAQUE_RAM_BLOCK_LIST);
    }
    f->list_left -= length;
    block->used_length = length;
    block->declared = true;
    event->length = length;
    f->extras = 0;
    rf_forward_give_block(f, event, RF_FORWARD_BLOCK, f->declared);
    rf_forward_begin(f, f->list_left == 0 ? AT_BLOCK_LAST_EXTRA : AT_BLOCK_NAME_LENGTH);
    return true;
}

/* One u64 behind the length. False with state untouched: it needs no event. */
static bool block_extra(struct rf_forward *f, struct rf_forward_event *event, uint64_t value) {
    bool size_fits = value >= rf_forward_page_size(f) && (value & (value - 1)) == 0;
    uint64_t size = value;
    if (++f->extras > EXTRAS_MAX) {
        return rf_forward_give_up(f, event, RF_OPAQUE_RAM_BLOCK_LIST);
    }
    if (f->has_extra) { /* two of them: size, address */
        size = f->extra;
        f->has_extra = false;
        size_fits = size >= rf_forward_page_size(f) && (size & (size - 1)) == 0;
        if (!size_fits) {
            return rf_forward_give_up(f, event, RF_OPAQUE_RAM_BLOCK_LIST);
        }
    } else if (f->ignore_shared || (!f->configured && !(f->advised && size_fits))) {
        f->extra = value;
        f->has_extra = true;
        return false;
    } else if (!size_fits) {
        return rf_forward_give_up(f, event, RF_OPAQUE_RAM_BLOCK_LIST);
    }
    event->value = size;
    rf_forward_give_block(f, event, RF_FORWARD_BLOCK_PAGE_SIZE, f->declared);
    rf_forward_begin(f, f->state);
    return true;
}

bool rf_forward_at_block_extra(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    uint64_t value = (uint64_t)rf_be32(bytes) << 24 | (uint64_t)rf_be16(bytes + 4) << 8 | bytes[6];
    f->state = AT_BLOCK_NAME_LENGTH;
    return block_extra(f, event, value);
}

bool rf_forward_at_block_last_extra(struct rf_forward *f, const uint8_t *bytes,
                                    struct rf_forward_event *event) {
    uint64_t value = rf_be64(bytes);
    if ((value & (rf_forward_page_size(f) - 1)) != 0) {
        f->has_extra = false;
        f->item = rf_forward_here(f) - 8;
        f->frame = value;
        return frame(f, event);
    }
    return block_extra(f, event, value);
}
