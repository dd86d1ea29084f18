#include "arguments.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

static const char *const SWITCHED_ON[] = {"on", "yes", "true", "y"};

/* Copies a value up to its end, which it returns: a comma that is not doubled, or the text's. */
static const char *take_value(const char *at, char *out, size_t size, int *fits) {
    size_t length = 0;
    for (; *at != '\0'; at++) {
        if (*at == ',') {
            if (at[1] != ',')
                break;
            at++;
        }
        if (length + 1 < size)
            out[length] = *at;
        length++;
    }
    out[length < size ? length : size - 1] = '\0';
    *fits = length < size;
    return at;
}

int refault_option(const char *text, const char *first, const char *name, char *out, size_t size) {
    int found = 0;
    char value[REFAULT_NAME_MAX];
    for (const char *at = text; *at != '\0';) {
        const size_t word = strcspn(at, "=,");
        const char *key = at;
        size_t key_length = word;
        int fits = 1;
        if (at[word] == '=') {
            at = take_value(at + word + 1, value, sizeof(value), &fits);
        } else if (at == text && first != NULL) {
            key = first;
            key_length = strlen(first);
            at = take_value(at, value, sizeof(value), &fits);
        } else {
            strcpy(value, "on");
            at += word;
        }
        if (key_length == strlen(name) && memcmp(key, name, key_length) == 0) {
            found = fits && strlen(value) < size; /* the last of a name counts */
            if (found)
                strcpy(out, value);
        }
        if (*at == ',')
            at++;
    }
    return found;
}

static int is_on(const char *value) {
    for (size_t i = 0; i < sizeof(SWITCHED_ON) / sizeof(SWITCHED_ON[0]); i++)
        if (strcmp(value, SWITCHED_ON[i]) == 0)
            return 1;
    return 0;
}

static int monitor_of(const char *chardev) {
    char value[32];
    if (!refault_option(chardev, "backend", "backend", value, sizeof(value)) || strcmp(value, "socket") != 0)
        return -1;
    if (!refault_option(chardev, "backend", "id", value, sizeof(value)) || strcmp(value, "charmonitor") != 0)
        return -1;
    if (!refault_option(chardev, "backend", "server", value, sizeof(value)) || !is_on(value))
        return -1;
    if (!refault_option(chardev, "backend", "fd", value, sizeof(value)) || *value < '0' || *value > '9')
        return -1;
    char *end;
    const long number = strtol(value, &end, 10);
    return *end == '\0' && number <= INT_MAX ? (int)number : -1;
}

void refault_read_arguments(char *const argv[], struct refault_arguments *out) {
    out->fd = -1;
    out->name[0] = out->uuid[0] = '\0';
    for (int i = 1; argv[i] != NULL && argv[i + 1] != NULL; i++) {
        const char *option = argv[i];
        if (*option != '-')
            continue;
        option += option[1] == '-' ? 2 : 1;
        const char *value = argv[i + 1];
        if (strcmp(option, "chardev") == 0) {
            const int fd = monitor_of(value);
            if (fd >= 0)
                out->fd = fd;
        } else if (strcmp(option, "name") == 0) {
            if (!refault_option(value, "guest", "guest", out->name, sizeof(out->name)))
                out->name[0] = '\0';
        } else if (strcmp(option, "uuid") == 0) {
            if (strlen(value) < sizeof(out->uuid))
                strcpy(out->uuid, value);
        }
    }
}
