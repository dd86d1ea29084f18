"""Dialling the other host. Who listens there may be a bare QEMU whose recovery ends with the first connection
that comes to nothing (docs/campaign.md, Strangers), so no connection is made that is then given up."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

import trio

from refault.daemon.far.lookups import Found, look_up
from refault.daemon.kernel.tcp import alive
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

    The seconds begin when the first name is known; the look-up of a name has its own deadline (lookups.py).
    Raises OSError with the reason for each.
    """
    deadline = math.inf
    patience = FIRST_PATIENCE if len(endpoints) > 1 else LONGEST_PATIENCE
    known: dict[Inet, Found] = {}
    while True:
        errors: list[OSError] = []
        for endpoint in endpoints:
            try:
                if endpoint not in known:
                    known[endpoint] = await _found(endpoint, patience if len(endpoints) > 1 else math.inf)
                deadline = min(deadline, trio.current_time() + seconds)
                return await _connect_one_of(endpoint, known[endpoint], patience), endpoint
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


async def connect(
    endpoint: Inet, seconds: float, *, found_within: float = math.inf
) -> trio.socket.SocketType:
    """Dials one address. Raises OSError with the reason; NoAnswer where `seconds` were too few once its name
    was known, or that is not known within so many."""
    return await _connect_one_of(endpoint, await _found(endpoint, found_within), seconds)


async def connect_as_qemu(endpoint: Inet) -> trio.socket.SocketType:
    """Dials as QEMU does where a migration begins (util/qemu-sockets.c, inet_connect_saddr): each address of
    a name in turn, for as long as the kernel tries. Raises OSError, in QEMU's words."""
    where = f"{endpoint.host}:{endpoint.port}"
    try:
        found = await look_up(endpoint.host, endpoint.port)
    except OSError as error:
        raise OSError(f"address resolution failed for {where}: {error.strerror}") from None
    last = ""
    for family, kind, proto, _, address in found:
        try:
            return await _connect(socket.socket(family, kind | socket.SOCK_NONBLOCK, proto), address)
        except OSError as error:
            last = error.strerror or str(error)
    raise OSError(f"Failed to connect to '{where}': {last}")


def reached(connection: trio.socket.SocketType, endpoint: Inet) -> Inet:
    """The very address of `endpoint` that a connection was made to; `endpoint` where it has ended already."""
    try:
        host, port, *more = connection.getpeername()
    except OSError:
        return endpoint
    return Inet(f"{host}%{more[1]}" if more and more[1] else host, port)


async def _found(endpoint: Inet, seconds: float) -> Found:
    """What its host's name stands for. Raises OSError; NoAnswer where `seconds` do not tell."""
    host = endpoint.host if endpoint.host not in ("", "0") else "localhost"
    with trio.move_on_after(seconds):
        try:
            return await look_up(host, endpoint.port)
        except OSError as error:
            raise OSError(f"cannot connect to {endpoint.uri}: {error.strerror}") from None
    raise NoAnswer(f"the name in {endpoint.uri} is still being looked up")


async def _connect_one_of(endpoint: Inet, found: Found, seconds: float) -> trio.socket.SocketType:
    errors: list[str] = []
    answered = True
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
