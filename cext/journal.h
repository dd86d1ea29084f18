/*
 * What befalls the connections of one monitor, written down so that a kill at any moment leaves no doubt: the
 * log that qmp/journal.py reads.
 *
 * A kill between a system call and the store behind it would leave "sent or not" unknown. So the kernel
 * itself writes the count, with sendmmsg(2) and recvmmsg(2) on a header that lies in the mapped file (the
 * cell). A record is there once the tail has moved behind it; a cell that stands at the tail with a count in
 * it is a record as well.
 *
 *   header | what was before the log, opaque | log: records, each 16 bytes and its data, padded to 8
 *
 * One process writes; nobody reads meanwhile. The file is mapped whole and has all its blocks.
 */
#ifndef RF_JOURNAL_H
#define RF_JOURNAL_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
enum rf_journal_at {
    RF_JOURNAL_HEADER = 256,    /* bytes before what is before the log */
    RF_JOURNAL_RECORD = 16,     /* bytes of a record without its data */
    RF_JOURNAL_LEAST = 4096,    /* bytes of room with which a receiver is content */
    RF_JOURNAL_NO_ROOM = -4096, /* in place of a count: no errno */
};

/* Makes the header of a log that begins `log_at` bytes behind the file's beginning. */
void rf_journal_begin(void *file, uint64_t log_at, uint64_t size);

/* Bytes that a record's data may still have; 0 for none. */
uint64_t rf_journal_room(const void *file);
/* The bytes of the log so far. */
uint64_t rf_journal_used(const void *file);
/* The same file, mapped anew with more bytes. */
void rf_journal_grown(void *file, uint64_t size);

/* Adds a record; `len` is at most the room. */
void rf_journal_append(void *file, int kind, uint32_t who, const void *data, uint32_t len);

/* Receives up to `most` bytes, at most the room, without waiting, as the data of a record. The bytes begin
 * `*at` bytes behind the file's beginning. Returns their number, 0 at the end, or -errno; RF_JOURNAL_NO_ROOM
 * where there is less than the least, or the log has more than `full` bytes, so that nothing was received. A
 * descriptor that comes with them is closed. */
int64_t rf_journal_receive(void *file, int fd, int kind, uint32_t who, uint32_t most, uint64_t full,
                           uint64_t *at);

/* The same of a socket by which descriptors come. Bytes with which one comes are left in the socket, as it is
 * with them, and make a record of the kind `peeked`: `*passed` is a duplicate of it; else -1. */
int64_t rf_journal_peek(void *file, int fd, int kind, int peeked, uint32_t who, uint32_t most, uint64_t full,
                        uint64_t *at, int *passed);

/* Sends without waiting, and adds a record of how many bytes went. `passed`: a descriptor that goes with the
 * first of them, or -1. Returns the number, or -errno, or RF_JOURNAL_NO_ROOM. */
int64_t rf_journal_send(void *file, int fd, int kind, uint32_t who, const void *data, size_t len, int passed);
/* cffi: end */

#endif
