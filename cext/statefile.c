#include "statefile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "budget.h"
#include "crash.h"

/* In native byte order: a file of another kind of machine has none. */
#define MAGIC UINT64_C(0x3152544c46455246)
#define VERSION 2u
#define HEADER_BYTES 4096u
#define BLOCKS_STEP 64u
#define RECORDS_STEP 1024u

/* A block's sizes in one word, so that they change together: pages, log2 of the page size, flags, checksum.
 */
#define PAGES_BITS 46u
#define CHECK_SHIFT 53u
#define DECLARED ((uint64_t)1 << 52)
#define PAGE_SIZE_SHIFT PAGES_BITS
#define PAGE_SIZE_MASK ((uint64_t)63 << PAGE_SIZE_SHIFT)
#define PAGES_MASK (((uint64_t)1 << PAGES_BITS) - 1)
#define CHECKED_MASK (((uint64_t)1 << CHECK_SHIFT) - 1)

struct header {
    _Atomic uint64_t magic; /* written last */
    uint32_t version;
    uint32_t key_length;
    uint8_t key[RF_STATEFILE_KEY_MAX];
    uint64_t check; /* of the three above */
    /* Each a sealed word. */
    _Atomic uint64_t facts;
    _Atomic uint64_t page_bits;
    _Atomic uint64_t blocks_length;
    _Atomic uint64_t records_room; /* slots that are allocated: a shorter file has been cut */
    _Atomic uint64_t crashed;      /* enum rf_work */
    /* With a checksum in it. */
    _Atomic uint64_t ended; /* records with an id up to this one have ended; 0: none by this word */
};

struct file_block {
    char name[255];
    uint8_t name_length;
    uint64_t check; /* of the name and the index */
    _Atomic uint64_t sizes;
};

struct file_record {
    _Atomic uint64_t state; /* id * 2 + outstanding; 0: the slot is free */
    uint64_t start;
    uint64_t time;
    uint64_t length_and_block;
    uint64_t check; /* of the three above, the id and the slot */
};

#define BLOCKS_AT ((uint64_t)HEADER_BYTES)
#define RECORDS_AT (BLOCKS_AT + RF_STATEFILE_BLOCKS_MAX * sizeof(struct file_block))
#define MOST_BYTES (RECORDS_AT + RF_STATEFILE_RECORDS_MAX * sizeof(struct file_record))

_Static_assert(sizeof(struct header) <= HEADER_BYTES, "the header has a page");
_Static_assert(sizeof(struct file_block) == 272 && sizeof(struct file_record) == 40, "the file's layout");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "a word is stored at once");

struct rf_statefile {
    int fd;
    uint8_t *map;
    uint32_t blocks_room;
    uint32_t blocks_length;
    uint32_t records_room;
    _Atomic bool part;
};

/* Checksums: against torn and overwritten files, not against whoever forges one. */

static uint64_t mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) * UINT64_C(0x9e3779b97f4a7c15);
    return hash ^ hash >> 29;
}

static uint64_t mix_bytes(uint64_t hash, const void *bytes, size_t length) {
    const uint8_t *byte = bytes;
    for (size_t i = 0; i < length; i++) {
        hash = mix(hash, byte[i]);
    }
    return hash;
}

static uint64_t sealed(uint32_t value) { return (uint64_t)~value << 32 | value; }

static bool unseal(uint64_t word, uint32_t *value) {
    *value = (uint32_t)word;
    return word == sealed(*value);
}

static uint64_t with_check(uint64_t word) { return word | mix(VERSION, word) >> CHECK_SHIFT << CHECK_SHIFT; }

static uint64_t header_check(const struct header *header) {
    return mix_bytes(mix(header->version, header->key_length), header->key, sizeof(header->key));
}

static uint64_t block_check(const struct file_block *block, uint32_t index) {
    return mix_bytes(mix(index + 1u, block->name_length), block->name, sizeof(block->name));
}

static uint64_t record_check(const struct file_record *record, uint64_t id, uint32_t slot) {
    uint64_t hash = mix(mix(slot + 1u, id), record->start);
    return mix(mix(hash, record->time), record->length_and_block);
}

/* Writing. */

static struct header *header_of(const struct rf_statefile *file) { return (struct header *)file->map; }

static struct file_block *block_of(const struct rf_statefile *file, uint32_t index) {
    return (struct file_block *)(file->map + BLOCKS_AT) + index;
}

static struct file_record *record_of(const struct rf_statefile *file, uint32_t slot) {
    return (struct file_record *)(file->map + RECORDS_AT) + slot;
}

static void put(_Atomic uint64_t *word, uint64_t value) {
    atomic_store_explicit(word, value, memory_order_release);
}

static bool left_out(struct rf_statefile *file) {
    atomic_store_explicit(&file->part, true, memory_order_relaxed);
    return false;
}

/* Allocates the blocks of the file system under a table's entries up to `count`. */
static bool allocate(struct rf_statefile *file, uint64_t at, uint64_t entry, uint32_t *room, uint32_t count,
                     uint32_t most) {
    int error;
    if (count > most) {
        return left_out(file);
    }
    do {
        error = posix_fallocate(file->fd, (off_t)(at + *room * entry), (off_t)((count - *room) * entry));
    } while (error == EINTR);
    if (error != 0) {
        return left_out(file);
    }
    *room = count;
    return true;
}

static bool room_for_block(struct rf_statefile *file, uint32_t index) {
    return index < file->blocks_room ||
           allocate(file, BLOCKS_AT, sizeof(struct file_block), &file->blocks_room,
                    (index / BLOCKS_STEP + 1) * BLOCKS_STEP, RF_STATEFILE_BLOCKS_MAX);
}

static bool room_for_record(struct rf_statefile *file, uint32_t slot) {
    if (slot < file->records_room) {
        return true;
    }
    if (!allocate(file, RECORDS_AT, sizeof(struct file_record), &file->records_room,
                  (slot / RECORDS_STEP + 1) * RECORDS_STEP, RF_STATEFILE_RECORDS_MAX)) {
        return false;
    }
    put(&header_of(file)->records_room, sealed(file->records_room));
    return true;
}

static void write_header(struct header *header, const uint8_t *key, size_t key_length) {
    header->version = VERSION;
    header->key_length = (uint32_t)key_length;
    memcpy(header->key, key, key_length);
    header->check = header_check(header);
    put(&header->facts, sealed(0));
    put(&header->page_bits, sealed(0));
    put(&header->blocks_length, sealed(0));
    put(&header->crashed, sealed(0));
    put(&header->magic, MAGIC); /* and with it records_room, of which room_for_record has told */
}

struct rf_statefile *rf_statefile_new(int fd, const uint8_t *key, size_t key_length) {
    if (key_length > RF_STATEFILE_KEY_MAX || ftruncate(fd, 0) < 0 ||
        posix_fallocate(fd, 0, HEADER_BYTES) != 0) {
        return NULL;
    }
    struct rf_statefile *file = rf_budget_alloc(NULL, sizeof(*file));
    if (file == NULL) {
        return NULL;
    }
    *file = (struct rf_statefile){.fd = fcntl(fd, F_DUPFD_CLOEXEC, 3), .map = MAP_FAILED};
    if (file->fd >= 0) {
        file->map = mmap(NULL, MOST_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file->fd, 0);
    }
    if (file->map == MAP_FAILED || !room_for_block(file, 0) || !room_for_record(file, 0)) {
        rf_statefile_free(file);
        return NULL;
    }
    write_header(header_of(file), key, key_length);
    rf_crash_watch();
    return file;
}

void rf_statefile_free(struct rf_statefile *file) {
    if (file == NULL) {
        return;
    }
    if (file->map != MAP_FAILED) {
        munmap(file->map, MOST_BYTES);
    }
    if (file->fd >= 0) {
        close(file->fd);
    }
    rf_budget_free(NULL, file, sizeof(*file));
}

enum rf_kept rf_statefile_kept(const struct rf_statefile *file) {
    if (file == NULL) {
        return RF_KEPT_NOTHING;
    }
    return atomic_load_explicit(&file->part, memory_order_relaxed) ? RF_KEPT_PART : RF_KEPT_ALL;
}

void rf_statefile_facts(struct rf_statefile *file, uint32_t facts) {
    if (file != NULL) {
        put(&header_of(file)->facts, sealed(facts));
    }
}

void rf_statefile_at_work(struct rf_statefile *file, enum rf_work work) {
    if (file != NULL) {
        rf_crash_last_word(work == RF_WORK_NONE ? NULL : &header_of(file)->crashed, sealed(work));
    }
}

void rf_statefile_crashed(struct rf_statefile *file, enum rf_work work) {
    if (file != NULL) {
        put(&header_of(file)->crashed, sealed(work));
    }
}

void rf_statefile_page_bits(struct rf_statefile *file, uint32_t bits) {
    if (file != NULL) {
        put(&header_of(file)->page_bits, sealed(bits));
    }
}

void rf_statefile_block(struct rf_statefile *file, uint32_t index, const char *name, size_t name_length) {
    if (file == NULL || !room_for_block(file, index)) {
        return;
    }
    if (index != file->blocks_length) { /* there was no room for one before it */
        left_out(file);
        return;
    }
    struct file_block *block = block_of(file, index);
    memcpy(block->name, name, name_length);
    block->name_length = (uint8_t)name_length;
    block->check = block_check(block, index);
    put(&block->sizes, with_check(0));
    file->blocks_length = index + 1;
    put(&header_of(file)->blocks_length, sealed(file->blocks_length));
}

void rf_statefile_block_size(struct rf_statefile *file, uint32_t index, uint64_t pages, uint64_t page_size,
                             bool declared) {
    if (file == NULL || index >= file->blocks_length || pages > PAGES_MASK) {
        return;
    }
    uint64_t log2 = page_size == 0 ? 0 : (uint64_t)__builtin_ctzll(page_size);
    put(&block_of(file, index)->sizes,
        with_check(pages | log2 << PAGE_SIZE_SHIFT | (declared ? DECLARED : 0)));
}

void rf_statefile_record(struct rf_statefile *file, uint32_t slot, const struct rf_statefile_record *record) {
    if (file == NULL || !room_for_record(file, slot)) {
        return;
    }
    if (record->block >= file->blocks_length) {
        left_out(file);
        return;
    }
    struct file_record *at = record_of(file, slot);
    at->start = record->start;
    at->time = record->time;
    at->length_and_block = (uint64_t)record->block << 32 | record->length;
    at->check = record_check(at, record->id, slot);
    put(&at->state, record->id << 1 | record->outstanding);
}

void rf_statefile_outstanding(struct rf_statefile *file, uint32_t slot, bool outstanding) {
    if (file != NULL && slot < file->records_room) {
        struct file_record *at = record_of(file, slot);
        uint64_t state = atomic_load_explicit(&at->state, memory_order_relaxed);
        if (state != 0) {
            put(&at->state, state >> 1 << 1 | outstanding);
        }
    }
}

void rf_statefile_end(struct rf_statefile *file, uint32_t slot) {
    if (file != NULL && slot < file->records_room) {
        put(&record_of(file, slot)->state, 0);
    }
}

void rf_statefile_end_all(struct rf_statefile *file, uint64_t last) {
    if (file != NULL && last != 0) {
        put(&header_of(file)->ended, with_check(last & CHECKED_MASK));
    }
}

/* Reading. */

static bool read_all(int fd, void *out, size_t bytes, uint64_t at) {
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pread(fd, (uint8_t *)out + done, bytes - done, (off_t)(at + done));
        if (n <= 0) {
            return false;
        }
        done += (size_t)n;
    }
    return true;
}

static uint64_t word(const _Atomic uint64_t *at) { return atomic_load_explicit(at, memory_order_relaxed); }

static enum rf_restored load_header(int fd, uint64_t size, const uint8_t *key, size_t key_length,
                                    struct rf_statefile_image *image) {
    struct header header;
    uint32_t records_room;
    uint32_t crashed;
    if (!read_all(fd, &header, sizeof(header), 0) || word(&header.magic) != MAGIC) {
        return RF_RESTORED_TORN;
    }
    if (header.version != VERSION) {
        return RF_RESTORED_VERSION;
    }
    if (header.check != header_check(&header) || header.key_length > sizeof(header.key)) {
        return RF_RESTORED_TORN;
    }
    if (header.key_length != key_length || memcmp(header.key, key, key_length) != 0) {
        return RF_RESTORED_FOREIGN;
    }
    if (!unseal(word(&header.facts), &image->facts) || !unseal(word(&header.page_bits), &image->page_bits) ||
        !unseal(word(&header.blocks_length), &image->blocks_length) ||
        !unseal(word(&header.records_room), &records_room) || !unseal(word(&header.crashed), &crashed) ||
        crashed > RF_WORK_FRAMING || image->blocks_length > RF_STATEFILE_BLOCKS_MAX ||
        records_room > RF_STATEFILE_RECORDS_MAX ||
        size < RECORDS_AT + records_room * sizeof(struct file_record)) {
        return RF_RESTORED_TORN;
    }
    image->ended = word(&header.ended) & CHECKED_MASK;
    if (word(&header.ended) != 0 && word(&header.ended) != with_check(image->ended)) {
        return RF_RESTORED_TORN;
    }
    image->crashed = (enum rf_work)crashed;
    return RF_RESTORED_WHOLE;
}

static enum rf_restored load_blocks(int fd, struct rf_statefile_image *image) {
    if (image->blocks_length == 0) {
        return RF_RESTORED_WHOLE;
    }
    image->blocks = rf_budget_alloc(NULL, image->blocks_length * sizeof(*image->blocks));
    if (image->blocks == NULL) {
        return RF_RESTORED_NO_MEMORY;
    }
    for (uint32_t i = 0; i < image->blocks_length; i++) {
        struct file_block block;
        if (!read_all(fd, &block, sizeof(block), BLOCKS_AT + i * sizeof(block))) {
            return RF_RESTORED_TORN;
        }
        uint64_t sizes = word(&block.sizes);
        if (block.name_length == 0 || block.check != block_check(&block, i) ||
            sizes != with_check(sizes & CHECKED_MASK)) {
            return RF_RESTORED_TORN;
        }
        struct rf_statefile_block *out = &image->blocks[i];
        memcpy(out->name, block.name, sizeof(out->name));
        out->name_length = block.name_length;
        out->declared = (sizes & DECLARED) != 0;
        out->pages = sizes & PAGES_MASK;
        uint64_t log2 = (sizes & PAGE_SIZE_MASK) >> PAGE_SIZE_SHIFT;
        out->page_size = log2 == 0 ? 0 : (uint64_t)1 << log2;
    }
    return RF_RESTORED_WHOLE;
}

static void take_record(struct rf_statefile_image *image, const struct file_record *record, uint32_t slot) {
    uint64_t state = word(&record->state);
    if (state == 0 || (state >> 1 != 0 && state >> 1 <= image->ended)) {
        return;
    }
    uint32_t block = (uint32_t)(record->length_and_block >> 32);
    if (state >> 1 == 0 || record->check != record_check(record, state >> 1, slot) ||
        block >= image->blocks_length) {
        image->torn++;
        return;
    }
    image->records[image->records_length++] = (struct rf_statefile_record){
        .id = state >> 1,
        .start = record->start,
        .time = record->time,
        .length = (uint32_t)record->length_and_block,
        .block = block,
        .outstanding = (state & 1) != 0,
    };
}

static int by_id(const void *one, const void *other) {
    const struct rf_statefile_record *a = one;
    const struct rf_statefile_record *b = other;
    return (a->id > b->id) - (a->id < b->id);
}

static enum rf_restored load_records(int fd, uint64_t size, struct rf_statefile_image *image) {
    uint64_t slots = size > RECORDS_AT ? (size - RECORDS_AT) / sizeof(struct file_record) : 0;
    image->records = rf_budget_alloc(NULL, (slots + 1) * sizeof(*image->records));
    if (image->records == NULL) {
        return RF_RESTORED_NO_MEMORY;
    }
    for (uint32_t slot = 0; slot < slots;) {
        struct file_record some[RECORDS_STEP / 8];
        uint32_t count = (uint32_t)(sizeof(some) / sizeof(some[0]));
        count = count < slots - slot ? count : (uint32_t)(slots - slot);
        if (!read_all(fd, some, count * sizeof(some[0]), RECORDS_AT + slot * sizeof(some[0]))) {
            return RF_RESTORED_TORN;
        }
        for (uint32_t i = 0; i < count; i++) {
            take_record(image, &some[i], slot++);
        }
    }
    qsort(image->records, image->records_length, sizeof(*image->records), by_id);
    return RF_RESTORED_WHOLE;
}

enum rf_restored rf_statefile_load(int fd, const uint8_t *key, size_t key_length,
                                   struct rf_statefile_image *image) {
    struct stat stat;
    *image = (struct rf_statefile_image){0};
    if (fstat(fd, &stat) < 0 || !S_ISREG(stat.st_mode) || (uint64_t)stat.st_size > MOST_BYTES) {
        return RF_RESTORED_TORN;
    }
    enum rf_restored found = load_header(fd, (uint64_t)stat.st_size, key, key_length, image);
    if (found == RF_RESTORED_WHOLE) {
        found = load_blocks(fd, image);
    }
    if (found == RF_RESTORED_WHOLE) {
        found = load_records(fd, (uint64_t)stat.st_size, image);
    }
    if (found != RF_RESTORED_WHOLE) {
        rf_statefile_image_free(image);
        return found;
    }
    return image->crashed != RF_WORK_NONE ? RF_RESTORED_CRASHED : RF_RESTORED_WHOLE;
}

void rf_statefile_image_free(struct rf_statefile_image *image) {
    rf_budget_free(NULL, image->blocks, 0);
    rf_budget_free(NULL, image->records, 0);
    *image = (struct rf_statefile_image){0};
}
