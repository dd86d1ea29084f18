"""A TCP connection between two other processes, to be closed from outside."""

from __future__ import annotations

import ctypes
import os
import re
import socket
from pathlib import Path

from refault.lab.procnet import ESTABLISHED, tcp_sockets

_SYS_PIDFD_GETFD = 438  # the same number on every architecture (pidfd_getfd(2), Linux 5.6)
_libc = ctypes.CDLL(None, use_errno=True)


def connection_of(pid: int, port: int) -> socket.socket:
    """A duplicate of the connection with ``port`` at either end that process ``pid`` has; for root.

    `shutdown` on it is an orderly close that both ends see at once. Raises OSError where it cannot be had.
    """
    inodes = {
        row.inode
        for row in tcp_sockets(pid)
        if row.state == ESTABLISHED and port in (row.local[1], row.remote[1])
    }
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry))
        if found and int(found[1]) in inodes:
            return _duplicate(pid, int(entry.name))
    raise OSError(f"process {pid} has no connection with port {port}")


def _duplicate(pid: int, fd: int) -> socket.socket:
    pidfd = os.pidfd_open(pid)
    try:
        duplicate = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    if duplicate < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return socket.socket(fileno=duplicate)
