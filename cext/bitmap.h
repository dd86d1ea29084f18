/*
 * Sparse bitmap: one bit for a target page, with summaries above it.
 *
 *     root    one pointer for 2^22 bits, one summary bit for each pointer
 *     middle  64 leaves, one summary word
 *     leaf    2^16 bits: the places of up to 4093 in order, or words with summary words (which are not zero)
 *
 * A leaf or middle exists only while a bit below it is set, so memory follows what is set, and finding set
 * bits costs what is set, not what exists. An idle map of 2^28 bits (1 TiB of 4 KiB pages) takes under 1 KiB.
 *
 * One thread uses a map at a time. Indexes outside the map read as clear and cannot be set.
 * Dense bitmaps are given as bytes, least significant bit first, as QEMU's received bitmap is
 * (migration/ram.c, ramblock_recv_bitmap_send).
 */
#ifndef RF_BITMAP_H
#define RF_BITMAP_H

#include <stddef.h>
#include <stdint.h>

#include "budget.h"
#include "status.h"

#define RF_BITMAP_END UINT64_MAX

struct rf_bitmap *rf_bitmap_new_within(struct rf_budget *budget, uint64_t bits);

/* cffi: begin */
struct rf_bitmap;

/* All clear; NULL without memory or for more than 2^44 bits. Allocates without a ceiling
 * (rf_bitmap_new_within takes one). */
struct rf_bitmap *rf_bitmap_new(uint64_t bits);
void rf_bitmap_free(struct rf_bitmap *map);

uint64_t rf_bitmap_bits(const struct rf_bitmap *map);
uint64_t rf_bitmap_count(const struct rf_bitmap *map);
/* Bytes held now, all levels together. */
uint64_t rf_bitmap_memory(const struct rf_bitmap *map);

/* The old value, 0 or 1; rf_bitmap_set may return RF_NO_MEMORY or RF_OUT_OF_RANGE and then changes nothing.
 */
int rf_bitmap_test(const struct rf_bitmap *map, uint64_t index);
int rf_bitmap_set(struct rf_bitmap *map, uint64_t index);
int rf_bitmap_clear(struct rf_bitmap *map, uint64_t index);

/* How many bits changed. The range is cut to the map. rf_bitmap_set_range may return RF_NO_MEMORY, having set
 * a part: setting only ever adds memory, clearing never does. */
int64_t rf_bitmap_set_range(struct rf_bitmap *map, uint64_t first, uint64_t count);
int64_t rf_bitmap_clear_range(struct rf_bitmap *map, uint64_t first, uint64_t count);
uint64_t rf_bitmap_count_range(const struct rf_bitmap *map, uint64_t first, uint64_t count);
void rf_bitmap_clear_all(struct rf_bitmap *map);

/* The first set bit at or after `from`, or 2^64 - 1. */
uint64_t rf_bitmap_next(const struct rf_bitmap *map, uint64_t from);

/* Copies up to `room` set bits, lowest first, from *from on; moves *from behind the last. Returns how many.
 */
size_t rf_bitmap_list(const struct rf_bitmap *map, uint64_t *from, uint64_t *out, size_t room);

/* Takes out up to `room` set bits, lowest first, and clears them. Returns how many. */
size_t rf_bitmap_drain(struct rf_bitmap *map, uint64_t *out, size_t room);

/* Clears the bits that are set in the dense bitmap, whose first byte stands for bit first_byte * 8. Returns
 * how many were cleared. */
uint64_t rf_bitmap_and_not(struct rf_bitmap *map, uint64_t first_byte, const uint8_t *dense, size_t bytes);

/* Clears, within the bytes given, the bits that are clear in the dense bitmap. Returns how many were cleared.
 */
uint64_t rf_bitmap_and(struct rf_bitmap *map, uint64_t first_byte, const uint8_t *dense, size_t bytes);

/* Adds to *only_map and *only_dense the number of bits set in one alone, within the bytes given and the map.
 */
void rf_bitmap_compare(const struct rf_bitmap *map, uint64_t first_byte, const uint8_t *dense, size_t bytes,
                       uint64_t *only_map, uint64_t *only_dense);
/* cffi: end */

#endif
