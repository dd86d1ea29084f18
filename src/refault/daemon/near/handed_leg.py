"""Our end of a local leg that a QEMU holds for the next refault, which takes it out of QEMU's process."""

from __future__ import annotations

import os
import socket

from refault.daemon.kept.sockets import Identity, cookie_of, end_for_all, held, may_take
from refault.daemon.kernel.process import start_of


def identity_of(end: socket.socket) -> tuple[int, bytes]:
    """By which it is found again: its inode's number, and the kernel's cookie. Raises OSError."""
    return os.fstat(end.fileno()).st_ino, cookie_of(end)


def can_be_taken(pid: int | None) -> bool:
    """Whether what QEMU, the process `pid`, holds can be taken out of it."""
    if pid is None:
        return False
    try:
        may_take(pid)
    except OSError:
        return False
    return True


def end(leg: socket.socket) -> None:
    """Ends it for all who hold it: QEMU sees the end."""
    with leg:
        end_for_all(leg)


def take(pid: int | None, started: int | None, leg: tuple[int, bytes]) -> socket.socket | None:
    """A duplicate of it; None where QEMU does not hold it. Raises OSError where that cannot be told, or it
    may not be taken."""
    if pid is None or (now := start_of(pid)) is None or started not in (None, now):
        return None
    inode, cookie = leg
    with held(pid, now) as holder:
        return holder.take(Identity(inode, cookie, ""))
