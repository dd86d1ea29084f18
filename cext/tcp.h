/*
 * TCP sockets told and asked: what waits unsent in them, and whether anybody is there.
 */
#ifndef RF_TCP_H
#define RF_TCP_H

#include <stdbool.h>

/* Sets TCP_NODELAY and TCP_NOTSENT_LOWAT, so that what waits unsent in the kernel stays small; whether it is
 * TCP. */
bool rf_tcp_prepare(int fd);

/* It can be written while fewer bytes than that wait unsent in the kernel. */
void rf_tcp_set_unsent(int fd, unsigned bytes);

/* With a round trip of `round_trip_us` at the most: SO_RCVBUF, which TCP does not change any more. Not where
 * it has grown beyond that already, for a window that shrinks stops the peer for long. */
void rf_tcp_bound_unread(int fd, unsigned bytes, unsigned round_trip_us);

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

/* Of any socket, by the errno of a call that does not wait: whether the same may succeed later. Where the
 * kernel has no memory, of which poll(2) does not tell, it waits a millisecond. */
bool rf_tcp_is_later(int error);

#endif
