"""The kernel's table of TCP sockets: what must not be learnt by trying.

All of them from /proc/PID/net/tcp and tcp6, for which the kernel walks the whole table of connections: 20 ms
where that has 2^18 places. Those that listen from its socket diagnostics (sock_diag(7)), in 0.1 ms, for who
carries bytes asks for them again and again.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from .netns import socket_inside

ESTABLISHED = 0x01
LISTEN = 0x0A

# linux/netlink.h, sock_diag.h, inet_diag.h
_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBxxI2s46x")
_INODE_AT = 68


@dataclass(frozen=True)
class TcpSocket:
    """One row: addresses as text and port, the kernel's state number, bytes not yet acknowledged and not yet
    read.
    """

    local: tuple[str, int]
    remote: tuple[str, int]
    state: int
    unsent: int
    unread: int
    inode: int


def tcp_sockets(pid: int | str = "self") -> list[TcpSocket]:
    """All TCP sockets in the network namespace of a process. Raises OSError when it is gone."""
    return [row for table in ("tcp", "tcp6") for row in _rows(Path(f"/proc/{pid}/net/{table}"))]


def listeners(port: int, pid: int | str = "self") -> set[int]:
    """The inodes of the sockets that listen on a port in that namespace, found without connecting to it.

    Raises OSError when the process is gone.
    """
    try:
        with _diagnostics(pid) as kernel:
            return set().union(*(_ask(kernel, family, port) for family in (socket.AF_INET, socket.AF_INET6)))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EPROTONOSUPPORT) or not Path(f"/proc/{pid}").exists():
            raise
    # A kernel without diagnostics of TCP.
    return {row.inode for row in tcp_sockets(pid) if row.state == LISTEN and row.local[1] == port}


def is_listening(port: int, pid: int | str = "self") -> bool:
    """Whether somebody listens on a port in that namespace, found without connecting to it."""
    return bool(listeners(port, pid))


def _diagnostics(pid: int | str) -> socket.socket:
    namespace = f"/proc/{pid}/ns/net"
    if os.path.samefile(namespace, "/proc/self/ns/net"):
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG)
    return socket_inside(namespace, socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG)


def _ask(kernel: socket.socket, family: int, port: int) -> set[int]:
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 1 << LISTEN, port.to_bytes(2, "big"))
    kernel.send(
        _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + request
    )
    inodes: set[int] = set()
    while True:
        answer = kernel.recv(1 << 16)
        at = 0
        while at < len(answer):
            length, kind, *_ = _HEADER.unpack_from(answer, at)
            if kind == _DONE:
                return inodes
            body = at + _HEADER.size
            if kind == _ERROR:
                number = -int(struct.unpack_from("=i", answer, body)[0])
                raise OSError(number, os.strerror(number))
            inodes.add(int(struct.unpack_from("=I", answer, body + _INODE_AT)[0]))
            at += (length + 3) & ~3


def _rows(path: Path) -> Iterator[TcpSocket]:
    try:
        lines = path.read_text().splitlines()[1:]
    except FileNotFoundError:  # a kernel without IPv6
        return
    for line in lines:
        cells = line.split()
        unsent, _, unread = cells[4].partition(":")
        yield TcpSocket(
            _address(cells[1]),
            _address(cells[2]),
            int(cells[3], 16),
            int(unsent, 16),
            int(unread, 16),
            int(cells[9]),
        )


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.partition(":")
    words = [int(host[at : at + 8], 16) for at in range(0, len(host), 8)]
    raw = struct.pack(f"={len(words)}I", *words)
    if len(raw) == 4:
        return socket.inet_ntop(socket.AF_INET, raw), int(port, 16)
    address = IPv6Address(raw)
    mapped: IPv4Address | None = address.ipv4_mapped
    return str(mapped or address), int(port, 16)
