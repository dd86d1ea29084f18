/* Which program a wrapper becomes. */
#ifndef REFAULT_WRAPPER_REAL_QEMU_H
#define REFAULT_WRAPPER_REAL_QEMU_H

#include <stddef.h>

/* The path of the real QEMU for a wrapper that was called as called (`/usr/bin/refault-qemu-system-x86_64`):
 * the program without `refault-` in fixed directories, or the one QEMU that Red Hat's systems have, where the
 * wrapper is for this machine's own processor; never this very program. 0 where there is none. */
int refault_real_qemu(const char *called, char *path, size_t size);

#endif
