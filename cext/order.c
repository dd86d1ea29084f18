#include "order.h"

#include <stddef.h>
#include <sys/eventfd.h>
#include <unistd.h>

bool rf_orders_init(struct rf_orders *orders) {
    *orders = (struct rf_orders){.event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    return orders->event >= 0 && pthread_mutex_init(&orders->lock, NULL) == 0;
}

void rf_orders_free(struct rf_orders *orders) {
    if (orders->event >= 0) {
        close(orders->event);
        orders->event = -1;
        pthread_mutex_destroy(&orders->lock);
    }
}

void rf_orders_wake(struct rf_orders *orders) {
    const uint64_t one = 1;
    ssize_t n = write(orders->event, &one, sizeof(one));

    (void)n; /* EAGAIN: it is signalled already */
}

void rf_orders_put(struct rf_orders *orders, struct rf_order *order) {
    order->next = NULL;
    pthread_mutex_lock(&orders->lock);
    if (orders->first == NULL) {
        orders->first = order;
    } else {
        orders->last->next = order;
    }
    orders->last = order;
    rf_orders_wake(orders);
    pthread_mutex_unlock(&orders->lock);
}

struct rf_order *rf_orders_take(struct rf_orders *orders) {
    struct rf_order *first;
    uint64_t count;
    ssize_t n;

    pthread_mutex_lock(&orders->lock);
    n = read(orders->event, &count, sizeof(count));
    (void)n; /* EAGAIN: it was not signalled */
    first = orders->first;
    orders->first = orders->last = NULL;
    pthread_mutex_unlock(&orders->lock);
    return first;
}
