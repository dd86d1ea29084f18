#include "bitmap.h"

#include <stdbool.h>
#include <string.h>

#define FAN 64u
#define FEW 31
#define LEAF_BITS ((uint64_t)FAN * 64)
#define MIDDLE_BITS ((uint64_t)FAN * LEAF_BITS)
#define LEAF_BYTES ((size_t)LEAF_BITS / 8)
#define BITS_MAX ((uint64_t)1 << 44)

/* A leaf is one of two kinds: the places of its few bits, in order, in one cache line; or a word for each 64
 * bits. A leaf of many stays one until it is empty. */
struct few {
    uint16_t length;
    uint16_t places[FEW];
};

struct many {
    uint64_t summary; /* which words are not zero */
    uint64_t words[FAN];
};

struct middle {
    uint64_t summary; /* which leaves there are; there is none without a bit */
    uint64_t many;    /* and which of them are of that kind */
    void *leaves[FAN];
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
    bool many = (middle->many & bit(slot)) != 0;
    give_back(map, middle->leaves[slot], many ? sizeof(struct many) : sizeof(struct few));
    middle->leaves[slot] = NULL;
    middle->summary &= ~bit(slot);
    middle->many &= ~bit(slot);
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

/* Where a bit is, or would be. */
struct place {
    struct middle *middle;
    size_t top;      /* of the middle */
    unsigned slot;   /* of the leaf in it */
    uint64_t base;   /* the leaf's first bit */
    struct few *few; /* the leaf, one of the two, or neither */
    struct many *many;
};

static struct place find(const struct rf_bitmap *map, uint64_t index) {
    struct place at = {.top = (size_t)(index / MIDDLE_BITS),
                       .slot = (unsigned)(index / LEAF_BITS % FAN),
                       .base = index - index % LEAF_BITS};
    at.middle = map->middles[at.top];
    if (at.middle != NULL && (at.middle->many & bit(at.slot)) != 0) {
        at.many = at.middle->leaves[at.slot];
    } else if (at.middle != NULL) {
        at.few = at.middle->leaves[at.slot];
    }
    return at;
}

/* Makes an empty leaf where there is none, in place of a full one of few where it is to be of many; false
 * without memory. An empty one must be filled or dropped at once. */
static bool need(struct rf_bitmap *map, struct place *at, bool many) {
    if (at->many != NULL || (at->few != NULL && !many)) {
        return true;
    }
    void *leaf = take(map, many ? sizeof(struct many) : sizeof(struct few));
    if (leaf == NULL) {
        return false;
    }
    if (at->middle == NULL) {
        at->middle = take(map, sizeof(struct middle));
        if (at->middle == NULL) {
            give_back(map, leaf, many ? sizeof(struct many) : sizeof(struct few));
            return false;
        }
        map->middles[at->top] = at->middle;
        map->summary[at->top / 64] |= bit(at->top);
    }
    at->middle->leaves[at->slot] = leaf;
    at->middle->summary |= bit(at->slot);
    if (!many) {
        at->few = leaf;
        return true;
    }
    at->many = leaf;
    at->middle->many |= bit(at->slot);
    if (at->few != NULL) {
        for (unsigned i = 0; i < at->few->length; i++) {
            uint16_t place = at->few->places[i];
            at->many->words[place / 64] |= bit(place);
            at->many->summary |= bit(place / 64);
        }
        give_back(map, at->few, sizeof(struct few));
        at->few = NULL;
    }
    return true;
}

static void drop_if_empty(struct rf_bitmap *map, const struct place *at) {
    if (at->many != NULL ? at->many->summary == 0 : at->few->length == 0) {
        free_leaf(map, at->middle, at->slot);
        if (at->middle->summary == 0) {
            free_middle(map, at->top);
        }
    }
}

/* How many of the few bits lie below this place in the leaf. */
static unsigned few_below(const struct few *few, uint64_t place) {
    unsigned below = 0;
    while (below < few->length && few->places[below] < place) {
        below++;
    }
    return below;
}

static bool few_has(const struct few *few, uint64_t place) {
    unsigned below = few_below(few, place);
    return below < few->length && few->places[below] == place;
}

int rf_bitmap_test(const struct rf_bitmap *map, uint64_t index) {
    if (index >= map->bits) {
        return 0;
    }
    struct place at = find(map, index);
    if (at.many != NULL) {
        return (at.many->words[index / 64 % FAN] & bit(index)) != 0;
    }
    return at.few != NULL && few_has(at.few, index - at.base);
}

int rf_bitmap_set(struct rf_bitmap *map, uint64_t index) {
    if (index >= map->bits) {
        return RF_OUT_OF_RANGE;
    }
    struct place at = find(map, index);
    if (at.few != NULL && few_has(at.few, index - at.base)) {
        return 1;
    }
    if (!need(map, &at, at.few != NULL && at.few->length == FEW)) {
        return RF_NO_MEMORY;
    }
    if (at.many != NULL) {
        uint64_t word = index / 64 % FAN;
        if ((at.many->words[word] & bit(index)) != 0) {
            return 1;
        }
        at.many->words[word] |= bit(index);
        at.many->summary |= bit(word);
    } else {
        unsigned below = few_below(at.few, index - at.base);
        memmove(&at.few->places[below + 1], &at.few->places[below],
                (size_t)(at.few->length - below) * sizeof(uint16_t));
        at.few->places[below] = (uint16_t)(index - at.base);
        at.few->length++;
    }
    map->count++;
    return 0;
}

int rf_bitmap_clear(struct rf_bitmap *map, uint64_t index) {
    if (index >= map->bits) {
        return 0;
    }
    return (int)rf_bitmap_clear_range(map, index, 1);
}

/* The end of a range, cut to the map. */
static uint64_t range_end(const struct rf_bitmap *map, uint64_t first, uint64_t count) {
    if (first >= map->bits) {
        return map->bits;
    }
    return count > map->bits - first ? map->bits : first + count;
}

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

static int64_t set_few(struct rf_bitmap *map, uint64_t first, uint64_t end) {
    for (; first < end; first++) {
        int old = rf_bitmap_set(map, first);
        if (old < 0) {
            return old;
        }
    }
    return 0;
}

static void set_many(struct rf_bitmap *map, struct many *many, uint64_t first, uint64_t end) {
    while (first < end) {
        uint64_t upto = smaller(end, (first / 64 + 1) * 64);
        uint64_t word = first / 64 % FAN;
        uint64_t bits = mask(first % 64, upto - (first - first % 64));
        map->count += ones(bits & ~many->words[word]);
        many->words[word] |= bits;
        many->summary |= bit(word);
        first = upto;
    }
}

int64_t rf_bitmap_set_range(struct rf_bitmap *map, uint64_t first, uint64_t count) {
    uint64_t end = range_end(map, first, count);
    uint64_t before = map->count;
    while (first < end) {
        struct place at = find(map, first);
        uint64_t leaf_end = smaller(end, at.base + LEAF_BITS);
        uint64_t there = at.few == NULL ? 0 : at.few->length;
        if (at.many == NULL && there + (leaf_end - first) <= FEW) {
            if (set_few(map, first, leaf_end) < 0) {
                return RF_NO_MEMORY;
            }
        } else {
            if (!need(map, &at, true)) {
                return RF_NO_MEMORY;
            }
            set_many(map, at.many, first, leaf_end);
        }
        first = leaf_end;
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

static void clear_few(struct rf_bitmap *map, struct few *few, uint64_t from, uint64_t upto) {
    unsigned first = few_below(few, from);
    unsigned end = few_below(few, upto);
    memmove(&few->places[first], &few->places[end], (size_t)(few->length - end) * sizeof(uint16_t));
    few->length = (uint16_t)(few->length - (end - first));
    map->count -= end - first;
}

static void clear_many(struct rf_bitmap *map, struct many *many, uint64_t first, uint64_t end) {
    while (first < end) {
        uint64_t upto = smaller(end, (first / 64 + 1) * 64);
        uint64_t word = first / 64 % FAN;
        uint64_t bits = mask(first % 64, upto - (first - first % 64));
        map->count -= ones(many->words[word] & bits);
        many->words[word] &= ~bits;
        if (many->words[word] == 0) {
            many->summary &= ~bit(word);
        }
        first = upto;
    }
}

int64_t rf_bitmap_clear_range(struct rf_bitmap *map, uint64_t first, uint64_t count) {
    uint64_t end = range_end(map, first, count);
    uint64_t before = map->count;
    while ((first = next_leaf(map, first)) < end) {
        struct place at = find(map, first);
        uint64_t leaf_end = smaller(end, at.base + LEAF_BITS);
        if (at.many != NULL) {
            clear_many(map, at.many, first, leaf_end);
        } else {
            clear_few(map, at.few, first - at.base, leaf_end - at.base);
        }
        drop_if_empty(map, &at);
        first = leaf_end;
    }
    return (int64_t)(before - map->count);
}

uint64_t rf_bitmap_count_range(const struct rf_bitmap *map, uint64_t first, uint64_t count) {
    uint64_t end = range_end(map, first, count);
    uint64_t sum = 0;
    while ((first = next_leaf(map, first)) < end) {
        struct place at = find(map, first);
        uint64_t leaf_end = smaller(end, at.base + LEAF_BITS);
        if (at.few != NULL) {
            sum += few_below(at.few, leaf_end - at.base) - few_below(at.few, first - at.base);
            first = leaf_end;
        }
        while (first < leaf_end) {
            uint64_t upto = smaller(leaf_end, (first / 64 + 1) * 64);
            sum += ones(at.many->words[first / 64 % FAN] & mask(first % 64, upto - (first - first % 64)));
            first = upto;
        }
    }
    return sum;
}

uint64_t rf_bitmap_next(const struct rf_bitmap *map, uint64_t from) {
    uint64_t found;
    return rf_bitmap_list(map, &from, &found, 1) == 1 ? found : RF_BITMAP_END;
}

/* The bits of one leaf from `from` on; returns how many. */
static size_t list_leaf(const struct place *at, uint64_t from, uint64_t *out, size_t room) {
    size_t found = 0;
    uint64_t start = from - at->base;
    if (at->few != NULL) {
        for (unsigned i = few_below(at->few, start); i < at->few->length && found < room; i++) {
            out[found++] = at->base + at->few->places[i];
        }
        return found;
    }
    uint64_t words = at->many->summary & mask(start / 64, 64);
    for (; words != 0 && found < room; words &= words - 1) {
        uint64_t word = lowest(words);
        uint64_t left = at->many->words[word];
        if (word == start / 64) {
            left &= mask(start % 64, 64);
        }
        for (; left != 0 && found < room; left &= left - 1) {
            out[found++] = at->base + word * 64 + lowest(left);
        }
    }
    return found;
}

size_t rf_bitmap_list(const struct rf_bitmap *map, uint64_t *from, uint64_t *out, size_t room) {
    size_t found = 0;
    uint64_t index = *from;
    while (found < room && (index = next_leaf(map, index)) < map->bits) {
        struct place at = find(map, index);
        found += list_leaf(&at, index, out + found, room - found);
        index = at.base + LEAF_BITS;
    }
    if (found > 0) {
        *from = out[found - 1] + 1;
    }
    return found;
}

size_t rf_bitmap_drain(struct rf_bitmap *map, uint64_t *out, size_t room) {
    size_t found = 0;
    uint64_t index = 0;
    while (found < room && (index = next_leaf(map, index)) < map->bits) {
        struct place at = find(map, index);
        size_t part = list_leaf(&at, at.base, out + found, room - found);
        found += part;
        index = at.base + LEAF_BITS;
        uint64_t upto = found < room ? index : out[found - 1] + 1;
        if (upto == index) {
            map->count -= part;
            free_leaf(map, at.middle, at.slot);
            if (at.middle->summary == 0) {
                free_middle(map, at.top);
            }
        } else {
            rf_bitmap_clear_range(map, at.base, upto - at.base);
        }
    }
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

static void clear_few_where(struct rf_bitmap *map, struct few *few, const uint8_t *with, uint64_t flip) {
    unsigned kept = 0;
    for (unsigned i = 0; i < few->length; i++) {
        uint16_t place = few->places[i];
        few->places[kept] = place;
        kept += ((((with[place / 8] ^ flip) >> place % 8) & 1) == 0);
    }
    map->count -= few->length - kept;
    few->length = (uint16_t)kept;
}

static void clear_many_where(struct rf_bitmap *map, struct many *many, const uint8_t *with, uint64_t flip) {
    for (uint64_t words = many->summary; words != 0; words &= words - 1) {
        unsigned word = lowest(words);
        uint64_t gone = many->words[word] & (load_le64(with + (size_t)word * 8) ^ flip);
        many->words[word] ^= gone;
        map->count -= ones(gone);
        many->summary &= ~((uint64_t)(many->words[word] == 0) << word);
    }
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
        struct place at = find(map, index);
        const uint8_t *with = leaf_bytes(at.base / 8, first_byte, dense, bytes, neutral, copy);
        if (at.many != NULL) {
            clear_many_where(map, at.many, with, flip);
        } else {
            clear_few_where(map, at.few, with, flip);
        }
        drop_if_empty(map, &at);
        index = at.base + LEAF_BITS;
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
        struct place at = find(map, index);
        const uint8_t *with = leaf_bytes(at.base / 8, first_byte, dense, bytes, 0, copy);
        for (unsigned i = 0; at.few != NULL && i < at.few->length; i++) {
            uint16_t place = at.few->places[i];
            common += (with[place / 8] >> place % 8) & 1;
        }
        for (uint64_t words = at.many != NULL ? at.many->summary : 0; words != 0; words &= words - 1) {
            unsigned word = lowest(words);
            common += ones(at.many->words[word] & load_le64(with + (size_t)word * 8));
        }
        index = at.base + LEAF_BITS;
    }
    *only_map += rf_bitmap_count_range(map, first_byte * 8, (uint64_t)bytes * 8) - common;
    *only_dense += count_inside(map, first_byte, dense, bytes) - common;
}
