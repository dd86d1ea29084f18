/*
 * What a pump is told: a queue of orders from any thread to the pump, in order and without a limit of their
 * number.
 */
#ifndef RF_ORDER_H
#define RF_ORDER_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "channel.h"

enum rf_order_kind {
    RF_ORDER_ATTACH,
    RF_ORDER_LANE,
    RF_ORDER_NO_MORE_LANES,
    RF_ORDER_LOSE,
    RF_ORDER_SAY,
    RF_ORDER_CLOSE,
    RF_ORDER_POSTCOPY_RUNS,
    RF_ORDER_COMPLETE,
    RF_ORDER_STOP
};

struct rf_order {
    enum rf_order_kind kind;
    uint64_t channel;
    unsigned number; /* of a lane */
    int local_fd;
    int far_fd;
    bool recovered;
    bool may_replay;
    unsigned lanes;
    enum rf_link_role session;
    bool tls;
    uint8_t id[16];
    struct rf_lane *lane;
    int error;
    uint8_t say[RF_SAY_MAX];
    size_t say_length;
    bool keep_local;
    struct rf_order *next;
};

struct rf_orders {
    pthread_mutex_t lock;
    int event; /* an eventfd, readable when there are some */
    struct rf_order *first;
    struct rf_order *last;
};

/* False when descriptors are short (errno). */
bool rf_orders_init(struct rf_orders *orders);
void rf_orders_free(struct rf_orders *orders);

/* Has the taker look, though there may be none. */
void rf_orders_wake(struct rf_orders *orders);

/* Adds one that stays the caller's until it is taken, and the taker's from then on. */
void rf_orders_put(struct rf_orders *orders, struct rf_order *order);

/* All that there are, in order, by `next`; NULL for none. */
struct rf_order *rf_orders_take(struct rf_orders *orders);

#endif
