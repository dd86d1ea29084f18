#include "budget.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

static bool take(struct rf_budget *budget, size_t bytes) {
    if (budget == NULL) {
        return true;
    }
    if (bytes > budget->ceiling || budget->used > budget->ceiling - bytes) {
        return false;
    }
    budget->used += bytes;
    return true;
}

static void give_back(struct rf_budget *budget, size_t bytes) {
    if (budget != NULL) {
        budget->used -= bytes;
    }
}

void *rf_budget_alloc(struct rf_budget *budget, size_t bytes) {
    if (!take(budget, bytes)) {
        return NULL;
    }
    void *memory = calloc(1, bytes);
    if (memory == NULL) {
        give_back(budget, bytes);
    }
    return memory;
}

void *rf_budget_grow(struct rf_budget *budget, void *memory, size_t old_bytes, size_t new_bytes) {
    if (!take(budget, new_bytes - old_bytes)) {
        return NULL;
    }
    uint8_t *grown = realloc(memory, new_bytes);
    if (grown == NULL) {
        give_back(budget, new_bytes - old_bytes);
        return NULL;
    }
    memset(grown + old_bytes, 0, new_bytes - old_bytes);
    return grown;
}

void rf_budget_free(struct rf_budget *budget, void *memory, size_t bytes) {
    if (memory == NULL) {
        return;
    }
    free(memory);
    give_back(budget, bytes);
}
