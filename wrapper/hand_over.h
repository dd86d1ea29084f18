/*
 * Handing libvirt's monitor socket to refault, over its SOCK_SEQPACKET socket, one packet each way:
 *
 *   wrapper ──▶ "refault-exec 1" NUL, name NUL, uuid NUL, number of the descriptor NUL;  with that descriptor
 *   refault ──▶ "ok" with a socket that is bound and does not listen yet,  or  "no " and why
 *
 * and then the end of the connection, when the wrapper has become QEMU.
 */
#ifndef REFAULT_WRAPPER_HAND_OVER_H
#define REFAULT_WRAPPER_HAND_OVER_H

#include "arguments.h"

enum { REFAULT_WHY_MAX = 256 };

/* Hands over what arguments name, within a number of milliseconds for all of it, and lays the socket that
 * comes back at the same number, listening; so who connects there sees this process's pid (SO_PEERCRED is
 * that of listen(2)). libvirt's own stays open at another number, for the refault that comes after this one.
 *
 * Returns 0, or -1 with why, in words, and everything as it was. Waits for nobody longer than that. */
int refault_hand_over(const char *socket_path, const struct refault_arguments *arguments, int milliseconds,
                      char why[REFAULT_WHY_MAX]);

#endif
