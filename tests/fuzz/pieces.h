/* Feeds a decoder a stream whole or in pieces. */
#ifndef RF_FUZZ_PIECES_H
#define RF_FUZZ_PIECES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "check.h"

/* Decodes up to the next event; how many bytes it took. Without an event it must take all. */
typedef size_t decode_part(void *run, const uint8_t *bytes, size_t length);

/* In pieces of up to `largest` bytes, their sizes from the stream itself; whole with 0. */
static inline void feed(const uint8_t *data, size_t size, size_t largest, decode_part *decode, void *run) {
    size_t at = 0;
    while (at < size) {
        size_t piece = largest != 0 ? 1 + data[(at * 7) % size] % largest : size;
        piece = piece < size - at ? piece : size - at;
        /* A buffer of its own, so that the sanitizer sees a read beyond it. */
        uint8_t *copy = malloc(piece);
        CHECK(copy != NULL);
        memcpy(copy, data + at, piece);
        for (size_t done = 0; done < piece;) {
            size_t part = decode(run, copy + done, piece - done);
            CHECK(part > 0 && part <= piece - done);
            done += part;
        }
        free(copy);
        at += piece;
    }
}

#endif
