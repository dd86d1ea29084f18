#include "leg.h"

#include <errno.h>
#include <fcntl.h>
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
    int flags = fcntl(fd, F_GETFL);

    *leg = (struct rf_leg){.fd = fd, .state = RF_LEG_OPEN};
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0) {
        leg->state = RF_LEG_FAILED;
        leg->error = errno;
        return;
    }
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

static void leg_broke(struct rf_leg *leg, int error) {
    leg->state = RF_LEG_FAILED;
    leg->error = error;
}

size_t rf_leg_read(struct rf_leg *leg, uint8_t *buf, size_t len) {
    ssize_t n;

    if (leg->state != RF_LEG_OPEN) {
        return 0;
    }
    do {
        n = recv(leg->fd, buf, len, 0);
    } while (n < 0 && errno == EINTR);
    if (n > 0) {
        return (size_t)n;
    }
    if (n == 0) {
        leg->state = RF_LEG_ENDED;
    } else if (errno != EAGAIN && errno != EWOULDBLOCK) {
        leg_broke(leg, errno);
    }
    return 0;
}

size_t rf_leg_write(struct rf_leg *leg, const uint8_t *buf, size_t len) {
    ssize_t n;

    if (leg->state != RF_LEG_OPEN || leg->write_ended) {
        return 0;
    }
    do {
        n = send(leg->fd, buf, len, MSG_NOSIGNAL);
    } while (n < 0 && errno == EINTR);
    if (n >= 0) {
        leg->sent += (uint64_t)n;
        return (size_t)n;
    }
    if (errno != EAGAIN && errno != EWOULDBLOCK) {
        leg_broke(leg, errno);
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

bool rf_leg_hung_up(struct rf_leg *leg, short events) {
    int error = 0;
    socklen_t size = sizeof(error);

    if (leg->state != RF_LEG_OPEN || !(events & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL))) {
        return false;
    }
    if (getsockopt(leg->fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0 && error != 0) {
        leg_broke(leg, error);
    } else {
        leg->state = RF_LEG_ENDED;
    }
    return true;
}

bool rf_leg_writable(const struct rf_leg *leg) {
    struct pollfd one = {.fd = leg->fd, .events = POLLOUT};

    return leg->fd >= 0 && poll(&one, 1, 0) > 0;
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
        leg_broke(leg, ETIMEDOUT);
    }
}

void rf_leg_end_writing(struct rf_leg *leg) {
    if (leg->fd >= 0 && !leg->write_ended) {
        (void)shutdown(leg->fd, SHUT_WR); /* fails only where the peer is gone, which is what it would tell */
        leg->write_ended = true;
    }
}

uint64_t rf_leg_confirmed(const struct rf_leg *leg) {
    int queued = 0;

    if (leg->fd < 0 || ioctl(leg->fd, SIOCOUTQ, &queued) < 0 || queued < 0) {
        return 0;
    }
    return (uint64_t)queued > leg->sent ? 0 : leg->sent - (uint64_t)queued;
}

size_t rf_leg_end_reading(struct rf_leg *leg) {
    int unread = 0;

    if (leg->state != RF_LEG_OPEN || shutdown(leg->fd, SHUT_RD) < 0 || ioctl(leg->fd, SIOCINQ, &unread) < 0) {
        return 0;
    }
    return unread > 0 ? (size_t)unread : 0;
}

void rf_leg_close(struct rf_leg *leg) {
    if (leg->fd >= 0) {
        (void)shutdown(leg->fd, SHUT_RDWR); /* fails only where the peer is gone already */
    }
    rf_leg_let_go(leg);
}

void rf_leg_let_go(struct rf_leg *leg) {
    if (leg->fd >= 0) {
        close(leg->fd);
        leg->fd = -1;
        if (leg->state == RF_LEG_OPEN) {
            leg->state = RF_LEG_CLOSED;
        }
    }
}
