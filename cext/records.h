/*
 * The table of page requests on record: slots in chunks, chained by a hash of what they ask for and linked by
 * age. It grows by one slot and one hash bucket at a time, so that no step takes longer than another. What a
 * request means is its owner's (pagemap.c).
 */
#ifndef RF_RECORDS_H
#define RF_RECORDS_H

#include <stdbool.h>
#include <stdint.h>

#include "budget.h"

#define RF_NO_RECORD UINT32_MAX

struct rf_record {
    uint64_t id; /* 0: a free slot, `next` leads to the next one */
    uint64_t start;
    uint64_t time;
    uint32_t length;
    uint32_t block;
    uint32_t previous; /* by id, oldest first */
    uint32_t next;
    uint32_t chain;        /* next in its hash bucket */
    uint32_t requested_on; /* the last channel on which the destination asked the source, 0: none */
    uint32_t replayed_on;
    bool outstanding;
};

struct rf_records_chunk;

struct rf_records {
    struct rf_budget *budget;
    struct rf_records_chunk **chunks;
    uint32_t chunks_length; /* as many as there have ever been slots for */
    uint32_t chunks_room;
    uint32_t slots; /* in use or free; and so many hash buckets */
    uint32_t free_slot;
    uint32_t oldest;
    uint32_t newest;
    uint64_t last_id;
};

void rf_records_init(struct rf_records *records, struct rf_budget *budget);
void rf_records_free(struct rf_records *records);

struct rf_record *rf_records_at(const struct rf_records *records, uint32_t slot);

/* The slot of the request for just that, or RF_NO_RECORD. */
uint32_t rf_records_find(const struct rf_records *records, uint32_t block, uint64_t start, uint64_t length);

/* Puts `record` on record, as the newest, with a new id: its slot, or RF_NO_RECORD without memory. */
uint32_t rf_records_add(struct rf_records *records, const struct rf_record *record);

void rf_records_remove(struct rf_records *records, uint32_t slot);

/* All are gone at once; the room stays. */
void rf_records_forget(struct rf_records *records);

#endif
