#include "leg.h"

#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    NOTSENT_LOWAT = 8 * 1024,
    UNANSWERED_PROBES = 3,
};

void rf_leg_init(struct rf_leg *leg) { *leg = (struct rf_leg){.fd = -1, .state = RF_LEG_NONE}; }

void rf_leg_adopt(struct rf_leg *leg, int fd) {
    int domain = AF_UNSPEC;
    socklen_t size = sizeof(domain);

    *leg = (struct rf_leg){.fd = fd, .state = RF_LEG_OPEN, .may_read = true, .may_write = true};
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 &&
        (domain == AF_INET || domain == AF_INET6)) {
        const int on = 1;
        const int lowat = NOTSENT_LOWAT;

        /* Both only shape latency: a leg without them still carries every byte. */
        (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
        (void)setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &lowat, sizeof(lowat));
        leg->is_tcp = true;
    }
}

static void take_note(struct rf_leg *leg, enum rf_leg_state state, int error) {
    if (leg->state == RF_LEG_OPEN) {
        leg->state = state;
        leg->error = error;
    }
}

static bool is_later(int error) { return error == EAGAIN || error == EWOULDBLOCK; }

static size_t receive(struct rf_leg *leg, uint8_t *buf, size_t len, int flags) {
    ssize_t n;

    if (!leg->may_read) {
        return 0;
    }
    do {
        n = recv(leg->fd, buf, len, MSG_DONTWAIT | flags);
    } while (n < 0 && errno == EINTR);
    if (n > 0) {
        return (size_t)n;
    }
    if (n == 0) {
        leg->may_read = false;
        take_note(leg, RF_LEG_ENDED, 0);
    } else if (!is_later(errno)) {
        leg->may_read = false;
        take_note(leg, RF_LEG_FAILED, errno);
    }
    return 0;
}

size_t rf_leg_read(struct rf_leg *leg, uint8_t *buf, size_t len) { return receive(leg, buf, len, 0); }

size_t rf_leg_peek(struct rf_leg *leg, uint8_t *buf, size_t len) { return receive(leg, buf, len, MSG_PEEK); }

size_t rf_leg_write(struct rf_leg *leg, const uint8_t *buf, size_t len) {
    ssize_t n;

    if (!leg->may_write) {
        return 0;
    }
    do {
        n = send(leg->fd, buf, len, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (n < 0 && errno == EINTR);
    if (n >= 0) {
        leg->sent += (uint64_t)n;
        return (size_t)n;
    }
    if (!is_later(errno)) {
        leg->may_write = false;
        leg->write_error = errno;
    }
    return 0;
}

bool rf_leg_lost(const struct rf_leg *leg) {
    return leg->state == RF_LEG_ENDED || leg->state == RF_LEG_FAILED || leg->state == RF_LEG_REFUSED;
}

void rf_leg_want(const struct rf_leg *leg, short events, struct pollfd *one) {
    if (leg->fd >= 0) {
        one->fd = leg->fd;
        one->events |= events;
    }
}

short rf_leg_events(const struct rf_leg *leg, const struct pollfd *one) {
    return one->fd >= 0 && one->fd == leg->fd ? one->revents : 0;
}

void rf_leg_see_end(struct rf_leg *leg, short events) {
    int error = 0;
    socklen_t size = sizeof(error);

    if (leg->state != RF_LEG_OPEN || !(events & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL))) {
        return;
    }
    if (getsockopt(leg->fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0) {
        error = errno;
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

    return leg->fd >= 0 && (leg->at_last || poll(&one, 1, 0) > 0);
}

void rf_leg_take_all(struct rf_leg *leg) {
    leg->at_last = true;
    if (leg->is_tcp && leg->fd >= 0) {
        const unsigned no_limit = UINT32_MAX;

        /* Where it fails a little less is taken. */
        (void)setsockopt(leg->fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &no_limit, sizeof(no_limit));
    }
}

void rf_leg_probe(struct rf_leg *leg, unsigned dead_after_s) {
    const int on = 1;
    const int interval_s = 1;
    const int probes = 3;
    const int idle_s = dead_after_s > 4 ? (int)dead_after_s - probes * interval_s : 1;

    if (leg->is_tcp && leg->state == RF_LEG_OPEN) {
        /* Where one fails the silence of an idle channel shows later, at the first byte that is sent. */
        (void)setsockopt(leg->fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof(idle_s));
        (void)setsockopt(leg->fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof(interval_s));
        (void)setsockopt(leg->fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
        (void)setsockopt(leg->fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
    }
}

void rf_leg_check_silence(struct rf_leg *leg, unsigned dead_after_s) {
    struct tcp_info info = {0};
    socklen_t size = sizeof(info);

    if (!leg->is_tcp || leg->state != RF_LEG_OPEN ||
        getsockopt(leg->fd, IPPROTO_TCP, TCP_INFO, &info, &size) < 0) {
        return;
    }
    /* Behind a long silence what was sent a moment ago may yet be acknowledged: it counts once it was sent
     * again, which the retransmissions leave out while the window is closed over it, and the back-off where
     * few segments are under way (net/ipv4/tcp_timer.c, tcp_retransmit_timer). A peer with a closed window
     * answers probes, which are the rarer the longer it lasts: one may be on its way. */
    bool sent_again = info.tcpi_retransmits > 0 || info.tcpi_backoff > 0;
    if (info.tcpi_last_ack_recv > dead_after_s * 1000u &&
        ((info.tcpi_unacked > 0 && sent_again) || info.tcpi_probes >= UNANSWERED_PROBES)) {
        rf_leg_break(leg, ETIMEDOUT);
    }
}

void rf_leg_end_writing(struct rf_leg *leg) {
    if (leg->may_write) {
        (void)shutdown(leg->fd, SHUT_WR); /* fails only where the peer is gone, which is what it would tell */
        leg->may_write = false;
    }
}

void rf_leg_shut(struct rf_leg *leg) {
    if (leg->fd >= 0) {
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

size_t rf_leg_unread(const struct rf_leg *leg) { return leg->may_read ? queued(leg, SIOCINQ) : 0; }

size_t rf_leg_unconfirmed(const struct rf_leg *leg) { return queued(leg, SIOCOUTQ); }

void rf_leg_close(struct rf_leg *leg) {
    rf_leg_shut(leg);
    rf_leg_let_go(leg);
}

void rf_leg_let_go(struct rf_leg *leg) {
    if (leg->fd >= 0) {
        close(leg->fd);
        leg->fd = -1;
        leg->may_read = leg->may_write = false;
        take_note(leg, RF_LEG_CLOSED, 0);
    }
}
