#include "journal.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST_SENT (1u << 30) /* a count has 32 bits */

/* The system call that is being made, whose record comes next. */
struct cell {
    uint64_t at; /* where in the log */
    uint8_t kind;
    uint8_t zero[3];
    uint32_t who;
    struct mmsghdr message; /* the kernel writes msg_len */
    struct iovec piece;
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
};

struct header {
    char magic[8];
    uint64_t log_at;
    uint64_t size; /* of the file */
    uint64_t tail; /* bytes of the log */
    struct cell cell;
};

struct record {
    uint8_t kind;
    uint8_t zero[3];
    uint32_t who;
    uint32_t len;
    uint32_t zero2;
};

_Static_assert(sizeof(struct header) <= RF_JOURNAL_HEADER, "the header has no room");
_Static_assert(sizeof(struct record) == RF_JOURNAL_RECORD, "a record");
/* qmp/journal.py */
_Static_assert(offsetof(struct header, cell.at) == 32, "cell");
_Static_assert(offsetof(struct header, cell.message.msg_len) == 104, "cell");

static size_t padded(size_t len) { return (len + 7) & ~(size_t)7; }

/* A kill comes between two instructions: what the compiler may not do is reorder the stores. */
static void ordered(void) { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

static char *tail(struct header *h) { return (char *)h + h->log_at + h->tail; }

void rf_journal_begin(void *file, uint64_t log_at, uint64_t size) {
    struct header *h = file;

    memset(h, 0, sizeof *h);
    h->log_at = log_at;
    h->size = size;
    h->cell.at = UINT64_MAX;
    ordered();
    memcpy(h->magic, "refault2", sizeof h->magic);
}

uint64_t rf_journal_room(const void *file) {
    const struct header *h = file;
    uint64_t used = h->log_at + h->tail + RF_JOURNAL_RECORD + 8;

    return h->size > used ? h->size - used : 0;
}

uint64_t rf_journal_used(const void *file) { return ((const struct header *)file)->tail; }

void rf_journal_grown(void *file, uint64_t size) { ((struct header *)file)->size = size; }

static void commit(struct header *h, int kind, uint32_t who, uint32_t len, size_t data) {
    struct record record = {.kind = (uint8_t)kind, .who = who, .len = len};

    memcpy(tail(h), &record, sizeof record);
    ordered();
    __atomic_store_n(&h->tail, h->tail + sizeof record + padded(data), __ATOMIC_RELEASE);
    ordered();
}

void rf_journal_append(void *file, int kind, uint32_t who, const void *data, uint32_t len) {
    struct header *h = file;

    memcpy(tail(h) + RF_JOURNAL_RECORD, data, len);
    commit(h, kind, who, len, len);
}

static struct cell *prepare(struct header *h, int kind, uint32_t who, void *data, size_t len) {
    struct cell *cell = &h->cell;

    cell->at = UINT64_MAX;
    ordered();
    memset(&cell->message, 0, sizeof cell->message);
    cell->kind = (uint8_t)kind;
    cell->who = who;
    cell->piece = (struct iovec){.iov_base = data, .iov_len = len};
    cell->message.msg_hdr.msg_iov = &cell->piece;
    cell->message.msg_hdr.msg_iovlen = 1;
    ordered();
    cell->at = h->tail;
    ordered();
    return cell;
}

/* The first descriptor of what was received; there is room for no second one. */
static int descriptor(struct msghdr *header) {
    int fd = -1;

    for (struct cmsghdr *c = CMSG_FIRSTHDR(header); c; c = CMSG_NXTHDR(header, c)) {
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS && c->cmsg_len >= CMSG_LEN(sizeof fd)) {
            memcpy(&fd, CMSG_DATA(c), sizeof fd);
        }
    }
    return fd;
}

/* The bytes that may be received now, at most `most`; 0 for none. */
static uint32_t receivable(const struct header *h, uint32_t most, uint64_t full) {
    uint64_t room = rf_journal_room(h);

    if (room < RF_JOURNAL_LEAST || h->tail > full) {
        return 0;
    }
    return room < most ? (uint32_t)room : most;
}

static int64_t receive(struct header *h, int fd, int kind, uint32_t who, uint32_t most, uint64_t *at) {
    char *data = tail(h) + RF_JOURNAL_RECORD;
    struct cell *cell = prepare(h, kind, who, data, most);
    uint32_t count;

    if (recvmmsg(fd, &cell->message, 1, MSG_DONTWAIT, NULL) < 0) {
        return -errno;
    }
    count = cell->message.msg_len;
    if (count > 0) {
        *at = (uint64_t)(data - (char *)h);
        commit(h, kind, who, count, count);
    }
    return count;
}

int64_t rf_journal_receive(void *file, int fd, int kind, uint32_t who, uint32_t most, uint64_t full,
                           uint64_t *at) {
    most = receivable(file, most, full);
    return most > 0 ? receive(file, fd, kind, who, most, at) : RF_JOURNAL_NO_ROOM;
}

int64_t rf_journal_peek(void *file, int fd, int kind, int peeked, uint32_t who, uint32_t most, uint64_t full,
                        uint64_t *at, int *passed) {
    struct header *h = file;
    char *data = tail(h) + RF_JOURNAL_RECORD;
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec piece = {.iov_base = data, .iov_len = receivable(h, most, full)};
    struct msghdr header = {.msg_iov = &piece,
                            .msg_iovlen = 1,
                            .msg_control = control.bytes,
                            .msg_controllen = CMSG_LEN(sizeof(int))};
    ssize_t count;

    *passed = -1;
    if (piece.iov_len == 0) {
        return RF_JOURNAL_NO_ROOM;
    }
    /* A cell that stands at the tail would be one of the bytes that are looked at. */
    h->cell.at = UINT64_MAX;
    ordered();
    count = recvmsg(fd, &header, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (count < 0) {
        return -errno;
    }
    *passed = descriptor(&header);
    if (*passed < 0) {
        return count > 0 ? receive(h, fd, kind, who, (uint32_t)count, at) : 0;
    }
    *at = (uint64_t)(data - (char *)file);
    commit(h, peeked, who, (uint32_t)count, (size_t)count);
    return count;
}

int64_t rf_journal_send(void *file, int fd, int kind, uint32_t who, const void *data, size_t len,
                        int passed) {
    struct header *h = file;
    struct cell *cell;
    struct msghdr *header;
    uint32_t count;

    if (rf_journal_room(h) == 0) {
        return RF_JOURNAL_NO_ROOM;
    }
    cell = prepare(h, kind, who, (void *)(uintptr_t)data, len < MOST_SENT ? len : MOST_SENT);
    header = &cell->message.msg_hdr;
    if (passed >= 0) {
        struct cmsghdr *c = &cell->control.align;
        memset(&cell->control, 0, sizeof cell->control);
        header->msg_control = cell->control.bytes;
        header->msg_controllen = sizeof cell->control.bytes;
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof passed);
        memcpy(CMSG_DATA(c), &passed, sizeof passed);
    }
    if (sendmmsg(fd, &cell->message, 1, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
        return -errno;
    }
    count = cell->message.msg_len;
    if (count > 0) {
        commit(h, kind, who, count, 0);
    }
    return count;
}
