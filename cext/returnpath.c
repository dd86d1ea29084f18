#include "returnpath.h"

#include <string.h>

#include "budget.h"

#define MESSAGE_LENGTH_MAX 512 /* the buffer of source_return_path_thread */
#define NAME_MAX_LENGTH 255
#define BITMAP_END_MARK UINT64_C(0x0123456789abcdef)
#define HEADER 4
#define TLS_HANDSHAKE 0x1603
#define REQUEST 12 /* start and length */

enum state {
    AT_HEADER,
    AT_PAYLOAD,
    AT_UNKNOWN,
    AT_BITMAP_SIZE,
    AT_BITMAP_DATA,
    AT_BITMAP_END,
    AT_BAD,
};

struct rf_returnpath {
    enum state state;
    uint16_t type;
    uint16_t length;
    size_t held;
    uint8_t hold[MESSAGE_LENGTH_MAX];
    uint16_t unknown_left; /* bytes of a message that cannot be read */
    enum rf_opaque unknown_reason;
    uint64_t bitmap_size;
    uint64_t bitmap_done;
    /* The block of the last request, and of the bitmap under way. */
    uint8_t request_name_length;
    uint8_t bitmap_name_length;
    char request_name[NAME_MAX_LENGTH];
    char bitmap_name[NAME_MAX_LENGTH];
};

/* Payload lengths as the source checks them (migration.c, rp_cmd_args). */
static const struct {
    uint16_t least;
    uint16_t most;
} lengths[] = {
    [RF_MESSAGE_SHUT] = {4, 4},
    [RF_MESSAGE_PONG] = {4, 4},
    [RF_MESSAGE_REQ_PAGES_ID] = {REQUEST + 2, REQUEST + 1 + NAME_MAX_LENGTH},
    [RF_MESSAGE_REQ_PAGES] = {REQUEST, REQUEST},
    [RF_MESSAGE_RECV_BITMAP] = {2, 1 + NAME_MAX_LENGTH},
    [RF_MESSAGE_RESUME_ACK] = {4, 4},
    [RF_MESSAGE_SWITCHOVER_ACK] = {0, 0},
};

static uint16_t be16(const uint8_t *bytes) { return (uint16_t)(bytes[0] << 8 | bytes[1]); }

static uint32_t be32(const uint8_t *bytes) { return (uint32_t)be16(bytes) << 16 | be16(bytes + 2); }

static uint64_t be64(const uint8_t *bytes) { return (uint64_t)be32(bytes) << 32 | be32(bytes + 4); }

static bool give(struct rf_returnpath_event *event, uint32_t type) {
    event->type = type;
    return true;
}

static bool bad(struct rf_returnpath *path, struct rf_returnpath_event *event, enum rf_opaque reason) {
    path->state = AT_BAD;
    event->reason = reason;
    return give(event, RF_RETURN_BAD);
}

static bool give_unknown(struct rf_returnpath *path, struct rf_returnpath_event *event,
                         enum rf_opaque reason) {
    event->reason = path->unknown_reason = reason;
    return give(event, RF_RETURN_UNKNOWN);
}

static bool give_request(struct rf_returnpath *path, const uint8_t *payload,
                         struct rf_returnpath_event *event) {
    event->start = be64(payload);
    event->length = be32(payload + 8);
    event->named = path->type == RF_MESSAGE_REQ_PAGES_ID;
    if (event->named) {
        if (payload[REQUEST] + REQUEST + 1 != path->length) {
            return give_unknown(path, event, RF_OPAQUE_MESSAGE_LENGTH);
        }
        path->request_name_length = payload[REQUEST];
        memcpy(path->request_name, payload + REQUEST + 1, path->request_name_length);
    }
    event->name = path->request_name;
    event->name_length = path->request_name_length;
    return give(event, RF_RETURN_REQUEST);
}

static bool give_bitmap(struct rf_returnpath *path, struct rf_returnpath_event *event, uint32_t type) {
    event->name = path->bitmap_name;
    event->name_length = path->bitmap_name_length;
    event->size = path->bitmap_size;
    return give(event, type);
}

static bool at_header(struct rf_returnpath *path, const uint8_t *bytes, struct rf_returnpath_event *event) {
    path->type = be16(bytes);
    path->length = be16(bytes + 2);
    if (path->type == TLS_HANDSHAKE) {
        return bad(path, event, RF_OPAQUE_TLS);
    }
    bool known = path->type != 0 && path->type < sizeof(lengths) / sizeof(lengths[0]);
    if (!known || path->length < lengths[path->type].least || path->length > lengths[path->type].most) {
        if (path->type == RF_MESSAGE_RECV_BITMAP) { /* it does not end with its length */
            return bad(path, event, RF_OPAQUE_MESSAGE_LENGTH);
        }
        path->unknown_left = path->length;
        path->state = path->length > 0 ? AT_UNKNOWN : AT_HEADER;
        return give_unknown(path, event, known ? RF_OPAQUE_MESSAGE_LENGTH : RF_OPAQUE_MESSAGE_TYPE);
    }
    if (path->length == 0) {
        return give(event, RF_RETURN_SWITCHOVER_ACK);
    }
    path->state = AT_PAYLOAD;
    return false;
}

static bool at_payload(struct rf_returnpath *path, const uint8_t *bytes, struct rf_returnpath_event *event) {
    path->state = AT_HEADER;
    switch (path->type) {
    case RF_MESSAGE_SHUT:
        event->value = be32(bytes);
        return give(event, RF_RETURN_SHUT);
    case RF_MESSAGE_PONG:
        event->value = be32(bytes);
        return give(event, RF_RETURN_PONG);
    case RF_MESSAGE_RESUME_ACK:
        event->value = be32(bytes);
        return give(event, RF_RETURN_RESUME_ACK);
    case RF_MESSAGE_RECV_BITMAP:
        if (bytes[0] + 1 != path->length) {
            return bad(path, event, RF_OPAQUE_MESSAGE_LENGTH);
        }
        path->bitmap_name_length = bytes[0];
        memcpy(path->bitmap_name, bytes + 1, bytes[0]);
        path->state = AT_BITMAP_SIZE;
        return false;
    default:
        return give_request(path, bytes, event);
    }
}

static bool at_bitmap_size(struct rf_returnpath *path, const uint8_t *bytes,
                           struct rf_returnpath_event *event) {
    path->bitmap_size = be64(bytes);
    path->bitmap_done = 0;
    if (path->bitmap_size % 8 != 0) {
        return bad(path, event, RF_OPAQUE_BITMAP_SIZE);
    }
    path->state = path->bitmap_size == 0 ? AT_BITMAP_END : AT_BITMAP_DATA;
    return give_bitmap(path, event, RF_RETURN_BITMAP_BEGIN);
}

static bool at_bitmap_end(struct rf_returnpath *path, const uint8_t *bytes,
                          struct rf_returnpath_event *event) {
    if (be64(bytes) != BITMAP_END_MARK) {
        return bad(path, event, RF_OPAQUE_BITMAP_END);
    }
    path->state = AT_HEADER;
    return give_bitmap(path, event, RF_RETURN_BITMAP_END);
}

/* For each state the bytes it needs (0: the payload's length) and its step; true: *event is filled. */
static const struct {
    uint8_t bytes;
    bool (*run)(struct rf_returnpath *path, const uint8_t *bytes, struct rf_returnpath_event *event);
} steps[] = {
    [AT_HEADER] = {HEADER, at_header},
    [AT_PAYLOAD] = {0, at_payload},
    [AT_BITMAP_SIZE] = {8, at_bitmap_size},
    [AT_BITMAP_END] = {8, at_bitmap_end},
};

static size_t unknown_data(struct rf_returnpath *path, size_t length, struct rf_returnpath_event *event) {
    size_t part = path->unknown_left < length ? path->unknown_left : length;
    path->unknown_left -= (uint16_t)part;
    if (path->unknown_left == 0) {
        path->state = AT_HEADER;
    }
    give_unknown(path, event, path->unknown_reason);
    return part;
}

/* The bitmap is handed on as it comes, never copied. */
static size_t bitmap_data(struct rf_returnpath *path, const uint8_t *bytes, size_t length,
                          struct rf_returnpath_event *event) {
    uint64_t left = path->bitmap_size - path->bitmap_done;
    size_t part = left < length ? (size_t)left : length;
    event->data = bytes;
    event->data_length = part;
    event->data_offset = path->bitmap_done;
    path->bitmap_done += part;
    if (path->bitmap_done == path->bitmap_size) {
        path->state = AT_BITMAP_END;
    }
    give_bitmap(path, event, RF_RETURN_BITMAP_DATA);
    return part;
}

size_t rf_returnpath_next(struct rf_returnpath *path, const uint8_t *bytes, size_t length,
                          struct rf_returnpath_event *event) {
    size_t consumed = 0;
    event->type = RF_RETURN_NONE;
    if (path->state == AT_BAD) {
        return length;
    }
    while (consumed < length) {
        if (path->state == AT_UNKNOWN) {
            return consumed + unknown_data(path, length - consumed, event);
        }
        if (path->state == AT_BITMAP_DATA) {
            return consumed + bitmap_data(path, bytes + consumed, length - consumed, event);
        }
        size_t count = steps[path->state].bytes != 0 ? steps[path->state].bytes : path->length;
        size_t part = count - path->held < length - consumed ? count - path->held : length - consumed;
        memcpy(path->hold + path->held, bytes + consumed, part);
        path->held += part;
        consumed += part;
        if (path->held == count) {
            path->held = 0;
            if (steps[path->state].run(path, path->hold, event)) {
                break;
            }
        }
    }
    return consumed;
}

bool rf_returnpath_is_bad(const struct rf_returnpath *path) { return path->state == AT_BAD; }

struct rf_returnpath *rf_returnpath_new(void) {
    struct rf_returnpath *path = rf_budget_alloc(NULL, sizeof(*path));
    if (path != NULL) {
        rf_returnpath_restart(path);
    }
    return path;
}

void rf_returnpath_free(struct rf_returnpath *path) { rf_budget_free(NULL, path, sizeof(*path)); }

void rf_returnpath_restart(struct rf_returnpath *path) {
    path->state = AT_HEADER;
    path->held = 0;
    path->request_name_length = 0;
}

int rf_returnpath_at_boundary(const struct rf_returnpath *path) {
    return path->state == AT_HEADER && path->held == 0;
}

static void put_be16(uint8_t *out, uint16_t value) {
    out[0] = (uint8_t)(value >> 8);
    out[1] = (uint8_t)value;
}

static void put_be32(uint8_t *out, uint32_t value) {
    put_be16(out, (uint16_t)(value >> 16));
    put_be16(out + 2, (uint16_t)value);
}

size_t rf_returnpath_encode_request_id(uint8_t *out, size_t room, const char *name, size_t name_length,
                                       uint64_t start, uint32_t length) {
    size_t payload = REQUEST + 1 + name_length;
    if (name_length == 0 || name_length > NAME_MAX_LENGTH || room < HEADER + payload) {
        return 0;
    }
    put_be16(out, RF_MESSAGE_REQ_PAGES_ID);
    put_be16(out + 2, (uint16_t)payload);
    put_be32(out + 4, (uint32_t)(start >> 32));
    put_be32(out + 8, (uint32_t)start);
    put_be32(out + 12, length);
    out[16] = (uint8_t)name_length;
    memcpy(out + 17, name, name_length);
    return HEADER + payload;
}

size_t rf_returnpath_block(const struct rf_returnpath *path, const char **name) {
    *name = path->request_name;
    return path->request_name_length;
}

void rf_returnpath_know_block(struct rf_returnpath *path, const char *name, size_t length) {
    path->request_name_length = (uint8_t)length;
    memcpy(path->request_name, name, length);
}

bool rf_returnpath_in_messages(const struct rf_returnpath *path) {
    return path->state == AT_HEADER || path->state == AT_PAYLOAD;
}
