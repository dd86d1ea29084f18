/*
 * How a TLS handshake begins (RFC 8446): what the client and the server say first, as it passes. In TLS 1.3 a
 * client drops each further ChangeCipherSpec record up to the server's Finished (section 5), so right behind
 * the server's own there is a place at which something can be said to who knows of it, and to nobody else.
 *
 *     ClientHello ──▶        ◀── ServerHello, ChangeCipherSpec ✳ EncryptedExtensions ... Finished
 *
 * Where anything is not as GnuTLS says it there is no such place: TLS 1.2, a HelloRetryRequest, a client that
 * asks for no ChangeCipherSpec (appendix D.4), a ServerHello in several records.
 */
#ifndef RF_TLS_H
#define RF_TLS_H

#include <stddef.h>
#include <stdint.h>

enum rf_tls_place {
    RF_TLS_BEFORE = 0,  /* what comes next is before it, as far as is known */
    RF_TLS_HERE = 1,    /* what comes next is behind it */
    RF_TLS_NOWHERE = 2, /* there is none */
};

enum {
    RF_TLS_RECORD_HEAD = 5, /* type, version, length of what follows */
    RF_TLS_RANDOM = 32,
    RF_TLS_CLIENT = RF_TLS_RECORD_HEAD + 4 + 2 + RF_TLS_RANDOM, /* up to the end of its random */
    RF_TLS_CCS = RF_TLS_RECORD_HEAD + 1,
    RF_TLS_SERVER = 4096, /* a larger ServerHello is not waited for */
    RF_TLS_ID = 16,
};

/* A ChangeCipherSpec record. */
extern const uint8_t rf_tls_ccs[RF_TLS_CCS];

struct rf_tls {
    enum rf_tls_place place;
    size_t client_length;
    size_t server_length;
    uint8_t client[RF_TLS_CLIENT];
    uint8_t server[RF_TLS_SERVER];
};

/* The next bytes of the client's. */
void rf_tls_client_says(struct rf_tls *tls, const uint8_t *bytes, size_t length);

/* How many bytes of the server's may be taken next: at least one, and none that may be behind the place. */
size_t rf_tls_wants(const struct rf_tls *tls);

/* The next bytes of the server's, as many as are wanted at the most. */
enum rf_tls_place rf_tls_server_says(struct rf_tls *tls, const uint8_t *bytes, size_t length);

/* HERE: 16 bytes that are as random as the better of the two ends' randoms, and no other handshake's. */
void rf_tls_id(const struct rf_tls *tls, uint8_t id[RF_TLS_ID]);

#endif
