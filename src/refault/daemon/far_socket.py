"""A far connection as the kernel knows it: whether its peer is there, and what it has said so far."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import trio

from refault.migration.messages import FIRST_BYTES

_TCP_ESTABLISHED = 1
_TCP_CLOSE_WAIT = 8


def alive(connection: socket.socket | trio.socket.SocketType) -> bool:
    """Whether the peer has not closed its end (TCP_INFO's first byte is the state)."""
    return _state(connection) == _TCP_ESTABLISHED


def is_whole(connection: socket.socket | trio.socket.SocketType) -> bool:
    """Whether all that the peer has sent is there to be read, be it that it has closed its end behind it."""
    return _state(connection) in (_TCP_ESTABLISHED, _TCP_CLOSE_WAIT)


def _state(connection: socket.socket | trio.socket.SocketType) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return info[0] if isinstance(info, bytes) else info


def watch_over(connection: trio.socket.SocketType) -> None:
    """Has the kernel ask the peer every second, so that one that went silently is not `alive` for long."""
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        connection.setsockopt(socket.IPPROTO_TCP, option, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def detached(connection: trio.socket.SocketType) -> trio.socket.SocketType:
    """The same connection as another object: whoever had the first can close nothing any more."""
    return trio.socket.from_stdlib_socket(socket.socket(fileno=connection.detach()))


def growing_pauses() -> Iterator[float]:
    """Seconds to wait for the rest of what has begun to come: short ones at first, for it mostly follows at
    once, and no more than a few in a second where it does not."""
    pause = 0.001
    while True:
        yield pause
        pause = min(pause * 2, 0.25)


async def peek(connection: trio.socket.SocketType, count: int = FIRST_BYTES) -> bytes:
    """The first `count` bytes, not consumed; fewer where the peer goes away before."""
    pauses = growing_pauses()
    while True:
        try:
            first = await connection.recv(count, socket.MSG_PEEK)
        except OSError:
            return b""
        if len(first) in (0, count) or not alive(connection):
            return first
        await trio.sleep(next(pauses))  # the rest is on its way
