#include "pipe.h"

static const short GONE = POLLERR | POLLHUP | POLLNVAL;

bool rf_pipe_pending(const struct rf_pipe *pipe) { return pipe->off < pipe->len; }

void rf_pipe_init(struct rf_pipe *pipe, uint8_t *data, size_t room) {
    *pipe = (struct rf_pipe){.data = data, .room = room};
}

void rf_pipe_clear(struct rf_pipe *pipe) {
    pipe->off = pipe->len = 0;
    pipe->waits = false;
}

size_t rf_pipe_write(struct rf_pipe *pipe, struct rf_leg *to) {
    size_t n = rf_leg_write(to, pipe->data + pipe->off, pipe->len - pipe->off);

    pipe->off += n;
    return n;
}

size_t rf_pipe_read(struct rf_pipe *pipe, struct rf_leg *from, const struct rf_leg *to, size_t most) {
    size_t n;

    pipe->waits = !rf_leg_writable(to);
    if (pipe->waits) {
        return 0;
    }
    n = rf_leg_read(from, pipe->data, most < pipe->room ? most : pipe->room);
    if (n > 0) {
        pipe->off = 0;
        pipe->len = n;
    }
    return n;
}

size_t rf_pipe_pass_last(struct rf_pipe *pipe, struct rf_leg *from, struct rf_leg *to) {
    size_t there = rf_leg_peek(from, pipe->data, pipe->room);
    size_t taken = there > 0 ? rf_leg_write(to, pipe->data, there) : 0;
    size_t left = taken;
    size_t n;

    do {
        n = left > 0 ? rf_leg_read(from, pipe->data + taken - left, left) : 0;
        left -= n;
    } while (n > 0);
    return taken;
}

enum rf_flow rf_pipe_flow(const struct rf_pipe *pipe, enum rf_direction direction, const struct rf_leg *from,
                          const struct rf_leg *to, bool gated) {
    enum rf_taker taker = !to->may_write ? RF_TAKER_GONE
                          : gated        ? RF_TAKER_GATED
                          : pipe->waits  ? RF_TAKER_FULL
                                         : RF_TAKER_READY;

    return rf_ends_flow(direction, from->may_read, rf_pipe_pending(pipe), taker);
}

void rf_flow_want(enum rf_direction direction, enum rf_flow flow, const struct rf_leg *from,
                  const struct rf_leg *to, struct pollfd *from_poll, struct pollfd *to_poll) {
    if (flow == RF_FLOW_READ || flow == RF_FLOW_DROP) {
        rf_leg_want(from, POLLIN, from_poll);
    } else if (flow == RF_FLOW_WRITE) {
        rf_leg_want(to, POLLOUT, to_poll);
    }
    if (rf_ends_watched(direction, flow) && from->state == RF_LEG_OPEN) {
        rf_leg_want(from, POLLRDHUP, from_poll);
    }
}

bool rf_flow_due(enum rf_direction direction, enum rf_flow flow, struct rf_leg *from, short from_events,
                 short to_events) {
    if (rf_ends_watched(direction, flow)) {
        rf_leg_see_end(from, from_events);
    }
    if (flow == RF_FLOW_READ || flow == RF_FLOW_DROP) {
        return from_events & (POLLIN | GONE);
    }
    return flow == RF_FLOW_WRITE && to_events & (POLLOUT | GONE);
}
