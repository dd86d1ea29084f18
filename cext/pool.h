/*
 * Cells of one size, cut from slabs of 4 KiB: taking and giving back cost a few instructions where malloc and
 * free of thousands of small pieces cost more than what is done with them. A slab is freed with its last
 * cell, so memory still follows what is held.
 */
#ifndef RF_POOL_H
#define RF_POOL_H

#include <stddef.h>
#include <stdint.h>

#include "budget.h"

#define RF_POOL_SLAB_BYTES ((size_t)4096)

struct rf_slab;

struct rf_pool {
    struct rf_budget *budget;
    struct rf_slab *open; /* slabs with a free cell */
    size_t slabs;
    uint32_t cell_bytes;
};

/* `cell_bytes` is a multiple of 8, at most 2048. */
void rf_pool_init(struct rf_pool *pool, struct rf_budget *budget, uint32_t cell_bytes);

/* A cell, its contents undefined, and its number in its slab; NULL without memory. */
void *rf_pool_take(struct rf_pool *pool, uint16_t *number);

/* Takes the cell back; `number` is the one that rf_pool_take gave. */
void rf_pool_give_back(struct rf_pool *pool, void *cell, uint16_t number);

/* Bytes held now. */
size_t rf_pool_memory(const struct rf_pool *pool);

#endif
