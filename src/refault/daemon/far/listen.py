"""The far leg at the destination: the addresses of one VM's migration, and what comes there; the source's is
dial.py."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Collection

import trio

from refault.daemon.far import lookups
from refault.daemon.far.connection import growing_pauses, peek
from refault.daemon.far.waiting_room import Arrival, WaitingRoom
from refault.daemon.host.repeats import repeats
from refault.daemon.kernel.tcp import alive, is_whole
from refault.migration.endpoint import Inet, socket_address
from refault.migration.messages import FIRST_BYTES, Kind, classify, is_cut_short, recv_bitmaps

log = logging.getLogger("refault.far")

FIRST_BYTES_TIMEOUT = 30.0
BACKLOG = 128
LONGEST_REQUEST = 6 + 255
_LOOK = 0.1

Offer = Callable[[trio.socket.SocketType, Kind], Awaitable[None]]


async def asks_for(connection: trio.socket.SocketType, blocks: Collection[bytes]) -> bool:
    """Whether a recovered channel begins by asking for all these RAM blocks, or for any where none is given.

    False if it goes away. Nothing is consumed. A source asks for all of them before it waits for the first
    answer (migration/ram.c, ram_dirty_bitmap_sync_all).
    """
    missing = set(blocks)
    pauses = growing_pauses()
    while alive(connection):
        begun = await connection.recv((len(missing) + 1) * LONGEST_REQUEST, socket.MSG_PEEK)
        names, ended = recv_bitmaps(begun)
        if names and missing <= set(names):
            return True
        if ended or len(begun) == (len(missing) + 1) * LONGEST_REQUEST:
            return False
        await trio.sleep(next(pauses))
    return False


Where = tuple[int, tuple[object, ...]]
"""A family and an address of it, as getaddrinfo gives them."""


async def look_up(endpoint: Inet) -> list[Where]:
    """Where QEMU would listen for `endpoint` (io/dns-resolver.c): no host is every address of both families,
    `0` every one of IPv4, `::` every one of both. Raises OSError, with the error of a look-up (socket.EAI_*).
    """
    hosts = [endpoint.host] if endpoint.host else ["0.0.0.0", "::"]  # noqa: S104
    found = [entry for host in hosts for entry in await lookups.look_up(host, endpoint.port)]
    return list(dict.fromkeys((int(entry[0]), entry[4]) for entry in found))


def why_not(error: OSError) -> str:
    """Why an address could not be had, as QEMU says it (util/qemu-sockets.c, inet_listen_saddr)."""
    reason = os.strerror(error.errno) if error.errno is not None else str(error)
    match error.errno:
        case errno.EADDRINUSE:
            return f"Failed to find an available port: {reason}"
        case errno.EAFNOSUPPORT:
            return f"Failed to create a socket: {reason}"
        case _:
            return f"Failed to bind socket: {reason}"


class FarListener:
    """The address of one VM's migration: bound for the whole migration, whoever connects."""

    def __init__(
        self, sockets: list[trio.socket.SocketType], endpoint: Inet, room: WaitingRoom | None = None
    ) -> None:
        self._sockets = sockets
        self._room = room or WaitingRoom()
        self.endpoint = endpoint
        """The address as bound, an ephemeral port replaced by the one given."""
        self.socket_addresses: list[dict[str, object]] = []
        """Where it listens, in numbers, as query-migrate tells it."""

    @classmethod
    async def bind(cls, endpoint: Inet, room: WaitingRoom | None = None) -> FarListener:
        """Listens at `endpoint` and never at another port. Raises OSError if it is in use, not of this host,
        or of a name that is not known."""
        listener = await cls.reserve(endpoint, await look_up(endpoint), room)
        listener.listen()
        return listener

    @classmethod
    async def reserve(
        cls, endpoint: Inet, found: list[Where], room: WaitingRoom | None = None
    ) -> FarListener:
        """Binds all of an endpoint's addresses that can be, as QEMU does (io/net-listener.c), and does not
        listen yet: nobody can connect, and nobody else can have them. Raises the first OSError if none can.
        """
        sockets: list[trio.socket.SocketType] = []
        errors: list[OSError] = []
        port = endpoint.port
        for family, where in found:
            try:
                sock = await _bound(family, (where[0], port, *where[2:]), sockets)
            except OSError as error:
                errors.append(error)
                continue
            sockets.append(sock)
            port = sock.getsockname()[1]
        if not sockets:
            raise errors[0]
        listener = cls(sockets, Inet(endpoint.host, port), room)
        listener._tell_missing(errors)
        return listener

    def listen(self) -> None:
        """From here on connections come. Raises OSError where somebody else was faster at all addresses."""
        errors: list[OSError] = []
        for sock in list(self._sockets):
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for what our connections leave
                sock.listen(BACKLOG)
            except OSError as error:
                errors.append(error)
                if len(errors) == len(self._sockets):
                    self.close()
                    raise errors[0] from None
        for sock in [sock for sock in self._sockets if not _listens(sock)]:
            self._sockets.remove(sock)
            sock.close()
        self.socket_addresses = [
            socket_address(sock.family == socket.AF_INET6, *sock.getsockname()[:2]) for sock in self._sockets
        ]
        self._tell_missing(errors)

    def _tell_missing(self, errors: list[OSError]) -> None:
        unusual = [error for error in errors if error.errno != errno.EAFNOSUPPORT]  # no IPv6, say
        if unusual:
            log.warning("%s: %s, at one of its addresses", self.endpoint.uri, why_not(unusual[0]))

    async def serve(self, offer: Offer) -> None:
        """Accepts until cancelled, then frees the address.

        `offer` gets each connection whose first bytes are there; it detaches its descriptor, or the
        connection is closed when it returns.
        """

        async def greet(stream: trio.SocketStream) -> None:
            try:
                await self._greet(stream.socket, offer)
            except OSError as error:
                lost = stream.socket.fileno() >= 0 and not is_whole(stream.socket)
                log.log(
                    _level(lost=lost),
                    "%s: a connection broke: %s",
                    self.endpoint.uri,
                    error,
                    extra=repeats((self.endpoint, "broke"), str(error)),
                )
            except Exception:
                log.exception("%s: internal error on a connection", self.endpoint.uri)

        try:
            await trio.serve_listeners(greet, [trio.SocketListener(sock) for sock in self._sockets])
        finally:
            self.close()

    async def _greet(self, connection: trio.socket.SocketType, offer: Offer) -> None:
        arrival = self._room.enter(connection)
        try:
            if not self._room.make_room(arrival):
                return
            first = None
            with arrival.silent or trio.CancelScope():
                while first is None:
                    with trio.move_on_after(FIRST_BYTES_TIMEOUT):
                        first = await peek(connection)
                    if first is None and not self._room.may_stay(arrival):
                        break
                if first == b"":
                    await self._until_nobody_wants(arrival)
            arrival.speaks()
            if arrival.taken is not None:
                arrival.hand(connection)
            elif first is None:
                log.warning(
                    "%s: closed a connection from %s that said nothing",
                    self.endpoint.uri,
                    arrival.peer,
                    extra=repeats((self.endpoint, arrival.peer, "nothing"), ""),
                )
            elif (kind := classify(first)) is Kind.FOREIGN:
                lost = is_cut_short(first) or (len(first) < FIRST_BYTES and not is_whole(connection))
                log.log(
                    _level(lost=lost),
                    "%s: closed a connection from %s: %s",
                    self.endpoint.uri,
                    arrival.peer,
                    _why(first),
                    extra=repeats((self.endpoint, arrival.peer, "no stream"), lost),
                )
            else:
                await offer(connection, kind)  # what it does not take is closed when this returns
        finally:
            self._room.leave(arrival)
            if arrival.taken is not None:
                arrival.taken.set()

    async def _until_nobody_wants(self, arrival: Arrival) -> None:
        """One that ended without a word may be the preempt channel of a source that has gone since: it can be
        taken for as long as a connection before it is here, and may wait for it."""
        with trio.move_on_after(FIRST_BYTES_TIMEOUT):
            # Nothing tells of it.
            while self._room.is_behind_another(arrival) and is_whole(arrival.connection):  # noqa: ASYNC110
                await trio.sleep(_LOOK)

    def close(self) -> None:
        """Frees the address."""
        for sock in self._sockets:
            sock.close()


async def _bound(
    family: int, where: tuple[object, ...], beside: list[trio.socket.SocketType]
) -> trio.socket.SocketType:
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            # As QEMU (try_bind): both families in one socket, unless IPv4 has its own here or elsewhere.
            both = where[0] == "::" and not any(other.family == socket.AF_INET for other in beside)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not both))
            try:
                await _bind(sock, where)
            except OSError as error:
                if not both or error.errno != errno.EADDRINUSE:
                    raise
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                await _bind(sock, where)
        else:
            await _bind(sock, where)
    except BaseException:
        sock.close()
        raise
    return sock


async def _bind(sock: trio.socket.SocketType, where: tuple[object, ...]) -> None:
    # Linux lets many bind what nobody listens at if all have SO_REUSEADDR: without it the address is ours
    # before we listen. With it what an ended connection has left is passed over.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    try:
        await sock.bind(where)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await sock.bind(where)


def _listens(sock: trio.socket.SocketType) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _level(*, lost: bool) -> int:
    """That the network has lost a connection is nothing to look after: its peer comes again."""
    return logging.INFO if lost else logging.WARNING


def _why(first: bytes) -> str:
    return (
        "it closed before it said anything" if not first else f"it begins with {first!r}, no migration stream"
    )
