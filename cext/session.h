/*
 * One lane of a session: two byte streams with 64-bit positions, as one end of it holds them, apart from the
 * connection that carries them at the moment. What the local side (QEMU, or a tunnel's plain connection) has
 * said is kept in a ring until the peer has acknowledged it; what the peer has said is kept in another until
 * the local side has taken it. A connection may end at any byte: both ends tell each other their positions,
 * and go on from there.
 *
 * Pure functions over memory: no descriptors, no clock. docs/session.md has the wire.
 *
 * Nothing that the peer says is used before it is checked against what can be true, and no number of the
 * peer's sizes anything: the ring of what comes has the room that we ourselves promised, no more.
 */
#ifndef RF_SESSION_H
#define RF_SESSION_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
enum rf_stream_frame {
    RF_FRAME_DATA = 1,
    RF_FRAME_ACK = 2,   /* written to the local side up to this offset; payload: the u64 limit */
    RF_FRAME_FIN = 3,   /* the stream ends at this offset, and the end counts as one byte */
    RF_FRAME_STOP = 4,  /* the local side takes no more: end your stream where you are */
    RF_FRAME_RESET = 5, /* the local side broke: nothing more comes, and nothing is taken */
    RF_FRAME_END = 6,   /* I know that both streams are over; I forget this lane */
    RF_FRAME_MORE = 7,  /* I have more to say than up to this limit of yours */
};

/* What is wrong with what a peer has said. */
enum rf_wrong {
    RF_RIGHT = 0,
    RF_WRONG_FRAME,    /* no frame: an unknown type, or a length that its type does not have */
    RF_WRONG_GAP,      /* it begins behind what we have received: bytes in between are lost */
    RF_WRONG_LIMIT,    /* more than we have promised room for */
    RF_WRONG_END,      /* something behind the end of its stream, or another end than before */
    RF_WRONG_RECEIVED, /* it has received, or written, what we never sent, or less than it has told before */
    RF_WRONG_KEPT,     /* it has dropped what we have not received, or what it never had */
    RF_WRONG_WINDOW,   /* room that was promised is taken back, or none that anybody has */
};

/* What an end tells the other in HELLO and WELCOME. */
struct rf_positions {
    uint64_t received;   /* of the other's stream: from here on it is to be sent */
    uint64_t written;    /* of these, what the local side has taken: acknowledged */
    uint64_t first_kept; /* of our own stream: the first byte that can be sent again */
    uint64_t end;        /* of our own stream, as far as it has come; an end that is known counts one */
    uint64_t window;     /* room, from `written` on */
};

struct rf_stream_facts {
    struct rf_positions here;
    uint64_t acknowledged;  /* of ours, by the peer */
    uint64_t sent;          /* of ours, given to the kernel on any connection */
    uint64_t limit;         /* of ours, the room that the peer has promised */
    uint64_t told;          /* of the peer's: what we have acknowledged */
    uint64_t retransmitted; /* bytes that were sent more than once */
    uint64_t wanted;        /* the limit at which the peer has last asked for more room; 0: never */
    uint64_t out_size;      /* ring of our stream */
    uint64_t in_size;       /* ring of the peer's, at least the window */
    int finished;           /* our stream has ended */
    int delivered;          /* it has, and all of it is acknowledged */
    int taken;              /* the peer's stream has ended, and all of it is written */
    int ended_there;        /* the peer's stream has ended, whether written or not */
    int stopped_there;      /* the peer's local side takes no more */
    int reset_here, reset_there;
    int end_there;  /* END has come */
    int in_a_frame; /* a frame has been sent in part */
    int at_fin;     /* all is written but the peer's end */
};

/* What is to be sent next, as for writev. */
struct rf_piece {
    const uint8_t *bytes;
    size_t length;
};

typedef struct rf_stream rf_stream;

/* Rings of these sizes, powers of two; `window` is the room that is promised at first. Both streams begin at
 * `origin`. NULL without memory, or for sizes that are none. */
rf_stream *rf_stream_new(size_t out_size, size_t window, uint64_t origin);
void rf_stream_free(rf_stream *stream);

/* The local side's bytes: where up to the returned length may be put (0: the ring is full, or no more is
 * wanted), and that so many have been put there. */
size_t rf_stream_space(rf_stream *stream, uint8_t **at);
void rf_stream_put(rf_stream *stream, size_t length);
/* The local side says no more. */
void rf_stream_finish(rf_stream *stream);

/* The same where the bytes lie elsewhere: how many there is room for, and that so many of them are kept. */
size_t rf_stream_room(const rf_stream *stream);
size_t rf_stream_keep(rf_stream *stream, const uint8_t *bytes, size_t length);
/* From now on no more of ours than so many bytes are kept at a time, however large the ring is. */
void rf_stream_bound(rf_stream *stream, size_t length);
/* Whether something of ours waits to be sent, for the kernel or for the peer's room. */
int rf_stream_unsent(const rf_stream *stream);

/*
 * Connection 0 of a session that begins as a plain one: bytes as they are, no frames. What has been put was
 * sent at once; what came was taken at once.
 */
void rf_stream_plain_sent(rf_stream *stream);
void rf_stream_plain_came(rf_stream *stream, size_t length);

/* The peer's bytes: what the local side is to take next, and that it has taken so much of it. */
size_t rf_stream_unwritten(const rf_stream *stream, const uint8_t **at);
void rf_stream_wrote(rf_stream *stream, size_t length);
/* The local side has been told the end of the peer's stream; only where `at_fin` says so. */
void rf_stream_wrote_fin(rf_stream *stream);

/* The local side takes no more; it broke; all is over and the peer is to hear it. Each is told again after a
 * resume. */
void rf_stream_stop(rf_stream *stream);
void rf_stream_reset(rf_stream *stream);
void rf_stream_end(rf_stream *stream);

/* What has been written is acknowledged with the next frame, whether much or little. */
void rf_stream_acknowledge(rf_stream *stream);

/* A larger ring for our stream, a larger promise for the peer's; -1 without memory (nothing has changed) or
 * where it would not be larger. */
int rf_stream_grow(rf_stream *stream, size_t out_size);
int rf_stream_widen(rf_stream *stream, size_t window);

/* The connection is gone: what was under way on it is forgotten, the positions stay. */
void rf_stream_lost(rf_stream *stream);
/* What is said in HELLO or WELCOME: the peer may drop what is acknowledged there. */
void rf_stream_tell(rf_stream *stream, struct rf_positions *here);
/* A new connection, whose peer says this: RF_RIGHT, or what is wrong, and then nothing has changed. */
enum rf_wrong rf_stream_resume(rf_stream *stream, const struct rf_positions *peer);

/* What is to be sent now: pieces[0] and pieces[1], of which either may be empty; returns their length, 0 for
 * nothing. They stay valid until the next call but rf_stream_put. */
size_t rf_stream_next(rf_stream *stream, struct rf_piece *pieces);
/* The kernel took so much of that. */
void rf_stream_sent(rf_stream *stream, size_t length);

/* Takes all that came on the connection; RF_RIGHT, or what is wrong: then the connection is to be closed, and
 * nothing more of it is taken. */
enum rf_wrong rf_stream_take(rf_stream *stream, const uint8_t *bytes, size_t length);

void rf_stream_facts(const rf_stream *stream, struct rf_stream_facts *facts);

/* How much of it is written down for another process, and that: what is under way on its connection is not.
 */
size_t rf_stream_saved_size(const rf_stream *stream);
void rf_stream_save(const rf_stream *stream, uint8_t *to);
/* The same stream, without a connection; NULL without memory, where it cannot have been one, or where its
 * rings have more than `largest` bytes. */
rf_stream *rf_stream_restore(const uint8_t *from, size_t length, size_t largest);
/* cffi: end */

/* No position reaches it: sums of two positions stay in 64 bits. */
#define RF_POSITION_END (UINT64_C(1) << 63)
#define RF_FRAME_HEADER 16
#define RF_FRAME_LIMIT 8
#define RF_FRAME_LENGTH_MAX (1u << 20)

#endif
