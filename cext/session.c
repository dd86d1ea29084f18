#include "session.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define WINDOW_MAX (UINT64_C(1) << 40) /* nobody has more room */
#define PAYLOAD_MAX (128u << 10)       /* of a frame of ours: what is urgent waits behind no more */
#define ACKNOWLEDGE_AFTER (64u << 10)

struct rf_stream {
    /* Ours. Kept: acknowledged to data_end; the end of the stream is the byte behind data_end. */
    uint8_t *out;
    size_t out_size;
    uint64_t acknowledged;
    uint64_t next; /* of the next frame on this connection */
    uint64_t sent; /* given to the kernel, on this connection or one before */
    uint64_t data_end;
    uint64_t bound; /* the most that is kept */
    uint64_t limit;
    uint64_t retransmitted;
    bool finished;
    bool stopped_there;
    /* The peer may not know yet that connection 0 has ended, for no frame of it has come: what it says of
     * itself may be older than what it has sent. */
    bool plain;

    /* The peer's. Kept: written to received. */
    uint8_t *in;
    size_t in_size;
    uint64_t written;
    uint64_t received;
    uint64_t told;
    uint64_t promised; /* the limit that the peer has been told, or is about to be */
    uint64_t window;
    uint64_t fin_at;
    bool fin_came;
    bool stopped_here;

    uint64_t wanted;
    bool reset_here, reset_there, end_here, end_there;

    /* This connection's. */
    uint8_t head[RF_FRAME_HEADER + RF_FRAME_LIMIT]; /* of the frame that is being sent */
    size_t head_length, head_sent;
    uint64_t payload_at;
    size_t payload_left;
    bool acknowledge, stop_sent, reset_sent, end_sent;
    uint64_t more_sent;                             /* the limit that MORE was sent for */
    uint8_t came[RF_FRAME_HEADER + RF_FRAME_LIMIT]; /* of the frame that is being received */
    size_t came_length;
    uint64_t data_at;
    size_t data_left;
    enum rf_wrong wrong; /* what it said; nothing of it is taken any more */
};

static void put32(uint8_t *to, uint32_t value) {
    for (unsigned i = 0; i < 4; i++) {
        to[i] = (uint8_t)(value >> (24 - 8 * i));
    }
}

static void put64(uint8_t *to, uint64_t value) {
    put32(to, (uint32_t)(value >> 32));
    put32(to + 4, (uint32_t)value);
}

static uint32_t get32(const uint8_t *from) {
    return (uint32_t)from[0] << 24 | (uint32_t)from[1] << 16 | (uint32_t)from[2] << 8 | from[3];
}

static uint64_t get64(const uint8_t *from) { return (uint64_t)get32(from) << 32 | get32(from + 4); }

static size_t least(uint64_t one, uint64_t other) { return (size_t)(one < other ? one : other); }

/* Where a position lies in a ring, and how much follows it in one piece. */
static uint8_t *place(uint8_t *ring, size_t size, uint64_t position, size_t *contiguous) {
    size_t at = (size_t)(position & (size - 1));
    *contiguous = size - at;
    return ring + at;
}

static bool is_size(size_t size) { return size > 0 && (size & (size - 1)) == 0; }

static uint64_t end_of(const rf_stream *stream) { return stream->data_end + (stream->finished ? 1 : 0); }

static bool at_fin(const rf_stream *stream) {
    return stream->fin_came && stream->written == stream->fin_at && !stream->reset_there;
}

rf_stream *rf_stream_new(size_t out_size, size_t window, uint64_t origin) {
    if (!is_size(out_size) || !is_size(window) || origin >= RF_POSITION_END - WINDOW_MAX) {
        return NULL;
    }
    rf_stream *stream = calloc(1, sizeof(*stream));
    uint8_t *out = calloc(1, out_size); /* its pages are there when they are written to */
    uint8_t *in = calloc(1, window);
    if (stream == NULL || out == NULL || in == NULL) {
        free(stream);
        free(out);
        free(in);
        return NULL;
    }
    *stream = (rf_stream){
        .out = out,
        .out_size = out_size,
        .acknowledged = origin,
        .next = origin,
        .sent = origin,
        .data_end = origin,
        .limit = origin,
        .bound = UINT64_MAX,
        .in = in,
        .in_size = window,
        .written = origin,
        .received = origin,
        .told = origin,
        .promised = origin + window,
        .window = window,
    };
    return stream;
}

void rf_stream_free(rf_stream *stream) {
    if (stream != NULL) {
        free(stream->out);
        free(stream->in);
        free(stream);
    }
}

size_t rf_stream_space(rf_stream *stream, uint8_t **at) {
    size_t contiguous;
    *at = place(stream->out, stream->out_size, stream->data_end, &contiguous);
    return least(contiguous, rf_stream_room(stream));
}

size_t rf_stream_room(const rf_stream *stream) {
    if (stream->finished || stream->reset_here || stream->reset_there ||
        stream->data_end >= RF_POSITION_END - WINDOW_MAX) {
        return 0;
    }
    /* An acknowledged end lies behind data_end, but then the stream is finished. */
    uint64_t kept = stream->data_end - stream->acknowledged;
    size_t most = least(stream->out_size, stream->bound);
    return kept < most ? most - (size_t)kept : 0;
}

size_t rf_stream_keep(rf_stream *stream, const uint8_t *bytes, size_t length) {
    size_t kept = 0;
    while (kept < length) {
        uint8_t *at;
        size_t part = least(rf_stream_space(stream, &at), length - kept);
        if (part == 0) {
            break;
        }
        memcpy(at, bytes + kept, part);
        rf_stream_put(stream, part);
        kept += part;
    }
    return kept;
}

void rf_stream_bound(rf_stream *stream, size_t length) { stream->bound = length; }

int rf_stream_unsent(const rf_stream *stream) {
    return stream->next < end_of(stream) || stream->head_sent < stream->head_length ||
           stream->payload_left > 0;
}

void rf_stream_put(rf_stream *stream, size_t length) { stream->data_end += length; }

void rf_stream_finish(rf_stream *stream) { stream->finished = true; }

size_t rf_stream_unwritten(const rf_stream *stream, const uint8_t **at) {
    size_t contiguous;
    uint64_t end = stream->fin_came ? stream->fin_at : stream->received;
    *at = place(stream->in, stream->in_size, stream->written, &contiguous);
    return stream->written < end ? least(contiguous, end - stream->written) : 0;
}

/* What may be promised grows with what has been written. */
static void promise(rf_stream *stream) {
    if (stream->written + stream->window > stream->promised) {
        stream->promised = stream->written + stream->window;
    }
}

void rf_stream_wrote(rf_stream *stream, size_t length) {
    stream->written += length;
    promise(stream);
}

void rf_stream_wrote_fin(rf_stream *stream) {
    if (at_fin(stream)) {
        stream->written++;
        stream->acknowledge = true;
    }
}

void rf_stream_plain_sent(rf_stream *stream) { stream->next = stream->sent = stream->data_end; }

void rf_stream_plain_came(rf_stream *stream, size_t length) {
    stream->plain = true;
    stream->received += length;
    rf_stream_wrote(stream, length);
}

/* Who takes no more has taken all. */
static void discard(rf_stream *stream) {
    stream->written = stream->received;
    stream->acknowledge = stream->acknowledge || stream->fin_came;
    promise(stream);
}

void rf_stream_stop(rf_stream *stream) {
    stream->stopped_here = true;
    discard(stream);
}

void rf_stream_reset(rf_stream *stream) { stream->reset_here = true; }

void rf_stream_end(rf_stream *stream) {
    stream->end_here = true;
    stream->acknowledge = true;
}

void rf_stream_acknowledge(rf_stream *stream) {
    if (stream->told != stream->written) {
        stream->acknowledge = true;
    }
}

/* Puts bytes into a ring, from a position on. */
static void copy_in(uint8_t *ring, size_t size, uint64_t to, size_t length, const uint8_t *from) {
    while (length > 0) {
        size_t part;
        uint8_t *at = place(ring, size, to, &part);

        part = least(part, length);
        memcpy(at, from, part);
        from += part;
        to += part;
        length -= part;
    }
}

/* The same bytes at the same positions, in a ring of another size. */
static uint8_t *copied(const uint8_t *ring, size_t size, uint64_t from, uint64_t end, size_t new_size) {
    uint8_t *larger = calloc(1, new_size);
    while (larger != NULL && from < end) {
        size_t length;
        const uint8_t *source = place((uint8_t *)ring, size, from, &length);

        length = least(length, end - from);
        copy_in(larger, new_size, from, length, source);
        from += length;
    }
    return larger;
}

int rf_stream_grow(rf_stream *stream, size_t out_size) {
    if (!is_size(out_size) || out_size <= stream->out_size) {
        return -1;
    }
    uint8_t *larger = copied(stream->out, stream->out_size, stream->acknowledged, stream->data_end, out_size);
    if (larger == NULL) {
        return -1;
    }
    free(stream->out);
    stream->out = larger;
    stream->out_size = out_size;
    return 0;
}

int rf_stream_widen(rf_stream *stream, size_t window) {
    if (!is_size(window) || window <= stream->window || window > WINDOW_MAX) {
        return -1;
    }
    uint8_t *larger = copied(stream->in, stream->in_size, stream->written, stream->received, window);
    if (larger == NULL) {
        return -1;
    }
    free(stream->in);
    stream->in = larger;
    stream->in_size = window;
    stream->window = window;
    promise(stream);
    stream->acknowledge = true;
    return 0;
}

void rf_stream_lost(rf_stream *stream) {
    stream->head_length = stream->head_sent = stream->payload_left = 0;
    stream->came_length = stream->data_left = 0;
    stream->acknowledge = stream->stop_sent = stream->reset_sent = stream->end_sent = false;
    stream->more_sent = 0;
    stream->wrong = RF_RIGHT;
}

static struct rf_positions positions(const rf_stream *stream) {
    return (struct rf_positions){
        .received = stream->received,
        .written = stream->written,
        .first_kept = stream->acknowledged,
        .end = end_of(stream),
        /* The end of a stream needs no room: it may have taken `written` behind the limit. */
        .window = stream->promised > stream->written ? stream->promised - stream->written : 0,
    };
}

void rf_stream_tell(rf_stream *stream, struct rf_positions *here) {
    *here = positions(stream);
    stream->told = stream->written;
}

/* Whether the peer may have written and received so much of ours, and its room is what it was or more. */
static enum rf_wrong judge(const rf_stream *stream, uint64_t written, uint64_t received, uint64_t limit) {
    if (written < stream->acknowledged || received < written || received > stream->sent) {
        return RF_WRONG_RECEIVED;
    }
    /* An end that was written needs no room: the limit may be the byte before it. */
    if (limit < stream->limit || limit + 1 < written || (limit > written && limit - written > WINDOW_MAX)) {
        return RF_WRONG_WINDOW;
    }
    return RF_RIGHT;
}

static void acknowledged(rf_stream *stream, uint64_t written, uint64_t limit) {
    stream->acknowledged = written;
    stream->limit = limit;
}

enum rf_wrong rf_stream_resume(rf_stream *stream, const struct rf_positions *peer) {
    if (peer->written >= RF_POSITION_END || peer->received >= RF_POSITION_END) {
        return RF_WRONG_RECEIVED;
    }
    if (peer->end >= RF_POSITION_END || peer->end < peer->first_kept) {
        return RF_WRONG_KEPT;
    }
    if (peer->window > WINDOW_MAX) {
        return RF_WRONG_WINDOW;
    }
    enum rf_wrong wrong = judge(stream, peer->written, peer->received, peer->written + peer->window);
    if (wrong != RF_RIGHT) {
        return wrong;
    }
    /* It drops what we have acknowledged, and no more; and it has what it has sent. */
    if (peer->first_kept > stream->told || (!stream->plain && peer->end < stream->received)) {
        return RF_WRONG_KEPT;
    }
    if (stream->fin_came && peer->end != stream->fin_at + 1) {
        return RF_WRONG_END;
    }
    rf_stream_lost(stream);
    acknowledged(stream, peer->written, peer->written + peer->window);
    stream->next = peer->received;
    /* The first frame says that we are there. */
    stream->acknowledge = true;
    return RF_RIGHT;
}

static void begin(rf_stream *stream, enum rf_stream_frame type, uint32_t length, uint64_t offset) {
    memset(stream->head, 0, sizeof(stream->head));
    stream->head[0] = (uint8_t)type;
    put32(stream->head + 4, length);
    put64(stream->head + 8, offset);
    stream->head_length = RF_FRAME_HEADER;
    stream->head_sent = 0;
    stream->payload_left = 0;
}

static void has_gone(rf_stream *stream, uint64_t from, uint64_t to) {
    if (from < stream->sent) {
        stream->retransmitted += least(to, stream->sent) - from;
    }
    if (to > stream->sent) {
        stream->sent = to;
    }
}

static void begin_data(rf_stream *stream, uint64_t end) {
    size_t contiguous;
    (void)place(stream->out, stream->out_size, stream->next, &contiguous);
    size_t length = least(least(contiguous, PAYLOAD_MAX), end - stream->next);
    begin(stream, RF_FRAME_DATA, (uint32_t)length, stream->next);
    stream->payload_at = stream->next;
    stream->payload_left = length;
    stream->next += length;
}

static void begin_acknowledgement(rf_stream *stream) {
    begin(stream, RF_FRAME_ACK, RF_FRAME_LIMIT, stream->written);
    put64(stream->head + RF_FRAME_HEADER, stream->promised);
    stream->head_length += RF_FRAME_LIMIT;
    stream->told = stream->written;
    stream->acknowledge = false;
}

/* Nothing but the peer's limit keeps us from saying more; said once for each limit. */
static bool wants_more(const rf_stream *stream) {
    bool has_more =
        stream->data_end > stream->limit || stream->data_end - stream->acknowledged == stream->out_size;
    return has_more && stream->next == stream->limit && stream->more_sent != stream->limit;
}

/* The next frame, where there is one. */
static bool begin_next(rf_stream *stream) {
    uint64_t may_go = stream->data_end < stream->limit ? stream->data_end : stream->limit;
    bool speaks = !stream->reset_sent && !stream->reset_there && !stream->end_here;

    if (stream->end_sent) {
        return false;
    }
    if (stream->stopped_here && !stream->stop_sent) {
        begin(stream, RF_FRAME_STOP, 0, stream->written);
        stream->stop_sent = true;
    } else if (!stream->reset_sent &&
               (stream->acknowledge || stream->written - stream->told >= ACKNOWLEDGE_AFTER)) {
        begin_acknowledgement(stream);
    } else if (speaks && stream->next < may_go) {
        begin_data(stream, may_go);
    } else if (speaks && stream->finished && stream->next == stream->data_end) {
        begin(stream, RF_FRAME_FIN, 0, stream->next);
        has_gone(stream, stream->next, stream->next + 1);
        stream->next++;
    } else if (speaks && stream->reset_here) {
        begin(stream, RF_FRAME_RESET, 0, stream->next);
        stream->reset_sent = true;
    } else if (stream->end_here) {
        begin(stream, RF_FRAME_END, 0, 0);
        stream->end_sent = true;
    } else if (speaks && wants_more(stream)) {
        begin(stream, RF_FRAME_MORE, 0, stream->limit);
        stream->more_sent = stream->limit;
    } else {
        return false;
    }
    return true;
}

size_t rf_stream_next(rf_stream *stream, struct rf_piece *pieces) {
    pieces[0] = pieces[1] = (struct rf_piece){0};
    if (stream->head_sent == stream->head_length && stream->payload_left == 0 && !begin_next(stream)) {
        return 0;
    }
    pieces[0].bytes = stream->head + stream->head_sent;
    pieces[0].length = stream->head_length - stream->head_sent;
    if (stream->payload_left > 0) {
        size_t contiguous;
        pieces[1].bytes = place(stream->out, stream->out_size, stream->payload_at, &contiguous);
        pieces[1].length = least(contiguous, stream->payload_left);
    }
    return pieces[0].length + pieces[1].length;
}

void rf_stream_sent(rf_stream *stream, size_t length) {
    size_t head = least(length, stream->head_length - stream->head_sent);
    stream->head_sent += head;
    size_t payload = least(length - head, stream->payload_left);
    has_gone(stream, stream->payload_at, stream->payload_at + payload);
    stream->payload_at += payload;
    stream->payload_left -= payload;
}

/* A stream ends where it is: of what was never sent only the frame under way is. */
static void cut_short(rf_stream *stream) {
    uint64_t end = stream->sent;
    if (stream->payload_left > 0 && stream->payload_at + stream->payload_left > end) {
        end = stream->payload_at + stream->payload_left;
    }
    stream->stopped_there = true;
    if (end <= stream->data_end) { /* else its end has been told */
        stream->data_end = end;
        stream->finished = true;
    }
}

static enum rf_wrong take_fin(rf_stream *stream, uint64_t offset) {
    if (stream->fin_came) {
        return offset == stream->fin_at ? RF_RIGHT : RF_WRONG_END;
    }
    if (offset != stream->received) {
        return offset > stream->received ? RF_WRONG_GAP : RF_WRONG_END;
    }
    stream->fin_came = true;
    stream->fin_at = offset;
    stream->received = offset + 1;
    if (stream->stopped_here) {
        discard(stream);
    }
    return RF_RIGHT;
}

/* A frame whose header, and limit where it has one, is there. */
static enum rf_wrong take_frame(rf_stream *stream) {
    uint32_t length = get32(stream->came + 4);
    uint64_t offset = get64(stream->came + 8);
    enum rf_wrong wrong = RF_RIGHT;

    if (offset >= RF_POSITION_END) {
        return RF_WRONG_FRAME;
    }
    switch ((enum rf_stream_frame)stream->came[0]) {
    case RF_FRAME_DATA:
        if (offset > stream->received) {
            return RF_WRONG_GAP;
        }
        if (stream->fin_came && offset + length > stream->fin_at) {
            return RF_WRONG_END;
        }
        if (offset + length > stream->promised) {
            return RF_WRONG_LIMIT;
        }
        stream->data_at = offset;
        stream->data_left = length;
        return RF_RIGHT;
    case RF_FRAME_ACK: {
        uint64_t limit = get64(stream->came + RF_FRAME_HEADER);
        wrong = limit < RF_POSITION_END ? judge(stream, offset, offset, limit) : RF_WRONG_WINDOW;
        if (wrong == RF_RIGHT) {
            acknowledged(stream, offset, limit);
        }
        return wrong;
    }
    case RF_FRAME_FIN:
        return take_fin(stream, offset);
    case RF_FRAME_STOP:
        cut_short(stream);
        return RF_RIGHT;
    case RF_FRAME_RESET:
        stream->reset_there = true;
        return RF_RIGHT;
    case RF_FRAME_END:
        stream->end_there = true;
        return RF_RIGHT;
    case RF_FRAME_MORE:
        if (offset > stream->promised) {
            return RF_WRONG_LIMIT;
        }
        stream->wanted = offset;
        return RF_RIGHT;
    }
    return RF_WRONG_FRAME;
}

/* How long a frame is before its payload; 0 where it is none. */
static size_t head_length(const uint8_t *head) {
    uint32_t length = get32(head + 4);

    if (head[1] != 0 || head[2] != 0 || head[3] != 0) {
        return 0;
    }
    switch ((enum rf_stream_frame)head[0]) {
    case RF_FRAME_DATA:
        return length > 0 && length <= RF_FRAME_LENGTH_MAX ? RF_FRAME_HEADER : 0;
    case RF_FRAME_ACK:
        return length == RF_FRAME_LIMIT ? RF_FRAME_HEADER + RF_FRAME_LIMIT : 0;
    case RF_FRAME_FIN:
    case RF_FRAME_STOP:
    case RF_FRAME_RESET:
    case RF_FRAME_END:
    case RF_FRAME_MORE:
        return length == 0 ? RF_FRAME_HEADER : 0;
    }
    return 0;
}

/* Data of the frame under way: what we have is skipped, the rest is kept. take_frame has seen that there is
 * room. */
static void take_data(rf_stream *stream, const uint8_t *bytes, size_t length) {
    uint64_t at = stream->data_at;
    stream->data_at += length;
    stream->data_left -= length;
    if (stream->data_at <= stream->received) {
        return;
    }
    size_t known = (size_t)(stream->received - at);
    bytes += known;
    length -= known;
    bool dropped = stream->stopped_here || stream->reset_here || stream->reset_there;
    if (!dropped) {
        copy_in(stream->in, stream->in_size, stream->received, length, bytes);
    }
    stream->received += length;
    if (dropped) {
        discard(stream);
    }
}

enum rf_wrong rf_stream_take(rf_stream *stream, const uint8_t *bytes, size_t length) {
    while (length > 0 && stream->wrong == RF_RIGHT) {
        size_t part;
        if (stream->data_left > 0) {
            part = least(length, stream->data_left);
            take_data(stream, bytes, part);
        } else {
            size_t want = RF_FRAME_HEADER;
            if (stream->came_length >= RF_FRAME_HEADER) {
                want = RF_FRAME_HEADER + RF_FRAME_LIMIT;
            }
            part = least(length, want - stream->came_length);
            memcpy(stream->came + stream->came_length, bytes, part);
            stream->came_length += part;
            if (stream->came_length < RF_FRAME_HEADER) {
                return RF_RIGHT;
            }
            want = head_length(stream->came);
            if (want == 0) {
                stream->wrong = RF_WRONG_FRAME;
            } else if (stream->came_length == want) {
                stream->wrong = take_frame(stream);
                stream->came_length = 0;
                stream->plain = false;
            }
        }
        bytes += part;
        length -= part;
    }
    return stream->wrong;
}

void rf_stream_facts(const rf_stream *stream, struct rf_stream_facts *facts) {
    *facts = (struct rf_stream_facts){
        .here = positions(stream),
        .acknowledged = stream->acknowledged,
        .sent = stream->sent,
        .limit = stream->limit,
        .told = stream->told,
        .retransmitted = stream->retransmitted,
        .wanted = stream->wanted,
        .out_size = stream->out_size,
        .in_size = stream->in_size,
        .finished = stream->finished,
        .delivered = stream->finished && stream->acknowledged == end_of(stream),
        .taken = stream->fin_came && stream->written == stream->fin_at + 1,
        .ended_there = stream->fin_came,
        .stopped_there = stream->stopped_there,
        .reset_here = stream->reset_here,
        .reset_there = stream->reset_there,
        .end_there = stream->end_there,
        .in_a_frame = stream->head_sent < stream->head_length || stream->payload_left > 0,
        .at_fin = at_fin(stream),
    };
}

/* ---- written down ---- */

enum saved {
    SAVED_OUT_SIZE,
    SAVED_ACKNOWLEDGED,
    SAVED_SENT,
    SAVED_DATA_END,
    SAVED_LIMIT,
    SAVED_RETRANSMITTED,
    SAVED_WRITTEN,
    SAVED_RECEIVED,
    SAVED_TOLD,
    SAVED_PROMISED,
    SAVED_WINDOW,
    SAVED_FIN_AT,
    SAVED_WANTED,
    SAVED_FLAGS,
    SAVED_WORDS
};

enum saved_flags {
    FINISHED = 1,
    STOPPED_THERE = 2,
    PLAIN = 4,
    FIN_CAME = 8,
    STOPPED_HERE = 16,
    RESET_HERE = 32,
    RESET_THERE = 64,
    END_HERE = 128,
    END_THERE = 256,
    ALL_FLAGS = 511,
};

static size_t kept_out(const rf_stream *stream) {
    return stream->data_end > stream->acknowledged ? (size_t)(stream->data_end - stream->acknowledged) : 0;
}

static size_t kept_in(const rf_stream *stream) {
    uint64_t end = stream->fin_came ? stream->fin_at : stream->received;

    return end > stream->written ? (size_t)(end - stream->written) : 0;
}

size_t rf_stream_saved_size(const rf_stream *stream) {
    return SAVED_WORDS * sizeof(uint64_t) + kept_out(stream) + kept_in(stream);
}

static uint8_t *copy_out(const uint8_t *ring, size_t size, uint64_t from, size_t length, uint8_t *to) {
    while (length > 0) {
        size_t part;
        const uint8_t *at = place((uint8_t *)ring, size, from, &part);

        part = least(part, length);
        memcpy(to, at, part);
        to += part;
        from += part;
        length -= part;
    }
    return to;
}

void rf_stream_save(const rf_stream *stream, uint8_t *to) {
    const uint64_t words[SAVED_WORDS] = {
        [SAVED_OUT_SIZE] = stream->out_size,
        [SAVED_ACKNOWLEDGED] = stream->acknowledged,
        [SAVED_SENT] = stream->sent,
        [SAVED_DATA_END] = stream->data_end,
        [SAVED_LIMIT] = stream->limit,
        [SAVED_RETRANSMITTED] = stream->retransmitted,
        [SAVED_WRITTEN] = stream->written,
        [SAVED_RECEIVED] = stream->received,
        [SAVED_TOLD] = stream->told,
        [SAVED_PROMISED] = stream->promised,
        [SAVED_WINDOW] = stream->window,
        [SAVED_FIN_AT] = stream->fin_at,
        [SAVED_WANTED] = stream->wanted,
        [SAVED_FLAGS] = (stream->finished ? FINISHED : 0u) | (stream->stopped_there ? STOPPED_THERE : 0u) |
                        (stream->plain ? PLAIN : 0u) | (stream->fin_came ? FIN_CAME : 0u) |
                        (stream->stopped_here ? STOPPED_HERE : 0u) | (stream->reset_here ? RESET_HERE : 0u) |
                        (stream->reset_there ? RESET_THERE : 0u) | (stream->end_here ? END_HERE : 0u) |
                        (stream->end_there ? END_THERE : 0u),
    };

    for (size_t i = 0; i < SAVED_WORDS; i++, to += sizeof(uint64_t)) {
        put64(to, words[i]);
    }
    to = copy_out(stream->out, stream->out_size, stream->acknowledged, kept_out(stream), to);
    (void)copy_out(stream->in, stream->in_size, stream->written, kept_in(stream), to);
}

/* Whether a stream can have been so, but for the bytes in its rings. */
static bool could_be(const uint64_t *words, size_t largest) {
    const uint64_t flags = words[SAVED_FLAGS];
    const uint64_t end = words[SAVED_DATA_END] + (flags & FINISHED ? 1 : 0);
    const uint64_t in_end = flags & FIN_CAME ? words[SAVED_FIN_AT] : words[SAVED_RECEIVED];

    for (size_t i = SAVED_ACKNOWLEDGED; i < SAVED_FLAGS; i++) {
        if (words[i] >= RF_POSITION_END) {
            return false;
        }
    }
    return flags <= ALL_FLAGS && is_size((size_t)words[SAVED_OUT_SIZE]) && words[SAVED_OUT_SIZE] <= largest &&
           is_size((size_t)words[SAVED_WINDOW]) && words[SAVED_WINDOW] <= largest &&
           words[SAVED_ACKNOWLEDGED] <= words[SAVED_SENT] && words[SAVED_SENT] <= end &&
           end <= words[SAVED_ACKNOWLEDGED] + words[SAVED_OUT_SIZE] + 1 &&
           words[SAVED_DATA_END] <= words[SAVED_ACKNOWLEDGED] + words[SAVED_OUT_SIZE] &&
           words[SAVED_LIMIT] + 1 >= words[SAVED_ACKNOWLEDGED] && words[SAVED_TOLD] <= words[SAVED_WRITTEN] &&
           words[SAVED_WRITTEN] <= words[SAVED_RECEIVED] &&
           (!(flags & FIN_CAME) || words[SAVED_RECEIVED] == in_end + 1) &&
           in_end <= words[SAVED_WRITTEN] + words[SAVED_WINDOW] &&
           words[SAVED_PROMISED] <= words[SAVED_WRITTEN] + words[SAVED_WINDOW] &&
           in_end <= words[SAVED_PROMISED];
}

rf_stream *rf_stream_restore(const uint8_t *from, size_t length, size_t largest) {
    uint64_t words[SAVED_WORDS];
    rf_stream *stream;

    if (length < sizeof(words)) {
        return NULL;
    }
    for (size_t i = 0; i < SAVED_WORDS; i++) {
        words[i] = get64(from + i * sizeof(uint64_t));
    }
    if (!could_be(words, largest)) {
        return NULL;
    }
    stream = rf_stream_new((size_t)words[SAVED_OUT_SIZE], (size_t)words[SAVED_WINDOW], 0);
    if (stream == NULL) {
        return NULL;
    }
    stream->acknowledged = words[SAVED_ACKNOWLEDGED];
    stream->next = stream->sent = words[SAVED_SENT];
    stream->data_end = words[SAVED_DATA_END];
    stream->limit = words[SAVED_LIMIT];
    stream->retransmitted = words[SAVED_RETRANSMITTED];
    stream->written = words[SAVED_WRITTEN];
    stream->received = words[SAVED_RECEIVED];
    stream->told = words[SAVED_TOLD];
    stream->promised = words[SAVED_PROMISED];
    stream->fin_at = words[SAVED_FIN_AT];
    stream->wanted = words[SAVED_WANTED];
    stream->finished = words[SAVED_FLAGS] & FINISHED;
    stream->stopped_there = words[SAVED_FLAGS] & STOPPED_THERE;
    stream->plain = words[SAVED_FLAGS] & PLAIN;
    stream->fin_came = words[SAVED_FLAGS] & FIN_CAME;
    stream->stopped_here = words[SAVED_FLAGS] & STOPPED_HERE;
    stream->reset_here = words[SAVED_FLAGS] & RESET_HERE;
    stream->reset_there = words[SAVED_FLAGS] & RESET_THERE;
    stream->end_here = words[SAVED_FLAGS] & END_HERE;
    stream->end_there = words[SAVED_FLAGS] & END_THERE;
    if (length != rf_stream_saved_size(stream)) {
        rf_stream_free(stream);
        return NULL;
    }
    from += sizeof(words);
    copy_in(stream->out, stream->out_size, stream->acknowledged, kept_out(stream), from);
    copy_in(stream->in, stream->in_size, stream->written, kept_in(stream), from + kept_out(stream));
    return stream;
}
