/*
 * Steps of the forward decoder: the `ram` section, frame by frame, and the list of RAM blocks in it. The
 * states are those of the same names (forward_parts.h).
 */
#ifndef RF_FORWARD_RAM_H
#define RF_FORWARD_RAM_H

#include "forward_parts.h"

bool rf_forward_at_frame(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event);
bool rf_forward_at_frame_name_length(struct rf_forward *f, const uint8_t *bytes,
                                     struct rf_forward_event *event);
bool rf_forward_at_frame_name(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event);
bool rf_forward_at_zero(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event);
bool rf_forward_at_xbzrle(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event);
bool rf_forward_at_compress(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event);
bool rf_forward_at_block_name_length(struct rf_forward *f, const uint8_t *bytes,
                                     struct rf_forward_event *event);
bool rf_forward_at_block_name(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event);
bool rf_forward_at_block_length(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event);
bool rf_forward_at_block_extra(struct rf_forward *f, const uint8_t *bytes, struct rf_forward_event *event);
bool rf_forward_at_block_last_extra(struct rf_forward *f, const uint8_t *bytes,
                                    struct rf_forward_event *event);

#endif
