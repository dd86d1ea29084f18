#include "link.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "queues.h"
#include "tcp.h"

enum {
    FIRST_RING = 1 << 20,
    SMALLEST_RING = 64 << 10, /* where that much is not to be had */
    LARGEST_RING = 16 << 20,
    MIGRATION_RINGS = 64 << 20,
    DAEMON_RINGS = 256 << 20,
    POSTCOPY_LEAST = 256 << 10,
    SILENT_AFTER_S = 5, /* a false alarm costs one more connection */
    ACKNOWLEDGE_MS = 10,
    LOOK_MS = 1000,
    PART_MS = 1000,
    READS = 4, /* at once, of a scratch each */
};

/* A PONG (migration/migration.c, migrate_send_rp_pong): its type, its length, its value. The value that
 * begins an offer is none of QEMU's (1 to 4, 0x42), nor that of far/ping.py. */
static const uint8_t OFFER_BEGINS[8] = {0, 2, 0, 4, 0xf5, 0x72, 0x66, 0x73};
enum { PONG_HEAD = 4, PONG_BYTES = 8 };

static _Atomic size_t daemon_rings;

static uint64_t ms(uint64_t count) { return count * 1000000u; }

static uint64_t now_ns(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static size_t least(size_t one, size_t other) { return one < other ? one : other; }

static struct rf_stream_facts facts_of(const struct rf_link *link) {
    struct rf_stream_facts facts;

    rf_stream_facts(link->stream, &facts);
    return facts;
}

/* ---- memory ---- */

static bool reserve(struct rf_link *link, size_t bytes) {
    if (link->rings->used + bytes > MIGRATION_RINGS) {
        return false;
    }
    if (atomic_fetch_add(&daemon_rings, bytes) + bytes > DAEMON_RINGS) {
        atomic_fetch_sub(&daemon_rings, bytes);
        return false;
    }
    link->rings->used += bytes;
    link->reserved += bytes;
    return true;
}

static void give_back(struct rf_link *link, size_t bytes) {
    link->rings->used -= bytes;
    link->reserved -= bytes;
    atomic_fetch_sub(&daemon_rings, bytes);
}

static void write_offer(struct rf_link *link) {
    memcpy(link->offer, OFFER_BEGINS, PONG_BYTES);
    for (size_t i = 0; i < sizeof(link->id) / 4; i++) {
        uint8_t *pong = link->offer + (i + 1) * PONG_BYTES;

        memcpy(pong, OFFER_BEGINS, PONG_HEAD);
        memcpy(pong + PONG_HEAD, link->id + 4 * i, 4);
    }
}

/* That all lanes can begin with. */
static size_t first_ring(unsigned lanes) {
    size_t size = FIRST_RING;

    while (size > SMALLEST_RING && lanes * 2 * size > MIGRATION_RINGS) {
        size /= 2;
    }
    return size;
}

struct rf_link *rf_link_new(bool answers, const uint8_t *id, struct rf_link_place place,
                            struct rf_rings *rings) {
    struct rf_link *link = calloc(1, sizeof(*link));
    size_t size = first_ring(place.lanes);

    if (link == NULL) {
        return NULL;
    }
    link->rings = rings;
    link->place = place;
    while (!reserve(link, 2 * size) && size > SMALLEST_RING) {
        size /= 2;
    }
    if (rings->scratch == NULL) {
        rings->scratch = malloc(RF_LINK_SCRATCH);
    }
    if (link->reserved > 0 && rings->scratch != NULL) {
        link->stream = rf_stream_new(size, size, 0);
    }
    if (link->stream == NULL) {
        rf_link_free(link);
        return NULL;
    }
    link->answers = answers;
    link->fd = -1;
    link->state = RF_LINK_PLAIN;
    link->has_leg = true;
    link->offer_bytes = RF_OFFER_BYTES;
    if (answers) {
        memcpy(link->id, id, sizeof(link->id));
        write_offer(link);
    }
    if (place.lane > 0) {
        link->offered = link->offer_bytes; /* elsewhere */
    }
    return link;
}

static void between(struct rf_link *link, int64_t lost_by);

size_t rf_link_largest_ring(void) { return LARGEST_RING; }

struct rf_link *rf_link_go_on(bool answers, const uint8_t *id, struct rf_link_place place,
                              struct rf_rings *rings, rf_stream *stream) {
    struct rf_link *link = calloc(1, sizeof(*link));
    struct rf_stream_facts facts;

    if (link == NULL) {
        return NULL;
    }
    rf_stream_facts(stream, &facts);
    link->rings = rings;
    link->place = place;
    link->fd = -1;
    if (rings->scratch == NULL) {
        rings->scratch = malloc(RF_LINK_SCRATCH);
    }
    if (rings->scratch == NULL || !reserve(link, facts.out_size + facts.in_size)) {
        rf_link_free(link);
        return NULL;
    }
    link->stream = stream;
    link->answers = answers;
    link->has_leg = true;
    memcpy(link->id, id, sizeof(link->id));
    link->offered = link->offer_bytes = RF_OFFER_BYTES; /* long ago */
    between(link, 0);
    return link;
}

static void close_connection(struct rf_link *link) {
    if (link->fd >= 0) {
        (void)shutdown(link->fd, SHUT_RDWR); /* wakes a poll that has it */
        close(link->fd);
        link->fd = -1;
    }
}

void rf_link_free(struct rf_link *link) {
    if (link != NULL) {
        if (link->stream != NULL) {
            close_connection(link);
        }
        give_back(link, link->reserved);
        rf_stream_free(link->stream);
        free(link->tls);
        free(link);
    }
}

/* Our ring, where nothing but its size keeps QEMU waiting, and the peer has the room. */
static bool grow(struct rf_link *link) {
    struct rf_stream_facts facts = facts_of(link);
    size_t size = facts.out_size;

    if (link->postcopy || size >= LARGEST_RING || facts.limit - facts.acknowledged <= size ||
        !reserve(link, 2 * size)) {
        return false;
    }
    bool larger = rf_stream_grow(link->stream, 2 * size) == 0;
    give_back(link, larger ? size : 2 * size); /* both were there at once */
    return larger;
}

/* What the peer is promised, where it has said that nothing else keeps it, and QEMU takes what comes. */
static void widen(struct rf_link *link) {
    struct rf_stream_facts facts = facts_of(link);
    size_t size = facts.in_size;

    if (link->postcopy || size >= LARGEST_RING || facts.wanted == 0 || facts.here.received < facts.wanted ||
        facts.wanted < link->widened_at || facts.here.received - facts.here.written > size / 2 ||
        !reserve(link, 2 * size)) {
        return;
    }
    bool larger = rf_stream_widen(link->stream, 2 * size) == 0;
    give_back(link, larger ? size : 2 * size);
    if (larger) {
        link->widened_at = facts.here.written + 2 * size;
    }
}

/* ---- connection 0 ---- */

bool rf_link_carries(const struct rf_link *link) { return link != NULL && link->state >= RF_LINK_CARRIED; }

bool rf_link_looks(const struct rf_link *link) {
    return link != NULL && !link->answers && link->place.lane == 0 && link->state == RF_LINK_PLAIN &&
           link->tls == NULL;
}

static void write_offer_in_tls(struct rf_link *link) {
    link->offer_bytes = RF_OFFER_IN_TLS;
    for (size_t at = 0; at < RF_OFFER_IN_TLS; at += RF_TLS_CCS) {
        memcpy(link->offer + at, rf_tls_ccs, RF_TLS_CCS);
    }
}

static enum rf_offer judge_in_tls(struct rf_link *link) {
    for (size_t i = 0; i < link->offered; i++) {
        if (link->offer[i] != rf_tls_ccs[i % RF_TLS_CCS]) {
            return RF_OFFER_NONE;
        }
    }
    if (link->offered < RF_OFFER_IN_TLS) {
        return RF_OFFER_UNDECIDED;
    }
    link->state = RF_LINK_OFFERED;
    return RF_OFFER_MADE;
}

enum rf_offer rf_link_judge(struct rf_link *link) {
    if (link->offer_bytes == RF_OFFER_IN_TLS) {
        return judge_in_tls(link);
    }
    size_t begun = least(link->offered, PONG_BYTES);

    if (memcmp(link->offer, OFFER_BEGINS, begun) != 0) {
        return RF_OFFER_NONE;
    }
    if (link->offered < RF_OFFER_BYTES) {
        return RF_OFFER_UNDECIDED;
    }
    for (size_t i = 0; i < sizeof(link->id) / 4; i++) {
        const uint8_t *pong = link->offer + (i + 1) * PONG_BYTES;

        if (memcmp(pong, OFFER_BEGINS, PONG_HEAD) != 0) {
            return RF_OFFER_NONE;
        }
        memcpy(link->id + 4 * i, pong + PONG_HEAD, 4);
    }
    link->state = RF_LINK_OFFERED;
    return RF_OFFER_MADE;
}

bool rf_link_in_tls(struct rf_link *link) {
    link->tls = calloc(1, sizeof(*link->tls));
    return link->tls != NULL;
}

/* What passes of a TLS handshake, until the place of the offer is known. */
static void see_tls(struct rf_link *link, const uint8_t *bytes, size_t length, bool server) {
    if (link->tls == NULL) {
        return;
    }
    if (!server) {
        rf_tls_client_says(link->tls, bytes, length);
        return;
    }
    switch (rf_tls_server_says(link->tls, bytes, length)) {
    case RF_TLS_BEFORE:
        return;
    case RF_TLS_HERE:
        rf_tls_id(link->tls, link->id);
        write_offer_in_tls(link);
        break;
    case RF_TLS_NOWHERE:
        link->bare = true;
        break;
    }
    free(link->tls);
    link->tls = NULL;
}

size_t rf_link_plain_room(const struct rf_link *link) { return rf_stream_room(link->stream); }

void rf_link_plain_sent(struct rf_link *link, const uint8_t *bytes, size_t length) {
    (void)rf_stream_keep(link->stream, bytes, length); /* there was room */
    rf_stream_plain_sent(link->stream);
    see_tls(link, bytes, length, link->answers);
}

void rf_link_plain_came(struct rf_link *link, const uint8_t *bytes, size_t length) {
    rf_stream_plain_came(link->stream, length);
    see_tls(link, bytes, length, !link->answers);
}

size_t rf_link_plain_most(const struct rf_link *link, bool sent, size_t length) {
    return link->tls != NULL && sent == link->answers ? least(length, rf_tls_wants(link->tls)) : length;
}

size_t rf_link_offer_due(const struct rf_link *link) {
    return link->answers && link->tls == NULL ? link->offer_bytes - link->offered : 0;
}

static void between(struct rf_link *link, int64_t lost_by) {
    close_connection(link);
    rf_stream_lost(link->stream);
    link->kernel_full = false;
    link->acknowledge_ns = 0;
    link->lost_by = lost_by;
    link->lost_ns = now_ns();
    link->was_session = true;
    link->state = RF_LINK_BETWEEN;
}

static bool is_offered(const struct rf_link *link) { return link != NULL && link->state == RF_LINK_OFFERED; }

bool rf_link_outlives(struct rf_link *link, int error) {
    if (!is_offered(link)) {
        return false;
    }
    between(link, error);
    return true;
}

bool rf_link_outlives_write(struct rf_link *link) {
    if (!is_offered(link)) {
        return false;
    }
    link->only_read = true;
    return true;
}

bool rf_link_outlives_end(struct rf_link *link) {
    if (!is_offered(link)) {
        return false;
    }
    link->end_seen = true;
    return true;
}

void rf_link_drop(struct rf_link *link) {
    link->has_leg = false;
    link->state = RF_LINK_OVER;
}

/* ---- further lanes ---- */

void rf_link_follow(struct rf_link *link, const struct rf_link *main) {
    if (link->state == RF_LINK_PLAIN && main->state != RF_LINK_PLAIN) {
        memcpy(link->id, main->id, sizeof(link->id));
        link->state = RF_LINK_OFFERED;
    }
    link->in_being = main->was_session;
}

void rf_link_begin(struct rf_link *link) { between(link, 0); }

/* ---- the leg's side ---- */

static void over(struct rf_link *link) {
    close_connection(link);
    link->acknowledge_ns = 0;
    link->state = RF_LINK_OVER;
}

static ssize_t receive_some(struct rf_link *link) {
    ssize_t n;

    do {
        n = recv(link->fd, link->rings->scratch, RF_LINK_SCRATCH, MSG_DONTWAIT);
    } while (n < 0 && errno == EINTR);
    return n;
}

/* The connection is lost, but for what had arrived on it: who sent that may not come again. No more is taken
 * than there is room for. */
static void break_off(struct rf_link *link, int error) {
    ssize_t n;

    do {
        n = receive_some(link);
    } while (n > 0 && rf_stream_take(link->stream, link->rings->scratch, (size_t)n) == RF_RIGHT);
    between(link, error);
}

static void send_all(struct rf_link *link) {
    link->kernel_full = false;
    while (link->state == RF_LINK_CARRIED) {
        struct rf_piece pieces[2];
        struct iovec parts[2];
        struct msghdr message = {.msg_iov = parts};
        ssize_t n;

        if (rf_stream_next(link->stream, pieces) == 0) {
            break;
        }
        for (int i = 0; i < 2; i++) {
            if (pieces[i].length > 0) {
                parts[message.msg_iovlen++] =
                    (struct iovec){.iov_base = (void *)pieces[i].bytes, .iov_len = pieces[i].length};
            }
        }
        do {
            n = sendmsg(link->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        } while (n < 0 && errno == EINTR);
        if (n < 0) {
            int error = errno;

            link->kernel_full = rf_tcp_is_later(error);
            if (!link->kernel_full) {
                break_off(link, error);
            }
            break;
        }
        rf_stream_sent(link->stream, (size_t)n);
    }
}

size_t rf_link_read(struct rf_link *link, uint8_t *bytes, size_t length) {
    size_t taken = 0;

    while (taken < length) {
        const uint8_t *at;
        size_t part = least(rf_stream_unwritten(link->stream, &at), length - taken);

        if (part == 0) {
            break;
        }
        memcpy(bytes + taken, at, part);
        rf_stream_wrote(link->stream, part);
        taken += part;
    }
    return taken;
}

size_t rf_link_peek(const struct rf_link *link, uint8_t *bytes, size_t length) {
    const uint8_t *at;
    size_t part = least(rf_stream_unwritten(link->stream, &at), length);

    memcpy(bytes, at, part);
    return part;
}

bool rf_link_read_out(struct rf_link *link, int *error) {
    const uint8_t *at;

    if (rf_stream_unwritten(link->stream, &at) > 0 || !rf_link_end_in_sight(link)) {
        return false;
    }
    struct rf_stream_facts facts = facts_of(link);
    if (facts.at_fin) {
        rf_stream_wrote_fin(link->stream);
        send_all(link);
        *error = 0;
    } else {
        *error = facts.taken ? 0 : link->error != 0 ? link->error : facts.reset_there ? ECONNRESET : 0;
    }
    return true;
}

bool rf_link_end_in_sight(const struct rf_link *link) {
    struct rf_stream_facts facts = facts_of(link);

    return link->shut || link->state == RF_LINK_OVER || facts.ended_there || facts.reset_there;
}

size_t rf_link_write(struct rf_link *link, const uint8_t *bytes, size_t length) {
    size_t n = rf_stream_keep(link->stream, bytes, length);

    send_all(link);
    return n;
}

int rf_link_refuses(const struct rf_link *link) {
    struct rf_stream_facts facts = facts_of(link);

    if (link->state == RF_LINK_OVER) {
        return link->error != 0 ? link->error : EPIPE;
    }
    return facts.reset_there ? ECONNRESET : facts.stopped_there ? EPIPE : 0;
}

static bool kernel_has_room(const struct rf_link *link) {
    struct pollfd one = {.fd = link->fd, .events = POLLOUT};

    return poll(&one, 1, 0) > 0;
}

bool rf_link_writable(const struct rf_link *link) {
    if (rf_link_refuses(link) != 0) {
        return true; /* as a socket that tells so */
    }
    return rf_stream_room(link->stream) > 0 &&
           (link->state != RF_LINK_CARRIED || (!rf_stream_unsent(link->stream) && kernel_has_room(link)));
}

bool rf_link_readable(const struct rf_link *link) {
    const uint8_t *at;

    return rf_stream_unwritten(link->stream, &at) > 0 || rf_link_end_in_sight(link);
}

size_t rf_link_unread(const struct rf_link *link) {
    struct rf_stream_facts facts = facts_of(link);

    return (size_t)(facts.here.received - facts.here.written);
}

size_t rf_link_unconfirmed(const struct rf_link *link) {
    struct rf_stream_facts facts = facts_of(link);

    return link->state == RF_LINK_OVER ? 0 : (size_t)(facts.here.end - facts.acknowledged);
}

void rf_link_finish(struct rf_link *link) {
    rf_stream_finish(link->stream);
    send_all(link);
}

void rf_link_shut(struct rf_link *link) {
    link->shut = true;
    rf_link_finish(link);
}

void rf_link_leave(struct rf_link *link) {
    link->has_leg = false;
    rf_stream_finish(link->stream);
    rf_stream_stop(link->stream);
    send_all(link);
}

void rf_link_await_word(struct rf_link *link) { link->word_due = true; }

void rf_link_last_word(struct rf_link *link, bool broke) {
    if (link->word_due) {
        link->word_due = false;
        if (broke) {
            rf_stream_reset(link->stream);
        }
        send_all(link);
    }
}

/* ---- the connections ---- */

void rf_link_tell(struct rf_link *link, struct rf_positions *here) {
    rf_stream_tell(link->stream, here);
    link->in_being = link->in_being || !link->answers;
}

void rf_link_detach(struct rf_link *link) {
    if (link->state != RF_LINK_OVER && link->state != RF_LINK_BETWEEN) {
        between(link, 0);
    }
}

enum rf_wrong rf_link_resume(struct rf_link *link, const struct rf_positions *peer) {
    return rf_stream_resume(link->stream, peer);
}

static void set_queues(const struct rf_link *link) {
    rf_tcp_set_unsent(link->fd, rf_queues[link->postcopy ? RF_REGIME_FULL : RF_REGIME_PRECOPY].unsent);
}

void rf_link_adopt(struct rf_link *link, int fd) {
    close_connection(link);
    link->fd = fd;
    link->state = RF_LINK_CARRIED;
    link->was_session = true;
    link->lost_ns = 0;
    link->look_ns = 0;
    link->parting = false;
    rf_tcp_prepare(fd);
    set_queues(link);
    if (link->answers && !link->bulk) {
        rf_tcp_bound_unread(fd, RF_QUEUE_FAR, RF_LAN_ROUND_TRIP_US);
    }
    rf_tcp_probe(fd, SILENT_AFTER_S);
    send_all(link);
}

void rf_link_give_up(struct rf_link *link, int error) {
    if (link->state != RF_LINK_OVER) {
        link->error = error;
        over(link);
    }
}

/* ---- the pump ---- */

void rf_link_want(struct rf_link *link, struct pollfd *one) {
    if (link->leg_writes && rf_stream_room(link->stream) == 0) {
        (void)grow(link);
    }
    bool waits = link->kernel_full ||
                 (link->leg_writes && !rf_stream_unsent(link->stream) && rf_stream_room(link->stream) > 0);

    *one = (struct pollfd){.fd = link->fd, .events = (short)(POLLIN | (waits ? POLLOUT : 0))};
    link->leg_writes = false;
}

int rf_link_timeout_ms(const struct rf_link *link, uint64_t now) {
    uint64_t due = link->look_ns;

    if (link->state != RF_LINK_CARRIED) {
        return -1;
    }
    if (link->acknowledge_ns != 0 && link->acknowledge_ns < due) {
        due = link->acknowledge_ns;
    }
    return due <= now ? 0 : (int)((due - now + ms(1) - 1) / ms(1));
}

static void receive(struct rf_link *link) {
    for (int i = 0; i < READS && link->state == RF_LINK_CARRIED; i++) {
        enum rf_wrong wrong;
        ssize_t n = receive_some(link);

        int error = n < 0 ? errno : 0;

        if (n < 0 && rf_tcp_is_later(error)) {
            return;
        }
        if (n <= 0) {
            between(link, error);
            return;
        }
        wrong = rf_stream_take(link->stream, link->rings->scratch, (size_t)n);
        if (wrong != RF_RIGHT) {
            between(link, -(int64_t)wrong);
            return;
        }
        if (n < RF_LINK_SCRATCH) {
            break;
        }
    }
    widen(link);
}

/* Whether both streams are over and nothing more is to be told. A RESET is answered with END. */
static bool is_complete(const struct rf_link *link, const struct rf_stream_facts *facts) {
    return facts->delivered && facts->taken && !facts->reset_here && !link->word_due;
}

/* How the two ends let go of it: who answers says END when it knows that both streams are over, and forgets;
 * who dials waits for that (session/course.py). */
static void settle(struct rf_link *link) {
    struct rf_stream_facts facts = facts_of(link);
    bool complete = is_complete(link, &facts);

    if (facts.end_there) {
        link->error = complete ? 0 : ECONNRESET; /* it cannot know what is not so */
        over(link);
    } else if (((complete && link->answers) || facts.reset_there) && !link->parting) {
        link->parting = true;
        rf_stream_end(link->stream);
        send_all(link);
        link->look_ns = now_ns() + ms(PART_MS);
    }
}

/* In postcopy what is sent and not taken goes before the page that a vCPU waits for. */
static void bound(struct rf_link *link) {
    size_t most = 2 * (size_t)rf_tcp_flight(link->fd);

    if (link->postcopy) {
        set_queues(link);
        rf_stream_bound(link->stream, most > POSTCOPY_LEAST ? most : POSTCOPY_LEAST);
    }
}

static void look_at_connection(struct rf_link *link, uint64_t now) {
    if (link->parting) { /* the peer has not closed the connection on which all is said */
        over(link);
    } else if (rf_tcp_silent(link->fd, SILENT_AFTER_S)) {
        break_off(link, ETIMEDOUT);
    } else {
        bound(link);
        link->look_ns = now + ms(LOOK_MS);
    }
}

static void mind_acknowledgement(struct rf_link *link, uint64_t now) {
    struct rf_stream_facts facts = facts_of(link);

    if (facts.told == facts.here.written) {
        link->acknowledge_ns = 0;
    } else if (link->acknowledge_ns == 0) {
        link->acknowledge_ns = now + ms(ACKNOWLEDGE_MS);
    } else if (link->acknowledge_ns <= now) {
        rf_stream_acknowledge(link->stream);
        link->acknowledge_ns = 0;
    }
}

void rf_link_move(struct rf_link *link, const struct pollfd *one, uint64_t now) {
    if (link->state != RF_LINK_CARRIED) {
        return;
    }
    if (one != NULL && one->fd == link->fd && one->revents != 0) {
        receive(link);
    }
    if (link->state == RF_LINK_CARRIED) {
        settle(link);
    }
    if (link->state == RF_LINK_CARRIED) {
        mind_acknowledgement(link, now);
        send_all(link);
    }
    if (link->state == RF_LINK_BETWEEN && link->parting) {
        over(link); /* all is said, and it has heard so, or asks again */
    }
    if (link->state == RF_LINK_CARRIED && now >= link->look_ns) {
        look_at_connection(link, now);
    }
}

void rf_link_look(const struct rf_link *link, struct rf_link_view *view) {
    struct rf_stream_facts facts = facts_of(link);

    *view = (struct rf_link_view){
        .state = link->state,
        .channel = link->place.channel,
        .error = (uint64_t)link->lost_by,
        .has_leg = link->has_leg,
        .delivered = (uint64_t)facts.delivered,
        .complete = is_complete(link, &facts),
        .word_due = link->word_due,
        .broke_there = (uint64_t)facts.reset_there,
        .lost_ns = link->lost_ns,
        .moved = facts.here.received + facts.acknowledged,
        .taken = facts.here.written,
        .end = facts.here.end,
        .retransmitted = facts.retransmitted,
        .kept = facts.here.end - facts.acknowledged + facts.here.received - facts.here.written,
        .rings = link->reserved,
    };
    memcpy(view->id, link->id, sizeof(view->id));
}
