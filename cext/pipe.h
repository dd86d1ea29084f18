/*
 * A pipe: one direction between two legs. It holds one chunk at the most, and reads the next only when the
 * other leg can be sent to, so that what is read never waits here behind what is not yet sent.
 *
 *     from ──▶ one chunk ──▶ to
 */
#ifndef RF_PIPE_H
#define RF_PIPE_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ends.h"
#include "leg.h"

struct rf_pipe {
    bool waits; /* there is something to read, but no room to send it */
    size_t off;
    size_t len;
    size_t room;
    uint8_t *data;
};

/* `data`: room for one chunk, the caller's. */
void rf_pipe_init(struct rf_pipe *pipe, uint8_t *data, size_t room);

bool rf_pipe_pending(const struct rf_pipe *pipe);

/* Forgets what it holds. */
void rf_pipe_clear(struct rf_pipe *pipe);

/* Writes what the kernel takes of the chunk; the count. */
size_t rf_pipe_write(struct rf_pipe *pipe, struct rf_leg *to);

/* Reads the next chunk, of at most `most` bytes, if it can be sent; the count. Only while nothing is pending.
 */
size_t rf_pipe_read(struct rf_pipe *pipe, struct rf_leg *from, const struct rf_leg *to, size_t most);

/*
 * At the last (rf_leg_take_all) what is read and not written would be counted as passed on and is not: reads
 * no more than `to` has taken. The count; they are at the beginning of `data`. Only while nothing is pending.
 */
size_t rf_pipe_pass_last(struct rf_pipe *pipe, struct rf_leg *from, struct rf_leg *to);

/* What it does now. `gated`: what it holds is not to be written yet. */
enum rf_flow rf_pipe_flow(const struct rf_pipe *pipe, enum rf_direction direction, const struct rf_leg *from,
                          const struct rf_leg *to, bool gated);

/* What a direction that flows so waits for. A leg that nothing is wanted of stays out, for poll tells of a
 * hang-up unasked. */
void rf_flow_want(enum rf_direction direction, enum rf_flow flow, const struct rf_leg *from,
                  const struct rf_leg *to, struct pollfd *from_poll, struct pollfd *to_poll);

/* Whether what it waits for has come; takes note of an end that has shown itself. */
bool rf_flow_due(enum rf_direction direction, enum rf_flow flow, struct rf_leg *from, short from_events,
                 short to_events);

#endif
