#include "tls.h"

#include <stdbool.h>
#include <string.h>

enum {
    HANDSHAKE = 22,
    CLIENT_HELLO = 1,
    SERVER_HELLO = 2,
    SUPPORTED_VERSIONS = 43,
    TLS_1_2 = 0x0303, /* in the place where there is nothing higher */
    TLS_1_3 = 0x0304,
    SESSION_ID_MAX = 32,
};

/* Offsets in a record with one of the two. */
enum {
    LENGTH_AT = 3,
    TYPE_AT = RF_TLS_RECORD_HEAD,
    VERSION_AT = TYPE_AT + 4,
    RANDOM_AT = VERSION_AT + 2,
    SESSION_ID_AT = RANDOM_AT + RF_TLS_RANDOM,
};

const uint8_t rf_tls_ccs[RF_TLS_CCS] = {20, 3, 3, 0, 1, 1};

/* The random of a ServerHello that is a HelloRetryRequest: SHA-256 of that word (4.1.3). */
static const uint8_t RETRY[RF_TLS_RANDOM] = {
    0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91,
    0xc2, 0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
};

static size_t two(const uint8_t *at) { return (size_t)at[0] << 8 | at[1]; }

static size_t three(const uint8_t *at) { return (size_t)at[0] << 16 | two(at + 1); }

static size_t record_end(const struct rf_tls *tls) {
    return RF_TLS_RECORD_HEAD + two(tls->server + LENGTH_AT);
}

static bool is_client_hello(const struct rf_tls *tls) {
    return tls->client_length == RF_TLS_CLIENT && tls->client[0] == HANDSHAKE && tls->client[1] == 3 &&
           tls->client[TYPE_AT] == CLIENT_HELLO && two(tls->client + VERSION_AT) == TLS_1_2;
}

static bool chooses_1_3(const uint8_t *at, size_t length) {
    while (length >= 4) {
        size_t body = two(at + 2);

        if (body > length - 4) {
            return false;
        }
        if (two(at) == SUPPORTED_VERSIONS) {
            return body == 2 && two(at + 4) == TLS_1_3;
        }
        at += 4 + body;
        length -= 4 + body;
    }
    return false;
}

/* A record is there: whether it is a ServerHello of TLS 1.3, alone and whole. */
static bool is_server_hello(const struct rf_tls *tls) {
    const uint8_t *record = tls->server;
    size_t end = record_end(tls);
    size_t at = SESSION_ID_AT;

    if (end < at + 1 || record[TYPE_AT] != SERVER_HELLO || three(record + TYPE_AT + 1) != end - VERSION_AT ||
        two(record + VERSION_AT) != TLS_1_2 || memcmp(record + RANDOM_AT, RETRY, sizeof(RETRY)) == 0 ||
        record[at] > SESSION_ID_MAX) {
        return false;
    }
    at += 1 + record[at] + 2 + 1; /* cipher suite, compression method */
    return end >= at + 2 && two(record + at) == end - at - 2 && chooses_1_3(record + at + 2, end - at - 2);
}

void rf_tls_client_says(struct rf_tls *tls, const uint8_t *bytes, size_t length) {
    size_t room = sizeof(tls->client) - tls->client_length;
    size_t part = length < room ? length : room;

    memcpy(tls->client + tls->client_length, bytes, part);
    tls->client_length += part;
}

size_t rf_tls_wants(const struct rf_tls *tls) {
    size_t until = tls->server_length < RF_TLS_RECORD_HEAD ? RF_TLS_RECORD_HEAD
                   : tls->server_length < record_end(tls)  ? record_end(tls)
                                                           : record_end(tls) + RF_TLS_CCS;

    return until - tls->server_length;
}

/* By all that has come. */
static enum rf_tls_place judge(const struct rf_tls *tls) {
    size_t end, behind;

    if (tls->server_length < RF_TLS_RECORD_HEAD) {
        return RF_TLS_BEFORE;
    }
    end = record_end(tls);
    if (tls->server[0] != HANDSHAKE || two(tls->server + 1) != TLS_1_2 || end + RF_TLS_CCS > RF_TLS_SERVER) {
        return RF_TLS_NOWHERE;
    }
    if (tls->server_length < end) {
        return RF_TLS_BEFORE;
    }
    behind = tls->server_length - end;
    if (!is_client_hello(tls) || !is_server_hello(tls) ||
        memcmp(tls->server + end, rf_tls_ccs, behind) != 0) {
        return RF_TLS_NOWHERE;
    }
    return behind < RF_TLS_CCS ? RF_TLS_BEFORE : RF_TLS_HERE;
}

enum rf_tls_place rf_tls_server_says(struct rf_tls *tls, const uint8_t *bytes, size_t length) {
    memcpy(tls->server + tls->server_length, bytes, length);
    tls->server_length += length;
    tls->place = judge(tls);
    return tls->place;
}

void rf_tls_id(const struct rf_tls *tls, uint8_t id[RF_TLS_ID]) {
    const uint8_t *client = tls->client + RANDOM_AT + RF_TLS_RANDOM - RF_TLS_ID;
    const uint8_t *server = tls->server + RANDOM_AT + RF_TLS_RANDOM - RF_TLS_ID;

    for (size_t i = 0; i < RF_TLS_ID; i++) {
        id[i] = client[i] ^ server[i];
    }
}
