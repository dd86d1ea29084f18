#include "leg.h"

#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "tcp.h"

void rf_leg_init(struct rf_leg *leg) { *leg = (struct rf_leg){.fd = -1, .state = RF_LEG_NONE}; }

void rf_leg_adopt(struct rf_leg *leg, int fd) {
    *leg = (struct rf_leg){.fd = fd, .state = RF_LEG_OPEN, .may_read = true, .may_write = true};
    leg->is_tcp = rf_tcp_prepare(fd);
}

void rf_leg_set_unsent(struct rf_leg *leg, unsigned bytes) {
    if (leg->is_tcp && leg->fd >= 0) {
        rf_tcp_set_unsent(leg->fd, bytes);
    }
}

void rf_leg_set_send_buffer(struct rf_leg *leg, unsigned bytes) {
    if (!leg->is_tcp && leg->fd >= 0) {
        /* It only shapes latency. */
        (void)setsockopt(leg->fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
    }
}

void rf_leg_bound_unread(struct rf_leg *leg, unsigned bytes, unsigned round_trip_us) {
    if (leg->is_tcp && leg->fd >= 0) {
        rf_tcp_bound_unread(leg->fd, bytes, round_trip_us);
    }
}

static void take_note(struct rf_leg *leg, enum rf_leg_state state, int error) {
    if (leg->state == RF_LEG_OPEN) {
        leg->state = state;
        leg->error = error;
    }
}

/* ---- a leg that may be a session ---- */

void rf_leg_adopt_link(struct rf_leg *leg, struct rf_link *link) {
    leg->link = link;
    if (rf_link_carries(link)) {
        rf_leg_leave_connection(leg); /* all that was sent on it comes again */
    } else if (leg->fd < 0 && link != NULL) {
        rf_link_begin(link);
    } else if (leg->fd < 0) {
        leg->may_read = leg->may_write = false;
        take_note(leg, RF_LEG_FAILED, ENOTCONN);
    }
}

void rf_leg_drop_link(struct rf_leg *leg) {
    if (leg->link != NULL && leg->link->in_being && rf_link_outlives(leg->link, 0)) {
        rf_leg_leave_connection(leg);
    } else if (leg->link != NULL && !rf_link_carries(leg->link)) {
        rf_link_drop(leg->link);
        leg->link = NULL;
    }
}

void rf_leg_leave_connection(struct rf_leg *leg) {
    if (leg->fd >= 0) {
        (void)shutdown(leg->fd, SHUT_RDWR); /* wakes a poll that has it */
        close(leg->fd);
        leg->fd = -1;
        leg->is_tcp = false;
    }
}

bool rf_leg_is_open(const struct rf_leg *leg) { return leg->fd >= 0 || leg->link != NULL; }

/* Whether the connection may end, for the link goes on without. */
static bool outlived(struct rf_leg *leg, int error) {
    if (!rf_link_outlives(leg->link, error)) {
        return false;
    }
    rf_leg_leave_connection(leg);
    return true;
}

static size_t read_link(struct rf_leg *leg, uint8_t *buf, size_t len) {
    size_t n = rf_link_read(leg->link, buf, len);
    int error = 0;

    if (n == 0 && rf_link_read_out(leg->link, &error)) {
        leg->may_read = false;
        take_note(leg, error != 0 ? RF_LEG_FAILED : RF_LEG_ENDED, error);
    }
    return n;
}

static ssize_t receive(int fd, uint8_t *buf, size_t len, int flags) {
    ssize_t n;

    do {
        n = recv(fd, buf, len, MSG_DONTWAIT | flags);
    } while (n < 0 && errno == EINTR);
    return n;
}

/* The connection brings nothing more. */
static void come_to_end(struct rf_leg *leg, int error) {
    if (!outlived(leg, error)) {
        leg->may_read = false;
        take_note(leg, error != 0 ? RF_LEG_FAILED : RF_LEG_ENDED, error);
    }
}

/* The first bytes of the other host, which may offer a session; 0 while that is not decided, or it is one. */
static size_t look_for_offer(struct rf_leg *leg, uint8_t *buf, size_t len) {
    struct rf_link *link = leg->link;
    ssize_t n = receive(leg->fd, link->offer + link->offered, link->offer_bytes - link->offered, 0);
    int error = n < 0 ? errno : 0;
    size_t seen;

    if (n < 0 && rf_tcp_is_later(error)) {
        return 0;
    }
    link->offered += n > 0 ? (size_t)n : 0;
    if (n > 0 && rf_link_judge(link) != RF_OFFER_NONE) {
        return 0;
    }
    seen = link->offered < len ? link->offered : len;
    memcpy(buf, link->offer, seen);
    rf_leg_drop_link(leg);
    if (seen == 0) {
        come_to_end(leg, error);
    }
    return seen;
}

/* ---- what it says and hears ---- */

/* What a link would be offered in has passed, and cannot be. */
static void leave_bare(struct rf_leg *leg) {
    if (leg->link->bare) {
        rf_leg_drop_link(leg);
    }
}

static size_t read_connection(struct rf_leg *leg, uint8_t *buf, size_t len, int flags) {
    size_t most = leg->link != NULL ? rf_link_plain_most(leg->link, false, len) : len;
    ssize_t n = leg->may_read ? receive(leg->fd, buf, most, flags) : 0;

    if (n > 0) {
        if (leg->link != NULL && flags == 0) {
            rf_link_plain_came(leg->link, buf, (size_t)n);
            leave_bare(leg);
        }
        return (size_t)n;
    }
    if (leg->may_read && (n == 0 || !rf_tcp_is_later(errno))) {
        come_to_end(leg, n == 0 ? 0 : errno);
    }
    return 0;
}

size_t rf_leg_read(struct rf_leg *leg, uint8_t *buf, size_t len) {
    if (leg->may_read && rf_link_carries(leg->link)) {
        return read_link(leg, buf, len);
    }
    if (leg->may_read && rf_link_looks(leg->link)) {
        return look_for_offer(leg, buf, len);
    }
    return read_connection(leg, buf, len, 0);
}

size_t rf_leg_peek(struct rf_leg *leg, uint8_t *buf, size_t len) {
    if (leg->may_read && rf_link_carries(leg->link)) {
        return rf_link_peek(leg->link, buf, len);
    }
    return read_connection(leg, buf, len, MSG_PEEK);
}

/* As much as the link has room for, which sends it when it can. */
static size_t keep(struct rf_leg *leg, const uint8_t *buf, size_t len) {
    size_t n = rf_link_write(leg->link, buf, len);

    leg->sent += n;
    return n;
}

static size_t write_link(struct rf_leg *leg, const uint8_t *buf, size_t len) {
    int error = rf_link_refuses(leg->link);

    if (error != 0) {
        leg->may_write = false;
        leg->write_error = error;
        return 0;
    }
    return keep(leg, buf, len);
}

/* As the kernel takes it, and behind the offer where there is one to make. */
static ssize_t transmit(struct rf_leg *leg, const uint8_t *buf, size_t len) {
    struct rf_link *link = leg->link;
    size_t offer = link != NULL ? rf_link_offer_due(link) : 0;
    struct iovec parts[2] = {
        {.iov_base = offer > 0 ? link->offer + link->offered : NULL, .iov_len = offer},
        {.iov_base = (void *)buf, .iov_len = len},
    };
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t n;

    do {
        n = sendmsg(leg->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (n < 0 && errno == EINTR);
    if (n > 0 && offer > 0) {
        size_t gone = (size_t)n < offer ? (size_t)n : offer;

        link->offered += gone;
        link->state = RF_LINK_OFFERED;
        n -= (ssize_t)gone;
    }
    return n;
}

size_t rf_leg_write(struct rf_leg *leg, const uint8_t *buf, size_t len) {
    ssize_t n;

    if (!leg->may_write) {
        return 0;
    }
    if (rf_link_carries(leg->link)) {
        return write_link(leg, buf, len);
    }
    if (leg->link != NULL && leg->link->only_read) {
        return keep(leg, buf, len);
    }
    if (leg->link != NULL && rf_link_plain_room(leg->link) < len) {
        if (leg->link->answers && leg->link->place.lane == 0) {
            rf_leg_drop_link(leg); /* nobody has taken the offer */
        } else {
            len = rf_link_plain_room(leg->link);
        }
    }
    if (leg->link != NULL) {
        len = rf_link_plain_most(leg->link, true, len);
    }
    if (len == 0) {
        return 0;
    }
    n = transmit(leg, buf, len);
    if (n >= 0) {
        if (leg->link != NULL) {
            rf_link_plain_sent(leg->link, buf, (size_t)n);
            leave_bare(leg);
        }
        leg->sent += (uint64_t)n;
        return (size_t)n;
    }
    if (rf_tcp_is_later(errno)) {
        return 0;
    }
    if (rf_link_outlives_write(leg->link)) {
        return keep(leg, buf, len);
    }
    leg->may_write = false;
    leg->write_error = errno;
    return 0;
}

bool rf_leg_lost(const struct rf_leg *leg) {
    return leg->state == RF_LEG_ENDED || leg->state == RF_LEG_FAILED || leg->state == RF_LEG_REFUSED;
}

void rf_leg_want(const struct rf_leg *leg, short events, struct pollfd *one) {
    struct rf_link *link = leg->link;

    if (rf_link_carries(link)) {
        one->events |= events;
        link->leg_writes = link->leg_writes || events & POLLOUT;
    } else if (leg->fd >= 0) {
        if (link != NULL && rf_link_plain_room(link) == 0) {
            events &= (short)~POLLOUT; /* not before it is known what the other host is */
        }
        if (link != NULL && link->end_seen) {
            events &= (short)~POLLRDHUP;
        }
        one->fd = events != 0 ? leg->fd : one->fd;
        one->events |= events;
    }
}

bool rf_leg_ready(const struct rf_leg *leg, const struct pollfd *one) {
    return rf_link_carries(leg->link) && rf_leg_events(leg, one) != 0;
}

short rf_leg_events(const struct rf_leg *leg, const struct pollfd *one) {
    short events = 0;

    if (!rf_link_carries(leg->link)) {
        return one->fd >= 0 && one->fd == leg->fd ? one->revents : 0;
    }
    if (one->events & POLLIN && leg->may_read && rf_link_readable(leg->link)) {
        events |= POLLIN;
    }
    if (one->events & POLLOUT && leg->may_write && rf_link_writable(leg->link)) {
        events |= POLLOUT;
    }
    if (one->events & POLLRDHUP && leg->state == RF_LEG_OPEN && rf_link_end_in_sight(leg->link)) {
        events |= POLLRDHUP;
    }
    return events;
}

void rf_leg_see_end(struct rf_leg *leg, short events) {
    int error = 0;
    socklen_t size = sizeof(error);

    if (leg->state != RF_LEG_OPEN || !(events & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL))) {
        return;
    }
    if (rf_link_carries(leg->link)) {
        error = leg->link->error;
    } else if (getsockopt(leg->fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0) {
        error = errno;
    }
    if (!rf_link_carries(leg->link) && rf_link_outlives_end(leg->link)) {
        return; /* what the kernel holds is read first */
    }
    take_note(leg, error != 0 ? RF_LEG_FAILED : RF_LEG_ENDED, error);
}

void rf_leg_see_failed_write(struct rf_leg *leg) {
    if (leg->write_error != 0) {
        take_note(leg, RF_LEG_FAILED, leg->write_error);
    }
}

bool rf_leg_writable(const struct rf_leg *leg) {
    struct pollfd one = {.fd = leg->fd, .events = POLLOUT};

    if (rf_link_carries(leg->link)) {
        return (leg->at_last && rf_stream_room(leg->link->stream) > 0) || rf_link_writable(leg->link);
    }
    if (leg->link != NULL && (!leg->link->answers || leg->link->place.lane > 0) &&
        rf_link_plain_room(leg->link) == 0) {
        return false;
    }
    return leg->fd >= 0 && (leg->at_last || poll(&one, 1, 0) > 0);
}

void rf_leg_take_all(struct rf_leg *leg) {
    leg->at_last = true;
    rf_leg_set_unsent(leg, UINT32_MAX); /* where it fails a little less is taken */
}

void rf_leg_probe(struct rf_leg *leg, unsigned dead_after_s) {
    if (leg->is_tcp && leg->state == RF_LEG_OPEN) {
        rf_tcp_probe(leg->fd, dead_after_s);
    }
}

void rf_leg_check_silence(struct rf_leg *leg, unsigned dead_after_s) {
    if (leg->is_tcp && leg->state == RF_LEG_OPEN && rf_tcp_silent(leg->fd, dead_after_s) &&
        !outlived(leg, ETIMEDOUT)) {
        rf_leg_break(leg, ETIMEDOUT);
    }
}

void rf_leg_end_writing(struct rf_leg *leg) {
    rf_leg_drop_link(leg);
    if (leg->may_write) {
        if (leg->link != NULL) {
            rf_link_finish(leg->link);
        } else {
            (void)shutdown(leg->fd, SHUT_WR); /* fails only where the peer is gone, as it would tell */
        }
        leg->may_write = false;
    }
}

void rf_leg_shut(struct rf_leg *leg) {
    rf_leg_drop_link(leg);
    if (leg->link != NULL) {
        rf_link_shut(leg->link);
        leg->may_write = false;
    } else if (leg->fd >= 0) {
        (void)shutdown(leg->fd, SHUT_RDWR); /* likewise */
        leg->may_write = false;
    }
}

void rf_leg_break(struct rf_leg *leg, int error) {
    take_note(leg, RF_LEG_FAILED, error);
    rf_leg_shut(leg);
}

static size_t queued(const struct rf_leg *leg, unsigned long what) {
    int count = 0;

    if (leg->fd < 0 || ioctl(leg->fd, what, &count) < 0 || count < 0) {
        return 0;
    }
    return (size_t)count;
}

size_t rf_leg_unread(const struct rf_leg *leg) {
    if (!leg->may_read) {
        return 0;
    }
    return rf_link_carries(leg->link) ? rf_link_unread(leg->link) : queued(leg, SIOCINQ);
}

size_t rf_leg_unconfirmed(const struct rf_leg *leg) {
    return rf_link_carries(leg->link) ? rf_link_unconfirmed(leg->link) : queued(leg, SIOCOUTQ);
}

void rf_leg_close(struct rf_leg *leg) {
    rf_leg_shut(leg);
    rf_leg_let_go(leg);
}

void rf_leg_let_go(struct rf_leg *leg) {
    rf_leg_drop_link(leg);
    if (rf_leg_is_open(leg)) {
        if (leg->link != NULL) {
            rf_link_leave(leg->link);
            leg->link = NULL;
        } else {
            close(leg->fd);
        }
        leg->fd = -1;
        leg->may_read = leg->may_write = false;
        take_note(leg, RF_LEG_CLOSED, 0);
    }
}
