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

#include "crash.h"
#include "lane.h"
#include "pipe.h"
#include "replay.h"

enum {
    PRECOPY_CHUNK = RF_PIPE_ROOM, /* before postcopy throughput counts */
    POSTCOPY_CHUNK = 16 * 1024,   /* from then on what is queued is latency */
    RETURN_CHUNK = 4 * 1024,
    RING_SIZE = 16,
    LANES_MAX = 255, /* as many as multifd-channels can be (qapi/migration.json) */
    LOOK_RETRIES = 100,
    SILENCE_LOOK_MS = 250,
    LINGER_MS = 1000, /* for the far side to take what was sent before it */
    STUCK_MS = 1000,  /* a lane of a source in doubt brings nothing and does not end */
    MISSED_MS = 1000, /* the end of a lane that QEMU goes on to write on was not that of the channel */
    VIEW_WORDS = sizeof(struct rf_relay_view) / sizeof(uint64_t),
};

enum command_kind {
    COMMAND_ATTACH,
    COMMAND_LANE,
    COMMAND_LOSE,
    COMMAND_CLOSE,
    COMMAND_POSTCOPY,
    COMMAND_COMPLETE,
    COMMAND_STOP
};

struct command {
    enum command_kind kind;
    int local_fd;
    int far_fd;
    bool recovered;
    bool may_replay;
    unsigned lanes;
    enum rf_lane_kind lane_kind;
    int error;
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
    uint64_t lanes;
    uint64_t waiting;
};

enum { POLL_COMMAND, POLL_LOCAL, POLL_FAR, POLL_LANES, POLL_MAX = POLL_LANES + LANES_MAX * RF_LANE_POLLS };

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
    struct rf_lane *lanes[LANES_MAX];
    unsigned lanes_wanted;
    struct pollfd polls[POLL_MAX];
    struct rf_relay_view view;
    struct told told;
    unsigned dead_after_s;
    bool in_postcopy;         /* as told, for a stream that cannot be read */
    bool probing;             /* postcopy: the far leg's silence counts */
    uint64_t next_silence_ns; /* when to look at it again */
    uint64_t
        linger_until_ns;    /* the local leg has ended and the far one is read until it ends too; 0 for not */
    bool return_waits;      /* there is something to read, but no room to send it */
    uint64_t stuck_from_ns; /* draining for a source in doubt, and nothing moves; 0 for not */
    uint64_t stuck_bytes;   /* forward_bytes then */
    uint64_t missed_from_ns; /* QEMU has more for a lane that is missed; 0 for not */
    struct rf_pipe forward;
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

/* Whether the forward stream cannot be read, so that its facts tell nothing. */
static bool unread(const struct rf_relay *relay) {
    return rf_tracker_forward_opaque(relay->tracker) != RF_OPAQUE_NO;
}

/* Whether what is read must not pass before the lanes are there. */
static bool forward_held(const struct rf_relay *relay) {
    const uint32_t gates = RF_FACT_PACKAGED_BEGUN | RF_FACT_RESUME_SENT;

    return relay->view.lanes < relay->lanes_wanted && (rf_tracker_channel_facts(relay->tracker) & gates) != 0;
}

/* Whether they must be added as soon as they come: where nothing can be read nothing is held back. */
static bool lanes_due(const struct rf_relay *relay) {
    return relay->view.lanes < relay->lanes_wanted &&
           (unread(relay) || (forward_held(relay) && rf_pipe_pending(&relay->forward)));
}

/* Whether the source may have sent all. Behind device state, as every precopy migration ends, EOF cannot be
 * read; that of multifd alone goes over several connections. */
static bool may_have_completed(const struct rf_relay *relay) {
    uint32_t facts = rf_tracker_channel_facts(relay->tracker);

    return (facts & RF_FACT_EOF_PASSED) != 0 || (unread(relay) && (facts & RF_FACT_MULTIFD) != 0);
}

/*
 * The source has completed and closed its channel, and QEMU has not been given all of it yet. Nobody sends
 * that again: the end of the far leg is no news before.
 */
static bool draining(const struct rf_relay *relay) {
    if (relay->side != RF_RELAY_DESTINATION || relay->far.state != RF_LEG_ENDED ||
        relay->local.state != RF_LEG_OPEN || !may_have_completed(relay)) {
        return false;
    }
    for (unsigned i = 0; i < relay->view.lanes; i++) {
        if (!rf_lane_drained(relay->lanes[i])) {
            return true;
        }
    }
    return rf_pipe_pending(&relay->forward);
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
        .lanes = relay->view.lanes,
        .waiting = relay->view.waiting,
    };
    bool news = now.facts != relay->told.facts || now.channel_facts != relay->told.channel_facts ||
                now.forward_opaque != relay->told.forward_opaque ||
                now.return_opaque != relay->told.return_opaque || now.channel != relay->told.channel ||
                now.local_state != relay->told.local_state || now.far_state != relay->told.far_state ||
                now.lanes != relay->told.lanes || now.waiting != relay->told.waiting;

    relay->told = now;
    return news;
}

static void publish(struct rf_relay *relay) {
    uint64_t words[VIEW_WORDS];
    uint64_t sequence;

    relay->view.local_state = relay->local.state;
    relay->view.far_state = draining(relay) ? RF_LEG_OPEN : relay->far.state;
    relay->view.local_error = (uint64_t)relay->local.error;
    relay->view.far_error = (uint64_t)relay->far.error;
    relay->view.replayed = relay->replay.replayed;
    relay->view.held = relay->replay.held_count;
    relay->view.last_replay_ns = relay->replay.last_replay_ns;
    relay->view.waiting = lanes_due(relay);
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

static struct rf_leg *forward_from(struct rf_relay *relay) {
    return relay->side == RF_RELAY_SOURCE ? &relay->local : &relay->far;
}

static struct rf_leg *forward_to(struct rf_relay *relay) {
    return relay->side == RF_RELAY_SOURCE ? &relay->far : &relay->local;
}

static void forward_write(struct rf_relay *relay) {
    if (!forward_held(relay)) {
        relay->view.forward_bytes += rf_pipe_write(&relay->forward, forward_to(relay));
    }
}

static void forward_read(struct rf_relay *relay) {
    bool postcopy = relay->in_postcopy || rf_tracker_facts(relay->tracker) & RF_FACT_PACKAGED_BEGUN;
    size_t chunk = postcopy ? POSTCOPY_CHUNK : PRECOPY_CHUNK;
    size_t n = rf_pipe_read(&relay->forward, forward_from(relay), forward_to(relay), chunk);

    if (n > 0) {
        rf_tracker_forward(relay->tracker, relay->forward.data, n, now_ns());
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

static void close_far_lanes(struct rf_relay *relay) {
    for (unsigned i = 0; i < relay->view.lanes; i++) {
        rf_leg_close(&relay->lanes[i]->far);
    }
}

static void drain_far(struct rf_relay *relay) {
    while (rf_leg_read(&relay->far, relay->backward, sizeof(relay->backward)) > 0) {
        /* the local leg, which this was for, has ended */
    }
}

/*
 * A lane that is lost is the channel's loss, save
 *  - at the end, when the destination closes its lanes before it says SHUT on the main one;
 *  - a lane that ends in order where it cannot be read whether that is the end: the main one ends too if not,
 * or QEMU goes on to write (lane_is_missed);
 *  - a multifd lane that ends in order: a source that has completed closes all, and this end can arrive
 * before what is still under way on the others.
 */
static void settle_lane(struct rf_relay *relay, struct rf_lane *lane) {
    bool in_order = lane->far.state == RF_LEG_ENDED && (unread(relay) || lane->kind == RF_LANE_MULTIFD);

    rf_lane_pass_end(lane);
    if (rf_leg_lost(&lane->far) && lane->far.fd >= 0) {
        rf_leg_close(&lane->far);
        if (relay->far.state == RF_LEG_OPEN && !in_order &&
            (rf_tracker_channel_facts(relay->tracker) & RF_FACT_EOF_PASSED) == 0) {
            relay->far.state = lane->far.state;
            relay->far.error = lane->far.error;
        }
    }
}

/* Whether a lane has ended in order that may be written on yet, which was not the end then. */
static bool lane_is_missed(const struct rf_relay *relay, const struct rf_lane *lane) {
    const uint32_t end = RF_FACT_EOF_PASSED | RF_FACT_SHUT_PASSED;

    return relay->side == RF_RELAY_SOURCE && relay->far.state == RF_LEG_OPEN &&
           lane->kind == RF_LANE_PREEMPT && lane->far.state == RF_LEG_ENDED &&
           lane->local.state == RF_LEG_OPEN && (rf_tracker_channel_facts(relay->tracker) & end) == 0;
}

/*
 * A channel that misses a lane is lost, unless it ends by itself: a source may write a last word on the lane
 * behind EOF, when the destination has ended it already (migration/migration.c,
 * migration_completion_postcopy), and must have SHUT then.
 */
static void mind_missed_lane(struct rf_relay *relay) {
    bool missed = false;

    for (unsigned i = 0; i < relay->view.lanes; i++) {
        missed = missed || lane_is_missed(relay, relay->lanes[i]);
    }
    if (!missed) {
        relay->missed_from_ns = 0;
    } else if (relay->missed_from_ns != 0 &&
               now_ns() - relay->missed_from_ns >= (uint64_t)MISSED_MS * 1000000u) {
        relay->far.state = RF_LEG_ENDED;
    }
}

/*
 * Where EOF cannot be read a source that was cut off looks like one that has completed, and its lanes may
 * never be drained: QEMU's threads for multifd wait at each round's end for the main thread, which waits for
 * what will not come (migration/multifd.c, multifd_recv_thread). So QEMU, when it has read all there was on
 * the main connection, is shown its end, as it would be without a relay; one that has all reads no further.
 */
static void show_end_if_stuck(struct rf_relay *relay) {
    bool in_doubt = draining(relay) && !rf_pipe_pending(&relay->forward) && !relay->local.write_ended &&
                    (rf_tracker_channel_facts(relay->tracker) & RF_FACT_EOF_PASSED) == 0;
    uint64_t now;

    if (!in_doubt) {
        relay->stuck_from_ns = 0;
        return;
    }
    now = now_ns();
    if (relay->stuck_from_ns == 0 || relay->stuck_bytes != relay->view.forward_bytes ||
        rf_leg_confirmed(&relay->local) < relay->local.sent) {
        relay->stuck_from_ns = now;
        relay->stuck_bytes = relay->view.forward_bytes;
    } else if (now - relay->stuck_from_ns >= (uint64_t)STUCK_MS * 1000000u) {
        rf_leg_end_writing(&relay->local);
        relay->stuck_from_ns = 0;
    }
}

static void settle_legs(struct rf_relay *relay) {
    for (unsigned i = 0; i < relay->view.lanes; i++) {
        settle_lane(relay, relay->lanes[i]);
    }
    mind_missed_lane(relay);
    if (rf_leg_lost(&relay->far) && relay->far.fd >= 0 && !draining(relay)) {
        mark_lost(relay);
        rf_leg_close(&relay->far);
        close_far_lanes(relay);
        relay->linger_until_ns = 0;
        relay->forward.waits = relay->return_waits = false;
    }
    if (rf_leg_lost(&relay->local) && relay->local.fd >= 0) {
        mark_lost(relay);
        rf_leg_close(&relay->local); /* QEMU has closed its end, or it is dead */
        relay->forward.waits = relay->return_waits = false;
        if (relay->far.fd >= 0) {
            relay->linger_until_ns = now_ns() + (uint64_t)LINGER_MS * 1000000u;
        }
    }
    if (relay->linger_until_ns != 0) {
        bool unsent = relay->side == RF_RELAY_SOURCE ? rf_pipe_pending(&relay->forward)
                                                     : rf_replay_pending(&relay->replay) > 0;

        if (!unsent) {
            rf_leg_end_writing(&relay->far);
        }
        if (unsent) {
            relay->linger_until_ns = now_ns() + (uint64_t)LINGER_MS * 1000000u;
        } else if (now_ns() >= relay->linger_until_ns) {
            rf_leg_close(&relay->far);
            relay->linger_until_ns = 0;
        }
    }
    show_end_if_stuck(relay);
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

static void drop_lanes(struct rf_relay *relay) {
    for (unsigned i = 0; i < relay->view.lanes; i++) {
        relay->view.forward_bytes += rf_lane_offer(relay->lanes[i]);
        rf_lane_free(relay->lanes[i]);
        relay->lanes[i] = NULL;
    }
    relay->view.lanes = 0;
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
            if (rf_pipe_pending(&relay->forward)) {
                forward_write(relay);
            }
            record_rest(relay);
        }
        rf_leg_close(&relay->local);
    }
    if (relay->far.fd >= 0) {
        rf_leg_close(&relay->far);
    }
    drop_lanes(relay);
    mark_lost(relay);
    relay->linger_until_ns = 0;
    rf_pipe_clear(&relay->forward);
    relay->return_waits = false;
    rf_replay_discard(&relay->replay);
}

static void attach(struct rf_relay *relay, const struct command *command) {
    if (relay->local.fd >= 0 || relay->far.fd >= 0 || relay->view.lanes > 0) {
        close_channel(relay);
    }
    relay->view.channel++;
    relay->view.lost_ns = 0;
    relay->lanes_wanted = command->lanes;
    rf_pipe_clear(&relay->forward); /* where both legs were lost the end of a channel may have stayed in it */
    relay->linger_until_ns = 0;
    relay->probing = false;
    rf_tracker_channel_begin(relay->tracker, command->recovered, now_ns());
    rf_replay_channel(&relay->replay, command->recovered, command->may_replay, command->lanes > 0);
    rf_leg_adopt(&relay->local, command->local_fd);
    rf_leg_adopt(&relay->far, command->far_fd);
}

static void add_lane(struct rf_relay *relay, const struct command *command) {
    struct rf_lane *lane = NULL;

    if (command->channel == relay->view.channel && relay->local.fd >= 0 &&
        relay->view.lanes < relay->lanes_wanted) {
        lane = rf_lane_new(command->lane_kind, relay->side == RF_RELAY_SOURCE, command->local_fd,
                           command->far_fd);
    }
    if (lane == NULL) {
        close(command->local_fd);
        close(command->far_fd);
        return;
    }
    relay->lanes[relay->view.lanes++] = lane;
    if (lane->kind == RF_LANE_PREEMPT) {
        rf_tracker_preempt_begin(relay->tracker, now_ns());
    } else {
        rf_tracker_pages_elsewhere(relay->tracker);
    }
    if (relay->far.fd < 0) {
        rf_leg_close(&lane->far);
    } else if (relay->probing) {
        rf_leg_probe(&lane->far, relay->dead_after_s);
    }
}

static void lose(struct rf_relay *relay, const struct command *command) {
    if (command->channel == relay->view.channel && relay->far.state == RF_LEG_OPEN) {
        relay->far.state = RF_LEG_FAILED;
        relay->far.error = command->error;
        settle_legs(relay);
    }
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

static void let_go_of_local_legs(struct rf_relay *relay) {
    rf_leg_let_go(&relay->local);
    for (unsigned i = 0; i < relay->view.lanes; i++) {
        rf_leg_let_go(&relay->lanes[i]->local);
    }
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
        case COMMAND_LANE:
            add_lane(relay, &command);
            break;
        case COMMAND_LOSE:
            lose(relay, &command);
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
                let_go_of_local_legs(relay);
            }
            close_channel(relay);
            go_on = false;
            break;
        }
    }
    return go_on;
}

/* ---- the loop ---- */

static unsigned prepare_polls(struct rf_relay *relay) {
    struct pollfd *polls = relay->polls;
    struct rf_leg *from = forward_from(relay);
    struct rf_leg *to = forward_to(relay);
    struct pollfd *from_poll = &polls[relay->side == RF_RELAY_SOURCE ? POLL_LOCAL : POLL_FAR];
    struct pollfd *to_poll = &polls[relay->side == RF_RELAY_SOURCE ? POLL_FAR : POLL_LOCAL];

    polls[POLL_COMMAND] = (struct pollfd){.fd = relay->command_event, .events = POLLIN};
    polls[POLL_LOCAL] = polls[POLL_FAR] = (struct pollfd){.fd = -1};

    if (forward_held(relay) && rf_pipe_pending(&relay->forward)) {
        if (from->state == RF_LEG_OPEN) {
            rf_leg_want(from, POLLRDHUP, from_poll); /* not read, but its end must show */
        }
    } else {
        rf_pipe_want(&relay->forward, from, to, from_poll, to_poll);
    }
    if (rf_replay_pending(&relay->replay) > 0 || relay->return_waits) {
        rf_leg_want(from, POLLOUT, from_poll);
    } else if (from->state == RF_LEG_OPEN || relay->side == RF_RELAY_DESTINATION) {
        rf_leg_want(to, POLLIN, to_poll);
    }
    if (relay->linger_until_ns != 0) {
        rf_leg_want(&relay->far, POLLIN, &polls[POLL_FAR]);
    }
    for (unsigned i = 0; i < relay->view.lanes; i++) {
        struct pollfd *lane_polls = &polls[POLL_LANES + i * RF_LANE_POLLS];

        rf_lane_want(relay->lanes[i], lane_polls);
        if (relay->missed_from_ns == 0 && lane_is_missed(relay, relay->lanes[i])) {
            rf_leg_want(&relay->lanes[i]->local, POLLIN, &lane_polls[RF_LANE_LOCAL]);
        }
    }
    return POLL_LANES + (unsigned)relay->view.lanes * RF_LANE_POLLS;
}

static void move_forward(struct rf_relay *relay, short from_events, short to_events) {
    if (forward_held(relay) && rf_pipe_pending(&relay->forward)) {
        (void)rf_leg_hung_up(forward_from(relay), from_events);
    } else if (rf_pipe_ready(&relay->forward, forward_to(relay), from_events, to_events)) {
        if (rf_pipe_pending(&relay->forward)) {
            forward_write(relay);
        } else {
            forward_read(relay);
        }
    }
}

static void move_bytes(struct rf_relay *relay) {
    const short gone = POLLERR | POLLHUP | POLLNVAL;
    short local_events = rf_leg_events(&relay->local, &relay->polls[POLL_LOCAL]);
    short far_events = rf_leg_events(&relay->far, &relay->polls[POLL_FAR]);
    short from_events = relay->side == RF_RELAY_SOURCE ? local_events : far_events;
    short to_events = relay->side == RF_RELAY_SOURCE ? far_events : local_events;

    if (relay->linger_until_ns != 0 && far_events & (POLLIN | gone)) {
        drain_far(relay);
    }
    move_forward(relay, from_events, to_events);
    if (rf_replay_pending(&relay->replay) == 0) {
        rf_replay_forward_passed(&relay->replay, now_ns());
        if (rf_replay_pending(&relay->replay) > 0 || relay->replay.replaying) {
            return_write(relay);
        }
    }
    if (rf_replay_pending(&relay->replay) > 0) {
        if (from_events & (POLLOUT | gone)) {
            return_write(relay);
        }
    } else if ((to_events & (POLLIN | gone)) || (relay->return_waits && from_events & (POLLOUT | gone))) {
        return_read(relay);
    }
    for (unsigned i = 0; i < relay->view.lanes; i++) {
        struct rf_lane *lane = relay->lanes[i];
        const struct pollfd *lane_polls = &relay->polls[POLL_LANES + i * RF_LANE_POLLS];

        relay->view.forward_bytes += rf_lane_move(lane, lane_polls, relay->tracker, now_ns());
        bool more = rf_pipe_pending(&lane->forward) ||
                    rf_leg_events(&lane->local, &lane_polls[RF_LANE_LOCAL]) & POLLIN;
        if (more && relay->missed_from_ns == 0 && lane_is_missed(relay, lane)) {
            relay->missed_from_ns = now_ns();
        }
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
        for (unsigned i = 0; i < relay->view.lanes; i++) {
            rf_leg_probe(&relay->lanes[i]->far, relay->dead_after_s);
        }
    }
    now = now_ns();
    if (now >= relay->next_silence_ns) {
        relay->next_silence_ns = now + (uint64_t)SILENCE_LOOK_MS * 1000000u;
        rf_leg_check_silence(&relay->far, relay->dead_after_s);
        for (unsigned i = 0; i < relay->view.lanes; i++) {
            rf_leg_check_silence(&relay->lanes[i]->far, relay->dead_after_s);
        }
    }
}

static int poll_timeout_ms(const struct rf_relay *relay) {
    if (relay->linger_until_ns != 0) {
        return LINGER_MS / 10;
    }
    if (relay->stuck_from_ns != 0 || relay->missed_from_ns != 0) {
        return STUCK_MS / 10;
    }
    /* In precopy no deadline: the legs may be silent for as long as the guest and the network are. */
    return relay->probing && relay->far.state == RF_LEG_OPEN ? SILENCE_LOOK_MS : -1;
}

static void *pump(void *opaque) {
    struct rf_relay *relay = opaque;
    bool go_on = true;

    while (go_on) {
        unsigned count = prepare_polls(relay);

        if (poll(relay->polls, count, poll_timeout_ms(relay)) < 0) {
            continue; /* EINTR cannot be, all signals are blocked; ENOMEM passes */
        }
        move_bytes(relay);
        mind_silence(relay);
        settle_legs(relay);
        if (relay->polls[POLL_COMMAND].revents != 0) {
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
    rf_crash_let_through(&all);
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

int rf_relay_attach(struct rf_relay *relay, int local_fd, int far_fd, bool recovered, bool may_replay,
                    unsigned lanes) {
    return give(relay, &(struct command){.kind = COMMAND_ATTACH,
                                         .local_fd = local_fd,
                                         .far_fd = far_fd,
                                         .recovered = recovered,
                                         .may_replay = may_replay,
                                         .lanes = lanes < LANES_MAX ? lanes : LANES_MAX});
}

int rf_relay_add_lane(struct rf_relay *relay, uint64_t channel, int kind, int local_fd, int far_fd) {
    return give(relay,
                &(struct command){.kind = COMMAND_LANE,
                                  .local_fd = local_fd,
                                  .far_fd = far_fd,
                                  .lane_kind = kind == RF_LANE_MULTIFD ? RF_LANE_MULTIFD : RF_LANE_PREEMPT,
                                  .channel = channel});
}

int rf_relay_lose(struct rf_relay *relay, uint64_t channel, int error) {
    return give(relay, &(struct command){.kind = COMMAND_LOSE, .channel = channel, .error = error});
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
