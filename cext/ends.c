#include "ends.h"

#include <stddef.h>

#define COUNT(table) (sizeof(table) / sizeof((table)[0]))

enum { ANY = -1, NO = 0, YES = 1 };

/* The first row that fits holds; ANY fits all. */
/* clang-format off */

static const struct {
    int direction;
    int in_hand;
    int taker;
    int readable;
    enum rf_flow flow;
} FLOWS[] = {
    /* direction  in hand  taker            readable */
    {ANY,        YES,     RF_TAKER_READY,  ANY,      RF_FLOW_WRITE},
    {ANY,        YES,     RF_TAKER_FULL,   ANY,      RF_FLOW_WRITE},
    {RF_FORWARD, YES,     ANY,             YES,      RF_FLOW_HOLD},
    {ANY,        ANY,     ANY,             NO,       RF_FLOW_OVER},
    {ANY,        ANY,     RF_TAKER_FULL,   ANY,      RF_FLOW_WRITE},
    {RF_FORWARD, ANY,     RF_TAKER_GONE,   ANY,      RF_FLOW_HOLD},
    {RF_RETURN,  ANY,     RF_TAKER_GONE,   ANY,      RF_FLOW_DROP},
    {ANY,        ANY,     ANY,             ANY,      RF_FLOW_READ},
};

static const struct {
    int connection;
    int local;
    int source;
    int in_order;
    int seen;
    enum rf_deed deed;
} DEEDS[] = {
    /* connection  local  source  in order  seen */
    {RF_MAIN,     YES,    ANY,     ANY,       ANY,                    RF_DEED_LINGER},
    {ANY,         YES,    ANY,     ANY,       ANY,                    RF_DEED_PASS_ON},
    /* A source's end waits until QEMU has been given what is on the lanes. */
    {RF_MAIN,     NO,     NO,      ANY,       RF_SEEN_ALL,            RF_DEED_DRAIN},
    {RF_MAIN,     NO,     NO,      YES,       RF_SEEN_MORE_DUE_LANES, RF_DEED_DRAIN},
    {RF_MAIN,     NO,     NO,      ANY,       RF_SEEN_UNREAD_LANES,   RF_DEED_DRAIN},
    {RF_MAIN,     NO,     ANY,     ANY,       ANY,                    RF_DEED_LOSS},
    /* A source that has completed closes all, and this end can come before what is under way on others. */
    {RF_MULTIFD,  NO,     ANY,     YES,       ANY,                    RF_DEED_PASS_ON},
    /* A destination closes its lanes before it says SHUT on the main connection. */
    {ANY,         NO,     ANY,     ANY,       RF_SEEN_ALL,            RF_DEED_NOTHING},
    /* Whether this is the end cannot be read: the main connection ends too if not, or QEMU writes on. */
    {RF_PREEMPT,  NO,     YES,     YES,       RF_SEEN_UNREAD,         RF_DEED_MISSED},
    {RF_PREEMPT,  NO,     YES,     YES,       RF_SEEN_UNREAD_LANES,   RF_DEED_MISSED},
    {RF_PREEMPT,  NO,     NO,      YES,       RF_SEEN_UNREAD,         RF_DEED_NOTHING},
    {RF_PREEMPT,  NO,     NO,      YES,       RF_SEEN_UNREAD_LANES,   RF_DEED_NOTHING},
    {ANY,         NO,     ANY,     ANY,       ANY,                    RF_DEED_LOSS},
};

static const struct {
    enum rf_stage stage;
    enum rf_occasion occasion;
    enum rf_stage next;
} COURSE[] = {
    {RF_STAGE_JOINED,   RF_FAR_LOST,   RF_STAGE_DRAINING},
    {RF_STAGE_JOINED,   RF_LOCAL_OVER, RF_STAGE_UNSENT},
    {RF_STAGE_DRAINING, RF_DELIVERED,  RF_STAGE_LOST},
    {RF_STAGE_DRAINING, RF_LOCAL_OVER, RF_STAGE_LEFT},
    {RF_STAGE_LOST,     RF_LOCAL_OVER, RF_STAGE_LEFT},
    {RF_STAGE_UNSENT,   RF_SENT,       RF_STAGE_UNACKED},
    {RF_STAGE_UNSENT,   RF_FAR_BROKE,  RF_STAGE_LEFT},
    {RF_STAGE_UNACKED,  RF_ACKED,      RF_STAGE_LEFT},
    {RF_STAGE_UNACKED,  RF_FAR_BROKE,  RF_STAGE_LEFT},
};

/* clang-format on */

static bool fits(int wanted, int is) { return wanted == ANY || wanted == is; }

enum rf_flow rf_ends_flow(enum rf_direction direction, bool readable, bool in_hand, enum rf_taker taker) {
    size_t i = 0;

    while (!fits(FLOWS[i].direction, (int)direction) || !fits(FLOWS[i].in_hand, in_hand) ||
           !fits(FLOWS[i].taker, (int)taker) || !fits(FLOWS[i].readable, readable)) {
        i++; /* the last row fits all */
    }
    return FLOWS[i].flow;
}

bool rf_ends_watched(enum rf_direction direction, enum rf_flow flow) {
    /* Whose bytes QEMU, or the other host, has yet to be given is told to have ended behind them. On the
     * return path nobody waits for that: all of it goes on record. */
    return flow == RF_FLOW_HOLD || (direction == RF_RETURN && flow == RF_FLOW_WRITE);
}

enum rf_deed rf_ends_deed(enum rf_connection connection, bool local, bool source, bool in_order,
                          enum rf_seen seen) {
    size_t i = 0;

    while (!fits(DEEDS[i].connection, (int)connection) || !fits(DEEDS[i].local, local) ||
           !fits(DEEDS[i].source, source) || !fits(DEEDS[i].in_order, in_order) ||
           !fits(DEEDS[i].seen, (int)seen)) {
        i++; /* the last row fits every far leg, the first two every local one */
    }
    return DEEDS[i].deed;
}

enum rf_stage rf_ends_next(enum rf_stage stage, enum rf_occasion occasion) {
    for (size_t i = 0; i < COUNT(COURSE); i++) {
        if (COURSE[i].stage == stage && COURSE[i].occasion == occasion) {
            return COURSE[i].next;
        }
    }
    return stage;
}
