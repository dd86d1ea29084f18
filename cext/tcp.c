#include "tcp.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <time.h>

enum {
    FIRST_UNSENT = 8 * 1024,
    UNANSWERED_PROBES = 3,
    NO_MEMORY_PAUSE_NS = 1000000,
};

bool rf_tcp_prepare(int fd) {
    int domain = AF_UNSPEC;
    socklen_t size = sizeof(domain);
    const int on = 1;

    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) < 0 ||
        (domain != AF_INET && domain != AF_INET6)) {
        return false;
    }
    /* These only shape latency: a socket without them still carries every byte. */
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    rf_tcp_set_unsent(fd, FIRST_UNSENT);
    return true;
}

void rf_tcp_set_unsent(int fd, unsigned bytes) {
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &bytes, sizeof(bytes));
}

void rf_tcp_bound_unread(int fd, unsigned bytes, unsigned round_trip_us) {
    struct tcp_info info = {0};
    socklen_t size = sizeof(info);
    unsigned now = 0;
    socklen_t now_size = sizeof(now);

    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0 && info.tcpi_rtt > 0 &&
        info.tcpi_rtt <= round_trip_us && getsockopt(fd, SOL_SOCKET, SO_RCVBUF, &now, &now_size) == 0 &&
        now <= 2 * bytes) {
        (void)setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof(bytes));
    }
}

void rf_tcp_probe(int fd, unsigned dead_after_s) {
    const int on = 1;
    const int interval_s = 1;
    const int probes = 3;
    const int idle_s = dead_after_s > 4 ? (int)dead_after_s - probes * interval_s : 1;

    /* Where one fails the silence of an idle connection shows later, at the first byte that is sent. */
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof(idle_s));
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof(interval_s));
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
    (void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
}

bool rf_tcp_silent(int fd, unsigned dead_after_s) {
    struct tcp_info info = {0};
    socklen_t size = sizeof(info);

    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) < 0) {
        return false;
    }
    /* Behind a long silence what was sent a moment ago may yet be acknowledged: it counts once it was sent
     * again, which the retransmissions leave out while the window is closed over it, and the back-off where
     * few segments are under way (net/ipv4/tcp_timer.c, tcp_retransmit_timer). A peer with a closed window
     * answers probes, which are the rarer the longer it lasts: one may be on its way. */
    bool sent_again = info.tcpi_retransmits > 0 || info.tcpi_backoff > 0;
    return info.tcpi_last_ack_recv > dead_after_s * 1000u &&
           ((info.tcpi_unacked > 0 && sent_again) || info.tcpi_probes >= UNANSWERED_PROBES);
}

unsigned rf_tcp_flight(int fd) {
    struct tcp_info info = {0};
    socklen_t size = sizeof(info);

    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) < 0) {
        return 0;
    }
    return info.tcpi_snd_cwnd * info.tcpi_snd_mss;
}

bool rf_tcp_is_later(int error) {
    const struct timespec pause = {.tv_nsec = NO_MEMORY_PAUSE_NS};

    if (error == ENOBUFS || error == ENOMEM) {
        nanosleep(&pause, NULL);
        return true;
    }
    return error == EAGAIN || error == EWOULDBLOCK;
}
