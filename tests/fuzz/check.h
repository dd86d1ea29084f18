/* What a fuzz target expects of the code under test. */
#ifndef RF_FUZZ_CHECK_H
#define RF_FUZZ_CHECK_H

#include <stdint.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

static inline uint64_t mix(uint64_t hash, uint64_t value) {
    return (hash ^ value) * UINT64_C(0x100000001b3) + (hash >> 29);
}

#endif
