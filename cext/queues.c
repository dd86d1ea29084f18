#include "queues.h"

#include <stdint.h>

enum {
    /* Chunks in a row that found room: then the link, and who reads at its end, are faster than the source.
     * One that found none says that they are not; a burst of a scheduler's may be as long as a few chunks. */
    FREE_AFTER = 64,
};

/* clang-format off */

const struct rf_queues rf_queues[RF_REGIMES] = {
    /*                     chunk       unsent      to_qemu */
    [RF_REGIME_BEGIN]   = {16 * 1024,  8 * 1024,   208 * 1024},
    [RF_REGIME_PRECOPY] = {256 * 1024, UINT32_MAX, 208 * 1024},
    [RF_REGIME_FREE]    = {64 * 1024,  32 * 1024,  128 * 1024},
    [RF_REGIME_FULL]    = {16 * 1024,  8 * 1024,   128 * 1024},
};

/* clang-format on */

void rf_fullness_note(struct rf_fullness *fullness, bool room) {
    if (!room) {
        fullness->chunks = 0;
    } else if (fullness->chunks < FREE_AFTER) {
        fullness->chunks++;
    }
}

enum rf_regime rf_fullness_regime(const struct rf_fullness *fullness) {
    return fullness->chunks < FREE_AFTER ? RF_REGIME_FULL : RF_REGIME_FREE;
}
