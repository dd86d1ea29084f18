/*
 * The state file: what must survive refault of one migration's tracking. A file, on a tmpfs, mapped and
 * written as things happen, so that after kill -9 the next refault knows the page requests that are on
 * record.
 *
 *     header page   magic, version, key (which VM, QEMU process and migration), facts, crash mark
 *     block table   RAM blocks: name, size, page size
 *     record table  page requests; a record's slot is its slot in the page map
 *
 * It stands against the death of this process, not of the machine, which QEMU does not survive either: there
 * is no fsync, only an order of stores. What is live is made so by one aligned store of a word behind all
 * that it stands for, so that whoever reads the file later finds an operation that was under way either done
 * or not begun. Every word carries or has a checksum: what is torn all the same is recognised.
 *
 * Blocks of the file are allocated before they are first written through the mapping, for a write to a full
 * file system through a mapping is a SIGBUS. Where there is no room, records are in memory alone, and
 * rf_statefile_kept says so. The file is read with pread, never through a mapping: what another process does
 * to it meanwhile can only make it torn.
 *
 * One thread writes; rf_statefile_kept may be asked from any. All functions that write take NULL for no file.
 */
#ifndef RF_STATEFILE_H
#define RF_STATEFILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    RF_STATEFILE_KEY_MAX = 512,
    RF_STATEFILE_BLOCKS_MAX = 4096,
    RF_STATEFILE_RECORDS_MAX = 1 << 20, /* 40 MiB: a record is 40 bytes */
};

/* cffi: begin */
/* What a new tracker found in the file of the refault before. */
enum rf_restored {
    RF_RESTORED_NOTHING = 0, /* no file was given */
    RF_RESTORED_WHOLE = 1,
    RF_RESTORED_CRASHED = 2, /* whole, but its writer crashed in a decoder: this migration passes unread */
    RF_RESTORED_TORN = 3,    /* from here on nothing was taken from it */
    RF_RESTORED_VERSION = 4,
    RF_RESTORED_FOREIGN = 5, /* of another VM, QEMU process or migration */
    RF_RESTORED_NO_MEMORY = 6,
};

/* How much of the page map the state file holds. */
enum rf_kept {
    RF_KEPT_NOTHING = 0, /* there is no file */
    RF_KEPT_ALL = 1,
    RF_KEPT_PART = 2, /* there was no room for some RAM blocks or requests */
};
/* cffi: end */

enum rf_work {
    RF_WORK_NONE = 0,
    RF_WORK_READING = 1, /* of either direction, and of what it says */
    RF_WORK_FRAMING = 2, /* the return path's messages told from each other */
};

struct rf_statefile;

/* Makes an empty state file of `fd`, opened for reading and writing, whose content goes. Takes no ownership
 * of it. NULL without memory, with a key longer than RF_STATEFILE_KEY_MAX, or where the file system has no
 * room. */
struct rf_statefile *rf_statefile_new(int fd, const uint8_t *key, size_t key_length);
void rf_statefile_free(struct rf_statefile *file);
enum rf_kept rf_statefile_kept(const struct rf_statefile *file);

void rf_statefile_facts(struct rf_statefile *file, uint32_t facts);
/* Where in the decoders the writing thread is. If it dies there of its own fault (crash.h) the file says so;
 * where it is killed, it does not. */
void rf_statefile_at_work(struct rf_statefile *file, enum rf_work work);
/* An earlier refault died there: so the next one will find it again. */
void rf_statefile_crashed(struct rf_statefile *file, enum rf_work work);
void rf_statefile_page_bits(struct rf_statefile *file, uint32_t bits);

/* A RAM block became known; blocks come in the order of their index. */
void rf_statefile_block(struct rf_statefile *file, uint32_t index, const char *name, size_t name_length);
/* `pages`: the used length in target pages, 0 for not known; `page_size`: bytes, a power of two, 0 for not
 * known. */
void rf_statefile_block_size(struct rf_statefile *file, uint32_t index, uint64_t pages, uint64_t page_size,
                             bool declared);

struct rf_statefile_record {
    uint64_t id; /* above 0, below 2^63 */
    uint64_t start;
    uint64_t time;
    uint32_t length;
    uint32_t block;
    bool outstanding;
};

void rf_statefile_record(struct rf_statefile *file, uint32_t slot, const struct rf_statefile_record *record);
/* Nothing where the slot holds no record. */
void rf_statefile_outstanding(struct rf_statefile *file, uint32_t slot, bool outstanding);
void rf_statefile_end(struct rf_statefile *file, uint32_t slot);
/* All records up to the one with the id `last` end at once; ids grow. */
void rf_statefile_end_all(struct rf_statefile *file, uint64_t last);

/* A state file as it was read. What it says is whole, and no more than that: the reader checks what it means.
 */
struct rf_statefile_block {
    char name[255];
    uint8_t name_length; /* above 0 */
    bool declared;
    uint64_t pages;
    uint64_t page_size;
};

struct rf_statefile_image {
    uint32_t facts;
    uint32_t page_bits;
    enum rf_work crashed; /* in what its writer died */
    uint64_t ended;       /* records up to this id are left out */
    uint32_t blocks_length;
    struct rf_statefile_block *blocks;
    uint32_t records_length;
    struct rf_statefile_record *records; /* by id; `block` is below blocks_length */
    uint32_t torn;                       /* records left out, for their checksum was wrong */
};

/* Reads a state file from `fd`. The image is to be freed only after RF_RESTORED_WHOLE or _CRASHED. */
enum rf_restored rf_statefile_load(int fd, const uint8_t *key, size_t key_length,
                                   struct rf_statefile_image *image);
void rf_statefile_image_free(struct rf_statefile_image *image);

#endif
