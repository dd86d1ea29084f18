/*
 * Two pumps, as source and destination have them, carry a migration with two lanes beside its main connection
 * that is lost again and again, while other threads read all that may be read beside a running pump: pump
 * SECONDS.
 *
 *     this thread ══ source's pump ══ destination's pump ══ this thread        readers, two of each pump
 *
 * Built with the thread sanitizer, and with the address and undefined-behaviour sanitizers (run.sh). It also
 * checks what it sees: a picture told to be consistent is, counts that only grow do, and the guest's requests
 * arrive at the source as whole messages, those of a lost channel again.
 */
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "relay.h"

#define BLOCK "pc.ram"
#define PAGE 4096
#define PAGES 4096
#define BITMAP_BYTES (PAGES / 8)
#define END_MARK UINT64_C(0x0123456789abcdef)

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                          \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

enum { SOURCE, DESTINATION, SIDES, READERS_EACH = 2, LANES = 2 };

static struct rf_relay *relays[SIDES];
static atomic_bool ending;

static double seconds_now(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void nap(void) {
    const struct timespec pause = {.tv_nsec = 200000};

    nanosleep(&pause, NULL);
}

/* ---- what a reader may do ---- */

static void *reader(void *opaque) {
    struct rf_relay *relay = opaque;
    struct rf_tracker *tracker = rf_relay_tracker(relay);
    struct rf_pagemap *map = rf_tracker_pagemap(tracker);
    struct rf_relay_view last = {0};
    struct rf_histogram_snapshot *latency = malloc(sizeof(*latency));
    uint64_t answered = 0;

    CHECK(latency != NULL);
    while (!atomic_load(&ending)) {
        struct rf_relay_view view;
        struct rf_pagemap_stats stats;
        struct rf_pagemap_block_stats block;
        uint64_t told;

        if (rf_relay_look(relay, &view)) {
            CHECK(view.channel >= last.channel && view.forward_bytes >= last.forward_bytes);
            CHECK(view.return_bytes >= last.return_bytes && view.replayed >= last.replayed);
            CHECK(view.local_state <= RF_LEG_CLOSED && view.far_state <= RF_LEG_CLOSED);
            last = view;
        }
        if (rf_pagemap_stats(map, &stats) == 1) {
            CHECK(stats.requested == stats.arrived + stats.outstanding);
            CHECK(stats.recorded >= stats.outstanding);
        }
        for (uint32_t i = 0; rf_pagemap_block_stats(map, i, &block) == RF_OK; i++) {
            CHECK(block.name_length == strlen(BLOCK) && strcmp(block.name, BLOCK) == 0);
        }
        rf_pagemap_latency(map, latency);
        CHECK(latency->count >= answered);
        answered = latency->count;
        CHECK(rf_tracker_kept(tracker) == RF_KEPT_ALL);
        CHECK(rf_tracker_forward_opaque(tracker) == 0 && rf_tracker_return_opaque(tracker) == 0);
        if (rf_tracker_channel_facts(tracker) & RF_FACT_RESUME_ACK_PASSED) {
            CHECK(rf_tracker_facts(tracker) & RF_FACT_RAM_DECLARED);
        }
        if (read(rf_relay_notify_fd(relay), &told, sizeof(told)) < 0) {
            sched_yield();
        }
    }
    free(latency);
    return NULL;
}

/* ---- the two ends ---- */

struct out {
    uint8_t bytes[64 * 1024];
    size_t length;
};

static void put(struct out *out, const void *bytes, size_t length) {
    CHECK(length <= sizeof(out->bytes) - out->length);
    memcpy(out->bytes + out->length, bytes, length);
    out->length += length;
}

static void put_number(struct out *out, uint64_t value, unsigned bytes) {
    while (bytes-- > 0) {
        uint8_t byte = (uint8_t)(value >> (8 * bytes));

        put(out, &byte, 1);
    }
}

static void put_name(struct out *out, const char *name) {
    put_number(out, strlen(name), 1);
    put(out, name, strlen(name));
}

static void send_all(int fd, struct out *out) {
    size_t sent = 0;

    while (sent < out->length) {
        ssize_t n = send(fd, out->bytes + sent, out->length - sent, MSG_NOSIGNAL);

        CHECK(n > 0);
        sent += (size_t)n;
    }
    out->length = 0;
}

/* False at the end of the stream, or when nothing has come for 10 s. */
static bool receive_all(int fd, void *bytes, size_t length) {
    size_t got = 0;

    while (got < length) {
        struct pollfd one = {.fd = fd, .events = POLLIN};
        ssize_t n;

        if (poll(&one, 1, 10000) != 1) {
            return false;
        }
        n = recv(fd, (uint8_t *)bytes + got, length - got, 0);
        if (n <= 0) {
            return false;
        }
        got += (size_t)n;
    }
    return true;
}

static void put_beginning(struct out *out) {
    const char machine[] = "pc-i440fx-7.2";

    put_number(out, 0x5145564d, 4);
    put_number(out, 3, 4);
    put_number(out, 7, 1);
    put_number(out, strlen(machine), 4);
    put(out, machine, strlen(machine));
    put_number(out, 0x0800010000, 5); /* OPEN_RETURN_PATH */
    put_number(out, 0x01, 1);         /* START of the section ram */
    put_number(out, 2, 4);
    put_name(out, "ram");
    put_number(out, 0, 4);
    put_number(out, 4, 4);
    put_number(out, (uint64_t)PAGES * PAGE | 0x04, 8);
    put_name(out, BLOCK);
    put_number(out, (uint64_t)PAGES * PAGE, 8);
    put_number(out, 0x10, 8);
    put_number(out, 0x7e00000002, 5);
}

static void put_pages(struct out *out, uint64_t first, unsigned count) {
    put_number(out, 0x0200000002, 5); /* PART of the section ram */
    for (unsigned i = 0; i < count; i++) {
        put_number(out, (first + i) * PAGE | 0x02 | (i > 0 ? 0x20 : 0), 8);
        if (i == 0) {
            put_name(out, BLOCK);
        }
        put_number(out, 0, 1);
    }
    put_number(out, 0x10, 8);
    put_number(out, 0x7e00000002, 5);
}

/* The same on the preempt lane, which has frames alone. */
static void put_urgent_pages(struct out *out, uint64_t first, unsigned count) {
    for (unsigned i = 0; i < count; i++) {
        put_number(out, (first + i) * PAGE | 0x02, 8);
        put_name(out, BLOCK);
        put_number(out, 0, 1);
    }
}

static void put_request(struct out *out, uint64_t page) {
    put_number(out, 3, 2);
    put_number(out, 12 + 1 + strlen(BLOCK), 2);
    put_number(out, page * PAGE, 8);
    put_number(out, PAGE, 4);
    put_name(out, BLOCK);
}

/* What the source gets, message for message; the page of a request, or UINT64_MAX. */
static uint64_t take_message(int fd) {
    uint8_t head[4];
    uint8_t body[8 + 4 + 1 + 255];
    size_t length;
    uint64_t start = 0;

    CHECK(receive_all(fd, head, sizeof(head)));
    length = (size_t)head[2] << 8 | head[3];
    CHECK(head[0] == 0 && length <= sizeof(body) && receive_all(fd, body, length));
    if (head[1] == 5) {
        uint8_t bitmap[8 + BITMAP_BYTES + 8];

        CHECK(receive_all(fd, bitmap, sizeof(bitmap)));
    }
    if (head[1] != 3) {
        CHECK(head[1] == 5 || head[1] == 6);
        return UINT64_MAX;
    }
    CHECK(length == 12 + 1 + strlen(BLOCK) && memcmp(body + 13, BLOCK, strlen(BLOCK)) == 0);
    for (unsigned i = 0; i < 8; i++) {
        start = start << 8 | body[i];
    }
    CHECK(start % PAGE == 0 && start / PAGE < PAGES);
    return start / PAGE;
}

/* ---- one channel after the other ---- */

enum { AT_ONCE = 16 };

struct ends {
    int source;
    int destination;
    int network; /* one end of what joins the pumps, to cut it */
    int source_lanes[LANES];
    int destination_lanes[LANES];
};

static bool both_gone(void) {
    for (int side = 0; side < SIDES; side++) {
        struct rf_relay_view view;

        if (!rf_relay_look(relays[side], &view) || view.far_state == RF_LEG_OPEN) {
            return false;
        }
    }
    return true;
}

static void close_both(uint64_t channel) {
    for (int side = 0; side < SIDES; side++) {
        while (rf_relay_close_channel(relays[side], channel) < 0) {
            nap();
        }
    }
}

/* QEMU's connection at either side, and what joins the pumps. */
static void make_pairs(int near[2], int far[2], int between[2]) {
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, near) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, far) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, between) == 0);
}

static struct ends attach(bool recovered) {
    struct ends ends;
    int near[2];
    int far[2];
    int between[2];

    make_pairs(near, far, between);
    ends.source = near[0];
    ends.destination = far[0];
    ends.network = dup(between[0]);
    CHECK(ends.network >= 0);
    CHECK(rf_relay_attach(relays[SOURCE], near[1], between[0], recovered, true, LANES, RF_LINK_NO, false,
                          NULL) == 0);
    CHECK(rf_relay_attach(relays[DESTINATION], far[1], between[1], recovered, true, LANES, RF_LINK_NO, false,
                          NULL) == 0);
    return ends;
}

static void add_lanes(struct ends *ends, uint64_t channel) {
    const int kinds[LANES] = {RF_LANE_PREEMPT, RF_LANE_MULTIFD};

    for (int i = 0; i < LANES; i++) {
        int near[2];
        int far[2];
        int between[2];

        make_pairs(near, far, between);
        CHECK(rf_relay_add_lane(relays[SOURCE], channel, kinds[i], 1 + i, near[1], between[0]) == 0);
        CHECK(rf_relay_add_lane(relays[DESTINATION], channel, kinds[i], 1 + i, far[1], between[1]) == 0);
        ends->source_lanes[i] = near[0];
        ends->destination_lanes[i] = far[0];
    }
}

static void lose(struct ends *ends, uint64_t channel) {
    CHECK(shutdown(ends->network, SHUT_RDWR) == 0);
    while (!both_gone()) {
        nap();
    }
    close_both(channel);
    close(ends->source);
    close(ends->destination);
    close(ends->network);
    for (int i = 0; i < LANES; i++) {
        close(ends->source_lanes[i]);
        close(ends->destination_lanes[i]);
    }
}

static void take_forward(int fd, size_t length) {
    static uint8_t bytes[64 * 1024];

    CHECK(length <= sizeof(bytes) && receive_all(fd, bytes, length));
}

static void use_lanes(const struct ends *ends, uint64_t page, struct out *out) {
    for (int i = 0; i < LANES; i++) {
        size_t length;

        put_urgent_pages(out, page, AT_ONCE);
        length = out->length;
        send_all(ends->source_lanes[i], out);
        take_forward(ends->destination_lanes[i], length);
    }
}

/* The handshake of a recovery, in which the destination has none of the pages from `missing` on. */
static void resume(struct ends *ends, uint64_t channel, uint64_t missing, struct out *out) {
    size_t length;

    put_number(out, 0x08000a, 3); /* RECV_BITMAP */
    put_number(out, 1 + strlen(BLOCK), 2);
    put_name(out, BLOCK);
    length = out->length;
    send_all(ends->source, out);
    take_forward(ends->destination, length);

    put_number(out, 5, 2);
    put_number(out, 1 + strlen(BLOCK), 2);
    put_name(out, BLOCK);
    put_number(out, BITMAP_BYTES, 8);
    for (uint64_t byte = 0; byte < BITMAP_BYTES; byte++) {
        put_number(out, byte < missing / 8 ? 0xff : 0, 1);
    }
    put_number(out, END_MARK, 8);
    send_all(ends->destination, out);
    CHECK(take_message(ends->source) == UINT64_MAX);

    put_number(out, 0x0800090000, 5); /* RESUME, which waits for the lanes */
    length = out->length;
    send_all(ends->source, out);
    add_lanes(ends, channel);
    take_forward(ends->destination, length);
    put_number(out, 6, 2);
    put_number(out, 4, 2);
    put_number(out, 1, 4);
    send_all(ends->destination, out);
    CHECK(take_message(ends->source) == UINT64_MAX);
}

/* One migration, until `until`; the number of losses. */
static unsigned migrate(double until) {
    static struct out out;
    uint64_t page = 0;
    uint64_t channel = 1;
    struct ends ends = attach(false);
    size_t length;

    add_lanes(&ends, channel);
    put_beginning(&out);
    length = out.length;
    send_all(ends.source, &out);
    take_forward(ends.destination, length);
    while (page + 4 * AT_ONCE <= PAGES) {
        bool again[AT_ONCE] = {false};

        /* Requests and answers, both ways at once. */
        for (unsigned i = 0; i < AT_ONCE; i++) {
            put_request(&out, page + i);
        }
        send_all(ends.destination, &out);
        put_pages(&out, page, AT_ONCE);
        length = out.length;
        send_all(ends.source, &out);
        take_forward(ends.destination, length);
        for (unsigned i = 0; i < AT_ONCE;) {
            uint64_t came = take_message(ends.source);

            CHECK(came == page + i || came < page); /* both sides replay: what is older may come twice */
            i += came == page + i;
        }
        use_lanes(&ends, page, &out);
        page += AT_ONCE;
        if (seconds_now() >= until) {
            break;
        }
        if (page / AT_ONCE % 3 != 0) {
            continue;
        }
        /* Requests that are lost with the channel: each must come again. */
        for (unsigned i = 0; i < AT_ONCE; i++) {
            put_request(&out, page + i);
        }
        send_all(ends.destination, &out);
        for (unsigned i = 0; i < AT_ONCE;) {
            uint64_t came = take_message(ends.source);

            CHECK(came == page + i || came < page);
            i += came == page + i;
        }
        lose(&ends, channel);
        ends = attach(true);
        channel++;
        resume(&ends, channel, page, &out);
        for (unsigned i = 0; i < AT_ONCE;) {
            uint64_t came = take_message(ends.source);

            CHECK(came >= page && came < page + AT_ONCE);
            i += !again[came - page];
            again[came - page] = true;
        }
        put_pages(&out, page, AT_ONCE);
        length = out.length;
        send_all(ends.source, &out);
        take_forward(ends.destination, length);
        page += AT_ONCE;
    }
    for (int side = 0; side < SIDES; side++) {
        CHECK(rf_relay_complete(relays[side]) == 0);
    }
    lose(&ends, channel);
    return (unsigned)channel - 1;
}

int main(int argc, char **argv) {
    double until = seconds_now() + (argc > 1 ? atof(argv[1]) : 5);
    unsigned migrations = 0;
    unsigned losses = 0;

    do {
        pthread_t readers[SIDES][READERS_EACH];

        atomic_store(&ending, false);
        for (int side = 0; side < SIDES; side++) {
            int state = memfd_create("state", MFD_CLOEXEC);

            CHECK(state >= 0);
            relays[side] = rf_relay_start(side == SOURCE ? RF_RELAY_SOURCE : RF_RELAY_DESTINATION, 64 << 20,
                                          5, state, -1, (const uint8_t *)"vm", 2);
            close(state);
            CHECK(relays[side] != NULL);
            for (int i = 0; i < READERS_EACH; i++) {
                CHECK(pthread_create(&readers[side][i], NULL, reader, relays[side]) == 0);
            }
        }
        losses += migrate(until);
        migrations++;
        atomic_store(&ending, true);
        for (int side = 0; side < SIDES; side++) {
            for (int i = 0; i < READERS_EACH; i++) {
                pthread_join(readers[side][i], NULL);
            }
            rf_relay_stop(relays[side], false);
        }
    } while (seconds_now() < until);
    printf("%u migrations, %u losses\n", migrations, losses);
    return losses > 0 ? 0 : 1;
}
