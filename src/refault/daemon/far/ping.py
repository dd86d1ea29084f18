"""PING and PONG before a recovered channel: whether anybody behind the connection will answer it.

A source before 8.2 cannot leave a recovery handshake that nobody ends. So its refault asks first, with QEMU's
own messages (migration/savevm.c, qemu_savevm_send_ping; migration/migration.c, migrate_send_rp_pong), and the
source is resumed only when the answer is there. A bare QEMU answers as soon as it has taken the connection, a
refault when its QEMU waits for the source. What accepts for a process that has died, or in its place, never
answers.
"""

from __future__ import annotations

import socket

import trio

from refault.daemon.kernel.tcp import alive, keep_alive
from refault.migration.messages import PING, PONG, REQUESTS


async def ask(connection: trio.socket.SocketType, dead_after: float) -> None:
    """Sends the PING, as the first bytes. From now on the kernel ends the connection when the other host is
    silent for `dead_after` seconds."""
    keep_alive(connection, 1)
    # The window is never closed here, so this does no wrong.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(dead_after * 1000))
    await connection.send(PING)  # all of it: nothing is queued yet


async def answered(connection: trio.socket.SocketType) -> None:
    """Waits, for ever, for the answer, and consumes it. A bare QEMU may ask for a page before it has come to
    the PING; then its PONG goes to the source, which before 8.2 but traces it.

    Raises OSError where the connection ends before, or what comes is no answer.
    """
    while True:
        first = await connection.recv(len(PONG), socket.MSG_PEEK)
        if first == PONG:
            await connection.recv(len(PONG))
            break
        if first.startswith(REQUESTS):
            break
        if not PONG.startswith(first):
            raise OSError(f"whoever accepted there is no destination: it says {first!r}")
        if not alive(connection):
            raise OSError("whoever accepted there closed before there was an answer")
        await trio.sleep(0.001)  # the rest is on its way
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)


async def answer(connection: trio.socket.SocketType) -> bool:
    """Answers a PING that is there; False where it is another's, and nothing was consumed."""
    if await connection.recv(len(PING), socket.MSG_PEEK) != PING:
        return False
    await connection.recv(len(PING))
    await connection.send(PONG)
    return True
