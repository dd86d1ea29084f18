"""A far connection before it is joined: what its peer has said so far."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import trio

from refault.daemon.kernel.tcp import alive
from refault.migration.messages import FIRST_BYTES


def detached(connection: trio.socket.SocketType) -> trio.socket.SocketType:
    """The same connection as another object: whoever had the first can close nothing any more."""
    return trio.socket.from_stdlib_socket(socket.socket(fileno=connection.detach()))


def growing_pauses(first: float = 0.001, longest: float = 0.25) -> Iterator[float]:
    """Seconds, each twice the last. As they are by default they are to wait for the rest of what has begun to
    come: it mostly follows at once, and is looked for no more than a few times in a second where not."""
    pause = first
    while True:
        yield pause
        pause = min(pause * 2, longest)


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
