// sources: json_splitter.c
/*
 * The JSON splitter: any chunking gives the same records, every offset lies inside its value, and what is
 * written as strict JSON reads as one value again.
 *
 * Input: a byte of options (1: lenient, 2: a size limit of 64 bytes), a byte that chooses the chunks, and the
 * stream.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "json_splitter.h"

#define BATCH 3

struct seen {
    uint64_t hash;
    size_t count;
};

/* A copy whose end the sanitizer watches. */
static char *copy_of(const char *bytes, size_t length) {
    char *copy = malloc(length ? length : 1);
    CHECK(copy != NULL);
    if (length > 0) {
        memcpy(copy, bytes, length);
    }
    return copy;
}

static void read_again(const char *value, size_t length, bool lenient) {
    char *out = malloc(3 * length + 1);
    CHECK(out != NULL);
    size_t compact = rf_json_compact(value, length, out);
    CHECK(compact <= 3 * length);
    out[compact] = ' '; /* a number or keyword ends where something else begins */
    rf_splitter *s = rf_splitter_new(SIZE_MAX / 2, lenient);
    int64_t record[2 * RF_RECORD_SIZE];
    size_t keep;
    CHECK(s != NULL);
    CHECK(rf_splitter_scan(s, out, compact + 1, record, 2, &keep) == 1);
    CHECK(record[RF_AT_STATUS] == RF_JSON_VALUE);
    CHECK(record[RF_AT_BEGIN] == 0 && record[RF_AT_END] == (int64_t)compact);
    CHECK((record[RF_AT_SHAPE] & (RF_EXTENDED | RF_BROKEN)) == 0);
    rf_splitter_free(s);
    free(out);
}

static void check_span(const int64_t *record, int begin, int end) {
    int64_t length = record[RF_AT_END] - record[RF_AT_BEGIN];
    CHECK(0 <= record[begin] && record[begin] <= record[end] && record[end] <= length);
}

static void take(struct seen *seen, const char *buf, size_t length, const int64_t *record, bool lenient) {
    CHECK(record[RF_AT_STATUS] >= RF_JSON_VALUE && record[RF_AT_STATUS] <= RF_JSON_TOO_DEEP);
    CHECK(0 <= record[RF_AT_BEGIN] && record[RF_AT_BEGIN] <= record[RF_AT_END]);
    CHECK(record[RF_AT_END] <= (int64_t)length);
    check_span(record, RF_AT_VERB, RF_AT_VERB_END);
    check_span(record, RF_AT_ARGUMENTS, RF_AT_ARGUMENTS_END);
    check_span(record, RF_AT_ID, RF_AT_ID_END);
    check_span(record, RF_AT_CUT, RF_AT_CUT_END);
    for (int at = 0; at < RF_RECORD_SIZE; at++) {
        if (at != RF_AT_BEGIN && at != RF_AT_END) {
            seen->hash = mix(seen->hash, (uint64_t)record[at]);
        }
    }
    for (int64_t at = record[RF_AT_BEGIN]; at < record[RF_AT_END]; at++) {
        seen->hash = mix(seen->hash, (uint8_t)buf[at]);
    }
    if (record[RF_AT_STATUS] == RF_JSON_VALUE && !(lenient && (record[RF_AT_SHAPE] & RF_EXTENDED))) {
        read_again(buf + record[RF_AT_BEGIN], (size_t)(record[RF_AT_END] - record[RF_AT_BEGIN]), lenient);
    }
    seen->count++;
}

static struct seen split(const char *stream, size_t size, bool lenient, size_t max_bytes, unsigned chunks) {
    struct seen seen = {0, 0};
    rf_splitter *s = rf_splitter_new(max_bytes, lenient);
    int64_t records[BATCH * RF_RECORD_SIZE];
    size_t begin = 0, end = 0, keep;
    CHECK(s != NULL);

    while (end < size) {
        chunks = chunks * 1103515245u + 12345u;
        size_t more = chunks ? 1 + (chunks >> 16) % 7 : size;
        end = size - end < more ? size : end + more;
        int count;
        do {
            char *buf = copy_of(stream + begin, end - begin);
            count = rf_splitter_scan(s, buf, end - begin, records, BATCH, &keep);
            CHECK(count >= 0 && count <= BATCH && keep <= end - begin);
            for (int i = 0; i < count; i++) {
                take(&seen, buf, end - begin, records + i * RF_RECORD_SIZE, lenient);
            }
            free(buf);
            begin += keep;
        } while (count == BATCH);
        CHECK(end - begin <= max_bytes);
    }
    rf_splitter_free(s);
    return seen;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2) {
        return 0;
    }
    bool lenient = data[0] & 1;
    size_t max_bytes = data[0] & 2 ? 64 : (size_t)1 << 20;
    const char *stream = (const char *)data + 2;
    struct seen whole = split(stream, size - 2, lenient, max_bytes, 0);
    struct seen pieces = split(stream, size - 2, lenient, max_bytes, 1u + data[1]);
    CHECK(whole.hash == pieces.hash && whole.count == pieces.count);
    return 0;
}
