"""The kernel's table of TCP sockets (/proc/PID/net/tcp and tcp6): what must not be learnt by trying."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

ESTABLISHED = 0x01
LISTEN = 0x0A


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
    """The inodes of the sockets that listen on a port in that namespace, found without connecting to it."""
    return {row.inode for row in tcp_sockets(pid) if row.state == LISTEN and row.local[1] == port}


def is_listening(port: int, pid: int | str = "self") -> bool:
    """Whether somebody listens on a port in that namespace, found without connecting to it."""
    return bool(listeners(port, pid))


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
