/*
 * The relay pump: one thread a migration that joins the local leg (our QEMU) and the far leg (the other
 * host), channel after channel (channel.h).
 *
 * With postcopy-preempt or multifd a channel has lanes beside the main connection (lane.h), which are added
 * one by one. QEMU takes no harm only if it has all or none:
 *  - the device state (PACKAGED) and RESUME are held back until all lanes are there: a destination that got
 *    them before its preempt channel would wait for that in a thread that nothing can wake
 *    (migration/savevm.c, loadvm_postcopy_handle_resume; migration/postcopy-ram.c, postcopy_preempt_thread).
 *    A stream that cannot be read is not held back;
 *  - a lane whose far leg is lost is the channel's loss, with exceptions (ends.h), and all far legs end at
 * once;
 *  - a source's end waits until QEMU has been given what is on the lanes;
 *  - on the source's side the end of QEMU's leg waits for the lanes that QEMU had opened before.
 *
 * The pump alone reads, writes and closes its descriptors. It gets orders by a queue (order.h) and tells
 * of what happens by an eventfd and by atomic words; it calls nobody. When one leg is lost it closes the
 * other one only if that is the far leg: a local leg stays open until the pump is told to close it, for when
 * a close kills a QEMU is decided elsewhere (src/refault/migration/legs.py).
 */
#ifndef RF_RELAY_H
#define RF_RELAY_H

#include <stdbool.h>
#include <stdint.h>

#include "lane.h"
#include "leg.h"
#include "link.h"
#include "tracker.h"

/* cffi: begin */
enum rf_relay_side {
    RF_RELAY_SOURCE = 0,
    RF_RELAY_DESTINATION = 1,
};

struct rf_relay_view {
    uint64_t channel;        /* number of the channel attached last, counted from 1; 0 for none */
    uint64_t local_state;    /* enum rf_leg_state */
    uint64_t far_state;      /* enum rf_leg_state */
    uint64_t local_error;    /* errno, where FAILED */
    uint64_t far_error;      /* errno, where FAILED */
    uint64_t forward_bytes;  /* passed on, over the whole migration */
    uint64_t return_bytes;   /* likewise */
    uint64_t replayed;       /* page requests written by the relay, over the whole migration */
    uint64_t held;           /* page requests held back until RESUME_ACK */
    uint64_t last_replay_ns; /* CLOCK_MONOTONIC; 0 for never */
    uint64_t lost_ns;    /* CLOCK_MONOTONIC, when the first leg of this channel was lost; 0 for not lost */
    uint64_t lanes;      /* added to this channel */
    uint64_t waiting;    /* 1: the lanes are due: bytes are held back for them, or cannot be read */
    uint64_t last_lanes; /* 1: QEMU, the source's, has ended its leg, which is not told before the lanes that
                            it had opened are added, or rf_relay_no_more_lanes is called */
};

struct rf_relay;

/*
 * Starts the pump's thread. `ceiling`: the most bytes of memory that tracking may take. `dead_after_s`:
 * seconds of the other host's silence that count, in postcopy, as a loss. `fd`, `old_fd` and `key`: the state
 * file, as rf_tracker_new_kept takes it. NULL when memory, descriptors or threads are short (errno says
 * which).
 */
struct rf_relay *rf_relay_start(int side, uint64_t ceiling, unsigned dead_after_s, int fd, int old_fd,
                                const uint8_t *key, size_t key_length);

/* Becomes readable when something changed: read it as an eventfd, then look at the view and the tracker. */
int rf_relay_notify_fd(const struct rf_relay *relay);

/* The tracker, for those of its readers that are safe beside the running pump. */
struct rf_tracker *rf_relay_tracker(struct rf_relay *relay);

/* A consistent picture; false when the pump kept writing through all retries (look again later). */
bool rf_relay_look(const struct rf_relay *relay, struct rf_relay_view *view);

/* Each of these gives -1 with errno ENOMEM when memory is short: then nothing of it happens. */

/*
 * Joins two stream sockets as the next channel and takes ownership of both. `recovered`: it resumes a lost
 * channel. `may_replay`: outstanding page requests are replayed after RESUME_ACK. `lanes`: how many are to be
 * added before the device state or RESUME may pass. `session`: enum rf_link_role, which end of a session the
 * far leg may become; without memory for one it becomes none. `tls`: the channel speaks TLS. `id`: the
 * session's, of who answers; where it speaks TLS it has another once that is offered.
 * What is left of the channel before is closed. 0, or -1; then the descriptors are still the caller's.
 */
int rf_relay_attach(struct rf_relay *relay, int local_fd, int far_fd, bool recovered, bool may_replay,
                    unsigned lanes, int session, bool tls, const uint8_t *id);

/*
 * Joins two stream sockets as a further lane of `channel` and takes ownership of both. Where that is no
 * longer the one attached last, or has all its lanes, both are closed; where its far leg is lost, the lane's
 * is ended too. `number`: which lane of a session it may be, from 1 on; of one that the channel has not, or
 * has already, it is none and becomes none. `far_fd` -1: the channel is a session, and the lane begins as one
 * of it, with the connection that it has been given already (rf_relay_session_adopt) or is given next. 0, or
 * -1 as above.
 */
int rf_relay_add_lane(struct rf_relay *relay, uint64_t channel, int kind, unsigned number, int local_fd,
                      int far_fd);

/* QEMU, the source's, opens no more lanes of `channel` than were added. */
int rf_relay_no_more_lanes(struct rf_relay *relay, uint64_t channel);

/* The other host cannot be had whole: the far legs of `channel` end as if one had broken with `error`. */
int rf_relay_lose(struct rf_relay *relay, uint64_t channel, int error);

/*
 * Says `length` bytes, one message or more and 64 at the most, to the QEMU of a source on the return path of
 * `channel`, between two messages; not where it cannot hear any more. A duplicate of the leg must not be
 * written: the pump may be in the midst of a message.
 */
int rf_relay_say(struct rf_relay *relay, uint64_t channel, const uint8_t *bytes, size_t length);

/* The destination runs the guest; for a stream that cannot be read, which does not show it. */
int rf_relay_in_postcopy(struct rf_relay *relay);

/* Closes what is open of `channel`, if that is still the one attached last. */
int rf_relay_close_channel(struct rf_relay *relay, uint64_t channel);

/* The migration has ended: nothing is outstanding any more. */
int rf_relay_complete(struct rf_relay *relay);

/*
 * The session of this migration (link.h), by its lanes: 0 is the main connection. False where there is none.
 * These wait for the pump no longer than one turn of it takes.
 */
bool rf_relay_session_look(struct rf_relay *relay, unsigned lane, struct rf_link_view *view);
/* Our positions, for HELLO or WELCOME. */
bool rf_relay_session_tell(struct rf_relay *relay, unsigned lane, struct rf_positions *here);
/* The connection is closed, with whatever is unread there, and the next one's peer has told this: enum
 * rf_wrong, or -1 where there is no session. */
int rf_relay_session_rejoin(struct rf_relay *relay, unsigned lane, const struct rf_positions *peer);
/* Goes on with that connection and takes ownership of it; `peer`: what it has told, where that is not known
 * yet. As above; the descriptor is the caller's where it is not RF_RIGHT. */
int rf_relay_session_adopt(struct rf_relay *relay, unsigned lane, const struct rf_positions *peer, int fd);
/* No session comes of the offer, and the plain connection goes on; nothing where one has. Of lane 0: of none
 * of its lanes. */
void rf_relay_session_withdraw(struct rf_relay *relay, unsigned lane);
/* The lane's connection is waited for no longer: its far leg breaks with `error`. Of lane 0: those of all
 * lanes, unless it has ended in order. */
void rf_relay_session_give_up(struct rf_relay *relay, unsigned lane, int error);
/* Where that is due (struct rf_link_view): whether QEMU broke, the destination's, which has ended its side
 * without a word. */
void rf_relay_session_last_word(struct rf_relay *relay, unsigned lane, bool broke);

/*
 * What another process needs to go on with the newest channel, of `length` bytes and freed by the caller with
 * rf_relay_handed_free; from then on the channel is its. QEMU sees nothing, so it must hold the local leg's
 * other end by then. NULL where that cannot be (channel.h), or without memory; then nothing has changed.
 */
uint8_t *rf_relay_hand_over(struct rf_relay *relay, size_t *length);
void rf_relay_handed_free(uint8_t *bytes);
/*
 * Goes on with that, as the first channel of a new relay, whose local leg's descriptor is the pump's from
 * then on; -1 where QEMU has ended it, and the last of it is to be delivered. Below 0 where it is not to be
 * believed, or without memory; the descriptor is the caller's then.
 * Without `bytes` (NULL) the far leg of the channel is lost, and all else is as for one that goes on.
 */
int rf_relay_go_on(struct rf_relay *relay, int local_fd, const uint8_t *bytes, size_t length);

/*
 * Ends the thread, which closes both legs after what they hold has been offered to the kernel. Waits for that
 * no longer than 20 ms. The thread frees all behind it.
 * `keep_local`: the local leg's socket has been duplicated, and QEMU is not to see it end.
 */
void rf_relay_stop(struct rf_relay *relay, bool keep_local);
/* cffi: end */

#endif
