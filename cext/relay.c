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

#include "channel.h"
#include "crash.h"
#include "link.h"
#include "order.h"

enum {
    LOOK_RETRIES = 100,
    NO_MEMORY_PAUSE_MS = 10,
    STOP_WAIT_MS = 20,
    OFFER_LOOK_MS = 100,
    OFFER_WAIT_MS = 3000, /* for the destination's first word, once no more is sent before it */
    LINKS_MAX = 1 + RF_LANES_MAX,
    VIEW_WORDS = sizeof(struct rf_relay_view) / sizeof(uint64_t),
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
    uint64_t last_lanes;
};

enum { POLL_ORDERS, POLL_CHANNEL, POLL_MAX = POLL_CHANNEL + RF_CHANNEL_POLLS + LINKS_MAX };

struct rf_relay {
    struct rf_orders orders;
    struct rf_order stop; /* for which there is always memory */
    int notify_event;
    pthread_mutex_t lock;
    pthread_cond_t changed; /* one of these was set */
    bool has_ended;         /* the pump does nothing more than free all */
    bool is_left;           /* who started it does nothing more with it */

    /* The sequence lock: odd while the pump writes. */
    _Atomic uint64_t sequence;
    _Atomic uint64_t published[VIEW_WORDS];

    /* What the pump holds but for when it waits. Under it alone links, and the far leg's connection, are
     * looked at or changed. */
    pthread_mutex_t at_work;
    struct rf_link *links; /* of the newest channel, its main connection's first */
    _Atomic bool had_link; /* without it there is nothing to lock for */
    bool link_forgotten;   /* which is news */
    /* Of the lanes of the session that has ended; state NONE: there was none. */
    struct rf_link_view last[1 + RF_LANES_MAX];
    struct rf_rings rings;

    /* All below belongs to the pump's thread. */
    uint64_t offer_due_ns; /* until when the offer is waited for; 0: for as long as it takes */
    struct rf_tracker *tracker;
    struct rf_channel channel;
    struct pollfd polls[POLL_MAX];
    struct rf_relay_view view;
    struct told told;
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

/* ---- what others may look at ---- */

/* Each loss is news, though nobody was told of the connection before it. */
static bool links_have_news(struct rf_relay *relay) {
    bool news = relay->link_forgotten;

    for (struct rf_link *link = relay->links; link != NULL; link = link->next) {
        struct rf_link_view view;

        rf_link_look(link, &view);
        const struct rf_link_told now = {link->state,   link->lost_ns, view.delivered,
                                         view.complete, view.word_due, view.broke_there};

        news = news || now.state != link->told.state || now.lost_ns != link->told.lost_ns ||
               now.delivered != link->told.delivered || now.complete != link->told.complete ||
               now.word_due != link->told.word_due || now.broke_there != link->told.broke_there;
        link->told = now;
    }
    relay->link_forgotten = false;
    return news;
}

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
        .last_lanes = relay->view.last_lanes,
    };
    bool news = links_have_news(relay);

    news = news || now.facts != relay->told.facts || now.channel_facts != relay->told.channel_facts ||
           now.forward_opaque != relay->told.forward_opaque ||
           now.return_opaque != relay->told.return_opaque || now.channel != relay->told.channel ||
           now.local_state != relay->told.local_state || now.far_state != relay->told.far_state ||
           now.lanes != relay->told.lanes || now.waiting != relay->told.waiting ||
           now.last_lanes != relay->told.last_lanes;

    relay->told = now;
    return news;
}

static void publish(struct rf_relay *relay) {
    const struct rf_channel *channel = &relay->channel;
    uint64_t words[VIEW_WORDS];
    uint64_t sequence;

    relay->view.local_state = rf_channel_local_state(channel);
    relay->view.far_state = rf_channel_far_state(channel);
    relay->view.local_error = relay->view.local_state == RF_LEG_FAILED ? (uint64_t)channel->local.error : 0;
    relay->view.far_error = relay->view.far_state == RF_LEG_FAILED ? (uint64_t)channel->far.error : 0;
    relay->view.forward_bytes = channel->forward_bytes;
    relay->view.return_bytes = channel->return_bytes;
    relay->view.replayed = channel->replay.replayed;
    relay->view.held = channel->replay.held_count;
    relay->view.last_replay_ns = channel->replay.last_replay_ns;
    relay->view.lost_ns = channel->lost_ns;
    relay->view.lanes = channel->lane_count;
    relay->view.waiting = rf_channel_lanes_due(channel);
    relay->view.last_lanes = rf_channel_last_lanes(channel);
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

/* ---- links ---- */

static void forget_links(struct rf_relay *relay, bool all) {
    struct rf_link **at = &relay->links;

    while (*at != NULL) {
        struct rf_link *link = *at;

        if (all || (link->state == RF_LINK_OVER && !link->has_leg)) {
            *at = link->next;
            if (link->was_session) {
                rf_link_give_up(link, ECONNRESET);
                rf_link_look(link, &relay->last[link->place.lane]);
            }
            relay->link_forgotten = true;
            rf_link_free(link);
        } else {
            at = &link->next;
        }
    }
}

/* One for each connection that the channel has or will have, before all others; false: for none. */
static bool add_links(struct rf_relay *relay, const struct rf_order *order) {
    struct rf_link_place place = {relay->view.channel, 0, 1 + relay->channel.lanes_wanted};
    bool answers = order->session == RF_LINK_ANSWERS;

    for (unsigned left = place.lanes; left > 0; left--) {
        struct rf_link *link;

        place.lane = left - 1;
        link = rf_link_new(answers, order->id, place, &relay->rings);
        if (link != NULL && place.lane == 0 && order->tls && !rf_link_in_tls(link)) {
            rf_link_free(link);
            link = NULL;
        }
        if (link == NULL) {
            forget_links(relay, true);
            return false;
        }
        link->next = relay->links;
        relay->links = link;
    }
    return true;
}

static void begin_links(struct rf_relay *relay, const struct rf_order *order) {
    relay->offer_due_ns = 0;
    if (order->session == RF_LINK_NO || !add_links(relay, order)) {
        return;
    }
    atomic_store(&relay->had_link, true);
    memset(relay->last, 0, sizeof(relay->last));
    for (struct rf_link *link = relay->links; link != NULL; link = link->next) {
        rf_channel_give_link(&relay->channel, link->place.lane, link);
    }
}

/* Another channel follows: nobody waits for what those of the one before have to deliver yet. */
static void give_up_links(struct rf_relay *relay) {
    for (struct rf_link *link = relay->links; link != NULL; link = link->next) {
        if (rf_link_carries(link)) {
            rf_link_give_up(link, ECONNRESET);
        }
    }
}

static struct rf_link *find_link(const struct rf_relay *relay, unsigned lane) {
    struct rf_link *link = relay->links;

    while (link != NULL && link->place.lane != lane) {
        link = link->next;
    }
    return link;
}

/* How long until one of them is due, or the channel, -1 for ever; with what they want, so many entries. */
static int want_links(struct rf_relay *relay, struct pollfd *polls, unsigned *count, int timeout_ms) {
    uint64_t now = now_ns();
    unsigned i = 0;

    for (struct rf_link *link = relay->links; link != NULL; link = link->next) {
        int due = rf_link_timeout_ms(link, now);

        if (rf_channel_is_short(&relay->channel) && !link->postcopy) {
            link->postcopy = true;
            link->look_ns = 0;
        }
        rf_link_want(link, &polls[i++]);
        timeout_ms = due >= 0 && (timeout_ms < 0 || due < timeout_ms) ? due : timeout_ms;
    }
    *count = i;
    return timeout_ms;
}

static void move_links(struct rf_relay *relay, const struct pollfd *polls) {
    uint64_t now = now_ns();
    unsigned i = 0;

    for (struct rf_link *link = relay->links; link != NULL; link = link->next) {
        rf_link_move(link, polls != NULL ? &polls[i++] : NULL, now);
    }
    forget_links(relay, false);
}

/* Whether a connection of the channel has sent all that it may before the other host is known. */
static bool any_is_full(const struct rf_relay *relay) {
    const struct rf_channel *channel = &relay->channel;
    bool full = rf_link_plain_room(channel->far.link) == 0;

    for (unsigned i = 0; i < channel->lane_count && !full; i++) {
        full = channel->lanes[i]->far.link != NULL && rf_link_plain_room(channel->lanes[i]->far.link) == 0;
    }
    return full;
}

/* A destination that says nothing, of which QEMU is to be heard by now: it goes on without a session. */
static void mind_offer(struct rf_relay *relay) {
    struct rf_leg *far = &relay->channel.far;
    bool waits = rf_link_looks(far->link) && any_is_full(relay);

    if (!waits) {
        relay->offer_due_ns = 0;
    } else if (relay->offer_due_ns == 0) {
        relay->offer_due_ns = now_ns() + OFFER_WAIT_MS * 1000000ull;
    } else if (now_ns() >= relay->offer_due_ns) {
        rf_leg_drop_link(far);
    }
}

/* The lanes of a channel are what its main connection is. */
static void mind_lanes(struct rf_relay *relay) {
    const struct rf_link *main = find_link(relay, 0);
    bool is_session = main != NULL ? main->state != RF_LINK_OVER || main->was_session
                                   : relay->last[0].state != RF_LINK_NONE;

    for (struct rf_link *link = relay->links; link != NULL; link = link->next) {
        if (link->place.lane == 0) {
            continue;
        }
        if (!is_session) {
            rf_channel_drop_lane_links(&relay->channel);
            return;
        }
        if (main != NULL) {
            rf_link_follow(link, main);
        }
    }
}

/* ---- orders ---- */

static void carry_out(struct rf_relay *relay, struct rf_order *order) {
    struct rf_channel *channel = &relay->channel;
    bool current = order->channel == relay->view.channel;

    switch (order->kind) {
    case RF_ORDER_ATTACH:
        give_up_links(relay);
        rf_channel_begin(channel, order->local_fd, order->far_fd, order->recovered, order->may_replay,
                         order->lanes);
        forget_links(relay, true);
        relay->view.channel++;
        begin_links(relay, order);
        break;
    case RF_ORDER_LANE:
        rf_channel_add_lane(channel, order->lane, order->number, order->local_fd, order->far_fd, current);
        break;
    case RF_ORDER_NO_MORE_LANES:
        if (current) {
            rf_channel_no_more_lanes(channel);
        }
        break;
    case RF_ORDER_LOSE:
        if (current) {
            rf_channel_lose(channel, order->error);
        }
        break;
    case RF_ORDER_SAY:
        if (current) {
            rf_channel_say(channel, order->say, order->say_length);
        }
        break;
    case RF_ORDER_CLOSE:
        if (current) {
            rf_channel_close(channel, false);
        }
        break;
    case RF_ORDER_POSTCOPY_RUNS:
        channel->in_postcopy = true;
        break;
    case RF_ORDER_COMPLETE:
        rf_tracker_complete(relay->tracker);
        break;
    case RF_ORDER_STOP:
        rf_channel_close(channel, order->keep_local);
        break;
    }
}

/* False when the thread is to end. */
static bool take_orders(struct rf_relay *relay) {
    struct rf_order *order = rf_orders_take(&relay->orders);

    while (order != NULL) {
        struct rf_order *next = order->next;

        carry_out(relay, order);
        if (order->kind == RF_ORDER_STOP) {
            return false; /* nothing is put behind it */
        }
        free(order);
        order = next;
    }
    return true;
}

static int give(struct rf_relay *relay, const struct rf_order *order) {
    struct rf_order *copy = malloc(sizeof(*copy));

    if (copy == NULL) {
        errno = ENOMEM;
        return -1;
    }
    *copy = *order;
    rf_orders_put(&relay->orders, copy);
    return 0;
}

/* ---- the loop ---- */

static bool turn(struct rf_relay *relay) {
    struct pollfd *polls = relay->polls;
    unsigned count = rf_channel_want(&relay->channel, &polls[POLL_CHANNEL]);
    struct pollfd *link_polls = &polls[POLL_CHANNEL + count];
    unsigned link_count = 0;
    int timeout_ms = want_links(relay, link_polls, &link_count, rf_channel_timeout_ms(&relay->channel));
    bool go_on = true;
    int found;

    if (rf_channel_ready(&relay->channel, &polls[POLL_CHANNEL])) {
        timeout_ms = 0;
    } else if (relay->offer_due_ns != 0 && (timeout_ms < 0 || timeout_ms > OFFER_LOOK_MS)) {
        timeout_ms = OFFER_LOOK_MS;
    }
    polls[POLL_ORDERS] = (struct pollfd){.fd = relay->orders.event, .events = POLLIN};
    pthread_mutex_unlock(&relay->at_work);
    found = poll(polls, POLL_CHANNEL + count + link_count, timeout_ms);
    if (found < 0) {
        const struct timespec pause = {.tv_nsec = NO_MEMORY_PAUSE_MS * 1000000L};

        nanosleep(&pause, NULL); /* EINTR cannot be, all signals are blocked; ENOMEM passes */
    }
    pthread_mutex_lock(&relay->at_work);
    if (found < 0) {
        go_on = take_orders(relay);
        publish(relay);
        return go_on;
    }
    move_links(relay, link_polls);
    rf_channel_move(&relay->channel, &polls[POLL_CHANNEL]);
    move_links(relay, NULL);
    mind_offer(relay);
    mind_lanes(relay);
    if (polls[POLL_ORDERS].revents != 0) {
        go_on = take_orders(relay);
    }
    publish(relay);
    return go_on;
}

static void close_events(struct rf_relay *relay) {
    rf_orders_free(&relay->orders);
    if (relay->notify_event >= 0) {
        close(relay->notify_event);
        relay->notify_event = -1;
    }
}

static void free_all(struct rf_relay *relay) {
    pthread_cond_destroy(&relay->changed);
    pthread_mutex_destroy(&relay->lock);
    pthread_mutex_destroy(&relay->at_work);
    forget_links(relay, true);
    free(relay->rings.scratch);
    rf_channel_free(&relay->channel);
    rf_tracker_free(relay->tracker);
    free(relay);
}

static void *pump(void *opaque) {
    struct rf_relay *relay = opaque;

    pthread_mutex_lock(&relay->at_work);
    while (turn(relay)) {
    }
    pthread_mutex_unlock(&relay->at_work);
    pthread_mutex_lock(&relay->lock);
    relay->has_ended = true;
    pthread_cond_signal(&relay->changed);
    while (!relay->is_left) {
        pthread_cond_wait(&relay->changed, &relay->lock);
    }
    pthread_mutex_unlock(&relay->lock);
    close_events(relay);
    free_all(relay); /* here, for millions of records take 10 ms */
    return NULL;
}

/* ---- life ---- */

static void init_ending(struct rf_relay *relay) {
    pthread_condattr_t monotonic;

    pthread_mutex_init(&relay->lock, NULL);
    pthread_mutex_init(&relay->at_work, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&relay->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

static void leave(struct rf_relay *relay) {
    struct timespec until;
    int error = 0;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += STOP_WAIT_MS * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_nsec -= 1000000000L;
        until.tv_sec++;
    }
    pthread_mutex_lock(&relay->lock);
    while (!relay->has_ended && error == 0) {
        error = pthread_cond_timedwait(&relay->changed, &relay->lock, &until);
    }
    if (relay->has_ended) {
        close_events(relay);
    }
    relay->is_left = true;
    pthread_cond_signal(&relay->changed);
    pthread_mutex_unlock(&relay->lock);
}

static int start_thread(struct rf_relay *relay) {
    sigset_t all;
    sigset_t before;
    pthread_attr_t detached;
    pthread_t thread;
    int error;

    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    rf_crash_let_through(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&thread, &detached, pump, relay);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&detached);
    return error;
}

struct rf_relay *rf_relay_start(int side, uint64_t ceiling, unsigned dead_after_s, int fd, int old_fd,
                                const uint8_t *key, size_t key_length) {
    struct rf_relay *relay = calloc(1, sizeof(*relay));
    bool source_side = side == RF_RELAY_SOURCE;
    int error = 0;

    if (relay == NULL) {
        return NULL;
    }
    init_ending(relay);
    relay->stop.kind = RF_ORDER_STOP;
    relay->notify_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!rf_orders_init(&relay->orders) || relay->notify_event < 0) {
        error = errno;
    } else {
        relay->tracker = rf_tracker_new_kept(ceiling, fd, old_fd, key, key_length);
        if (relay->tracker == NULL ||
            !rf_channel_init(&relay->channel, relay->tracker, source_side, dead_after_s)) {
            error = ENOMEM;
        }
    }
    if (error == 0) {
        if (!source_side) {
            rf_tracker_trust_bitmaps(relay->tracker);
        }
        error = start_thread(relay);
    }
    if (error != 0) {
        close_events(relay);
        free_all(relay);
        errno = error;
        return NULL;
    }
    return relay;
}

int rf_relay_notify_fd(const struct rf_relay *relay) { return relay->notify_event; }

struct rf_tracker *rf_relay_tracker(struct rf_relay *relay) { return relay->tracker; }

int rf_relay_attach(struct rf_relay *relay, int local_fd, int far_fd, bool recovered, bool may_replay,
                    unsigned lanes, int session, bool tls, const uint8_t *id) {
    struct rf_order order = {.kind = RF_ORDER_ATTACH,
                             .local_fd = local_fd,
                             .far_fd = far_fd,
                             .recovered = recovered,
                             .may_replay = may_replay,
                             .lanes = lanes,
                             .session = (enum rf_link_role)session,
                             .tls = tls};

    if (session == RF_LINK_ANSWERS) {
        memcpy(order.id, id, sizeof(order.id));
    }
    return give(relay, &order);
}

int rf_relay_add_lane(struct rf_relay *relay, uint64_t channel, int kind, unsigned number, int local_fd,
                      int far_fd) {
    struct rf_order order = {
        .kind = RF_ORDER_LANE,
        .channel = channel,
        .number = number,
        .local_fd = local_fd,
        .far_fd = far_fd,
        .lane = rf_lane_new(kind == RF_LANE_MULTIFD ? RF_LANE_MULTIFD : RF_LANE_PREEMPT,
                            relay->channel.source_side),
    };

    if (order.lane == NULL || give(relay, &order) < 0) {
        rf_lane_free(order.lane);
        errno = ENOMEM;
        return -1;
    }
    return 0;
}

int rf_relay_no_more_lanes(struct rf_relay *relay, uint64_t channel) {
    return give(relay, &(struct rf_order){.kind = RF_ORDER_NO_MORE_LANES, .channel = channel});
}

int rf_relay_lose(struct rf_relay *relay, uint64_t channel, int error) {
    return give(relay, &(struct rf_order){.kind = RF_ORDER_LOSE, .channel = channel, .error = error});
}

int rf_relay_say(struct rf_relay *relay, uint64_t channel, const uint8_t *bytes, size_t length) {
    struct rf_order order = {.kind = RF_ORDER_SAY, .channel = channel, .say_length = length};

    if (length > sizeof(order.say)) {
        errno = EMSGSIZE;
        return -1;
    }
    memcpy(order.say, bytes, length);
    return give(relay, &order);
}

int rf_relay_close_channel(struct rf_relay *relay, uint64_t channel) {
    return give(relay, &(struct rf_order){.kind = RF_ORDER_CLOSE, .channel = channel});
}

int rf_relay_in_postcopy(struct rf_relay *relay) {
    return give(relay, &(struct rf_order){.kind = RF_ORDER_POSTCOPY_RUNS});
}

int rf_relay_complete(struct rf_relay *relay) {
    return give(relay, &(struct rf_order){.kind = RF_ORDER_COMPLETE});
}

/* ---- the session ---- */

/* A lane of the session of the migration: a link that never became one is none. */
static struct rf_link *session_of(const struct rf_relay *relay, unsigned lane) {
    struct rf_link *link = find_link(relay, lane);

    return link != NULL && (link->has_leg || link->state != RF_LINK_OVER) ? link : NULL;
}

static struct rf_leg *leg_of(struct rf_relay *relay, const struct rf_link *link) {
    struct rf_channel *channel = &relay->channel;

    if (link == NULL) {
        return NULL;
    }
    for (unsigned i = 0; i < channel->lane_count; i++) {
        if (channel->lanes[i]->far.link == link) {
            return &channel->lanes[i]->far;
        }
    }
    return channel->far.link == link ? &channel->far : NULL;
}

bool rf_relay_session_look(struct rf_relay *relay, unsigned lane, struct rf_link_view *view) {
    if (!atomic_load(&relay->had_link) || lane > RF_LANES_MAX) {
        return false;
    }
    pthread_mutex_lock(&relay->at_work);
    const struct rf_link *link = session_of(relay, lane);
    if (link != NULL) {
        rf_link_look(link, view);
    } else {
        *view = relay->last[lane];
    }
    pthread_mutex_unlock(&relay->at_work);
    return view->state != RF_LINK_NONE;
}

/* The connection that the leg has of its own is left, and the link alone carries it. */
static void leave_plain(struct rf_relay *relay, const struct rf_link *link) {
    struct rf_leg *leg = leg_of(relay, link);

    if (leg != NULL) {
        rf_leg_leave_connection(leg);
    }
}

bool rf_relay_session_tell(struct rf_relay *relay, unsigned lane, struct rf_positions *here) {
    pthread_mutex_lock(&relay->at_work);
    struct rf_link *link = session_of(relay, lane);
    if (link != NULL) {
        rf_link_tell(link, here);
    }
    pthread_mutex_unlock(&relay->at_work);
    return link != NULL;
}

int rf_relay_session_rejoin(struct rf_relay *relay, unsigned lane, const struct rf_positions *peer) {
    int wrong = -1;

    pthread_mutex_lock(&relay->at_work);
    struct rf_link *link = session_of(relay, lane);
    if (link != NULL && link->state != RF_LINK_OVER) {
        leave_plain(relay, link);
        rf_link_detach(link);
        wrong = (int)rf_link_resume(link, peer);
    }
    pthread_mutex_unlock(&relay->at_work);
    rf_orders_wake(&relay->orders);
    return wrong;
}

int rf_relay_session_adopt(struct rf_relay *relay, unsigned lane, const struct rf_positions *peer, int fd) {
    int wrong = -1;

    pthread_mutex_lock(&relay->at_work);
    struct rf_link *link = session_of(relay, lane);
    if (link != NULL && link->state != RF_LINK_OVER) {
        wrong = peer != NULL ? (int)rf_link_resume(link, peer) : RF_RIGHT;
        if (wrong == RF_RIGHT) {
            leave_plain(relay, link);
            rf_link_adopt(link, fd);
        }
    }
    pthread_mutex_unlock(&relay->at_work);
    rf_orders_wake(&relay->orders);
    return wrong;
}

void rf_relay_session_withdraw(struct rf_relay *relay, unsigned lane) {
    pthread_mutex_lock(&relay->at_work);
    struct rf_leg *leg = leg_of(relay, session_of(relay, lane));
    if (leg != NULL) {
        leg->link->in_being = leg->link->in_being && lane > 0;
        rf_leg_drop_link(leg);
    }
    pthread_mutex_unlock(&relay->at_work);
    rf_orders_wake(&relay->orders);
}

void rf_relay_session_give_up(struct rf_relay *relay, unsigned lane, int error) {
    pthread_mutex_lock(&relay->at_work);
    for (struct rf_link *link = relay->links; link != NULL; link = link->next) {
        if (link->place.lane == lane || (lane == 0 && error != 0)) {
            leave_plain(relay, link);
            rf_link_give_up(link, error);
        }
    }
    pthread_mutex_unlock(&relay->at_work);
    rf_orders_wake(&relay->orders);
}

void rf_relay_session_last_word(struct rf_relay *relay, unsigned lane, bool broke) {
    pthread_mutex_lock(&relay->at_work);
    struct rf_link *link = find_link(relay, lane);
    if (link != NULL) {
        rf_link_last_word(link, broke);
    }
    pthread_mutex_unlock(&relay->at_work);
    rf_orders_wake(&relay->orders);
}

/* ---- from one process to the next ---- */

uint8_t *rf_relay_hand_over(struct rf_relay *relay, size_t *length) {
    struct rf_channel *channel = &relay->channel;
    struct rf_handed handed;
    uint8_t *bytes = NULL;
    uint8_t *stream;

    pthread_mutex_lock(&relay->at_work);
    struct rf_link *link = relay->links;
    if (rf_channel_hand_over(channel, &handed) || rf_channel_hand_over_last(channel, link, &handed)) {
        bytes = rf_handed_write(&handed, length, &stream);
    }
    if (bytes != NULL) {
        rf_stream_save(link->stream, stream);
        rf_channel_leave(channel, link);
    }
    pthread_mutex_unlock(&relay->at_work);
    return bytes;
}

void rf_relay_handed_free(uint8_t *bytes) { free(bytes); }

static struct rf_link *handed_link(struct rf_relay *relay, const struct rf_handed *handed) {
    const struct rf_link_place place = {relay->view.channel + 1, 0, 1};
    rf_stream *stream = rf_stream_restore(handed->stream.data, handed->stream.length, rf_link_largest_ring());
    struct rf_link *link = NULL;

    if (stream != NULL) {
        link = rf_link_go_on(!relay->channel.source_side, handed->id, place, &relay->rings, stream);
    }
    if (link == NULL) {
        rf_stream_free(stream);
    }
    return link;
}

int rf_relay_go_on(struct rf_relay *relay, int local_fd, const uint8_t *bytes, size_t length) {
    struct rf_channel *channel = &relay->channel;
    struct rf_handed handed;
    struct rf_link *link = NULL;
    int result = -1;

    if (bytes != NULL && !rf_handed_read(bytes, length, &handed)) {
        return -1;
    }
    pthread_mutex_lock(&relay->at_work);
    if (bytes != NULL) {
        link = handed_link(relay, &handed);
    }
    if (link != NULL && handed.ended && !channel->source_side) {
        if (local_fd >= 0) {
            close(local_fd);
        }
        rf_link_leave(link);
        result = 0;
    } else if ((link != NULL || bytes == NULL) && local_fd >= 0 &&
               rf_channel_go_on(channel, local_fd, bytes != NULL ? &handed : NULL)) {
        rf_leg_adopt_link(&channel->far, link);
        result = 0;
    }
    if (result == 0) {
        relay->view.channel++;
        if (link != NULL) {
            relay->links = link;
            atomic_store(&relay->had_link, true);
        }
    } else {
        rf_link_free(link);
    }
    pthread_mutex_unlock(&relay->at_work);
    rf_orders_wake(&relay->orders);
    return result;
}

void rf_relay_stop(struct rf_relay *relay, bool keep_local) {
    relay->stop.keep_local = keep_local;
    rf_orders_put(&relay->orders, &relay->stop);
    leave(relay);
}
