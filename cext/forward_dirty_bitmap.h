/*
 * Steps of the forward decoder: the `dirty-bitmap` section, chunk by chunk. The states are those of the same
 * names (forward_parts.h).
 */
#ifndef RF_FORWARD_DIRTY_BITMAP_H
#define RF_FORWARD_DIRTY_BITMAP_H

#include "forward_parts.h"

bool rf_forward_at_bitmap_flags(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event);
bool rf_forward_at_bitmap_name_length(struct rf_forward *f, const uint8_t *bytes,
                                      struct rf_forward_event *event);
bool rf_forward_at_bitmap_name(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event);
bool rf_forward_at_bitmap_start(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event);
bool rf_forward_at_bitmap_bits(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event);
bool rf_forward_at_bitmap_size(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event);

#endif
