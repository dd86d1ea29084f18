#include "bitmap.h"

#include <stdbool.h>
#include <string.h>

#define FAN 64u
#define LEAF_BITS ((uint64_t)FAN * 64)
#define MIDDLE_BITS ((uint64_t)FAN * LEAF_BITS)
#define LEAF_BYTES ((size_t)LEAF_BITS / 8)
#define BITS_MAX ((uint64_t)1 << 44)

struct leaf {
    uint64_t summary;
    uint64_t words[FAN];
};

struct middle {
    uint64_t summary;
    struct leaf *leaves[FAN];
};

struct rf_bitmap {
    struct rf_budget *budget;
    uint64_t bits;
    uint64_t count;
    uint64_t memory;
    size_t middles_length;
    size_t summary_length;
    struct middle **middles;
    uint64_t *summary;
};

static unsigned lowest(uint64_t word) { return (unsigned)__builtin_ctzll(word); }

static unsigned ones(uint64_t word) { return (unsigned)__builtin_popcountll(word); }

static uint64_t bit(uint64_t index) { return (uint64_t)1 << (index % 64); }

/* Bits [from, to) of a word; 0 <= from < to <= 64. */
static uint64_t mask(uint64_t from, uint64_t to) {
    uint64_t below = to == 64 ? UINT64_MAX : ((uint64_t)1 << to) - 1;
    return below & ~(((uint64_t)1 << from) - 1);
}

static uint64_t load_le64(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, sizeof(word));
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

static void *take(struct rf_bitmap *map, size_t bytes) {
    void *memory = rf_budget_alloc(map->budget, bytes);
    if (memory != NULL) {
        map->memory += bytes;
    }
    return memory;
}

static void give_back(struct rf_bitmap *map, void *memory, size_t bytes) {
    rf_budget_free(map->budget, memory, bytes);
    map->memory -= bytes;
}

struct rf_bitmap *rf_bitmap_new_within(struct rf_budget *budget, uint64_t bits) {
    if (bits > BITS_MAX) {
        return NULL;
    }
    struct rf_bitmap *map = rf_budget_alloc(budget, sizeof(*map));
    if (map == NULL) {
        return NULL;
    }
    map->budget = budget;
    map->bits = bits;
    map->memory = sizeof(*map);
    map->middles_length = (size_t)((bits + MIDDLE_BITS - 1) / MIDDLE_BITS);
    map->summary_length = (map->middles_length + 63) / 64;
    if (map->middles_length > 0) {
        map->middles = take(map, map->middles_length * sizeof(struct middle *));
        map->summary = take(map, map->summary_length * sizeof(uint64_t));
        if (map->middles == NULL || map->summary == NULL) {
            rf_bitmap_free(map);
            return NULL;
        }
    }
    return map;
}

struct rf_bitmap *rf_bitmap_new(uint64_t bits) { return rf_bitmap_new_within(NULL, bits); }

static void free_leaf(struct rf_bitmap *map, struct middle *middle, unsigned slot) {
    give_back(map, middle->leaves[slot], sizeof(struct leaf));
    middle->leaves[slot] = NULL;
    middle->summary &= ~bit(slot);
}

static void free_middle(struct rf_bitmap *map, size_t slot) {
    struct middle *middle = map->middles[slot];
    while (middle->summary != 0) {
        free_leaf(map, middle, lowest(middle->summary));
    }
    give_back(map, middle, sizeof(*middle));
    map->middles[slot] = NULL;
    map->summary[slot / 64] &= ~bit(slot);
}

void rf_bitmap_clear_all(struct rf_bitmap *map) {
    for (size_t i = 0; i < map->summary_length; i++) {
        while (map->summary[i] != 0) {
            free_middle(map, i * 64 + lowest(map->summary[i]));
        }
    }
    map->count = 0;
}

void rf_bitmap_free(struct rf_bitmap *map) {
    if (map == NULL) {
        return;
    }
    if (map->middles != NULL && map->summary != NULL) {
        rf_bitmap_clear_all(map);
    }
    rf_budget_free(map->budget, map->middles, map->middles_length * sizeof(struct middle *));
    rf_budget_free(map->budget, map->summary, map->summary_length * sizeof(uint64_t));
    rf_budget_free(map->budget, map, sizeof(*map));
}

uint64_t rf_bitmap_bits(const struct rf_bitmap *map) { return map->bits; }

uint64_t rf_bitmap_count(const struct rf_bitmap *map) { return map->count; }

uint64_t rf_bitmap_memory(const struct rf_bitmap *map) { return map->memory; }

static struct leaf *find_leaf(const struct rf_bitmap *map, uint64_t index) {
    const struct middle *middle = map->middles[index / MIDDLE_BITS];
    return middle == NULL ? NULL : middle->leaves[index / LEAF_BITS % FAN];
}

/* The leaf, made if it is not there; NULL without memory. An empty one must be filled or dropped at once. */
static struct leaf *need_leaf(struct rf_bitmap *map, uint64_t index) {
    size_t top = (size_t)(index / MIDDLE_BITS);
    unsigned slot = (unsigned)(index / LEAF_BITS % FAN);
    struct middle *middle = map->middles[top];
    if (middle == NULL) {
        middle = take(map, sizeof(*middle));
        if (middle == NULL) {
            return NULL;
        }
        map->middles[top] = middle;
        map->summary[top / 64] |= bit(top);
    }
    if (middle->leaves[slot] == NULL) {
        struct leaf *leaf = take(map, sizeof(*leaf));
        if (leaf == NULL) {
            if (middle->summary == 0) {
                free_middle(map, top);
            }
            return NULL;
        }
        middle->leaves[slot] = leaf;
        middle->summary |= bit(slot);
    }
    return middle->leaves[slot];
}

static void drop_if_empty(struct rf_bitmap *map, uint64_t index) {
    size_t top = (size_t)(index / MIDDLE_BITS);
    unsigned slot = (unsigned)(index / LEAF_BITS % FAN);
    struct middle *middle = map->middles[top];
    if (middle->leaves[slot]->summary == 0) {
        free_leaf(map, middle, slot);
        if (middle->summary == 0) {
            free_middle(map, top);
        }
    }
}

int rf_bitmap_test(const struct rf_bitmap *map, uint64_t index) {
    if (index >= map->bits) {
        return 0;
    }
    const struct leaf *leaf = find_leaf(map, index);
    return leaf != NULL && (leaf->words[index / 64 % FAN] & bit(index)) != 0;
}

int rf_bitmap_set(struct rf_bitmap *map, uint64_t index) {
    if (index >= map->bits) {
        return RF_OUT_OF_RANGE;
    }
    struct leaf *leaf = need_leaf(map, index);
    if (leaf == NULL) {
        return RF_NO_MEMORY;
    }
    uint64_t word = index / 64 % FAN;
    if ((leaf->words[word] & bit(index)) != 0) {
        return 1;
    }
    leaf->words[word] |= bit(index);
    leaf->summary |= bit(word);
    map->count++;
    return 0;
}

int rf_bitmap_clear(struct rf_bitmap *map, uint64_t index) {
    if (index >= map->bits) {
        return 0;
    }
    struct leaf *leaf = find_leaf(map, index);
    uint64_t word = index / 64 % FAN;
    if (leaf == NULL || (leaf->words[word] & bit(index)) == 0) {
        return 0;
    }
    leaf->words[word] &= ~bit(index);
    map->count--;
    if (leaf->words[word] == 0) {
        leaf->summary &= ~bit(word);
        drop_if_empty(map, index);
    }
    return 1;
}

/* The end of a range, cut to the map. */
static uint64_t range_end(const struct rf_bitmap *map, uint64_t first, uint64_t count) {
    if (first >= map->bits) {
        return map->bits;
    }
    return count > map->bits - first ? map->bits : first + count;
}

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

int64_t rf_bitmap_set_range(struct rf_bitmap *map, uint64_t first, uint64_t count) {
    uint64_t end = range_end(map, first, count);
    uint64_t before = map->count;
    while (first < end) {
        struct leaf *leaf = need_leaf(map, first);
        if (leaf == NULL) {
            return RF_NO_MEMORY;
        }
        uint64_t leaf_end = smaller(end, (first / LEAF_BITS + 1) * LEAF_BITS);
        while (first < leaf_end) {
            uint64_t upto = smaller(leaf_end, (first / 64 + 1) * 64);
            uint64_t word = first / 64 % FAN;
            uint64_t bits = mask(first % 64, upto - (first - first % 64));
            map->count += ones(bits & ~leaf->words[word]);
            leaf->words[word] |= bits;
            leaf->summary |= bit(word);
            first = upto;
        }
    }
    return (int64_t)(map->count - before);
}

/* Where the next leaf at or after `index` begins (or index itself inside it); map->bits if there is none. */
static uint64_t next_leaf(const struct rf_bitmap *map, uint64_t index) {
    while (index < map->bits) {
        size_t top = (size_t)(index / MIDDLE_BITS);
        const struct middle *middle = map->middles[top];
        if (middle != NULL) {
            unsigned slot = (unsigned)(index / LEAF_BITS % FAN);
            uint64_t left = middle->summary & mask(slot, 64);
            if (left != 0) {
                unsigned found = lowest(left);
                return found == slot ? index : top * MIDDLE_BITS + found * LEAF_BITS;
            }
        }
        top++;
        size_t group = top / 64;
        if (group >= map->summary_length) {
            break;
        }
        uint64_t left = map->summary[group] & mask(top % 64, 64);
        while (left == 0 && ++group < map->summary_length) {
            left = map->summary[group];
        }
        if (left == 0) {
            break;
        }
        index = (group * 64 + lowest(left)) * MIDDLE_BITS;
    }
    return map->bits;
}

int64_t rf_bitmap_clear_range(struct rf_bitmap *map, uint64_t first, uint64_t count) {
    uint64_t end = range_end(map, first, count);
    uint64_t before = map->count;
    while ((first = next_leaf(map, first)) < end) {
        struct leaf *leaf = find_leaf(map, first);
        uint64_t inside = first;
        uint64_t leaf_end = smaller(end, (first / LEAF_BITS + 1) * LEAF_BITS);
        while (first < leaf_end) {
            uint64_t upto = smaller(leaf_end, (first / 64 + 1) * 64);
            uint64_t word = first / 64 % FAN;
            uint64_t bits = mask(first % 64, upto - (first - first % 64));
            map->count -= ones(leaf->words[word] & bits);
            leaf->words[word] &= ~bits;
            if (leaf->words[word] == 0) {
                leaf->summary &= ~bit(word);
            }
            first = upto;
        }
        drop_if_empty(map, inside);
    }
    return (int64_t)(before - map->count);
}

uint64_t rf_bitmap_count_range(const struct rf_bitmap *map, uint64_t first, uint64_t count) {
    uint64_t end = range_end(map, first, count);
    uint64_t sum = 0;
    while ((first = next_leaf(map, first)) < end) {
        const struct leaf *leaf = find_leaf(map, first);
        uint64_t leaf_end = smaller(end, (first / LEAF_BITS + 1) * LEAF_BITS);
        while (first < leaf_end) {
            uint64_t upto = smaller(leaf_end, (first / 64 + 1) * 64);
            sum += ones(leaf->words[first / 64 % FAN] & mask(first % 64, upto - (first - first % 64)));
            first = upto;
        }
    }
    return sum;
}

uint64_t rf_bitmap_next(const struct rf_bitmap *map, uint64_t from) {
    while ((from = next_leaf(map, from)) < map->bits) {
        const struct leaf *leaf = find_leaf(map, from);
        uint64_t base = from - from % LEAF_BITS;
        uint64_t word = from / 64 % FAN;
        uint64_t here = leaf->words[word] & mask(from % 64, 64);
        if (here != 0) {
            return base + word * 64 + lowest(here);
        }
        uint64_t left = word == FAN - 1 ? 0 : leaf->summary & mask(word + 1, 64);
        if (left != 0) {
            word = lowest(left);
            return base + word * 64 + lowest(leaf->words[word]);
        }
        from = base + LEAF_BITS;
    }
    return RF_BITMAP_END;
}

size_t rf_bitmap_list(const struct rf_bitmap *map, uint64_t *from, uint64_t *out, size_t room) {
    size_t found = 0;
    uint64_t index = *from;
    while (found < room && (index = next_leaf(map, index)) < map->bits) {
        const struct leaf *leaf = find_leaf(map, index);
        uint64_t base = index - index % LEAF_BITS;
        uint64_t start = index - base;
        uint64_t words = leaf->summary & mask(start / 64, 64);
        for (; words != 0 && found < room; words &= words - 1) {
            uint64_t word = lowest(words);
            uint64_t left = leaf->words[word];
            if (word == start / 64) {
                left &= mask(start % 64, 64);
            }
            for (; left != 0 && found < room; left &= left - 1) {
                out[found++] = base + word * 64 + lowest(left);
            }
        }
        index = base + LEAF_BITS;
    }
    if (found > 0) {
        *from = found == room ? out[found - 1] + 1 : map->bits;
    }
    return found;
}

size_t rf_bitmap_drain(struct rf_bitmap *map, uint64_t *out, size_t room) {
    size_t found = 0;
    for (size_t group = 0; group < map->summary_length; group++) {
        while (map->summary[group] != 0) {
            size_t top = group * 64 + lowest(map->summary[group]);
            struct middle *middle = map->middles[top];
            while (middle->summary != 0) {
                unsigned slot = lowest(middle->summary);
                struct leaf *leaf = middle->leaves[slot];
                uint64_t base = top * MIDDLE_BITS + slot * LEAF_BITS;
                for (; leaf->summary != 0; leaf->summary &= leaf->summary - 1) {
                    unsigned word = lowest(leaf->summary);
                    uint64_t left = leaf->words[word];
                    for (; left != 0; left &= left - 1) {
                        if (found == room) {
                            leaf->words[word] = left;
                            map->count -= found;
                            return found;
                        }
                        out[found++] = base + word * 64 + lowest(left);
                    }
                    leaf->words[word] = 0;
                }
                free_leaf(map, middle, slot);
            }
            free_middle(map, top);
        }
    }
    map->count -= found;
    return found;
}

/* The dense bytes that stand for one whole leaf: the caller's where they cover it, else a copy between bytes
 * that change nothing. */
static const uint8_t *leaf_bytes(uint64_t leaf_first_byte, uint64_t first_byte, const uint8_t *dense,
                                 size_t bytes, uint8_t neutral, uint8_t copy[LEAF_BYTES]) {
    uint64_t leaf_end = leaf_first_byte + LEAF_BYTES;
    uint64_t end = first_byte + bytes;
    if (first_byte <= leaf_first_byte && leaf_end <= end) {
        return dense + (leaf_first_byte - first_byte);
    }
    uint64_t from = first_byte > leaf_first_byte ? first_byte : leaf_first_byte;
    uint64_t upto = smaller(leaf_end, end);
    memset(copy, neutral, LEAF_BYTES);
    memcpy(copy + (from - leaf_first_byte), dense + (from - first_byte), (size_t)(upto - from));
    return copy;
}

/* Clears where `dense`, turned over by `flip`, has ones. */
static uint64_t clear_where(struct rf_bitmap *map, uint64_t first_byte, const uint8_t *dense, size_t bytes,
                            uint64_t flip) {
    if (first_byte >= BITS_MAX / 8) {
        return 0;
    }
    uint8_t copy[LEAF_BYTES];
    uint8_t neutral = flip == 0 ? 0 : 0xff;
    uint64_t before = map->count;
    uint64_t index = first_byte * 8;
    while ((index = next_leaf(map, index)) < map->bits && index / 8 < first_byte + bytes) {
        uint64_t base = index - index % LEAF_BITS;
        struct leaf *leaf = find_leaf(map, index);
        const uint8_t *with = leaf_bytes(base / 8, first_byte, dense, bytes, neutral, copy);
        for (uint64_t words = leaf->summary; words != 0; words &= words - 1) {
            unsigned word = lowest(words);
            uint64_t gone = leaf->words[word] & (load_le64(with + (size_t)word * 8) ^ flip);
            leaf->words[word] ^= gone;
            map->count -= ones(gone);
            leaf->summary &= ~((uint64_t)(leaf->words[word] == 0) << word);
        }
        drop_if_empty(map, index);
        index = base + LEAF_BITS;
    }
    return before - map->count;
}

uint64_t rf_bitmap_and_not(struct rf_bitmap *map, uint64_t first_byte, const uint8_t *dense, size_t bytes) {
    return clear_where(map, first_byte, dense, bytes, 0);
}

uint64_t rf_bitmap_and(struct rf_bitmap *map, uint64_t first_byte, const uint8_t *dense, size_t bytes) {
    return clear_where(map, first_byte, dense, bytes, UINT64_MAX);
}

static uint64_t count_bytes(const uint8_t *dense, size_t bytes) {
    uint64_t sum = 0;
    size_t i = 0;
    for (; i + 8 <= bytes; i += 8) {
        sum += ones(load_le64(dense + i));
    }
    for (; i < bytes; i++) {
        sum += ones(dense[i]);
    }
    return sum;
}

/* Set bits of the dense bytes that lie inside the map. */
static uint64_t count_inside(const struct rf_bitmap *map, uint64_t first_byte, const uint8_t *dense,
                             size_t bytes) {
    uint64_t whole = map->bits / 8;
    if (first_byte > whole) {
        return 0;
    }
    uint64_t room = whole - first_byte;
    if (bytes <= room) {
        return count_bytes(dense, bytes);
    }
    return count_bytes(dense, (size_t)room) + ones(dense[room] & ((1u << map->bits % 8) - 1));
}

void rf_bitmap_compare(const struct rf_bitmap *map, uint64_t first_byte, const uint8_t *dense, size_t bytes,
                       uint64_t *only_map, uint64_t *only_dense) {
    if (first_byte >= BITS_MAX / 8) {
        return;
    }
    uint8_t copy[LEAF_BYTES];
    uint64_t common = 0;
    uint64_t index = first_byte * 8;
    while ((index = next_leaf(map, index)) < map->bits && index / 8 < first_byte + bytes) {
        uint64_t base = index - index % LEAF_BITS;
        const struct leaf *leaf = find_leaf(map, index);
        const uint8_t *with = leaf_bytes(base / 8, first_byte, dense, bytes, 0, copy);
        for (uint64_t words = leaf->summary; words != 0; words &= words - 1) {
            unsigned word = lowest(words);
            common += ones(leaf->words[word] & load_le64(with + (size_t)word * 8));
        }
        index = base + LEAF_BITS;
    }
    *only_map += rf_bitmap_count_range(map, first_byte * 8, (uint64_t)bytes * 8) - common;
    *only_dense += count_inside(map, first_byte, dense, bytes) - common;
}
