"""The far leg: the TCP connection to the other host, dialled at the source and accepted at the
destination."""

from __future__ import annotations

import enum
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable

import trio

from refault.migration.endpoint import Inet

log = logging.getLogger("refault.far")

FIRST_BYTES = 4
FIRST_BYTES_TIMEOUT = 30.0
_TCP_ESTABLISHED = 1


class Kind(enum.Enum):
    """What the first bytes of a far connection say it is."""

    FRESH = "the beginning of a migration"
    RESUMED = "a recovered channel"
    FOREIGN = "no migration stream"


Offer = Callable[[trio.socket.SocketType, Kind], Awaitable[None]]


def classify(first: bytes) -> Kind:
    """Reads the first 4 bytes: QEMU_VM_FILE_MAGIC, or the command section that opens a recovered channel.

    migration/savevm.c: qemu_savevm_state_header, and qemu_savevm_send_recv_bitmap, which is what
    ram_resume_prepare (migration/ram.c) begins a recovery with.
    """
    if first == b"QEVM":
        return Kind.FRESH
    if first == struct.pack(">BHB", 8, 10, 0):
        return Kind.RESUMED
    return Kind.FOREIGN


async def first_block(connection: trio.socket.SocketType) -> bytes | None:
    """The RAM block that a recovered channel asks about first, not consumed; None if the channel goes away.

    migration/savevm.c, qemu_savevm_send_recv_bitmap: section type, command and length, then the counted name.
    """
    while alive(connection):
        first = await connection.recv(6 + 255, socket.MSG_PEEK)
        if len(first) > 5 and len(first) >= 6 + first[5]:
            return first[6 : 6 + first[5]]
        await trio.sleep(0.001)
    return None


def alive(connection: trio.socket.SocketType) -> bool:
    """Whether the peer has not closed its end (TCP_INFO's first byte is the state)."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return isinstance(info, bytes) and info[0] == _TCP_ESTABLISHED


async def connect(endpoint: Inet, timeout: float) -> trio.socket.SocketType:  # noqa: ASYNC109
    """Dials the other host. Raises OSError with the reason, also after `timeout` seconds."""
    host = endpoint.host if endpoint.host not in ("", "0") else "localhost"
    try:
        with trio.fail_after(timeout):
            stream = await trio.open_tcp_stream(host, endpoint.port)
    except trio.TooSlowError:
        raise OSError(f"no answer from {endpoint.uri} in {timeout:g} s") from None
    except OSError as error:
        raise OSError(f"cannot connect to {endpoint.uri}: {_root(error)}") from None
    return stream.socket


def _root(error: OSError) -> str:
    """What the system said, without trio's words around it."""
    cause = error.__cause__ or error
    errors = cause.exceptions if isinstance(cause, ExceptionGroup) else [cause]
    return "; ".join(
        sorted({os.strerror(e.errno) if isinstance(e, OSError) and e.errno else str(e) for e in errors})
    )


class FarListener:
    """The address of one VM's migration: bound for the whole migration, whoever connects."""

    def __init__(self, listeners: list[trio.SocketListener], endpoint: Inet) -> None:
        self._listeners = listeners
        self.endpoint = endpoint
        """The address as bound, an ephemeral port replaced by the one given."""

    @classmethod
    async def bind(cls, endpoint: Inet) -> FarListener:
        """Binds `endpoint` and never another port. Raises OSError if it is in use or not of this host."""
        host = {"": None, "0": "0.0.0.0"}.get(endpoint.host, endpoint.host)  # noqa: S104
        if host is None and endpoint.port == 0:
            host = "0.0.0.0"  # noqa: S104  # one port, so one socket
        listeners = await trio.open_tcp_listeners(endpoint.port, host=host)
        port = listeners[0].socket.getsockname()[1]
        return cls(listeners, Inet(endpoint.host, port))

    async def serve(self, offer: Offer) -> None:
        """Accepts until cancelled, then frees the address.

        `offer` gets each connection whose first bytes are there; it detaches its descriptor, or the
        connection is closed when it returns.
        """

        async def greet(stream: trio.SocketStream) -> None:
            try:
                await self._greet(stream.socket, offer)
            except OSError as error:
                log.warning("%s: a connection broke: %s", self.endpoint.uri, error)
            except Exception:
                log.exception("%s: internal error on a connection", self.endpoint.uri)

        try:
            await trio.serve_listeners(greet, self._listeners)
        finally:
            self.close()

    async def _greet(self, connection: trio.socket.SocketType, offer: Offer) -> None:
        peer = connection.getpeername()[0]
        first = None
        with trio.move_on_after(FIRST_BYTES_TIMEOUT):
            first = await _peek(connection)
        if first is None:
            log.warning("%s: closed a connection from %s that said nothing", self.endpoint.uri, peer)
        elif (kind := classify(first)) is Kind.FOREIGN:
            log.warning("%s: closed a connection from %s: %s", self.endpoint.uri, peer, _why(first))
        else:
            await offer(connection, kind)  # what it does not take is closed when this returns

    def close(self) -> None:
        """Frees the address."""
        for listener in self._listeners:
            listener.socket.close()


def _why(first: bytes) -> str:
    return (
        "it closed before it said anything" if not first else f"it begins with {first!r}, no migration stream"
    )


async def _peek(connection: trio.socket.SocketType) -> bytes:
    while True:
        try:
            first = await connection.recv(FIRST_BYTES, socket.MSG_PEEK)
        except OSError:
            return b""
        if len(first) in (0, FIRST_BYTES) or not alive(connection):
            return first
        await trio.sleep(0.001)  # the rest of four bytes is on its way
