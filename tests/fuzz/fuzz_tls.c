/*
 * How a TLS handshake begins: two bytes say how many of the rest are the client's, and what is left is the
 * server's. In pieces as whole, whatever they say.
 */
#include <stdint.h>
#include <string.h>

#include "check.h"
#include "tls.h"

static void client_says(struct rf_tls *tls, const uint8_t *bytes, size_t length, size_t most) {
    for (size_t at = 0; at < length; at += most) {
        rf_tls_client_says(tls, bytes + at, length - at < most ? length - at : most);
    }
}

/* How many bytes were taken until it was known. */
static size_t server_says(struct rf_tls *tls, const uint8_t *bytes, size_t length, size_t most) {
    size_t at = 0;
    while (tls->place == RF_TLS_BEFORE && at < length) {
        size_t wants = rf_tls_wants(tls);
        CHECK(wants > 0 && at + wants <= RF_TLS_SERVER);
        size_t part = wants < length - at ? wants : length - at;
        part = part < most ? part : most;
        rf_tls_server_says(tls, bytes + at, part);
        at += part;
    }
    return at;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2) {
        return 0;
    }
    size_t client = (size_t)data[0] << 8 | data[1];
    client = client < size - 2 ? client : size - 2;
    const uint8_t *server = data + 2 + client;
    size_t left = size - 2 - client;
    struct rf_tls whole = {0}, pieces = {0};

    client_says(&whole, data + 2, client, size);
    client_says(&pieces, data + 2, client, 3);
    size_t taken = server_says(&whole, server, left, SIZE_MAX);
    size_t one_by_one = server_says(&pieces, server, left, 1);
    if (whole.place == RF_TLS_NOWHERE) { /* which shows sooner in pieces */
        CHECK(pieces.place == RF_TLS_NOWHERE && one_by_one <= taken);
    } else {
        CHECK(pieces.place == whole.place && one_by_one == taken);
    }
    if (whole.place == RF_TLS_HERE) {
        uint8_t one[RF_TLS_ID], other[RF_TLS_ID];
        CHECK(memcmp(server + taken - RF_TLS_CCS, rf_tls_ccs, RF_TLS_CCS) == 0);
        rf_tls_id(&whole, one);
        rf_tls_id(&pieces, other);
        CHECK(memcmp(one, other, sizeof(one)) == 0);
    }
    return 0;
}
