/*
 * TCP sockets told and asked: what waits unsent in them, and whether anybody is there.
 */
#ifndef RF_TCP_H
#define RF_TCP_H

#include <stdbool.h>

/* Sets TCP_NODELAY and TCP_NOTSENT_LOWAT, so that what waits unsent in the kernel stays small; whether it is
 * TCP. */
bool rf_tcp_prepare(int fd);

/* From now on the kernel probes an idle connection, so that a host that is gone shows within `dead_after_s`
 * seconds. */
void rf_tcp_probe(int fd, unsigned dead_after_s);

/*
 * Whether TCP has had no sign of life for so long though it asked for one: bytes unacknowledged that were
 * sent again, or window probes unanswered. Never by TCP_USER_TIMEOUT, which kills a live peer whose window is
 * closed.
 */
bool rf_tcp_silent(int fd, unsigned dead_after_s);

/* Bytes that it has under way at the most as the network is now. */
unsigned rf_tcp_flight(int fd);

#endif
