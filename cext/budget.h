/*
 * The one place where the channel core allocates. A budget counts what its owner holds and refuses what would
 * pass the ceiling, so that no stream, however hostile, can take more than the operator allowed. One thread
 * at a time uses a budget. A NULL budget counts nothing and refuses nothing.
 */
#ifndef RF_BUDGET_H
#define RF_BUDGET_H

#include <stddef.h>
#include <stdint.h>

struct rf_budget {
    uint64_t used;
    uint64_t ceiling;
};

/* Zeroed memory, or NULL. */
void *rf_budget_alloc(struct rf_budget *budget, size_t bytes);

/* Like realloc, the new part zeroed; on failure NULL, and the old memory stays. */
void *rf_budget_grow(struct rf_budget *budget, void *memory, size_t old_bytes, size_t new_bytes);

/* `bytes` is what was asked for; `memory` may be NULL. */
void rf_budget_free(struct rf_budget *budget, void *memory, size_t bytes);

#endif
