"""Descriptors passed over unix sockets, with flags: socket.send_fds and recv_fds drop theirs (Python 3.11),
so that they wait where a socket is a blocking one.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence


def send_with(sock: socket.socket, data: bytes | memoryview, fds: Sequence[int], flags: int) -> int:
    """sendmsg(2) with descriptors. Raises OSError."""
    passed = struct.pack(f"{len(fds)}i", *fds)
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)], flags)


def receive_with(sock: socket.socket, size: int, most: int, flags: int) -> tuple[bytes, list[int]]:
    """recvmsg(2) with at most so many descriptors. Raises OSError."""
    data, ancillary, _, _ = sock.recvmsg(size, socket.CMSG_SPACE(4 * most), flags)
    return data, descriptors_in(ancillary)


def descriptors_in(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """Those that recvmsg(2) has returned."""
    fds: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds += struct.unpack_from(f"{len(content) // 4}i", content)
    return fds
