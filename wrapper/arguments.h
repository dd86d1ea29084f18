/* What the command line of a QEMU says that matters here: libvirt's monitor, and whose it is. */
#ifndef REFAULT_WRAPPER_ARGUMENTS_H
#define REFAULT_WRAPPER_ARGUMENTS_H

#include <stddef.h>

enum {
    REFAULT_NAME_MAX = 1024, /* with its end; a longer one counts as none */
    REFAULT_UUID_MAX = 64,
};

struct refault_arguments {
    int fd;                      /* of the listening socket of libvirt's monitor; -1: there is none */
    char name[REFAULT_NAME_MAX]; /* "" where none is said, or it is too long */
    char uuid[REFAULT_UUID_MAX];
};

/* Reads argv, which ends with NULL. The monitor is `-chardev socket,id=charmonitor,fd=N,server=on`, the last
 * of several (libvirt, src/qemu/qemu_command.c, qemuBuildMonitorCommandLine; QEMU itself refuses two of an
 * id). */
void refault_read_arguments(char *const argv[], struct refault_arguments *out);

/* The value of option name in text, words of QEMU's like `socket,id=charmonitor,fd=3`, a doubled comma in it
 * undone; 0 where there is none, or it has no room. first, if not NULL, is the name of a first word without
 * `=`. A later word with no value has "on" (util/qemu-option.c, get_opt_name_value). */
int refault_option(const char *text, const char *first, const char *name, char *out, size_t size);

#endif
