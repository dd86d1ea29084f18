"""TCP connections as the kernel knows them: ours by TCP_INFO (tcp(7)), another process's by its table."""

from __future__ import annotations

import socket
from pathlib import Path

import trio

from refault.daemon.kernel.process import holds

# <linux/tcp_states.h>
_ESTABLISHED = 1
_SYN_SENT = 2
_CLOSE_WAIT = 8


def alive(connection: socket.socket | trio.socket.SocketType) -> bool:
    """Whether the peer has not closed its end (TCP_INFO's first byte is the state)."""
    return _state(connection) == _ESTABLISHED


def is_whole(connection: socket.socket | trio.socket.SocketType) -> bool:
    """Whether all that the peer has sent is there to be read, be it that it has closed its end behind it."""
    return _state(connection) in (_ESTABLISHED, _CLOSE_WAIT)


def _state(connection: socket.socket | trio.socket.SocketType) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return info[0] if isinstance(info, bytes) else info


def watch_over(connection: trio.socket.SocketType) -> None:
    """Has the kernel ask the peer every second, so that one that went silently is not `alive` for long."""
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        connection.setsockopt(socket.IPPROTO_TCP, option, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


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
