/*
 * A link: what a far leg is carried by where it is one lane of a session (session.h) between two refaults, so
 * that it outlives its connections. docs/session.md has the wire, and how a migration comes to it.
 *
 *     PLAIN ──▶ OFFERED ──▶ CARRIED ◀──▶ BETWEEN ──▶ OVER
 *
 * It begins as a plain connection that the leg reads and writes itself, connection 0, and whose bytes are
 * kept here besides; nothing tells it from a connection to a bare QEMU but the offer that the destination's
 * end puts before its first bytes. A peer that makes no offer, or does not take one, ends the link, and the
 * leg goes on without.
 *
 * Of a TLS channel the offer stands in the handshake (tls.h), and the id is made of that. Where there is no
 * place for it the link ends.
 *
 * A further connection of a channel is a lane of the same session with a link of its own, and nothing is
 * offered on it: what the other host is the main connection tells (rf_link_follow). One that is opened when
 * the session is there has no connection 0, and begins as BETWEEN.
 *
 * The pump moves its bytes, and whoever dials or answers asks for positions and gives it the next connection:
 * all under one lock, which is the caller's.
 */
#ifndef RF_LINK_H
#define RF_LINK_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "session.h"
#include "tls.h"

/* cffi: begin */
enum rf_link_role {
    RF_LINK_NO = 0,
    RF_LINK_DIALS = 1,   /* the source's end */
    RF_LINK_ANSWERS = 2, /* the destination's */
};

enum rf_link_state {
    RF_LINK_NONE = 0,    /* no session */
    RF_LINK_PLAIN = 1,   /* connection 0, and nothing has been said of a session */
    RF_LINK_OFFERED = 2, /* connection 0 yet, and a session has been offered */
    RF_LINK_CARRIED = 3, /* a connection carries its frames */
    RF_LINK_BETWEEN = 4, /* the last one is lost */
    RF_LINK_OVER = 5,    /* it ended in order, or was given up */
};

struct rf_link_view {
    uint64_t state;         /* enum rf_link_state */
    uint64_t channel;       /* of which it is the session, from 1 */
    uint64_t error;         /* errno or, negative, enum rf_wrong that ended the last connection */
    uint64_t has_leg;       /* 0: QEMU's side has ended, and what is left is delivered */
    uint64_t delivered;     /* 1: our own stream is over, and all of it is acknowledged */
    uint64_t complete;      /* 1: both are, all is taken too, and nothing is to be told yet */
    uint64_t word_due;      /* 1: it is to be told what became of QEMU (rf_link_last_word) */
    uint64_t broke_there;   /* 1: the peer has said that its local side broke (RESET) */
    uint64_t lost_ns;       /* CLOCK_MONOTONIC, since when it is BETWEEN */
    uint64_t moved;         /* bytes received and acknowledged, of this whole session */
    uint64_t taken;         /* of the peer's stream, by QEMU's side */
    uint64_t end;           /* of our own stream */
    uint64_t retransmitted; /* bytes */
    uint64_t kept;          /* bytes in its rings */
    uint64_t rings;         /* bytes that its rings have */
    uint8_t id[16];
};
/* cffi: end */

enum {
    RF_OFFER_BYTES = 5 * 8, /* five PONGs */
    RF_OFFER_IN_TLS = 2 * RF_TLS_CCS,
    RF_LINK_SCRATCH = 64 * 1024,
};

/* The memory that the rings of one migration have, and what one read of them takes. */
struct rf_rings {
    size_t used;
    uint8_t *scratch; /* RF_LINK_SCRATCH bytes, from the first link on */
};

/* What of it was told last, to who waits for changes. */
struct rf_link_told {
    enum rf_link_state state;
    uint64_t lost_ns;
    bool delivered;
    bool complete;
    bool word_due;
    bool broke_there;
};

/* Which streams it has: lane 0 is a channel's main connection. */
struct rf_link_place {
    uint64_t channel;
    unsigned lane;
    unsigned lanes; /* that the session has in all, at the most */
};

struct rf_link {
    rf_stream *stream;
    struct rf_rings *rings;
    size_t reserved;
    struct rf_link_place place;
    enum rf_link_state state;
    bool answers;
    bool bulk;     /* what is queued is no latency, in postcopy neither: a multifd lane */
    bool in_being; /* the session is there, or asked for: the connection of its own may end */
    bool has_leg;
    bool was_session; /* it has been carried by more than connection 0 */
    bool shut;        /* nothing more of the peer's is taken than what is here */
    bool postcopy;    /* what is queued is latency */
    bool parting;     /* END has been sent */
    bool word_due;    /* what became of our QEMU is to be told, before all is over */
    bool kernel_full;
    bool leg_writes; /* the leg waits for room */
    bool only_read;  /* connection 0 has failed and is read to its end: what is written is kept alone */
    bool end_seen;   /* likewise, and what it waits for is the leg's taker */
    int fd;          /* in CARRIED, else -1 */
    int error;       /* what it was given up for; 0 for not */
    int64_t lost_by;
    uint64_t lost_ns;
    uint64_t acknowledge_ns; /* when what was written is acknowledged at the latest; 0: all is */
    uint64_t look_ns;        /* when to look at the connection's silence, and at its room */
    uint64_t widened_at;
    uint8_t id[16];
    struct rf_tls *tls; /* of a TLS channel, until the place of the offer is known; NULL for none */
    bool bare;          /* there is no such place */
    uint8_t offer[RF_OFFER_BYTES];
    size_t offer_bytes; /* its length */
    size_t offered;     /* of it, sent or received */
    struct rf_link_told told;
    struct rf_link *next;
};

/* `id`: of who answers, 16 bytes of which 4 have their top bit set. NULL where memory is short, or what links
 * may have of it is used up. */
struct rf_link *rf_link_new(bool answers, const uint8_t *id, struct rf_link_place place,
                            struct rf_rings *rings);
void rf_link_free(struct rf_link *link);

/* The same of a session that another process has had, whose stream becomes the link's; it has no connection.
 * NULL as there, and then the stream is the caller's. */
struct rf_link *rf_link_go_on(bool answers, const uint8_t *id, struct rf_link_place place,
                              struct rf_rings *rings, rf_stream *stream);
/* The most bytes that a ring has. */
size_t rf_link_largest_ring(void);

/* Of lane 0 of a channel that speaks TLS, before its first bytes. False without memory. */
bool rf_link_in_tls(struct rf_link *link);

/* Of a further lane: the session of which `main` is lane 0 is offered, or is there. */
void rf_link_follow(struct rf_link *link, const struct rf_link *main);

/* Of a further lane: its leg has no connection of its own, and the next one is waited for. */
void rf_link_begin(struct rf_link *link);

/* ---- connection 0, which the leg has ---- */

/* Whether the leg reads and writes the link and not a connection of its own. */
bool rf_link_carries(const struct rf_link *link);

/* Whether its next bytes may be the offer. */
bool rf_link_looks(const struct rf_link *link);

enum rf_offer { RF_OFFER_UNDECIDED, RF_OFFER_MADE, RF_OFFER_NONE };

/* Judges what came of it, `offered` bytes in `offer`. */
enum rf_offer rf_link_judge(struct rf_link *link);

/* How much more may be sent on it: what was sent is kept. */
size_t rf_link_plain_room(const struct rf_link *link);
void rf_link_plain_sent(struct rf_link *link, const uint8_t *bytes, size_t length);
void rf_link_plain_came(struct rf_link *link, const uint8_t *bytes, size_t length);

/* How many of the next `length` bytes that are sent, or come, may be taken at once: none from both sides of
 * the offer's place. */
size_t rf_link_plain_most(const struct rf_link *link, bool sent, size_t length);

/* Of the offer, what is to be sent before the next bytes. */
size_t rf_link_offer_due(const struct rf_link *link);

/* Whether the loss of connection 0 is one that the link outlives; then it is BETWEEN. */
bool rf_link_outlives(struct rf_link *link, int error);

/* The same, where it cannot be written any more, or its end shows, and what has come on it is to be read
 * first: what the leg writes is kept alone, and no end of it is waited for. */
bool rf_link_outlives_write(struct rf_link *link);
bool rf_link_outlives_end(struct rf_link *link);

/* The leg goes on without it. */
void rf_link_drop(struct rf_link *link);

/* ---- the leg's side ---- */

size_t rf_link_read(struct rf_link *link, uint8_t *bytes, size_t length);
/* The same, but that the bytes stay; fewer perhaps than there are. */
size_t rf_link_peek(const struct rf_link *link, uint8_t *bytes, size_t length);
/* Whether all has been read that ever comes; `error`: how it ended, 0 for in order. */
bool rf_link_read_out(struct rf_link *link, int *error);
/* Whether its end is in sight: the peer has said so, or there is none any more. */
bool rf_link_end_in_sight(const struct rf_link *link);
size_t rf_link_write(struct rf_link *link, const uint8_t *bytes, size_t length);
/* Whether the peer takes no more; the errno of a write then, else 0. */
int rf_link_refuses(const struct rf_link *link);
/* Whether it would be sent at once, or kept where there is no connection. */
bool rf_link_writable(const struct rf_link *link);
bool rf_link_readable(const struct rf_link *link);
size_t rf_link_unread(const struct rf_link *link);
size_t rf_link_unconfirmed(const struct rf_link *link);
void rf_link_finish(struct rf_link *link);
/* Ends both directions; what is here may be read yet. */
void rf_link_shut(struct rf_link *link);
/* The leg is closed: what it wrote is delivered yet. */
void rf_link_leave(struct rf_link *link);
/*
 * QEMU has ended its side without a word, and the peer cannot tell what that means: the lane is not over
 * before rf_link_last_word has been told whether that QEMU broke, which the peer hears of (RESET), or not.
 */
void rf_link_await_word(struct rf_link *link);
void rf_link_last_word(struct rf_link *link, bool broke);

/* ---- the connections ---- */

/* Our positions. */
void rf_link_tell(struct rf_link *link, struct rf_positions *here);
/* The connection is closed, with whatever is unread there. */
void rf_link_detach(struct rf_link *link);
/* What the next one's peer has told; RF_RIGHT, or what is wrong, and then nothing has changed. */
enum rf_wrong rf_link_resume(struct rf_link *link, const struct rf_positions *peer);
/* Goes on with that connection. */
void rf_link_adopt(struct rf_link *link, int fd);
/* It is not waited for any more: the leg breaks with `error`. */
void rf_link_give_up(struct rf_link *link, int error);

/* ---- the pump ---- */

void rf_link_want(struct rf_link *link, struct pollfd *one);
int rf_link_timeout_ms(const struct rf_link *link, uint64_t now_ns);
void rf_link_move(struct rf_link *link, const struct pollfd *one, uint64_t now_ns);

void rf_link_look(const struct rf_link *link, struct rf_link_view *view);

#endif
