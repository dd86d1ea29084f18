/*
 * refault-qemu-system-x86_64, and so on: the <emulator> of a libvirt domain. Hands the monitor's socket to
 * refault, if there is one, and becomes QEMU, whatever comes of that.
 *
 * It has no arguments and no environment of its own, closes nothing that it was given, and lays nothing at
 * another number.
 */
#include "arguments.h"
#include "hand_over.h"
#include "real_qemu.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#ifndef REFAULT_EXEC_SOCKET
#define REFAULT_EXEC_SOCKET "/run/refault/exec"
#endif
#ifndef REFAULT_PATIENCE
#define REFAULT_PATIENCE 2800 /* milliseconds; with what surrounds it less than 3 s */
#endif

enum {
    NOT_FOUND = 127, /* as a shell ends where there is no such program */
    NOT_STARTED = 126,
};

static void tell(const char *program, const char *what, const char *why) {
    char line[PATH_MAX + 512];
    const int length = snprintf(line, sizeof(line), "%s: %s: %s\n", program, what, why);
    if (length > 0 &&
        write(STDERR_FILENO, line, (size_t)length < sizeof(line) ? (size_t)length : sizeof(line)) < 0)
        return; /* there is nobody to tell */
}

int main(int argc, char *argv[]) {
    char qemu[PATH_MAX], why[REFAULT_WHY_MAX];
    struct refault_arguments arguments;
    if (argc < 1)
        return NOT_FOUND;
    if (!refault_real_qemu(argv[0], qemu, sizeof(qemu))) {
        tell(argv[0], "no QEMU",
             "there is none of this name without refault- in /usr/local/bin, /usr/bin and"
             " /usr/libexec");
        return NOT_FOUND;
    }
    refault_read_arguments(argv, &arguments);
    if (arguments.fd >= 0 && refault_hand_over(REFAULT_EXEC_SOCKET, &arguments, REFAULT_PATIENCE, why) != 0)
        tell(argv[0], "QEMU starts without refault", why);
    const char *program = argv[0];
    argv[0] = qemu;
    execv(qemu, argv);
    tell(program, qemu, strerror(errno));
    return NOT_STARTED;
}
