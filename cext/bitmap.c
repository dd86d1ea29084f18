#include "bitmap.h"

#include <stdbool.h>
#include <string.h>

#include "pool.h"

#define FAN 64u
#define LEAF_BITS ((uint64_t)1 << 16)
#define LEAF_WORDS (LEAF_BITS / 64)
#define MIDDLE_BITS (FAN * LEAF_BITS)
#define BITS_MAX ((uint64_t)1 << 44)
#define LINE ((size_t)64) /* of the cache */
#define FEW_BYTES_MIN ((size_t)64)
#define FEW_BYTES_MAX ((size_t)8192)
#define POOLS 5 /* for leaves of few, of up to 1024 bytes */

/* The same C, also compiled for what most machines have and the baseline of x86-64 lacks. The linker's loader
 * chooses, which is too early for the thread sanitizer. */
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TOO_EARLY
#endif
#endif
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(TOO_EARLY) && !defined(__SANITIZE_THREAD__)
#define FAST __attribute__((target_clones("avx2", "default")))
#else
#define FAST
#endif

/* A leaf is one of two kinds: the places of its few bits, in order; or a word for each 64 bits. It grows as
 * it fills, and stays as it is until it is empty. */
struct few {
    uint16_t length;
    uint16_t room;
    uint16_t cell; /* its number in the pool */
    uint16_t places[];
};

struct many {
    uint64_t count;
    uint64_t summary[LEAF_WORDS / 64]; /* which words are not zero */
    uint64_t words[LEAF_WORDS];
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
    struct rf_pool pools[POOLS]; /* cells of 64, 128, 256, 512 and 1024 bytes */
};

static unsigned lowest(uint64_t word) { return (unsigned)__builtin_ctzll(word); }

static inline unsigned ones(uint64_t word) { return (unsigned)__builtin_popcountll(word); }

static uint64_t bit(uint64_t index) { return (uint64_t)1 << (index % 64); }

/* Bits [from, to) of a word; 0 <= from < to <= 64. */
static uint64_t mask(uint64_t from, uint64_t to) {
    uint64_t below = to == 64 ? UINT64_MAX : ((uint64_t)1 << to) - 1;
    return below & ~(((uint64_t)1 << from) - 1);
}

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

static inline uint64_t load_le64(const uint8_t *bytes) {
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

static unsigned room_in(size_t bytes) { return (unsigned)((bytes - sizeof(struct few)) / sizeof(uint16_t)); }

static size_t few_bytes(unsigned room) { return sizeof(struct few) + room * sizeof(uint16_t); }

/* The pool of leaves of so many bytes; NULL if they have none. */
static struct rf_pool *pool_of(struct rf_bitmap *map, size_t bytes) {
    unsigned number = lowest(bytes / FEW_BYTES_MIN);
    return number < POOLS ? &map->pools[number] : NULL;
}

static struct few *take_few(struct rf_bitmap *map, size_t bytes) {
    struct rf_pool *pool = pool_of(map, bytes);
    uint16_t cell = 0;
    struct few *few = pool != NULL ? rf_pool_take(pool, &cell) : take(map, bytes);
    if (few != NULL) {
        few->length = 0;
        few->room = (uint16_t)room_in(bytes);
        few->cell = cell;
    }
    return few;
}

static void give_back_few(struct rf_bitmap *map, struct few *few) {
    size_t bytes = few_bytes(few->room);
    struct rf_pool *pool = pool_of(map, bytes);
    if (pool != NULL) {
        rf_pool_give_back(pool, few, few->cell);
    } else {
        give_back(map, few, bytes);
    }
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
    for (uint32_t i = 0; i < POOLS; i++) {
        rf_pool_init(&map->pools[i], budget, FEW_BYTES_MIN << i);
    }
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
    void *leaf = middle->leaves[slot];
    if ((middle->many & bit(slot)) != 0) {
        give_back(map, leaf, sizeof(struct many));
    } else {
        give_back_few(map, leaf);
    }
    middle->leaves[slot] = NULL;
    middle->summary &= ~bit(slot);
    middle->many &= ~bit(slot);
}

static void free_middle(struct rf_bitmap *map, size_t top) {
    struct middle *middle = map->middles[top];
    while (middle->summary != 0) {
        free_leaf(map, middle, lowest(middle->summary));
    }
    give_back(map, middle, sizeof(*middle));
    map->middles[top] = NULL;
    map->summary[top / 64] &= ~bit(top);
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

uint64_t rf_bitmap_memory(const struct rf_bitmap *map) {
    uint64_t memory = map->memory;
    for (unsigned i = 0; i < POOLS; i++) {
        memory += rf_pool_memory(&map->pools[i]);
    }
    return memory;
}

/* Where a bit is, or would be. */
struct place {
    struct middle *middle;
    size_t top;      /* of the middle */
    unsigned slot;   /* of the leaf in it */
    uint64_t base;   /* the leaf's first bit */
    struct few *few; /* the leaf, one of the two, or neither */
    struct many *many;
};

static inline struct place leaf_in(struct middle *middle, size_t top, unsigned slot) {
    struct place at = {
        .middle = middle, .top = top, .slot = slot, .base = top * MIDDLE_BITS + slot * LEAF_BITS};
    if (middle != NULL && (middle->many & bit(slot)) != 0) {
        at.many = middle->leaves[slot];
    } else if (middle != NULL) {
        at.few = middle->leaves[slot];
    }
    return at;
}

static inline struct place find(const struct rf_bitmap *map, uint64_t index) {
    size_t top = (size_t)(index / MIDDLE_BITS);
    return leaf_in(map->middles[top], top, (unsigned)(index / LEAF_BITS % FAN));
}

/* How many of the few bits lie below this place in the leaf. */
static unsigned few_below(const struct few *few, uint64_t place) {
    if (few->length == 0 || few->places[few->length - 1] < place) {
        return few->length;
    }
    unsigned first = 0;
    for (unsigned left = few->length; left > 1;) {
        unsigned half = left / 2;
        first += few->places[first + half - 1] < place ? half : 0;
        left -= half;
    }
    return first + (few->places[first] < place);
}

/* The size of a leaf with room for so many bits: one of few or, beyond what those hold, one of many. */
static size_t leaf_bytes(unsigned length) {
    size_t bytes = FEW_BYTES_MIN;
    while (bytes <= FEW_BYTES_MAX && room_in(bytes) < length) {
        bytes *= 2;
    }
    return bytes <= FEW_BYTES_MAX ? bytes : sizeof(struct many);
}

static void move_few(struct place *to, const struct few *from) {
    if (to->few != NULL) {
        to->few->length = from->length;
        memcpy(to->few->places, from->places, from->length * sizeof(uint16_t));
        return;
    }
    for (unsigned i = 0; i < from->length; i++) {
        unsigned place = from->places[i];
        to->many->words[place / 64] |= bit(place);
        to->many->summary[place / 64 / 64] |= bit(place / 64);
    }
    to->many->count = from->length;
}

/* Sees to it that the leaf can hold so many bits; false without memory, and nothing has changed. A leaf that
 * is made must be filled at once. */
static bool need(struct rf_bitmap *map, struct place *at, unsigned length) {
    if (at->many != NULL || (at->few != NULL && length <= at->few->room)) {
        return true;
    }
    struct middle *middle = at->middle;
    if (middle == NULL && (middle = take(map, sizeof(*middle))) == NULL) {
        return false;
    }
    size_t bytes = leaf_bytes(length);
    struct few *old = at->few;
    if (bytes <= FEW_BYTES_MAX) {
        at->few = take_few(map, bytes);
    } else {
        at->many = take(map, bytes);
        at->few = NULL;
    }
    if (at->few == NULL && at->many == NULL) {
        if (at->middle == NULL) {
            give_back(map, middle, sizeof(*middle));
        }
        return false;
    }
    if (old != NULL) {
        move_few(at, old);
        give_back_few(map, old);
    }
    at->middle = middle;
    map->middles[at->top] = middle;
    map->summary[at->top / 64] |= bit(at->top);
    middle->summary |= bit(at->slot);
    middle->many |= at->many != NULL ? bit(at->slot) : 0;
    middle->leaves[at->slot] = at->many != NULL ? (void *)at->many : at->few;
    return true;
}

static inline uint64_t bits_in(const struct place *at) {
    return at->many != NULL ? at->many->count : at->few->length;
}

static void drop_if_empty(struct rf_bitmap *map, const struct place *at) {
    if (bits_in(at) == 0) {
        free_leaf(map, at->middle, at->slot);
        if (at->middle->summary == 0) {
            free_middle(map, at->top);
        }
    }
}

int rf_bitmap_test(const struct rf_bitmap *map, uint64_t index) {
    if (index >= map->bits) {
        return 0;
    }
    struct place at = find(map, index);
    uint64_t place = index - at.base;
    if (at.many != NULL) {
        return (at.many->words[place / 64] & bit(place)) != 0;
    }
    if (at.few == NULL) {
        return 0;
    }
    unsigned below = few_below(at.few, place);
    return below < at.few->length && at.few->places[below] == place;
}

/* Sets the places [from, upto) of a leaf; how many changed, or RF_NO_MEMORY. */
static int64_t set_in_leaf(struct rf_bitmap *map, struct place *at, uint64_t from, uint64_t upto) {
    unsigned wanted = (unsigned)(upto - from);
    if (at->many == NULL) {
        unsigned first = at->few == NULL ? 0 : few_below(at->few, from);
        unsigned end = at->few == NULL ? 0 : first;
        while (at->few != NULL && end < at->few->length && at->few->places[end] < upto) {
            end++;
        }
        unsigned added = wanted - (end - first);
        unsigned length = at->few == NULL ? 0 : at->few->length;
        if (added == 0) {
            return 0;
        }
        if (!need(map, at, length + added)) {
            return RF_NO_MEMORY;
        }
        if (at->few != NULL) {
            uint16_t *places = at->few->places;
            memmove(&places[first + wanted], &places[end], (size_t)(length - end) * sizeof(uint16_t));
            for (unsigned i = 0; i < wanted; i++) {
                places[first + i] = (uint16_t)(from + i);
            }
            at->few->length = (uint16_t)(length + added);
            map->count += added;
            return added;
        }
    }
    uint64_t added = 0;
    while (from < upto) {
        uint64_t word = from / 64;
        uint64_t end = smaller(upto, (word + 1) * 64);
        uint64_t bits = mask(from % 64, end - word * 64);
        added += ones(bits & ~at->many->words[word]);
        at->many->words[word] |= bits;
        at->many->summary[word / 64] |= bit(word);
        from = end;
    }
    at->many->count += added;
    map->count += added;
    return (int64_t)added;
}

/* Clears the places [from, upto) of a leaf, and drops it if nothing is left. */
static void clear_in_leaf(struct rf_bitmap *map, const struct place *at, uint64_t from, uint64_t upto) {
    if (at->few != NULL) {
        struct few *few = at->few;
        unsigned first = few_below(few, from);
        unsigned end = few_below(few, upto);
        memmove(&few->places[first], &few->places[end], (size_t)(few->length - end) * sizeof(uint16_t));
        few->length = (uint16_t)(few->length - (end - first));
        map->count -= end - first;
    } else {
        uint64_t gone = 0;
        while (from < upto) {
            uint64_t word = from / 64;
            uint64_t end = smaller(upto, (word + 1) * 64);
            uint64_t bits = mask(from % 64, end - word * 64);
            gone += ones(at->many->words[word] & bits);
            at->many->words[word] &= ~bits;
            if (at->many->words[word] == 0) {
                at->many->summary[word / 64] &= ~bit(word);
            }
            from = end;
        }
        at->many->count -= gone;
        map->count -= gone;
    }
    drop_if_empty(map, at);
}

int rf_bitmap_set(struct rf_bitmap *map, uint64_t index) {
    if (index >= map->bits) {
        return RF_OUT_OF_RANGE;
    }
    struct place at = find(map, index);
    int64_t added = set_in_leaf(map, &at, index - at.base, index - at.base + 1);
    return added < 0 ? (int)added : added == 0;
}

int rf_bitmap_clear(struct rf_bitmap *map, uint64_t index) {
    if (index >= map->bits) {
        return 0;
    }
    uint64_t before = map->count;
    struct place at = find(map, index);
    if (at.few != NULL || at.many != NULL) {
        clear_in_leaf(map, &at, index - at.base, index - at.base + 1);
    }
    return before != map->count;
}

/* The end of a range, cut to the map. */
static uint64_t range_end(const struct rf_bitmap *map, uint64_t first, uint64_t count) {
    if (first >= map->bits) {
        return map->bits;
    }
    return count > map->bits - first ? map->bits : first + count;
}

int64_t rf_bitmap_set_range(struct rf_bitmap *map, uint64_t first, uint64_t count) {
    uint64_t end = range_end(map, first, count);
    uint64_t before = map->count;
    while (first < end) {
        struct place at = find(map, first);
        uint64_t leaf_end = smaller(end, at.base + LEAF_BITS);
        if (set_in_leaf(map, &at, first - at.base, leaf_end - at.base) < 0) {
            return RF_NO_MEMORY;
        }
        first = leaf_end;
    }
    return (int64_t)(map->count - before);
}

/* The first middle there is at or after `top`; middles_length if there is none. */
static size_t next_middle(const struct rf_bitmap *map, size_t top) {
    size_t group = top / 64;
    if (group >= map->summary_length) {
        return map->middles_length;
    }
    uint64_t left = map->summary[group] & mask(top % 64, 64);
    while (left == 0 && ++group < map->summary_length) {
        left = map->summary[group];
    }
    return left == 0 ? map->middles_length : group * 64 + lowest(left);
}

/* Where the next leaf at or after `index` begins (or index itself inside it); map->bits if there is none. */
static uint64_t next_leaf(const struct rf_bitmap *map, uint64_t index) {
    if (index >= map->bits) {
        return map->bits;
    }
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
    top = next_middle(map, top + 1);
    return top == map->middles_length ? map->bits
                                      : top * MIDDLE_BITS + lowest(map->middles[top]->summary) * LEAF_BITS;
}

int64_t rf_bitmap_clear_range(struct rf_bitmap *map, uint64_t first, uint64_t count) {
    uint64_t end = range_end(map, first, count);
    uint64_t before = map->count;
    while ((first = next_leaf(map, first)) < end) {
        struct place at = find(map, first);
        uint64_t leaf_end = smaller(end, at.base + LEAF_BITS);
        clear_in_leaf(map, &at, first - at.base, leaf_end - at.base);
        first = leaf_end;
    }
    return (int64_t)(before - map->count);
}

static uint64_t count_in_leaf(const struct place *at, uint64_t from, uint64_t upto) {
    if (at->few != NULL) {
        return few_below(at->few, upto) - few_below(at->few, from);
    }
    if (upto - from == LEAF_BITS) {
        return at->many->count;
    }
    uint64_t sum = 0;
    while (from < upto) {
        uint64_t word = from / 64;
        uint64_t end = smaller(upto, (word + 1) * 64);
        sum += ones(at->many->words[word] & mask(from % 64, end - word * 64));
        from = end;
    }
    return sum;
}

uint64_t rf_bitmap_count_range(const struct rf_bitmap *map, uint64_t first, uint64_t count) {
    uint64_t end = range_end(map, first, count);
    uint64_t sum = 0;
    while ((first = next_leaf(map, first)) < end) {
        struct place at = find(map, first);
        uint64_t leaf_end = smaller(end, at.base + LEAF_BITS);
        sum += count_in_leaf(&at, first - at.base, leaf_end - at.base);
        first = leaf_end;
    }
    return sum;
}

uint64_t rf_bitmap_next(const struct rf_bitmap *map, uint64_t from) {
    uint64_t found;
    return rf_bitmap_list(map, &from, &found, 1) == 1 ? found : RF_BITMAP_END;
}

#define EIGHT 8u /* places at a time, which the compiler makes into vectors */

FAST static void add_base(uint64_t *restrict out, const uint16_t *restrict places, size_t length,
                          uint64_t base) {
    size_t i = 0;
    for (; i + EIGHT <= length; i += EIGHT) {
        for (size_t j = 0; j < EIGHT; j++) {
            out[i + j] = base + places[i + j];
        }
    }
    for (; i < length; i++) {
        out[i] = base + places[i];
    }
}

/* The first word that is not zero, at or after this one; LEAF_WORDS if there is none. */
static uint64_t next_word(const struct many *many, uint64_t word) {
    if (word >= LEAF_WORDS) {
        return LEAF_WORDS;
    }
    uint64_t group = word / 64;
    uint64_t left = many->summary[group] & mask(word % 64, 64);
    while (left == 0 && ++group < LEAF_WORDS / 64) {
        left = many->summary[group];
    }
    return left == 0 ? LEAF_WORDS : group * 64 + lowest(left);
}

/* The bits of one leaf from a place on; returns how many. Of `out` it may overwrite `scratch`, at most
 * `room`. */
static size_t list_leaf(const struct place *at, uint64_t from, uint64_t *out, size_t room, size_t scratch) {
    if (at->few != NULL) {
        unsigned first = from == 0 ? 0 : few_below(at->few, from);
        size_t length = (size_t)smaller(at->few->length - first, room);
        size_t rounded = (length + EIGHT - 1) / EIGHT * EIGHT; /* spares a branch that is hard to foresee */
        bool fits = rounded <= scratch && first + rounded <= at->few->room;
        add_base(out, at->few->places + first, fits ? rounded : length, at->base);
        return length;
    }
    size_t found = 0;
    uint64_t skip = from % 64;
    for (uint64_t word = next_word(at->many, from / 64); word < LEAF_WORDS && found < room;
         word = next_word(at->many, word + 1)) {
        uint64_t left = at->many->words[word];
        if (word == from / 64) {
            left &= mask(skip, 64);
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
        found += list_leaf(&at, index - at.base, out + found, room - found, 0);
        index = at.base + LEAF_BITS;
    }
    if (found > 0) {
        *from = out[found - 1] + 1;
    }
    return found;
}

size_t rf_bitmap_drain(struct rf_bitmap *map, uint64_t *out, size_t room) {
    size_t found = 0;
    size_t wanted = (size_t)smaller(map->count, room); /* all of which will be written */
    for (size_t top = 0; found < room && (top = next_middle(map, top)) < map->middles_length;) {
        struct middle *middle = map->middles[top];
        while (middle->summary != 0 && found < room) {
            struct place at = leaf_in(middle, top, lowest(middle->summary));
            size_t part = list_leaf(&at, 0, out + found, room - found, wanted - found);
            uint64_t first = out[found] - at.base;
            found += part;
            if (part < bits_in(&at)) {
                clear_in_leaf(map, &at, first, out[found - 1] + 1 - at.base);
                return found;
            }
            map->count -= part;
            free_leaf(map, middle, at.slot);
        }
        if (middle->summary == 0) {
            free_middle(map, top);
        }
    }
    return found;
}

/* A dense bitmap: bytes [first, end) of all, turned over by `flip`. */
struct dense {
    const uint8_t *bytes;
    uint64_t first;
    uint64_t end;
    uint64_t flip;
};

static struct dense dense_of(const struct rf_bitmap *map, uint64_t first_byte, const uint8_t *bytes,
                             size_t length, uint64_t flip) {
    uint64_t whole = (map->bits + 7) / 8;
    uint64_t first = smaller(first_byte, whole);
    return (struct dense){bytes, first, first + smaller(length, whole - first), flip};
}

/* The word of all that begins at this byte, zero where no byte was given. */
static inline uint64_t dense_word(const struct dense *dense, uint64_t byte) {
    if (dense->first <= byte && byte + 8 <= dense->end) {
        return load_le64(dense->bytes + (byte - dense->first)) ^ dense->flip;
    }
    uint64_t word = 0;
    for (unsigned i = 0; i < 8; i++) {
        if (dense->first <= byte + i && byte + i < dense->end) {
            word |= (uint64_t)(uint8_t)(dense->bytes[byte + i - dense->first] ^ dense->flip) << (i * 8);
        }
    }
    return word;
}

static inline unsigned dense_bit(const struct dense *dense, uint64_t index) {
    return ((dense->bytes[index / 8 - dense->first] ^ dense->flip) >> index % 8) & 1;
}

/* The part of a leaf of few that the dense bytes cover: places [first, end). */
static void few_inside(const struct place *at, const struct dense *dense, unsigned *first, unsigned *end) {
    uint64_t begin = dense->first * 8;
    *first = begin <= at->base ? 0 : few_below(at->few, begin - at->base);
    *end = few_below(at->few, smaller(dense->end * 8 - at->base, LEAF_BITS));
}

static void clear_few_where(struct rf_bitmap *map, const struct place *at, const struct dense *dense) {
    struct few *few = at->few;
    unsigned first, end;
    few_inside(at, dense, &first, &end);
    unsigned kept = first;
    for (unsigned i = first; i < end; i++) {
        uint16_t place = few->places[i];
        few->places[kept] = place;
        kept += 1 - dense_bit(dense, at->base + place);
    }
    if (kept < end) {
        memmove(&few->places[kept], &few->places[end], (size_t)(few->length - end) * sizeof(uint16_t));
        few->length = (uint16_t)(few->length - (end - kept));
        map->count -= end - kept;
    }
}

FAST static void clear_many_where(struct rf_bitmap *map, const struct place *at, const struct dense *dense) {
    struct many *many = at->many;
    uint64_t first = at->base / 8;
    uint64_t gone = 0;
    uint64_t word = dense->first <= first ? 0 : (dense->first - first) / 8;
    for (word = next_word(many, word); word < LEAF_WORDS && first + word * 8 < dense->end;
         word = next_word(many, word + 1)) {
        uint64_t cleared = many->words[word] & dense_word(dense, first + word * 8);
        many->words[word] ^= cleared;
        gone += ones(cleared);
        many->summary[word / 64] &= ~((uint64_t)(many->words[word] == 0) << word % 64);
    }
    many->count -= gone;
    map->count -= gone;
}

/* How many bits ahead the dense bytes are asked for: enough to keep the memory busy, and what has come is not
 * pushed out of the cache again. A leaf of more bits has ones in most lines of its 8 KiB, and the processor
 * itself sees that they are read in order. */
#define ASKED_BITS 96u
#define CROWDED_BITS 128u
/* Lines are asked for into the second cache, to which many more can be on their way; but from leaves of fewer
 * bits than this, with one or two on a page, into the first: on Zen 4 the other kind of request seems to be
 * dropped where the page is not in the TLB. Measured there, of 10^4 bits in 4096 leaves: 283 us, not 629; of
 * 10^5: 870 us, not 1430. */
#define LONELY_BITS 8u

/* gcc takes a function that does nothing but prefetch for one without effect, and leaves its calls out. */
#define ASKING static inline __attribute__((always_inline))

/* The leaves under the dense bytes, in order. Each would cost a wait for memory for its middle, one for
 * itself and one for the dense byte of each of its bits; so all of these are asked for some time before. */
struct walk {
    const struct rf_bitmap *map;
    const struct dense *dense;
    uint64_t end;
    uint64_t index; /* where the next leaf is looked for */
    uint64_t ahead; /* and the next whose dense bytes are asked for */
    size_t top;     /* the middle where `ahead` was */
    uint64_t asked; /* bits in leaves before `ahead` */
    uint64_t given; /* bits in leaves before `index` */
};

ASKING void ask_for_middle(const struct rf_bitmap *map, size_t top) {
    if (top < map->middles_length) {
        const uint8_t *middle = (const uint8_t *)map->middles[top];
        for (size_t i = 0; i < sizeof(struct middle); i += LINE) {
            __builtin_prefetch(middle + i);
        }
    }
}

ASKING void ask_for_leaves(const struct rf_bitmap *map, size_t top) {
    if (top < map->middles_length) {
        const struct middle *middle = map->middles[top];
        for (uint64_t left = middle->summary; left != 0; left &= left - 1) {
            __builtin_prefetch(middle->leaves[lowest(left)]);
        }
    }
}

ASKING void ask_for_dense(const struct place *at, const struct dense *dense) {
    unsigned first, end;
    few_inside(at, dense, &first, &end);
    for (unsigned i = first; i < end; i++) {
        const uint8_t *byte = &dense->bytes[(at->base + at->few->places[i]) / 8 - dense->first];
        if (at->few->length < LONELY_BITS) {
            __builtin_prefetch(byte, 0, 3);
        } else {
            __builtin_prefetch(byte, 0, 2);
        }
    }
}

static void look_ahead(struct walk *walk) {
    const struct rf_bitmap *map = walk->map;
    while (walk->asked - walk->given < ASKED_BITS &&
           (walk->ahead = next_leaf(map, walk->ahead)) < walk->end) {
        struct place at = find(map, walk->ahead);
        if (at.top != walk->top) {
            size_t next = next_middle(map, at.top + 1);
            ask_for_leaves(map, next);
            ask_for_middle(map, next_middle(map, next + 1));
            walk->top = at.top;
        }
        uint64_t bits = bits_in(&at);
        if (at.few != NULL && bits < CROWDED_BITS) {
            ask_for_dense(&at, walk->dense);
        }
        walk->asked += bits;
        walk->ahead = at.base + LEAF_BITS;
    }
}

static struct walk walk_under(const struct rf_bitmap *map, const struct dense *dense) {
    uint64_t first = dense->first * 8;
    size_t top = next_middle(map, (size_t)(first / MIDDLE_BITS));
    size_t next = next_middle(map, top + 1);
    ask_for_middle(map, top);
    ask_for_middle(map, next);
    ask_for_leaves(map, top);
    return (struct walk){.map = map,
                         .dense = dense,
                         .end = smaller(dense->end * 8, map->bits),
                         .index = first,
                         .ahead = first,
                         .top = SIZE_MAX};
}

/* False at the end. What is done with the leaf may drop it. */
static inline bool step(struct walk *walk, struct place *at) {
    look_ahead(walk);
    uint64_t index = next_leaf(walk->map, walk->index);
    if (index >= walk->end) {
        return false;
    }
    *at = find(walk->map, index);
    walk->given += bits_in(at);
    walk->index = at->base + LEAF_BITS;
    return true;
}

/* Clears where the dense bitmap has ones. */
static uint64_t clear_where(struct rf_bitmap *map, const struct dense *dense) {
    uint64_t before = map->count;
    struct walk walk = walk_under(map, dense);
    for (struct place at; step(&walk, &at);) {
        if (at.many != NULL) {
            clear_many_where(map, &at, dense);
        } else {
            clear_few_where(map, &at, dense);
        }
        drop_if_empty(map, &at);
    }
    return before - map->count;
}

uint64_t rf_bitmap_and_not(struct rf_bitmap *map, uint64_t first_byte, const uint8_t *dense, size_t bytes) {
    struct dense taken = dense_of(map, first_byte, dense, bytes, 0);
    return clear_where(map, &taken);
}

uint64_t rf_bitmap_and(struct rf_bitmap *map, uint64_t first_byte, const uint8_t *dense, size_t bytes) {
    struct dense taken = dense_of(map, first_byte, dense, bytes, UINT64_MAX);
    return clear_where(map, &taken);
}

FAST static uint64_t count_bytes(const uint8_t *dense, size_t bytes) {
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

FAST static uint64_t common_in_leaf(const struct place *at, const struct dense *dense) {
    uint64_t common = 0;
    if (at->few != NULL) {
        unsigned first, end;
        few_inside(at, dense, &first, &end);
        for (unsigned i = first; i < end; i++) {
            common += dense_bit(dense, at->base + at->few->places[i]);
        }
        return common;
    }
    uint64_t first = at->base / 8;
    uint64_t word = dense->first <= first ? 0 : (dense->first - first) / 8;
    for (word = next_word(at->many, word); word < LEAF_WORDS && first + word * 8 < dense->end;
         word = next_word(at->many, word + 1)) {
        common += ones(at->many->words[word] & dense_word(dense, first + word * 8));
    }
    return common;
}

void rf_bitmap_compare(const struct rf_bitmap *map, uint64_t first_byte, const uint8_t *dense, size_t bytes,
                       uint64_t *only_map, uint64_t *only_dense) {
    struct dense all = dense_of(map, first_byte, dense, bytes, 0);
    uint64_t length = all.end - all.first;
    uint64_t common = 0;
    struct walk walk = walk_under(map, &all);
    for (struct place at; step(&walk, &at);) {
        common += common_in_leaf(&at, &all);
    }
    uint64_t inside = count_bytes(dense, length);
    if (length > 0 && all.end * 8 > map->bits) { /* the last byte reaches beyond the map */
        inside -= ones(dense[length - 1] >> map->bits % 8);
    }
    *only_map += rf_bitmap_count_range(map, all.first * 8, length * 8) - common;
    *only_dense += inside - common;
}
