/*
 * One lane of a session. With an even first byte a peer that may say anything, in frames and in positions:
 * whatever it says, what it is believed to have said can be true, and no ring is overrun. With an odd one two
 * ends that are honest, over connections that end at any byte: every byte arrives once.
 */
#include <stdint.h>
#include <string.h>

#include "check.h"
#include "session.h"

#define MOST (4u << 10)

struct input {
    const uint8_t *data;
    size_t left;
};

static uint64_t next(struct input *in, unsigned bytes) {
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes && in->left > 0; i++) {
        value = value << 8 | *in->data++;
        in->left--;
    }
    return value;
}

static uint64_t origin(struct input *in) {
    switch (next(in, 1) % 3) {
    case 0:
        return 0;
    case 1:
        return (UINT64_C(1) << 32) - next(in, 2);
    default:
        return RF_POSITION_END - (UINT64_C(1) << 41);
    }
}

static uint64_t hash;

static void touch(const uint8_t *bytes, size_t length) {
    for (size_t i = 0; i < length; i++) {
        hash = mix(hash, bytes[i]);
    }
}

static void check(const rf_stream *stream) {
    struct rf_stream_facts facts;
    rf_stream_facts(stream, &facts);
    CHECK(facts.told <= facts.here.written && facts.here.written <= facts.here.received);
    CHECK(facts.here.received - facts.here.written <= facts.in_size + 1);
    CHECK(facts.acknowledged <= facts.sent && facts.sent <= facts.here.end);
    CHECK(facts.here.end - facts.acknowledged <= facts.out_size + 1);
    CHECK(facts.here.end < RF_POSITION_END && facts.here.received < RF_POSITION_END);
    CHECK(facts.in_size <= MOST && facts.out_size <= MOST);
}

/* The byte at a position of a stream. */
static uint8_t byte_at(uint64_t position, int which) {
    return (uint8_t)(position * 7 + position / 251 + (uint64_t)which);
}

static void say(rf_stream *stream, size_t most, int which) {
    struct rf_stream_facts facts;
    uint8_t *at;
    rf_stream_facts(stream, &facts);
    size_t length = rf_stream_space(stream, &at);
    length = length < most ? length : most;
    for (size_t i = 0; i < length; i++) {
        at[i] = byte_at(facts.here.end + i, which);
    }
    rf_stream_put(stream, length);
}

/* Takes what came; from an honest peer it must be what was said. */
static void take(rf_stream *stream, size_t most, int from) {
    struct rf_stream_facts facts;
    const uint8_t *at;
    size_t length = rf_stream_unwritten(stream, &at);
    length = length < most ? length : most;
    touch(at, length);
    rf_stream_facts(stream, &facts);
    for (size_t i = 0; i < length && from >= 0; i++) {
        CHECK(at[i] == byte_at(facts.here.written + i, from));
    }
    rf_stream_wrote(stream, length);
    rf_stream_wrote_fin(stream);
}

static void local(rf_stream *stream, struct input *in, int which, int from) {
    struct rf_stream_facts facts;
    rf_stream_facts(stream, &facts);
    switch (next(in, 1) % 8) {
    case 0:
    case 1:
        say(stream, (size_t)next(in, 2), which);
        break;
    case 2:
    case 3:
        take(stream, (size_t)next(in, 2), from);
        break;
    case 4:
        rf_stream_acknowledge(stream);
        break;
    case 5:
        if (facts.out_size < MOST) {
            CHECK(rf_stream_grow(stream, 2 * facts.out_size) == 0);
        }
        break;
    case 6:
        if (facts.in_size < MOST) {
            CHECK(rf_stream_widen(stream, 2 * facts.in_size) == 0);
        }
        break;
    default:
        if (next(in, 1) % 16 == 0) {
            rf_stream_finish(stream);
        }
        break;
    }
}

/* Positions near the truth, or anything. */
static uint64_t near(struct input *in, uint64_t truth) {
    uint8_t kind = (uint8_t)next(in, 1);
    return kind < 250 ? truth + kind % 5 - 2 * (kind > 240) : next(in, 8);
}

static void hostile(struct input *in) {
    rf_stream *stream = rf_stream_new(1024, 1024, origin(in));
    CHECK(stream != NULL);
    while (in->left > 0) {
        struct rf_stream_facts facts;
        struct rf_piece pieces[2];
        rf_stream_facts(stream, &facts);
        switch (next(in, 1) % 10) {
        case 0:
        case 1:
        case 2: {
            size_t length = (size_t)next(in, 1);
            length = length < in->left ? length : in->left;
            (void)rf_stream_take(stream, in->data, length);
            in->data += length;
            in->left -= length;
            break;
        }
        case 3: {
            uint8_t head[24] = {(uint8_t)(1 + next(in, 1) % 7)};
            uint64_t offset = near(in, head[0] == RF_FRAME_ACK ? facts.acknowledged : facts.here.received);
            uint64_t limit = near(in, facts.limit);
            head[7] = head[0] == RF_FRAME_ACK ? 8 : head[0] == RF_FRAME_DATA ? (uint8_t)next(in, 1) : 0;
            for (int i = 0; i < 8; i++) {
                head[15 - i] = (uint8_t)(offset >> (8 * i));
                head[23 - i] = (uint8_t)(limit >> (8 * i));
            }
            (void)rf_stream_take(stream, head, head[0] == RF_FRAME_ACK ? 24 : 16);
            break;
        }
        case 4: {
            struct rf_positions before = facts.here;
            struct rf_positions peer = {
                .received = near(in, facts.sent),
                .written = near(in, facts.acknowledged),
                .first_kept = near(in, facts.told),
                .end = near(in, facts.here.received),
                .window = near(in, facts.limit - facts.acknowledged),
            };
            if (rf_stream_resume(stream, &peer) != RF_RIGHT) {
                rf_stream_facts(stream, &facts);
                CHECK(memcmp(&before, &facts.here, sizeof(before)) == 0);
            }
            break;
        }
        case 5:
        case 6: {
            size_t length = rf_stream_next(stream, pieces);
            touch(pieces[0].bytes, pieces[0].length);
            touch(pieces[1].bytes, pieces[1].length);
            uint64_t some = next(in, 2);
            rf_stream_sent(stream, some < length ? (size_t)some : length);
            break;
        }
        case 7: {
            struct rf_positions told;
            switch (next(in, 1) % 32) {
            case 0:
                rf_stream_stop(stream);
                break;
            case 1:
                rf_stream_reset(stream);
                break;
            case 2:
                rf_stream_end(stream);
                break;
            case 3:
                rf_stream_lost(stream);
                break;
            default:
                rf_stream_tell(stream, &told);
                break;
            }
            break;
        }
        default:
            local(stream, in, 0, -1);
            break;
        }
        check(stream);
    }
    rf_stream_free(stream);
}

struct wire {
    uint8_t bytes[8192];
    size_t length;
};

static void send_some(rf_stream *stream, struct wire *wire, size_t most) {
    struct rf_piece pieces[2];
    (void)rf_stream_next(stream, pieces);
    size_t sent = 0;
    for (int i = 0; i < 2; i++) {
        size_t length = pieces[i].length;
        length = length < most - sent ? length : most - sent;
        length = length < sizeof(wire->bytes) - wire->length ? length : sizeof(wire->bytes) - wire->length;
        if (length > 0) {
            memcpy(wire->bytes + wire->length, pieces[i].bytes, length);
        }
        wire->length += length;
        sent += length;
        if (length < pieces[i].length) {
            break;
        }
    }
    rf_stream_sent(stream, sent);
}

static void carry(rf_stream *to, struct wire *wire, size_t most) {
    size_t length = wire->length < most ? wire->length : most;
    CHECK(rf_stream_take(to, wire->bytes, length) == RF_RIGHT);
    memmove(wire->bytes, wire->bytes + length, wire->length - length);
    wire->length -= length;
}

/* The first dials; HELLO or WELCOME may be lost. Whether there is a connection then. */
static int connect_both(rf_stream *ends[2], struct wire wires[2], unsigned reach) {
    struct rf_positions told;
    wires[0].length = wires[1].length = 0;
    rf_stream_lost(ends[0]);
    rf_stream_tell(ends[0], &told);
    if (reach == 0) {
        return 0;
    }
    rf_stream_lost(ends[1]);
    CHECK(rf_stream_resume(ends[1], &told) == RF_RIGHT);
    rf_stream_tell(ends[1], &told);
    if (reach == 1) {
        return 0;
    }
    CHECK(rf_stream_resume(ends[0], &told) == RF_RIGHT);
    return 1;
}

static void honest(struct input *in) {
    uint64_t begin = origin(in);
    rf_stream *ends[2] = {rf_stream_new(1024, 512, begin), rf_stream_new(512, 1024, begin)};
    struct wire wires[2] = {0};
    CHECK(ends[0] != NULL && ends[1] != NULL);
    int connected = connect_both(ends, wires, 2);
    while (in->left > 0) {
        uint8_t what = (uint8_t)next(in, 1);
        int which = what & 1;
        switch (what >> 1 & 7) {
        case 0:
        case 1:
            if (connected) {
                send_some(ends[which], &wires[which], (size_t)next(in, 2));
            }
            break;
        case 2:
        case 3:
            if (connected) {
                carry(ends[1 - which], &wires[which], (size_t)next(in, 2));
            }
            break;
        case 4:
            if (next(in, 1) % 4 == 0) {
                connected = connect_both(ends, wires, (unsigned)next(in, 1) % 4);
            }
            break;
        default:
            local(ends[which], in, which, 1 - which);
            break;
        }
        check(ends[0]);
        check(ends[1]);
    }
    connect_both(ends, wires, 2);
    rf_stream_finish(ends[0]);
    rf_stream_finish(ends[1]);
    struct rf_stream_facts facts[2] = {0};
    for (int turns = 0; !(facts[0].taken && facts[1].taken && facts[0].delivered && facts[1].delivered);
         turns++) {
        CHECK(turns < 4000);
        for (int i = 0; i < 2; i++) {
            send_some(ends[i], &wires[i], SIZE_MAX);
            carry(ends[1 - i], &wires[i], SIZE_MAX);
            take(ends[1 - i], SIZE_MAX, i);
            rf_stream_acknowledge(ends[1 - i]);
        }
        rf_stream_facts(ends[0], &facts[0]);
        rf_stream_facts(ends[1], &facts[1]);
    }
    CHECK(facts[0].here.end == facts[1].here.received && facts[1].here.end == facts[0].here.received);
    rf_stream_free(ends[0]);
    rf_stream_free(ends[1]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct input in = {data, size};
    if (next(&in, 1) % 2 == 0) {
        hostile(&in);
    } else {
        honest(&in);
    }
    return 0;
}
