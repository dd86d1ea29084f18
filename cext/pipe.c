#include "pipe.h"

static const short GONE = POLLERR | POLLHUP | POLLNVAL;

bool rf_pipe_pending(const struct rf_pipe *pipe) { return pipe->off < pipe->len; }

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
    n = rf_leg_read(from, pipe->data, most < RF_PIPE_ROOM ? most : RF_PIPE_ROOM);
    if (n > 0) {
        pipe->off = 0;
        pipe->len = n;
    }
    return n;
}

void rf_pipe_want(const struct rf_pipe *pipe, const struct rf_leg *from, const struct rf_leg *to,
                  struct pollfd *from_poll, struct pollfd *to_poll) {
    if (rf_pipe_pending(pipe) || pipe->waits) {
        rf_leg_want(to, POLLOUT, to_poll);
    } else if (to->state == RF_LEG_OPEN && from->state == RF_LEG_OPEN) {
        rf_leg_want(from, POLLIN, from_poll);
    }
}

bool rf_pipe_ready(const struct rf_pipe *pipe, const struct rf_leg *to, short from_events, short to_events) {
    if (rf_pipe_pending(pipe)) {
        return to_events & (POLLOUT | GONE);
    }
    return to->state == RF_LEG_OPEN &&
           ((from_events & (POLLIN | GONE)) || (pipe->waits && to_events & (POLLOUT | GONE)));
}
