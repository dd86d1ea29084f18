#include "relay.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "replay.h"

enum {
    PRECOPY_CHUNK = 64 * 1024,  /* before postcopy throughput counts */
    POSTCOPY_CHUNK = 16 * 1024, /* from then on what is queued is latency (DESIGN 7) */
    RETURN_CHUNK = 4 * 1024,
    RING_SIZE = 16,
    LOOK_RETRIES = 100,
    SILENCE_LOOK_MS = 250,
    LINGER_MS = 1000, /* for the far side to take what was sent before it */
    VIEW_WORDS = sizeof(struct rf_relay_view) / sizeof(uint64_t),
};

enum command_kind { COMMAND_ATTACH, COMMAND_CLOSE, COMMAND_POSTCOPY, COMMAND_COMPLETE, COMMAND_STOP };

struct command {
    enum command_kind kind;
    int local_fd;
    int far_fd;
    bool recovered;
    bool may_replay;
    uint64_t channel;
    bool keep_local;
};

struct told {
    uint32_t facts;
    uint32_t channel_facts;
    uint32_t forward_opaque;
    uint32_t return_opaque;
    uint64_t channel;
    uint64_t local_state;
    uint64_t far_state;
};

struct rf_relay {
    enum rf_relay_side side;
    pthread_t thread;
    int command_event;
    int notify_event;

    /* One producer (the caller), one consumer (the pump). */
    struct command ring[RING_SIZE];
    _Atomic uint32_t ring_head; /* next to be taken */
    _Atomic uint32_t ring_tail; /* next to be filled */

    /* The sequence lock: odd while the pump writes. */
    _Atomic uint64_t sequence;
    _Atomic uint64_t published[VIEW_WORDS];

    /* All below belongs to the pump's thread. */
    struct rf_tracker *tracker;
    struct rf_replay replay;
    struct rf_leg local;
    struct rf_leg far;
    struct rf_relay_view view;
    struct told told;
    unsigned dead_after_s;
    bool in_postcopy;         /* as told, for a stream that cannot be read */
    bool probing;             /* postcopy: the far leg's silence counts */
    uint64_t next_silence_ns; /* when to look at it again */
    uint64_t
        linger_until_ns; /* the local leg has ended and the far one is read until it ends too; 0 for not */
    bool forward_waits;  /* there is something to read, but no room to send it */
    bool return_waits;
    size_t forward_off;
    size_t forward_len;
    uint8_t forward[PRECOPY_CHUNK];
    uint8_t backward[RETURN_CHUNK];
};

static uint64_t now_ns(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void signal_event(int fd) {
    const uint64_t one = 1;
    ssize_t n = write(fd, &one, sizeof(one));

    (void)n; /* EAGAIN: it is signalled already */
}

static void clear_event(int fd) {
    uint64_t count;
    ssize_t n = read(fd, &count, sizeof(count));

    (void)n; /* EAGAIN: it was not signalled */
}

/* ---- what others may look at ---- */

/* What others wait for is told at once; counters they look up when they like. */
static bool has_news(struct rf_relay *relay, const uint64_t *words) {
    const struct told now = {
        .facts = rf_tracker_facts(relay->tracker),
        .channel_facts = rf_tracker_channel_facts(relay->tracker),
        .forward_opaque = rf_tracker_forward_opaque(relay->tracker),
        .return_opaque = rf_tracker_return_opaque(relay->tracker),
        .channel = words[0],
        .local_state = words[1],
        .far_state = words[2],
    };
    bool news = now.facts != relay->told.facts || now.channel_facts != relay->told.channel_facts ||
                now.forward_opaque != relay->told.forward_opaque ||
                now.return_opaque != relay->told.return_opaque || now.channel != relay->told.channel ||
                now.local_state != relay->told.local_state || now.far_state != relay->told.far_state;

    relay->told = now;
    return news;
}

static void publish(struct rf_relay *relay) {
    uint64_t words[VIEW_WORDS];
    uint64_t sequence;

    relay->view.local_state = relay->local.state;
    relay->view.far_state = relay->far.state;
    relay->view.local_error = (uint64_t)relay->local.error;
    relay->view.far_error = (uint64_t)relay->far.error;
    relay->view.replayed = relay->replay.replayed;
    relay->view.held = relay->replay.held_count;
    relay->view.last_replay_ns = relay->replay.last_replay_ns;
    memcpy(words, &relay->view, sizeof(words));

    sequence = atomic_load_explicit(&relay->sequence, memory_order_relaxed);
    atomic_store_explicit(&relay->sequence, sequence + 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    for (size_t i = 0; i < VIEW_WORDS; i++) {
        atomic_store_explicit(&relay->published[i], words[i], memory_order_relaxed);
    }
    atomic_store_explicit(&relay->sequence, sequence + 2, memory_order_release);
    if (has_news(relay, words)) {
        signal_event(relay->notify_event);
    }
}

bool rf_relay_look(const struct rf_relay *relay, struct rf_relay_view *view) {
    for (int i = 0; i < LOOK_RETRIES; i++) {
        uint64_t words[VIEW_WORDS];
        uint64_t before = atomic_load_explicit(&relay->sequence, memory_order_acquire);

        for (size_t w = 0; w < VIEW_WORDS; w++) {
            words[w] = atomic_load_explicit(&relay->published[w], memory_order_relaxed);
        }
        atomic_thread_fence(memory_order_acquire);
        if ((before & 1) == 0 && before == atomic_load_explicit(&relay->sequence, memory_order_relaxed)) {
            memcpy(view, words, sizeof(words));
            return true;
        }
    }
    return false;
}

/* ---- the two pipes ---- */

static bool leg_gone(const struct rf_leg *leg) {
    return leg->state == RF_LEG_ENDED || leg->state == RF_LEG_FAILED || leg->state == RF_LEG_REFUSED;
}

static struct rf_leg *forward_from(struct rf_relay *relay) {
    return relay->side == RF_RELAY_SOURCE ? &relay->local : &relay->far;
}

static struct rf_leg *forward_to(struct rf_relay *relay) {
    return relay->side == RF_RELAY_SOURCE ? &relay->far : &relay->local;
}

static bool forward_pending(const struct rf_relay *relay) { return relay->forward_off < relay->forward_len; }

static void forward_write(struct rf_relay *relay) {
    size_t n = rf_leg_write(forward_to(relay), relay->forward + relay->forward_off,
                            relay->forward_len - relay->forward_off);

    relay->forward_off += n;
    relay->view.forward_bytes += n;
}

static void forward_read(struct rf_relay *relay) {
    bool postcopy = relay->in_postcopy || rf_tracker_facts(relay->tracker) & RF_FACT_PACKAGED_BEGUN;
    size_t chunk = postcopy ? POSTCOPY_CHUNK : PRECOPY_CHUNK;
    size_t n;

    if (!rf_leg_writable(forward_to(relay))) {
        relay->forward_waits = true;
        return;
    }
    relay->forward_waits = false;
    n = rf_leg_read(forward_from(relay), relay->forward, chunk);
    if (n > 0) {
        rf_tracker_forward(relay->tracker, relay->forward, n, now_ns());
        relay->forward_off = 0;
        relay->forward_len = n;
        forward_write(relay);
    }
}

static void return_write(struct rf_relay *relay) {
    struct rf_leg *to = forward_from(relay);
    struct rf_replay *replay = &relay->replay;

    for (;;) {
        size_t n;

        rf_replay_refill(replay, now_ns());
        if (rf_replay_pending(replay) == 0) {
            return;
        }
        n = rf_leg_write(to, replay->out.data + replay->out.off, rf_replay_pending(replay));
        replay->out.off += n;
        relay->view.return_bytes += n;
        if (n == 0) {
            break;
        }
    }
    if (to->state != RF_LEG_OPEN) {
        rf_replay_discard(replay);
    }
}

static void return_read(struct rf_relay *relay) {
    struct rf_leg *to = forward_from(relay);
    size_t n;

    /* With the far leg lost, what the destination says is still read: its PONG ends a hold (legs.py). */
    if (to->state == RF_LEG_OPEN && !rf_leg_writable(to)) {
        relay->return_waits = true;
        return;
    }
    relay->return_waits = false;
    n = rf_leg_read(forward_to(relay), relay->backward, sizeof(relay->backward));
    if (n > 0) {
        rf_replay_feed(&relay->replay, relay->backward, n, now_ns());
        if (relay->replay.foreign && relay->far.state == RF_LEG_OPEN) {
            relay->far.state = RF_LEG_REFUSED;
        }
        if (to->state == RF_LEG_OPEN) {
            return_write(relay);
        } else {
            rf_replay_discard(&relay->replay);
        }
    }
}

/* ---- legs that come and go ---- */

static void mark_lost(struct rf_relay *relay) {
    if (relay->view.lost_ns == 0) {
        relay->view.lost_ns = now_ns();
        rf_tracker_channel_lost(relay->tracker, relay->view.lost_ns);
    }
}

static void drain_far(struct rf_relay *relay) {
    while (rf_leg_read(&relay->far, relay->backward, sizeof(relay->backward)) > 0) {
        /* the local leg, which this was for, has ended */
    }
}

static void settle_legs(struct rf_relay *relay) {
    if (leg_gone(&relay->far) && relay->far.fd >= 0) {
        mark_lost(relay);
        rf_leg_close(&relay->far);
        relay->linger_until_ns = 0;
        relay->forward_waits = relay->return_waits = false;
    }
    if (leg_gone(&relay->local) && relay->local.fd >= 0) {
        mark_lost(relay);
        rf_leg_close(&relay->local); /* QEMU has closed its end, or it is dead */
        relay->forward_waits = relay->return_waits = false;
        if (relay->far.fd >= 0) {
            relay->linger_until_ns = now_ns() + (uint64_t)LINGER_MS * 1000000u;
        }
    }
    if (relay->linger_until_ns != 0) {
        bool unsent =
            relay->side == RF_RELAY_SOURCE ? forward_pending(relay) : rf_replay_pending(&relay->replay) > 0;

        if (!unsent) {
            rf_leg_end_writing(&relay->far);
        }
        if (now_ns() >= relay->linger_until_ns) {
            rf_leg_close(&relay->far);
            relay->linger_until_ns = 0;
        }
    }
}

/* What the destination has asked for in the meantime belongs on record: not every QEMU asks again. */
static void record_rest(struct rf_relay *relay) {
    size_t left = rf_leg_end_reading(&relay->local);

    while (left > 0) {
        size_t most = left < sizeof(relay->backward) ? left : sizeof(relay->backward);
        size_t n = rf_leg_read(&relay->local, relay->backward, most);

        if (n == 0) {
            break;
        }
        rf_replay_discard(&relay->replay);
        rf_replay_feed(&relay->replay, relay->backward, n, now_ns());
        left -= n;
    }
}

static void close_channel(struct rf_relay *relay) {
    if (relay->local.fd >= 0) {
        /* Offer what is here once more; a QEMU that does not take it now will ask for it again after the
         * recovery. */
        if (relay->side == RF_RELAY_SOURCE) {
            if (rf_replay_pending(&relay->replay) > 0) {
                return_write(relay);
            }
        } else {
            if (forward_pending(relay)) {
                forward_write(relay);
            }
            record_rest(relay);
        }
        rf_leg_close(&relay->local);
    }
    if (relay->far.fd >= 0) {
        rf_leg_close(&relay->far);
    }
    mark_lost(relay);
    relay->linger_until_ns = 0;
    relay->forward_off = relay->forward_len = 0;
    relay->forward_waits = relay->return_waits = false;
    rf_replay_discard(&relay->replay);
}

static void attach(struct rf_relay *relay, const struct command *command) {
    if (relay->local.fd >= 0 || relay->far.fd >= 0) {
        close_channel(relay);
    }
    relay->view.channel++;
    relay->view.lost_ns = 0;
    relay->forward_off = relay->forward_len = 0;
    relay->linger_until_ns = 0;
    relay->probing = false;
    rf_tracker_channel_begin(relay->tracker, command->recovered, now_ns());
    rf_replay_channel(&relay->replay, command->recovered, command->may_replay);
    rf_leg_adopt(&relay->local, command->local_fd);
    rf_leg_adopt(&relay->far, command->far_fd);
}

/* ---- commands ---- */

static int give(struct rf_relay *relay, const struct command *command) {
    uint32_t tail = atomic_load_explicit(&relay->ring_tail, memory_order_relaxed);
    uint32_t head = atomic_load_explicit(&relay->ring_head, memory_order_acquire);

    if (tail - head == RING_SIZE) {
        errno = EAGAIN;
        return -1;
    }
    relay->ring[tail % RING_SIZE] = *command;
    atomic_store_explicit(&relay->ring_tail, tail + 1, memory_order_release);
    signal_event(relay->command_event);
    return 0;
}

/* False when the thread is to end. */
static bool take_commands(struct rf_relay *relay) {
    bool go_on = true;
    uint32_t head = atomic_load_explicit(&relay->ring_head, memory_order_relaxed);

    clear_event(relay->command_event);
    while (head != atomic_load_explicit(&relay->ring_tail, memory_order_acquire)) {
        struct command command = relay->ring[head % RING_SIZE];

        atomic_store_explicit(&relay->ring_head, ++head, memory_order_release);
        switch (command.kind) {
        case COMMAND_ATTACH:
            attach(relay, &command);
            break;
        case COMMAND_CLOSE:
            if (command.channel == relay->view.channel) {
                close_channel(relay);
            }
            break;
        case COMMAND_POSTCOPY:
            relay->in_postcopy = true;
            break;
        case COMMAND_COMPLETE:
            rf_tracker_complete(relay->tracker);
            break;
        case COMMAND_STOP:
            if (command.keep_local) {
                rf_leg_let_go(&relay->local);
            }
            close_channel(relay);
            go_on = false;
            break;
        }
    }
    return go_on;
}

/* ---- the loop ---- */

enum { POLL_COMMAND, POLL_LOCAL, POLL_FAR, POLL_COUNT };

static void want(struct pollfd *polls, const struct rf_relay *relay, const struct rf_leg *leg, short events) {
    struct pollfd *one = &polls[leg == &relay->local ? POLL_LOCAL : POLL_FAR];

    if (leg->fd >= 0) {
        one->fd =
            leg->fd; /* a leg that nothing is wanted of stays out, for poll tells of a hang-up unasked */
        one->events |= events;
    }
}

static void prepare_polls(struct rf_relay *relay, struct pollfd *polls) {
    struct rf_leg *from = forward_from(relay);
    struct rf_leg *to = forward_to(relay);

    polls[POLL_COMMAND] = (struct pollfd){.fd = relay->command_event, .events = POLLIN};
    polls[POLL_LOCAL] = (struct pollfd){.fd = -1};
    polls[POLL_FAR] = (struct pollfd){.fd = -1};

    if (forward_pending(relay) || relay->forward_waits) {
        want(polls, relay, to, POLLOUT);
    } else if (to->state == RF_LEG_OPEN) {
        want(polls, relay, from, POLLIN);
    }
    if (rf_replay_pending(&relay->replay) > 0 || relay->return_waits) {
        want(polls, relay, from, POLLOUT);
    } else if (from->state == RF_LEG_OPEN || relay->side == RF_RELAY_DESTINATION) {
        want(polls, relay, to, POLLIN);
    }
    if (relay->linger_until_ns != 0) {
        want(polls, relay, &relay->far, POLLIN);
    }
}

static short happened(const struct pollfd *polls, const struct rf_relay *relay, const struct rf_leg *leg) {
    const struct pollfd *one = &polls[leg == &relay->local ? POLL_LOCAL : POLL_FAR];

    return one->fd >= 0 && one->fd == leg->fd ? one->revents : 0;
}

static void move_bytes(struct rf_relay *relay, const struct pollfd *polls) {
    const short gone = POLLERR | POLLHUP | POLLNVAL;
    struct rf_leg *from = forward_from(relay);
    struct rf_leg *to = forward_to(relay);

    if (relay->linger_until_ns != 0 && happened(polls, relay, &relay->far) & (POLLIN | gone)) {
        drain_far(relay);
    }
    if (forward_pending(relay)) {
        if (happened(polls, relay, to) & (POLLOUT | gone)) {
            forward_write(relay);
        }
    } else if (to->state == RF_LEG_OPEN &&
               ((happened(polls, relay, from) & (POLLIN | gone)) ||
                (relay->forward_waits && happened(polls, relay, to) & (POLLOUT | gone)))) {
        forward_read(relay);
    }
    if (rf_replay_pending(&relay->replay) > 0) {
        if (happened(polls, relay, from) & (POLLOUT | gone)) {
            return_write(relay);
        }
    } else if ((happened(polls, relay, to) & (POLLIN | gone)) ||
               (relay->return_waits && happened(polls, relay, from) & (POLLOUT | gone))) {
        return_read(relay);
    }
}

static bool silence_counts(const struct rf_relay *relay) {
    return relay->in_postcopy ||
           rf_tracker_facts(relay->tracker) & (RF_FACT_PONG_3 | RF_FACT_RESUME_ACK_PASSED) ||
           rf_tracker_channel_facts(relay->tracker) & RF_FACT_RECV_BITMAP_ASKED;
}

static void mind_silence(struct rf_relay *relay) {
    uint64_t now;

    if (relay->far.state != RF_LEG_OPEN || (!relay->probing && !silence_counts(relay))) {
        return;
    }
    if (!relay->probing) {
        relay->probing = true;
        rf_leg_probe(&relay->far, relay->dead_after_s);
    }
    now = now_ns();
    if (now >= relay->next_silence_ns) {
        relay->next_silence_ns = now + (uint64_t)SILENCE_LOOK_MS * 1000000u;
        rf_leg_check_silence(&relay->far, relay->dead_after_s);
    }
}

static int poll_timeout_ms(const struct rf_relay *relay) {
    if (relay->linger_until_ns != 0) {
        return LINGER_MS / 10;
    }
    /* In precopy no deadline: the legs may be silent for as long as the guest and the network are. */
    return relay->probing && relay->far.state == RF_LEG_OPEN ? SILENCE_LOOK_MS : -1;
}

static void *pump(void *opaque) {
    struct rf_relay *relay = opaque;
    bool go_on = true;

    while (go_on) {
        struct pollfd polls[POLL_COUNT];

        prepare_polls(relay, polls);
        if (poll(polls, POLL_COUNT, poll_timeout_ms(relay)) < 0) {
            continue; /* EINTR cannot be, all signals are blocked; ENOMEM passes */
        }
        move_bytes(relay, polls);
        mind_silence(relay);
        settle_legs(relay);
        if (polls[POLL_COMMAND].revents != 0) {
            go_on = take_commands(relay);
        }
        publish(relay);
    }
    return NULL;
}

/* ---- life ---- */

static void relay_free(struct rf_relay *relay) {
    if (relay->command_event >= 0) {
        close(relay->command_event);
    }
    if (relay->notify_event >= 0) {
        close(relay->notify_event);
    }
    rf_replay_free(&relay->replay);
    rf_tracker_free(relay->tracker);
    free(relay);
}

struct rf_relay *rf_relay_start(int side, uint64_t ceiling, unsigned dead_after_s, int fd, int old_fd,
                                const uint8_t *key, size_t key_length) {
    struct rf_relay *relay = calloc(1, sizeof(*relay));
    sigset_t all;
    sigset_t before;
    int error;

    if (relay == NULL) {
        return NULL;
    }
    relay->dead_after_s = dead_after_s;
    relay->side = side == RF_RELAY_SOURCE ? RF_RELAY_SOURCE : RF_RELAY_DESTINATION;
    rf_leg_init(&relay->local);
    rf_leg_init(&relay->far);
    relay->notify_event = -1;
    relay->command_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (relay->command_event >= 0) {
        relay->notify_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    }
    relay->tracker =
        relay->notify_event < 0 ? NULL : rf_tracker_new_kept(ceiling, fd, old_fd, key, key_length);
    if (relay->tracker == NULL ||
        !rf_replay_init(&relay->replay, relay->tracker, relay->side == RF_RELAY_SOURCE, RETURN_CHUNK)) {
        error = relay->notify_event < 0 ? errno : ENOMEM;
        relay_free(relay);
        errno = error;
        return NULL;
    }
    if (relay->side == RF_RELAY_DESTINATION) {
        rf_tracker_trust_bitmaps(relay->tracker);
    }
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&relay->thread, NULL, pump, relay);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error != 0) {
        relay_free(relay);
        errno = error;
        return NULL;
    }
    return relay;
}

int rf_relay_notify_fd(const struct rf_relay *relay) { return relay->notify_event; }

struct rf_tracker *rf_relay_tracker(struct rf_relay *relay) { return relay->tracker; }

int rf_relay_attach(struct rf_relay *relay, int local_fd, int far_fd, bool recovered, bool may_replay) {
    return give(relay, &(struct command){.kind = COMMAND_ATTACH,
                                         .local_fd = local_fd,
                                         .far_fd = far_fd,
                                         .recovered = recovered,
                                         .may_replay = may_replay});
}

int rf_relay_close_channel(struct rf_relay *relay, uint64_t channel) {
    return give(relay, &(struct command){.kind = COMMAND_CLOSE, .channel = channel});
}

int rf_relay_in_postcopy(struct rf_relay *relay) {
    return give(relay, &(struct command){.kind = COMMAND_POSTCOPY});
}

int rf_relay_complete(struct rf_relay *relay) {
    return give(relay, &(struct command){.kind = COMMAND_COMPLETE});
}

void rf_relay_stop(struct rf_relay *relay, bool keep_local) {
    const struct timespec pause = {.tv_nsec = 1000000};

    while (give(relay, &(struct command){.kind = COMMAND_STOP, .keep_local = keep_local}) < 0) {
        nanosleep(&pause, NULL); /* the ring is full for as long as the pump needs to empty it */
    }
    pthread_join(relay->thread, NULL);
    relay_free(relay);
}
