#include "pool.h"

#define NONE UINT16_MAX

struct rf_slab {
    struct rf_slab *next; /* among the open ones */
    struct rf_slab *previous;
    uint16_t taken;
    uint16_t given_back; /* the cell given back last, which names the one before; or NONE */
    uint16_t untouched;  /* the first cell that was never taken */
};

/* Where the cells begin. No more alignment than malloc's may be counted on. */
#define CELLS_AT ((size_t)64)

_Static_assert(sizeof(struct rf_slab) <= CELLS_AT, "the slab's own words lie before its cells");

static uint16_t cells_in_slab(const struct rf_pool *pool) {
    return (uint16_t)((RF_POOL_SLAB_BYTES - CELLS_AT) / pool->cell_bytes);
}

static uint16_t *cell_at(const struct rf_pool *pool, struct rf_slab *slab, uint16_t number) {
    unsigned char *cells = (unsigned char *)slab + CELLS_AT;
    return (uint16_t *)(void *)(cells + (size_t)number * pool->cell_bytes);
}

static void open_slab(struct rf_pool *pool, struct rf_slab *slab) {
    slab->previous = NULL;
    slab->next = pool->open;
    if (slab->next != NULL) {
        slab->next->previous = slab;
    }
    pool->open = slab;
}

static void close_slab(struct rf_pool *pool, struct rf_slab *slab) {
    if (slab->previous != NULL) {
        slab->previous->next = slab->next;
    } else {
        pool->open = slab->next;
    }
    if (slab->next != NULL) {
        slab->next->previous = slab->previous;
    }
}

void rf_pool_init(struct rf_pool *pool, struct rf_budget *budget, uint32_t cell_bytes) {
    *pool = (struct rf_pool){.budget = budget, .cell_bytes = cell_bytes};
}

void *rf_pool_take(struct rf_pool *pool, uint16_t *number) {
    struct rf_slab *slab = pool->open;
    if (slab == NULL) {
        slab = rf_budget_alloc(pool->budget, RF_POOL_SLAB_BYTES);
        if (slab == NULL) {
            return NULL;
        }
        slab->given_back = NONE;
        pool->slabs++;
        open_slab(pool, slab);
    }
    uint16_t taken = slab->given_back;
    if (taken != NONE) {
        slab->given_back = *cell_at(pool, slab, taken);
    } else {
        taken = slab->untouched++;
    }
    slab->taken++;
    if (slab->taken == cells_in_slab(pool)) {
        close_slab(pool, slab);
    }
    *number = taken;
    return cell_at(pool, slab, taken);
}

void rf_pool_give_back(struct rf_pool *pool, void *cell, uint16_t number) {
    unsigned char *cells = (unsigned char *)cell - (size_t)number * pool->cell_bytes;
    struct rf_slab *slab = (struct rf_slab *)(void *)(cells - CELLS_AT);
    if (slab->taken == cells_in_slab(pool)) {
        open_slab(pool, slab);
    }
    slab->taken--;
    if (slab->taken == 0) {
        close_slab(pool, slab);
        pool->slabs--;
        rf_budget_free(pool->budget, slab, RF_POOL_SLAB_BYTES);
        return;
    }
    *(uint16_t *)cell = slab->given_back;
    slab->given_back = number;
}

size_t rf_pool_memory(const struct rf_pool *pool) { return pool->slabs * RF_POOL_SLAB_BYTES; }
