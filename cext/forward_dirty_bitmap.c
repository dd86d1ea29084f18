#include "forward_dirty_bitmap.h"

#define BITMAP_EOS 0x01
#define BITMAP_ZEROES 0x02
#define BITMAP_BITMAP_NAME 0x04
#define BITMAP_DEVICE_NAME 0x08
#define BITMAP_START 0x10
#define BITMAP_COMPLETE 0x20
#define BITMAP_BITS 0x40
#define BITMAP_EXTRA_FLAGS 0x80
#define BITMAP_BODY_MAX 10240 /* dirty_bitmap_load_bits refuses more */

/* The dirty-bitmap section: chunks up to one with the EOS flag. */

static bool give_bitmap_chunk(struct rf_forward *f, struct rf_forward_event *event, uint64_t body) {
    bool last = (f->bitmap_flags & BITMAP_EOS) != 0;
    event->code = f->bitmap_flags;
    if (last) {
        f->around = AROUND_FOOTER;
    }
    return rf_forward_pass(f, event, RF_FORWARD_DIRTY_BITMAP, body, last ? AT_ITEM : AT_BITMAP_FLAGS);
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

bool rf_forward_at_bitmap_flags(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    if ((bytes[0] & BITMAP_EXTRA_FLAGS) != 0) { /* no QEMU sends more than one byte of them */
        return rf_forward_give_up(f, event, RF_OPAQUE_DIRTY_BITMAP);
    }
    f->bitmap_flags = bytes[0];
    f->bitmap_names = bytes[0] & (BITMAP_DEVICE_NAME | BITMAP_BITMAP_NAME);
    return after_bitmap_names(f, event);
}

bool rf_forward_at_bitmap_name_length(struct rf_forward *f, const uint8_t *bytes,
                                      struct rf_forward_event *event) {
    if (bytes[0] == 0) {
        return rf_forward_give_up(f, event, RF_OPAQUE_DIRTY_BITMAP);
    }
    rf_forward_go(f, AT_BITMAP_NAME, bytes[0]);
    return false;
}

bool rf_forward_at_bitmap_name(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    (void)bytes;
    return after_bitmap_names(f, event);
}

bool rf_forward_at_bitmap_start(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    (void)bytes;
    return give_bitmap_chunk(f, event, 0);
}

bool rf_forward_at_bitmap_bits(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    (void)bytes;
    if ((f->bitmap_flags & BITMAP_ZEROES) != 0) {
        return give_bitmap_chunk(f, event, 0);
    }
    f->state = AT_BITMAP_SIZE;
    return false;
}

bool rf_forward_at_bitmap_size(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event) {
    if (rf_be64(bytes) > BITMAP_BODY_MAX) {
        return rf_forward_give_up(f, event, RF_OPAQUE_DIRTY_BITMAP);
    }
    return give_bitmap_chunk(f, event, rf_be64(bytes));
}
