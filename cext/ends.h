/*
 * How the directions, legs and lanes of a channel end, as tables: what becomes of bytes whose taker is full
 * or gone, what a leg's end does, and what is told when.
 *
 * A leg has two directions that end on their own: it may be read until the kernel has no more of it, and it
 * may be written until a write fails. A reset lets all be read that had arrived before it (net/ipv4/tcp.c,
 * tcp_recvmsg_locked; net/unix/af_unix.c, unix_stream_read_generic: the queue goes before the error).
 *
 * The forward stream is never read but for who takes it: where nobody does, who sends it is to notice, as
 * beside a QEMU that has gone. The return path is read to its end in any case, for the record.
 */
#ifndef RF_ENDS_H
#define RF_ENDS_H

#include <stdbool.h>

/* ---- what becomes of the bytes of one direction of one connection ---- */

enum rf_direction {
    RF_FORWARD, /* from the source to the destination */
    RF_RETURN,
};

enum rf_taker {
    RF_TAKER_READY, /* the other leg has room, as far as is known */
    RF_TAKER_FULL,  /* it had none */
    RF_TAKER_GATED, /* it is not to get what is in hand yet (relay.h) */
    RF_TAKER_GONE,  /* it cannot be written any more */
};

enum rf_flow {
    RF_FLOW_OVER,  /* read to its end, and nothing is in hand */
    RF_FLOW_READ,  /* the one leg is waited for to bring more */
    RF_FLOW_WRITE, /* the other is waited for to have room */
    RF_FLOW_HOLD,  /* nobody takes it now: it is not read, but its end is to show */
    RF_FLOW_DROP,  /* nobody ever takes it: it is read, and put on record */
};

/* `readable`: it has not been read to its end. `in_hand`: something was read and not yet written. */
enum rf_flow rf_ends_flow(enum rf_direction direction, bool readable, bool in_hand, enum rf_taker taker);

/* Whether the end of a leg that is not being read for the sake of such a flow is to show at once. */
bool rf_ends_watched(enum rf_direction direction, enum rf_flow flow);

/* ---- what the end of a leg does ---- */

enum rf_connection {
    RF_MAIN,
    RF_PREEMPT,
    RF_MULTIFD,
};

/* What of the forward stream has passed when the leg ends. */
enum rf_seen {
    RF_SEEN_MORE_DUE,       /* the source has not sent all */
    RF_SEEN_MORE_DUE_LANES, /* likewise, and its pages go over several connections */
    RF_SEEN_ALL,            /* EOF has passed */
    RF_SEEN_UNREAD,         /* it cannot be read whether the source has sent all */
    RF_SEEN_UNREAD_LANES, /* likewise, and its pages go over several connections, or some have not come yet */
};

enum rf_deed {
    RF_DEED_NOTHING,
    RF_DEED_PASS_ON, /* the other leg's writing direction ends behind all that it is to get */
    RF_DEED_LINGER,  /* likewise; the other leg is closed once the other host has all */
    RF_DEED_MISSED,  /* it is the channel's loss if QEMU goes on to write on it */
    RF_DEED_DRAIN,   /* it is the channel's loss once QEMU has been given all that the lanes bring yet */
    RF_DEED_LOSS,    /* it is the channel's loss: all far legs are ended at once */
};

/* `local`: it is QEMU's leg that has ended. `source`: it is the source's side. `in_order`: by end of file. */
enum rf_deed rf_ends_deed(enum rf_connection connection, bool local, bool source, bool in_order,
                          enum rf_seen seen);

/* ---- the course of a channel to its end ---- */

enum rf_stage {
    RF_STAGE_NONE,     /* none was attached */
    RF_STAGE_JOINED,   /* both legs carry */
    RF_STAGE_DRAINING, /* the far side is lost; what had arrived is passed on. Not told yet */
    RF_STAGE_LOST,     /* the far side is lost, and that is told; QEMU's legs stay */
    RF_STAGE_UNSENT,   /* QEMU has ended its leg; what it wrote is passed on */
    RF_STAGE_UNACKED,  /* it has been written, and the other host's kernel is to have it */
    RF_STAGE_LEFT,     /* the far leg ends; the return path is read to its end */
};

enum rf_occasion {
    RF_FAR_LOST,
    RF_DELIVERED, /* QEMU was given what had arrived, or does not take what it does not need */
    RF_LOCAL_OVER,
    RF_SENT,      /* all that QEMU wrote was written to the far leg */
    RF_ACKED,     /* and the other host's kernel has it, or has had the time */
    RF_FAR_BROKE, /* the far leg cannot be written */
    RF_OCCASIONS
};

enum rf_stage rf_ends_next(enum rf_stage stage, enum rf_occasion occasion);

#endif
