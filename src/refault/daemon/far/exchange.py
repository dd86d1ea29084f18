"""The messages of the handshake over a socket: exactly their bytes and no more, for frames follow."""

from __future__ import annotations

import socket

import trio

from refault.session.handshake import Answering, Dialling, Untrusted
from refault.session.wire import MAGIC, MESSAGE_BYTES, Message

HANDSHAKE_TIMEOUT = 5.0
"""For all messages of one handshake; a stranger who says nothing is let go after it."""


async def dials(sock: socket.socket, dialling: Dialling) -> Message:
    """The handshake of who dials, to WELCOME. Raises OSError, Untrusted, trio.TooSlowError."""
    with trio.fail_after(HANDSHAKE_TIMEOUT):
        await send(sock, dialling.begin())
        return await _converse(sock, dialling)


async def answers(sock: socket.socket, answering: Answering) -> Message:
    """The handshake of who answers, to a HELLO that may be judged. Raises OSError, Untrusted,
    trio.TooSlowError."""
    with trio.fail_after(HANDSHAKE_TIMEOUT):
        return await _converse(sock, answering)


async def _converse(sock: socket.socket, side: Dialling | Answering) -> Message:
    """Hears and answers until there is a message that ends the handshake."""
    while True:
        answer = side.heard(await _receive(sock))
        if isinstance(answer, Message):
            return answer
        await send(sock, answer)


async def send(sock: socket.socket, data: bytes) -> None:
    """Sends all. Raises OSError."""
    while data:
        try:
            data = data[sock.send(data, socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
    await trio.lowlevel.checkpoint()


async def _receive(sock: socket.socket) -> bytes:
    data = b""
    while len(data) < MESSAGE_BYTES:
        try:
            more = sock.recv(MESSAGE_BYTES - len(data))
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
            continue
        if not more:
            raise ConnectionResetError(0, "it was closed in the handshake")
        data += more
        if not data.startswith(MAGIC[: len(data)]):
            raise Untrusted("it does not speak refault's session protocol")
    await trio.lowlevel.checkpoint()
    return data
