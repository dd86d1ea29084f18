"""The far leg at the destination: the addresses of one VM's migration, and who comes there; the source's is
far_dial.py."""

from __future__ import annotations

import enum
import logging
import socket
import struct
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from refault.migration.endpoint import Inet

log = logging.getLogger("refault.far")

FIRST_BYTES = 4
FIRST_BYTES_TIMEOUT = 30.0
BACKLOG = 128
LONGEST_REQUEST = 6 + 255
_RECV_BITMAP = struct.pack(">BH", 8, 10)
_TCP_ESTABLISHED = 1


class Kind(enum.Enum):
    """What the first bytes of a far connection say it is."""

    FRESH = "the beginning of a migration"
    RESUMED = "a recovered channel"
    ENCRYPTED = "a TLS handshake"
    PING = "the question whether a recovered channel would be answered"
    MULTIFD = "a multifd channel"
    FOREIGN = "no migration stream"


Offer = Callable[[trio.socket.SocketType, Kind], Awaitable[None]]


def classify(first: bytes) -> Kind:
    """Reads the first 4 bytes: QEMU_VM_FILE_MAGIC, the command section that opens a recovered channel, the
    PING that a refault sends before it (ping.py), or a TLS record with a handshake in it (RFC 8446, 5.1).

    migration/savevm.c: qemu_savevm_state_header; migration/multifd.c: MULTIFD_MAGIC, which a multifd channel
    begins with; and savevm.c, qemu_savevm_send_recv_bitmap, which is what
    ram_resume_prepare (migration/ram.c) begins a recovery with.
    """
    if first == b"QEVM":
        return Kind.FRESH
    if first[:3] == _RECV_BITMAP and first[3:] == b"\0":  # a name has at most 255 bytes
        return Kind.RESUMED
    if first[:2] == b"\x16\x03":
        return Kind.ENCRYPTED
    if first == struct.pack(">BHB", 8, 2, 0):
        return Kind.PING
    if first == b"\x11\x22\x33\x44":
        return Kind.MULTIFD
    return Kind.FOREIGN


async def asks_for(connection: trio.socket.SocketType, blocks: Collection[bytes]) -> bool:
    """Whether a recovered channel begins by asking for all these RAM blocks, or for any where none is given.

    False if it goes away. Nothing is consumed. A source asks for all of them before it waits for the first
    answer (migration/ram.c, ram_dirty_bitmap_sync_all).
    """
    missing = set(blocks)
    while alive(connection):
        begun = await connection.recv((len(missing) + 1) * LONGEST_REQUEST, socket.MSG_PEEK)
        names, ended = recv_bitmaps(begun)
        if names and missing <= set(names):
            return True
        if ended or len(begun) == (len(missing) + 1) * LONGEST_REQUEST:
            return False
        await trio.sleep(0.001)
    return False


def recv_bitmaps(begun: bytes) -> tuple[list[bytes], bool]:
    """The RAM blocks that the beginning of a recovered channel asks for, and whether something else follows.

    migration/savevm.c, qemu_savevm_send_recv_bitmap: section type, command and length, then the counted name.
    """
    names: list[bytes] = []
    while len(begun) > 5 and len(begun) >= 6 + begun[5]:
        if not begun.startswith(_RECV_BITMAP):
            return names, True
        names.append(begun[6 : 6 + begun[5]])
        begun = begun[6 + begun[5] :]
    return names, not begun.startswith(_RECV_BITMAP[: len(begun)])


def alive(connection: trio.socket.SocketType) -> bool:
    """Whether the peer has not closed its end (TCP_INFO's first byte is the state)."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return isinstance(info, bytes) and info[0] == _TCP_ESTABLISHED


def watch_over(connection: trio.socket.SocketType) -> None:
    """Has the kernel ask the peer every second, so that one that went silently is not `alive` for long."""
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        connection.setsockopt(socket.IPPROTO_TCP, option, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def detached(connection: trio.socket.SocketType) -> trio.socket.SocketType:
    """The same connection as another object: whoever had the first can close nothing any more."""
    return trio.socket.from_stdlib_socket(socket.socket(fileno=connection.detach()))


@dataclass(eq=False)
class _Arrival:
    connection: trio.socket.SocketType
    peer: str
    number: int
    silent: trio.CancelScope | None = field(default_factory=trio.CancelScope)
    """What ends the wait for its first bytes; None once they are there."""
    taken: trio.Event | None = None
    """Whether somebody takes it; set when its waiting has ended."""
    handed: trio.socket.SocketType | None = None
    """The connection, out of the listener's hands."""


class WaitingRoom:
    """The connections at all addresses of one migration, numbered as they came.

    A preempt channel has no first bytes: who said nothing yet may be one.
    """

    def __init__(self) -> None:
        self._arrivals: list[_Arrival] = []
        self._patience: list[tuple[int, str]] = []
        self._count = 0
        self.changed = trio.Event()
        """Set when one more has come, and replaced."""

    def enter(self, connection: trio.socket.SocketType) -> _Arrival:
        """One has come."""
        self._count += 1
        arrival = _Arrival(connection, connection.getpeername()[0], self._count)
        self._arrivals.append(arrival)
        self.changed.set()
        self.changed = trio.Event()
        return arrival

    def leave(self, arrival: _Arrival) -> None:
        """It has been dealt with."""
        self._arrivals.remove(arrival)

    def number_of(self, connection: trio.socket.SocketType) -> tuple[int, str]:
        """When it came, and from where."""
        found = next(arrival for arrival in self._arrivals if arrival.connection is connection)
        return found.number, found.peer

    @contextmanager
    def patient(self, number: int, peer: str) -> Iterator[None]:
        """What comes from that host after `number` may be silent for as long as it likes."""
        self._patience.append((number, peer))
        try:
            yield
        finally:
            self._patience.remove((number, peer))

    def may_stay(self, arrival: _Arrival) -> bool:
        """Whether it may go on saying nothing."""
        return any(arrival.number > number and arrival.peer == peer for number, peer in self._patience)

    def silent_after(self, number: int, peer: str) -> _Arrival | None:
        """The newest connection of that host that came after `number`, has said nothing, and lives."""
        for arrival in reversed(self._arrivals):
            if (
                arrival.number > number
                and arrival.peer == peer
                and arrival.silent is not None
                and arrival.taken is None
                and alive(arrival.connection)
            ):
                return arrival
        return None

    async def take(self, arrival: _Arrival) -> trio.socket.SocketType:
        """Takes a silent connection out of the wait for its first bytes; it is the caller's then.

        Raises OSError where the address was given up meanwhile.
        """
        arrival.taken = trio.Event()
        if arrival.silent is not None:
            arrival.silent.cancel()
        await arrival.taken.wait()
        if arrival.handed is None:
            raise OSError("the address was given up")
        return arrival.handed


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
        try:
            for family, where in dict.fromkeys((entry[0], entry[4]) for entry in found):
                address = (where[0], port, *where[2:])
                listener = await _listen(family, address, both_families=host == "::")
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


async def peek(connection: trio.socket.SocketType) -> bytes:
    """The first 4 bytes, not consumed; fewer where the peer goes away before."""
    while True:
        try:
            first = await connection.recv(FIRST_BYTES, socket.MSG_PEEK)
        except OSError:
            return b""
        if len(first) in (0, FIRST_BYTES) or not alive(connection):
            return first
        await trio.sleep(0.001)  # the rest of four bytes is on its way
