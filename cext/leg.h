/*
 * A leg: one end of what the relay joins. The local leg is the socketpair or unix socket that the relay
 * shares with its own QEMU; the far leg is the connection to the other host. Owned and closed by the pump
 * alone, and never waited for, though QEMU makes a duplicate that it is passed blocking, and so ours
 * (io/channel-socket.c, qio_channel_socket_copy_fds).
 *
 * Its two directions end each on its own (ends.h): a write that failed ends only writing, and what the kernel
 * holds for us is read on.
 */
#ifndef RF_LEG_H
#define RF_LEG_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "link.h"

/* cffi: begin */
enum rf_leg_state {
    RF_LEG_NONE = 0,    /* never attached */
    RF_LEG_OPEN = 1,    /* no end of it has shown itself */
    RF_LEG_ENDED = 2,   /* the peer closed it in order (end of file) */
    RF_LEG_FAILED = 3,  /* it broke; its error says how */
    RF_LEG_CLOSED = 4,  /* we closed it */
    RF_LEG_REFUSED = 5, /* likewise, for its other end is another VM's (replay.h) */
};
/* cffi: end */

struct rf_leg {
    int fd;                  /* -1 when closed */
    enum rf_leg_state state; /* by what it was lost first */
    int error;               /* errno that broke it, 0 for end of file */
    bool may_read;           /* it has not been read to its end */
    bool may_write;          /* no write has failed, nor has the direction been ended */
    int write_error;         /* errno of the write that failed, 0 for none */
    bool is_tcp;
    bool at_last;         /* rf_leg_take_all */
    uint64_t sent;        /* bytes that the kernel took from us */
    struct rf_link *link; /* of a far leg that may outlive its connections, not its own; NULL for none */
};

void rf_leg_init(struct rf_leg *leg);

/* Takes ownership of the descriptor and, on TCP, sees to it that what waits unsent in the kernel stays small.
 */
void rf_leg_adopt(struct rf_leg *leg, int fd);

/* One lane of a session: with the connection that it has of its own, until a link that has none yet has the
 * first. Without a link and a connection it is FAILED. */
void rf_leg_adopt_link(struct rf_leg *leg, struct rf_link *link);

/* It is no session and becomes none; nothing where the link carries it already. A further lane of a session
 * that is there goes on by that, which delivers what the connection has not. */
void rf_leg_drop_link(struct rf_leg *leg);

/* The connection that it has of its own ends, and the link alone carries it. */
void rf_leg_leave_connection(struct rf_leg *leg);

/* Whether it is not closed. */
bool rf_leg_is_open(const struct rf_leg *leg);

/* On TCP: as tcp.h. */
void rf_leg_set_unsent(struct rf_leg *leg, unsigned bytes);

/* On a unix socket: SO_SNDBUF. */
void rf_leg_set_send_buffer(struct rf_leg *leg, unsigned bytes);

/* On TCP: as tcp.h. */
void rf_leg_bound_unread(struct rf_leg *leg, unsigned bytes, unsigned round_trip_us);

/* Reads at most `len` bytes. Returns the count; 0 when nothing is there now, or nothing will be. */
size_t rf_leg_read(struct rf_leg *leg, uint8_t *buf, size_t len);

/* The same, but that the kernel keeps them. */
size_t rf_leg_peek(struct rf_leg *leg, uint8_t *buf, size_t len);

/* Writes what the kernel takes of `len` bytes and returns the count; 0 when it takes none now, or none any
 * more. */
size_t rf_leg_write(struct rf_leg *leg, const uint8_t *buf, size_t len);

/* Whether the peer has ended it, it broke, or what is behind it was refused. */
bool rf_leg_lost(const struct rf_leg *leg);

/* Adds what is wanted of it to its entry for poll. */
void rf_leg_want(const struct rf_leg *leg, short events, struct pollfd *one);

/* What poll said of it; 0 where it was not asked, or is another descriptor by now. */
short rf_leg_events(const struct rf_leg *leg, const struct pollfd *one);

/* Whether what is wanted of it is there without a poll: it is carried by a link. */
bool rf_leg_ready(const struct rf_leg *leg, const struct pollfd *one);

/* Takes note that the peer ended it though it is not being read: ENDED or FAILED then. It may be read on. */
void rf_leg_see_end(struct rf_leg *leg, short events);

/* Takes note that it cannot be written any more: FAILED, unless its end has shown itself before. */
void rf_leg_see_failed_write(struct rf_leg *leg);

/* True where the kernel would take bytes now (or would tell that it never will); at last, always. */
bool rf_leg_writable(const struct rf_leg *leg);

/*
 * It is about to be closed: from now on the kernel is offered all that there is. It takes more than it says
 * that it has room for: of a unix socket's buffer poll(2) tells while three quarters are free
 * (net/unix/af_unix.c, unix_writable).
 */
void rf_leg_take_all(struct rf_leg *leg);

/*
 * From now on the peer's silence counts: the kernel probes an idle connection, so that a host that is gone
 * shows within `dead_after_s` seconds. For postcopy only: in precopy a network that comes back is worth
 * waiting for.
 */
void rf_leg_probe(struct rf_leg *leg, unsigned dead_after_s);

/*
 * FAILED (ETIMEDOUT) where TCP has had no sign of life for so long though it asked for one: bytes
 * unacknowledged that were sent again, or window probes unanswered. Never by TCP_USER_TIMEOUT, which kills a
 * live peer whose window is closed.
 */
void rf_leg_check_silence(struct rf_leg *leg, unsigned dead_after_s);

/* Ends our writing direction, so that the peer reads end of file after all that was sent. */
void rf_leg_end_writing(struct rf_leg *leg);

/*
 * Ends both directions: the peer reads end of file, and what it has not written yet does not come any more;
 * what the kernel holds may be read to its end.
 */
void rf_leg_shut(struct rf_leg *leg);

/* The same, as FAILED by `error`, unless its end has shown itself before. */
void rf_leg_break(struct rf_leg *leg, int error);

/* Bytes that the kernel holds for us. */
size_t rf_leg_unread(const struct rf_leg *leg);

/*
 * Bytes, or more than none, that the peer's kernel has not acknowledged (TCP; the end of our writing counts
 * as one), or that its process has not read (unix). They may be lost with the leg.
 */
size_t rf_leg_unconfirmed(const struct rf_leg *leg);

/*
 * Ends both directions and closes the descriptor: the peer reads end of file even where the socket has been
 * duplicated. The state becomes CLOSED where it was OPEN, else it keeps telling how the leg was lost.
 */
void rf_leg_close(struct rf_leg *leg);

/* Closes the descriptor only: where the socket has been duplicated, the peer sees nothing. */
void rf_leg_let_go(struct rf_leg *leg);

#endif
