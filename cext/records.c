#include "records.h"

#define RECORDS_CHUNK 256
#define CHUNKS_FIRST 64
#define RECORDS_MAX ((uint32_t)1 << 30)

struct rf_records_chunk {
    struct rf_record records[RECORDS_CHUNK];
    uint32_t buckets[RECORDS_CHUNK]; /* the first of each hash bucket's chain, or RF_NO_RECORD */
};

void rf_records_init(struct rf_records *records, struct rf_budget *budget) {
    *records = (struct rf_records){
        .budget = budget, .free_slot = RF_NO_RECORD, .oldest = RF_NO_RECORD, .newest = RF_NO_RECORD};
}

void rf_records_free(struct rf_records *records) {
    for (uint32_t i = 0; i < records->chunks_length; i++) {
        rf_budget_free(records->budget, records->chunks[i], sizeof(struct rf_records_chunk));
    }
    rf_budget_free(records->budget, records->chunks, records->chunks_room * sizeof(*records->chunks));
}

void rf_records_forget(struct rf_records *records) {
    records->slots = 0; /* the chunks stay: to free millions of records takes long too */
    records->free_slot = records->oldest = records->newest = RF_NO_RECORD;
}

struct rf_record *rf_records_at(const struct rf_records *records, uint32_t slot) {
    return &records->chunks[slot / RECORDS_CHUNK]->records[slot % RECORDS_CHUNK];
}

static uint32_t *bucket_at(const struct rf_records *records, uint32_t bucket) {
    return &records->chunks[bucket / RECORDS_CHUNK]->buckets[bucket % RECORDS_CHUNK];
}

static uint32_t hash_of(uint32_t block, uint64_t start) {
    uint64_t mixed = (start >> 10) * UINT64_C(0x9e3779b97f4a7c15) + block * UINT64_C(0xc2b2ae3d27d4eb4f);
    return (uint32_t)(mixed >> 32);
}

/* Of so many buckets, above 0. With one more, one bucket's entries part: those that come to the new one were
 * in the bucket of its number without the highest bit. */
static uint32_t bucket_of(uint32_t hash, uint32_t buckets) {
    uint32_t mask = buckets > 1 ? UINT32_MAX >> __builtin_clz(buckets - 1) : 0;
    uint32_t bucket = hash & mask;
    return bucket < buckets ? bucket : hash & mask >> 1;
}

static uint32_t *bucket_for(const struct rf_records *records, uint32_t block, uint64_t start) {
    return bucket_at(records, bucket_of(hash_of(block, start), records->slots));
}

uint32_t rf_records_find(const struct rf_records *records, uint32_t block, uint64_t start, uint64_t length) {
    if (records->slots == 0) {
        return RF_NO_RECORD;
    }
    uint32_t slot = *bucket_for(records, block, start);
    while (slot != RF_NO_RECORD) {
        const struct rf_record *record = rf_records_at(records, slot);
        if (record->block == block && record->start == start && record->length == length) {
            return slot;
        }
        slot = record->chain;
    }
    return RF_NO_RECORD;
}

static void chain_record(struct rf_records *records, uint32_t slot) {
    struct rf_record *record = rf_records_at(records, slot);
    uint32_t *bucket = bucket_for(records, record->block, record->start);
    record->chain = *bucket;
    *bucket = slot;
}

static void unchain_record(struct rf_records *records, uint32_t slot) {
    const struct rf_record *record = rf_records_at(records, slot);
    uint32_t *link = bucket_for(records, record->block, record->start);
    while (*link != slot) {
        link = &rf_records_at(records, *link)->chain;
    }
    *link = record->chain;
}

static bool add_chunk(struct rf_records *records) {
    uint32_t number = records->chunks_length;
    if (number == records->chunks_room) {
        uint32_t room = number == 0 ? CHUNKS_FIRST : number * 2;
        struct rf_records_chunk **chunks = rf_budget_grow(records->budget, records->chunks,
                                                          number * sizeof(*chunks), room * sizeof(*chunks));
        if (chunks == NULL) {
            return false;
        }
        records->chunks = chunks;
        records->chunks_room = room;
    }
    records->chunks[number] = rf_budget_alloc(records->budget, sizeof(struct rf_records_chunk));
    records->chunks_length += records->chunks[number] != NULL;
    return records->chunks[number] != NULL;
}

/* One slot more, and one hash bucket, so that the table grows by steps of one size. RF_NO_RECORD without
 * memory. */
static uint32_t add_slot(struct rf_records *records) {
    uint32_t added = records->slots;
    if (added == RECORDS_MAX || (added / RECORDS_CHUNK == records->chunks_length && !add_chunk(records))) {
        return RF_NO_RECORD;
    }
    records->slots++;
    *bucket_at(records, added) = RF_NO_RECORD;
    if (added == 0) {
        return added;
    }
    uint32_t highest = UINT32_C(1) << (31 - __builtin_clz(added));
    uint32_t *link = bucket_at(records, added - highest);
    while (*link != RF_NO_RECORD) {
        uint32_t slot = *link;
        struct rf_record *record = rf_records_at(records, slot);
        if (bucket_of(hash_of(record->block, record->start), records->slots) == added) {
            *link = record->chain;
            chain_record(records, slot);
        } else {
            link = &record->chain;
        }
    }
    return added;
}

uint32_t rf_records_add(struct rf_records *records, const struct rf_record *record) {
    uint32_t slot = records->free_slot;
    if (slot == RF_NO_RECORD) {
        slot = add_slot(records);
    } else {
        records->free_slot = rf_records_at(records, slot)->next;
    }
    if (slot == RF_NO_RECORD) {
        return slot;
    }
    struct rf_record *added = rf_records_at(records, slot);
    *added = *record;
    added->id = ++records->last_id;
    added->previous = records->newest;
    added->next = RF_NO_RECORD;
    chain_record(records, slot);
    if (records->newest == RF_NO_RECORD) {
        records->oldest = slot;
    } else {
        rf_records_at(records, records->newest)->next = slot;
    }
    records->newest = slot;
    return slot;
}

void rf_records_remove(struct rf_records *records, uint32_t slot) {
    struct rf_record *record = rf_records_at(records, slot);
    unchain_record(records, slot);
    if (record->previous == RF_NO_RECORD) {
        records->oldest = record->next;
    } else {
        rf_records_at(records, record->previous)->next = record->next;
    }
    if (record->next == RF_NO_RECORD) {
        records->newest = record->previous;
    } else {
        rf_records_at(records, record->next)->previous = record->previous;
    }
    record->id = 0;
    record->next = records->free_slot;
    records->free_slot = slot;
}
