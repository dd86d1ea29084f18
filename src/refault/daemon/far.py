"""The far leg at the destination: the addresses of one VM's migration, and what comes there; the source's is
far_dial.py."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Collection

import trio

from refault.daemon.far_socket import alive, detached, growing_pauses, peek
from refault.daemon.waiting_room import WaitingRoom
from refault.migration.endpoint import Inet
from refault.migration.messages import Kind, classify, recv_bitmaps

log = logging.getLogger("refault.far")

FIRST_BYTES_TIMEOUT = 30.0
BACKLOG = 128
LONGEST_REQUEST = 6 + 255


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


class FarListener:
    """The address of one VM's migration: bound for the whole migration, whoever connects."""

    def __init__(
        self, listeners: list[trio.SocketListener], endpoint: Inet, room: WaitingRoom | None = None
    ) -> None:
        self._listeners = listeners
        self._room = room or WaitingRoom()
        self.endpoint = endpoint
        """The address as bound, an ephemeral port replaced by the one given."""

    @classmethod
    async def bind(cls, endpoint: Inet, room: WaitingRoom | None = None) -> FarListener:
        """Binds `endpoint` and never another port. Raises OSError if it is in use or not of this host."""
        # As QEMU does (util/qemu-sockets.c, inet_listen_saddr): no host is every address of both families in
        # two sockets, 0 every one of IPv4, :: every one of both in one socket.
        host = {"": None, "0": "0.0.0.0"}.get(endpoint.host, endpoint.host)  # noqa: S104
        found = await trio.socket.getaddrinfo(
            host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listeners: list[trio.SocketListener] = []
        port = endpoint.port
        wanted = list(dict.fromkeys((entry[0], entry[4]) for entry in found))
        try:
            for family, where in wanted:
                address = (where[0], port, *where[2:])
                try:
                    listener = await _listen(family, address, both_families=host == "::")
                except OSError as error:
                    last = (family, where) == wanted[-1]
                    if error.errno != errno.EAFNOSUPPORT or (last and not listeners):
                        raise
                    continue  # a kernel without IPv6, say
                listeners.append(listener)
                port = listener.socket.getsockname()[1]
        except OSError:
            for listener in listeners:
                listener.socket.close()
            raise
        return cls(listeners, Inet(endpoint.host, port), room)

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
            arrival.silent = None
            if arrival.taken is not None:
                arrival.handed = detached(connection)
            elif first is None:
                log.warning(
                    "%s: closed a connection from %s that said nothing", self.endpoint.uri, arrival.peer
                )
            elif (kind := classify(first)) is Kind.FOREIGN:
                log.warning(
                    "%s: closed a connection from %s: %s", self.endpoint.uri, arrival.peer, _why(first)
                )
            else:
                await offer(connection, kind)  # what it does not take is closed when this returns
        finally:
            self._room.leave(arrival)
            if arrival.taken is not None:
                arrival.taken.set()

    def close(self) -> None:
        """Frees the address."""
        for listener in self._listeners:
            listener.socket.close()


async def _listen(family: int, where: tuple[object, ...], *, both_families: bool) -> trio.SocketListener:
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        # On Linux this passes over what an ended connection left; a second listener is refused all the same.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not both_families))
        await sock.bind(where)
        sock.listen(BACKLOG)
        return trio.SocketListener(sock)
    except BaseException:
        sock.close()
        raise


def _why(first: bytes) -> str:
    return (
        "it closed before it said anything" if not first else f"it begins with {first!r}, no migration stream"
    )
