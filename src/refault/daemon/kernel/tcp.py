"""TCP connections as the kernel knows them: ours by TCP_INFO (tcp(7)), another process's by its table."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import trio

from refault.daemon.kernel.process import holds

# <linux/tcp_states.h>
_ESTABLISHED = 1
_SYN_SENT = 2
_CLOSE_WAIT = 8

_PROBES = 3
_UNANSWERED_PROBES = 2
_INFO = struct.Struct("=8B13I")
"""struct tcp_info (linux/tcp.h) as far as tcpi_last_ack_recv, which is the 14th of its 32-bit words."""


def alive(connection: socket.socket | trio.socket.SocketType) -> bool:
    """Whether the peer has not closed its end (TCP_INFO's first byte is the state)."""
    return _state(connection) == _ESTABLISHED


def is_whole(connection: socket.socket | trio.socket.SocketType) -> bool:
    """Whether all that the peer has sent is there to be read, be it that it has closed its end behind it."""
    return _state(connection) in (_ESTABLISHED, _CLOSE_WAIT)


def _state(connection: socket.socket | trio.socket.SocketType) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return info[0] if isinstance(info, bytes) else info


def is_silent(connection: socket.socket, seconds: float) -> bool:
    """Whether there was no sign of life for so long though TCP asked for one: bytes that were sent again and
    not acknowledged, or window probes that nobody answers. As cext/leg.c finds it for the pump, and never by
    TCP_USER_TIMEOUT, which kills a live peer whose window is closed.
    """
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
    fields: tuple[int, ...] = _INFO.unpack(info)
    retransmits, probes, backoff = fields[2:5]
    unacked, last_ack_recv_ms = fields[8 + 4], fields[8 + 12]
    sent_again = unacked > 0 and (retransmits > 0 or backoff > 0)
    return last_ack_recv_ms > seconds * 1000 and (sent_again or probes >= _UNANSWERED_PROBES)


def keep_alive(
    connection: socket.socket | trio.socket.SocketType, idle: int, interval: int = 1, probes: int = _PROBES
) -> None:
    """Has the kernel ask a peer that has said nothing for `idle` seconds, every `interval` seconds, and end
    the connection where `probes` in a row are not answered."""
    for option, value in (
        (socket.TCP_KEEPIDLE, idle),
        (socket.TCP_KEEPINTVL, interval),
        (socket.TCP_KEEPCNT, probes),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def show_gone(connection: socket.socket, seconds: int) -> None:
    """Has a peer that is gone show on an idle connection within `seconds`."""
    keep_alive(connection, max(seconds - _PROBES, 1))


def connects(pid: int, port: int) -> bool:
    """Whether a process dials a TCP port, or has just got through. Raises OSError where one may not look."""
    # Twice: the kernel gives its table in pieces, and where connections come and go a row can be passed over.
    tables = [Path(f"/proc/{pid}/net/{table}") for table in ("tcp", "tcp6")] * 2
    return any(holds(pid, inode) for table in tables for inode in _inodes(table, port))


def _inodes(table: Path, port: int) -> set[int]:
    """proc(5), net/tcp: the sockets on their way to a remote port."""
    try:
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
    except FileNotFoundError:  # a kernel without IPv6, or the process is gone
        return set()
    return {
        int(row[9])
        for row in rows
        if int(row[3], 16) in (_ESTABLISHED, _SYN_SENT) and int(row[2].rpartition(":")[2], 16) == port
    }
