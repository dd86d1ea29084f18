/*
 * Finds where each JSON value of a QMP stream ends, as QEMU's own lexer and parser would
 * (qobject/json-lexer.c, json-streamer.c, json-parser.c), and where the members stand that a QMP message is
 * routed by.
 *
 * Incremental: any chunking gives the same records. Nothing is decoded and nothing is copied.
 */
#ifndef RF_JSON_SPLITTER_H
#define RF_JSON_SPLITTER_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
typedef struct rf_splitter rf_splitter;

enum rf_json_status {
    RF_JSON_VALUE = 1, /* one complete, well-formed value */
    RF_JSON_STRAY,     /* a byte that no token allows; the lexer skips to where QEMU's would recover */
    RF_JSON_SYNTAX,    /* tokens in an order that is no value, or an invalid string or keyword */
    RF_JSON_DUPLICATE, /* two equal keys in one object */
    RF_JSON_TOO_LARGE, /* more than max_bytes bytes in one value */
    RF_JSON_TOO_MANY,  /* more than 2^21 - 4 tokens in one value */
    RF_JSON_TOO_DEEP,  /* more than 1024 brackets open at once */
};

/* What RF_AT_SHAPE holds: the verb, that is which routing member the object has, and flags. */
enum rf_json_shape {
    RF_VERB_NONE = 0,
    RF_VERB_EXECUTE = 1,
    RF_VERB_EXEC_OOB = 2,
    RF_VERB_RETURN = 3,
    RF_VERB_ERROR = 4,
    RF_VERB_EVENT = 5,
    RF_VERB_GREETING = 6,
    RF_VERB_MASK = 7,
    RF_NOT_OBJECT = 0x10,
    RF_UNUSUAL = 0x20,  /* not exactly: one verb that is a string, perhaps arguments that are an object,
                           perhaps an id */
    RF_EXTENDED = 0x40, /* has single-quoted strings, \', or U+0000 as C0 80: QEMU's extensions to JSON */
    RF_BROKEN = 0x80,   /* has a CR or LF between tokens: more than one line */
    RF_EMPTY = 0x100,   /* {} */
};

/* One record. Offsets are bytes: RF_AT_BEGIN and RF_AT_END into the buffer, the rest from RF_AT_BEGIN; 0 is
 * "none". What is no value has no shape and no members. */
enum rf_json_at {
    RF_AT_STATUS,
    RF_AT_BEGIN,
    RF_AT_END,
    RF_AT_SHAPE,
    RF_AT_VERB, /* value of the verb; of a record that is no value: the token that was wrong */
    RF_AT_VERB_END,
    RF_AT_ARGUMENTS,
    RF_AT_ARGUMENTS_END,
    RF_AT_ID,
    RF_AT_ID_END,
    RF_AT_CUT, /* taking these bytes out takes the id out, key and comma included */
    RF_AT_CUT_END,
    RF_RECORD_SIZE,
};

/* A splitter refusing values of more than max_bytes. A lenient one reads QEMU's output, where `inf` and
 * `-nan` occur, and does not look for equal keys. NULL without memory. */
rf_splitter *rf_splitter_new(size_t max_bytes, int lenient);
void rf_splitter_free(rf_splitter *s);

/* Whether it skips what follows a stray byte, between two values; and has a new one do that. A new one that
 * is given the same bytes from *keep on goes on as this one does. */
int rf_splitter_skips(const rf_splitter *s);
void rf_splitter_skip(rf_splitter *s);

/* Scans on in buf, which begins where *keep of the call before says (at first: at the stream's first byte).
 * Writes up to max records and returns their number, or -1 without memory. Fewer than max: all of buf has
 * been looked at. *keep: the bytes before it are not needed again. */
int rf_splitter_scan(rf_splitter *s, const char *buf, size_t len, int64_t *records, int max, size_t *keep);

/* Writes a well-formed value as one line of strict JSON without white space, strings otherwise unchanged; out
 * has room for 3 * len bytes. Returns the length written. */
size_t rf_json_compact(const char *value, size_t len, char *out);
/* cffi: end */

#endif
