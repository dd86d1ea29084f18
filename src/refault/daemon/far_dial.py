"""Dialling the other host. Who listens there may be a bare QEMU whose recovery ends with the first connection
that comes to nothing (docs/campaign.md, Strangers), so no connection is made that is then given up."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

import trio

from refault.daemon.far_socket import alive
from refault.migration.endpoint import Inet

FIRST_PATIENCE = 0.25
"""Seconds until the next address is dialled, if there is one; twice as long in each round."""
REDIAL_TIMEOUT = 2.0
"""In a recovery. The kernel repeats a SYN ever later, so that a new dial finds a path that is back sooner."""
LONGEST_PATIENCE = 1.0
"""A SYN is sent again after a second (RFC 6298), and dialling anew does no less."""
_SO_ATTACH_FILTER = 26
_SO_DETACH_FILTER = 27


class NoAnswer(OSError):  # noqa: N818 - it says what happened
    """Nobody answered in time, neither yes nor no."""


async def connect_any(endpoints: Sequence[Inet], seconds: float) -> tuple[trio.socket.SocketType, Inet]:
    """Dials them in turn, one at a time, and again for `seconds` while one of them is silent.

    Raises OSError with the reason for each.
    """
    deadline = trio.current_time() + seconds
    patience = FIRST_PATIENCE if len(endpoints) > 1 else LONGEST_PATIENCE
    while True:
        errors: list[OSError] = []
        for endpoint in endpoints:
            try:
                return await connect(endpoint, patience), endpoint
            except OSError as error:
                errors.append(error)
        silent = any(isinstance(error, NoAnswer) for error in errors)
        if not silent or trio.current_time() >= deadline:
            raise OSError("; ".join(str(error) for error in errors) or "there is no address to dial")
        patience = min(patience * 2, LONGEST_PATIENCE)


async def dial_in_course(
    endpoints: Sequence[Inet], seconds: float, course: trio.CancelScope | None
) -> tuple[trio.socket.SocketType, Inet]:
    """As connect_any; the shield of an attempt's `course` is up only once there is a connection, which is not
    given up.

    Before, an attempt can be cancelled: what comes to nothing then was never there.
    """
    if course is None:
        return await connect_any(endpoints, seconds)
    course.shield = False
    try:
        return await connect_any(endpoints, seconds)
    finally:
        course.shield = True


async def connect(endpoint: Inet, seconds: float) -> trio.socket.SocketType:
    """Dials one address. Raises OSError with the reason; NoAnswer where `seconds` were too few."""
    host = endpoint.host if endpoint.host not in ("", "0") else "localhost"
    errors: list[str] = []
    found: list[tuple[Any, ...]] = []
    with trio.move_on_after(seconds) as scope:
        try:
            found = await trio.socket.getaddrinfo(host, endpoint.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise OSError(f"cannot connect to {endpoint.uri}: {error.strerror}") from None
    answered = not scope.cancelled_caught
    for family, kind, proto, _, where in found:
        with trio.move_on_after(seconds / len(found)) as scope:
            try:
                return await _connect(socket.socket(family, kind | socket.SOCK_NONBLOCK, proto), where)
            except OSError as error:
                errors.append(error.strerror or str(error))
        answered = answered and not scope.cancelled_caught
    if not answered:
        raise NoAnswer(f"no answer from {endpoint.uri} in {seconds:g} s")
    raise OSError(f"cannot connect to {endpoint.uri}: {'; '.join(dict.fromkeys(errors))}")


async def outlast(connection: trio.socket.SocketType) -> None:
    """Keeps a connection that is of no more use until the peer ends it."""
    with connection:
        while alive(connection):  # noqa: ASYNC110 - the kernel tells of it only with bytes to be read
            await trio.sleep(1)


async def _connect(sock: socket.socket, where: tuple[Any, ...]) -> trio.socket.SocketType:
    """Connects; a connection that was made is never closed for being late."""
    try:
        error = sock.connect_ex(where)
        if error == errno.EINPROGRESS:
            try:
                await trio.lowlevel.wait_writable(sock)
            except trio.Cancelled:
                if _withdrawn(sock):
                    raise
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        return trio.socket.from_stdlib_socket(sock)
    except BaseException:
        sock.close()
        raise


def _withdrawn(sock: socket.socket) -> bool:
    """Sees to it that a connection not made yet will not be; False where it has been made.

    A filter that lets nothing through stops the answer to our SYN, so what the state is then it stays.
    """
    nothing = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF_RET, 0 bytes
    program = struct.pack("HL", 1, ctypes.addressof(nothing))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    if not alive(sock):
        return True
    sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
    return False
