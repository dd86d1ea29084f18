"""Keeps what a source has written and we have not read short, where QEMU itself has made the connection: it
delays the page that is asked for. Of a pair that we make we have both ends (local.py)."""

from __future__ import annotations

import ctypes
import logging
import os
import socket

from refault.daemon.local import SOURCE_SEND_BUFFER

log = logging.getLogger("refault.local")

_SYS_PIDFD_GETFD = 438  # the same number on every architecture (pidfd_getfd(2), Linux 5.6)
_syscall = ctypes.CDLL(None, use_errno=True).syscall


def shorten(pid: int | None, inode: int) -> bool:
    """Sets the send buffer of a process's socket. False where that is not permitted: the queue is longer
    then, and nothing else changes."""
    try:
        if pid is None:
            raise OSError("its process is not known")
        with _borrowed(pid, _number_of(pid, inode)) as theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOURCE_SEND_BUFFER)
    except OSError as error:
        log.info("QEMU's socket %s keeps its send buffer: %s", inode, error)
        return False
    return True


def _number_of(pid: int, inode: int) -> int:
    """By which a process knows a socket. Raises OSError."""
    wanted = f"socket:[{inode}]"
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            if os.readlink(f"/proc/{pid}/fd/{name}") == wanted:
                return int(name)
        except FileNotFoundError:
            continue  # closed while we looked
    raise FileNotFoundError(f"process {pid} has no socket {inode}")


def _borrowed(pid: int, number: int) -> socket.socket:
    """A duplicate of a process's descriptor. Raises OSError."""
    process = os.pidfd_open(pid)
    try:
        duplicate = _syscall(_SYS_PIDFD_GETFD, process, number, 0)
        if duplicate < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return socket.socket(fileno=duplicate)
    finally:
        os.close(process)
