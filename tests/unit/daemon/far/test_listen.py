"""The far leg: what is let in, judged by its first bytes."""

import contextlib
import errno
import socket
import struct
from typing import Any, cast

import pytest
import trio
import trio.testing

from refault.daemon.far import listen, lookups, waiting_room
from refault.daemon.far.connection import peek
from refault.daemon.far.dial import connect
from refault.daemon.far.listen import FarListener
from refault.daemon.far.waiting_room import WaitingRoom
from refault.daemon.kernel.tcp import alive
from refault.migration.endpoint import Inet
from refault.migration.messages import Kind, classify

ANY_PORT = Inet("127.0.0.1", 0)
RECOVERED = struct.pack(">BHH", 8, 10, 7) + b"\x06pc.ram"


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        (b"QEVM", Kind.FRESH),
        (RECOVERED[:4], Kind.RESUMED),
        (b"\x16\x03\x01\x02", Kind.ENCRYPTED),
        (b"\x15\x03\x01\x00", Kind.FOREIGN),
        (struct.pack(">BHB", 8, 2, 0), Kind.PING),
        (b"\x11\x22\x33\x44", Kind.MULTIFD),
        (b"\0\0\0\x10", Kind.FRAME),
        (b"GET ", Kind.FOREIGN),
        (b"QE", Kind.FOREIGN),
        (b"", Kind.FOREIGN),
    ],
)
def test_the_first_bytes_tell(first: bytes, kind: Kind) -> None:
    assert classify(first) is kind


class Door:
    """A listener, and what it offered."""

    def __init__(self) -> None:
        self.offered: list[tuple[Kind, bytes]] = []
        self.came = trio.Event()

    async def offer(self, connection: trio.socket.SocketType, kind: Kind) -> None:
        self.offered.append((kind, await connection.recv(100)))
        self.came.set()


async def open_door(nursery: trio.Nursery) -> tuple[Door, Inet]:
    door = Door()
    listener = await FarListener.bind(ANY_PORT)
    nursery.start_soon(listener.serve, door.offer)
    return door, listener.endpoint


async def test_nothing_is_consumed_before_it_is_offered(nursery: trio.Nursery) -> None:
    door, endpoint = await open_door(nursery)
    connection = await connect(endpoint, 5)
    for byte in RECOVERED[:4]:  # however slowly it comes
        await connection.send(bytes([byte]))
        await trio.sleep(0.002)
    with trio.fail_after(9):
        await door.came.wait()
    assert door.offered == [(Kind.RESUMED, RECOVERED[:4])]
    connection.close()


@pytest.mark.parametrize("stranger", [b"", b"QE", b"GET / HTTP/1.0\r\n\r\n", b"\x16\x02\x01\x02\x00"])
async def test_strangers_are_not_offered(nursery: trio.Nursery, stranger: bytes) -> None:
    door, endpoint = await open_door(nursery)
    connection = await connect(endpoint, 5)
    if stranger:
        await connection.send(stranger)
    if len(stranger) < 4:
        connection.shutdown(trio.socket.SHUT_WR)
    with trio.fail_after(9):
        with contextlib.suppress(ConnectionResetError):
            assert await connection.recv(1) == b""
    assert door.offered == []
    connection.close()


async def test_one_that_says_nothing_stops_nobody(nursery: trio.Nursery) -> None:
    door, endpoint = await open_door(nursery)
    silent = await connect(endpoint, 5)
    loud = await connect(endpoint, 5)
    await loud.send(b"QEVM")
    with trio.fail_after(9):
        await door.came.wait()
    silent.close()
    loud.close()


async def test_a_crowd_that_says_nothing_takes_nobodys_place(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the descriptors that a recovery needs: who has been silent longest goes."""
    monkeypatch.setattr(waiting_room, "MOST", 3, raising=False)
    door, endpoint = await open_door(nursery)
    crowd = [await trio.open_tcp_stream(endpoint.host, endpoint.port) for _ in range(8)]
    source = await trio.open_tcp_stream(endpoint.host, endpoint.port)
    await source.send_all(RECOVERED)
    with trio.fail_after(9):
        await door.came.wait()
        for stranger in crowd[:5]:
            assert await stranger.receive_some(1) == b""
    assert door.offered == [(Kind.RESUMED, RECOVERED)]
    for stranger in (*crowd, source):
        await stranger.aclose()


async def test_one_that_begins_and_says_no_more_is_looked_at_now_and_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
    ours.sendall(b"Q")
    looks = 0

    class Counted:
        async def recv(self, *_: int) -> bytes:
            nonlocal looks
            looks += 1
            return b"Q"

        getsockopt = theirs.getsockopt

    with trio.move_on_after(10):
        await peek(cast(Any, Counted()))
    assert looks < 100
    ours.close()
    theirs.close()


@pytest.mark.parametrize("said", [b"", b"\xf5r"])
async def test_connections_that_break_at_once_stop_nobody(
    nursery: trio.Nursery, said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    door, endpoint = await open_door(nursery)
    for _ in range(
        20
    ):  # reset before the listener has come to it: not even its peer's name is known any more
        connection = socket.create_connection((endpoint.host, endpoint.port))
        connection.sendall(said)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    with socket.create_connection((endpoint.host, endpoint.port)) as connection:
        connection.sendall(b"\xf5r")  # a HELLO of which no more comes
    await trio.sleep(0.01)
    later = await connect(endpoint, 5)
    await later.send(b"QEVM")
    with trio.fail_after(9):
        await door.came.wait()
    assert door.offered == [(Kind.FRESH, b"QEVM")]
    later.close()
    await trio.testing.wait_all_tasks_blocked()
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


@pytest.mark.parametrize("error", [OSError("it broke"), RuntimeError("a mistake of ours")])
async def test_an_offer_that_fails_stops_nobody(nursery: trio.Nursery, error: Exception) -> None:
    offers = 0

    async def offer(connection: trio.socket.SocketType, kind: Kind) -> None:
        nonlocal offers
        offers += 1
        raise error

    listener = await FarListener.bind(ANY_PORT)
    nursery.start_soon(listener.serve, offer)
    for _ in range(2):
        connection = await connect(listener.endpoint, 5)
        await connection.send(b"QEVM")
        with trio.fail_after(9), contextlib.suppress(ConnectionResetError):
            assert await connection.recv(1) == b""
        connection.close()
    assert offers == 2


async def test_an_address_in_use_is_never_another_port() -> None:
    first = await FarListener.bind(ANY_PORT)
    try:
        with pytest.raises(OSError, match=r"[Aa]ddress already in use"):
            await FarListener.bind(first.endpoint)
    finally:
        first.close()


@pytest.mark.parametrize(
    ("host", "families"),
    [("", {4, 6}), ("0", {4}), ("0.0.0.0", {4}), ("::", {4, 6}), ("127.0.0.1", {4}), ("::1", {6})],
)
async def test_a_wildcard_is_what_it_is_to_qemu(host: str, families: set[int]) -> None:
    listener = await FarListener.bind(Inet(host, 0))
    try:
        answering = set()
        for family, address in ((4, "127.0.0.1"), (6, "::1")):
            with contextlib.suppress(OSError):
                (await connect(Inet(address, listener.endpoint.port), 5)).close()
                answering.add(family)
        assert answering == families
        assert listener.endpoint.host == host
        again = await connect(listener.endpoint, 5)  # the source may be given the same words
        again.close()
    finally:
        listener.close()


@pytest.mark.parametrize(
    ("one", "other"), [("", "127.0.0.1"), ("127.0.0.1", "0"), ("::", "0.0.0.0"), ("::1", "::"), ("::", "")]
)
async def test_a_wildcard_and_an_address_in_it_are_one_address(one: str, other: str) -> None:
    first = await FarListener.bind(Inet(one, 0))
    try:
        with pytest.raises(OSError, match=r"[Aa]ddress already in use"):
            await FarListener.bind(Inet(other, first.endpoint.port))
    finally:
        first.close()


@pytest.mark.parametrize("wildcard", ["", "::"])
async def test_of_a_wildcard_what_is_free_is_had(wildcard: str) -> None:
    """As QEMU does (util/qemu-sockets.c, try_bind)."""
    first = await FarListener.bind(Inet("0", 0))
    second = await FarListener.bind(Inet(wildcard, first.endpoint.port))
    assert [address["host"] for address in second.socket_addresses] == ["::"]
    first.close()
    second.close()


async def test_a_reserved_address_is_nobody_elses_and_takes_no_connection() -> None:
    reserved = await FarListener.reserve(ANY_PORT, await listen.look_up(ANY_PORT))
    with pytest.raises(OSError, match="in use"):
        await FarListener.reserve(reserved.endpoint, await listen.look_up(reserved.endpoint))
    with pytest.raises(OSError, match="refused"):
        await connect(reserved.endpoint, 5)
    reserved.listen()
    (await connect(reserved.endpoint, 5)).close()
    reserved.close()


async def test_all_addresses_of_a_name_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    async def found(_: str, port: int) -> list[tuple[object, ...]]:
        hosts = (("127.0.0.1", port), ("127.0.0.3", port), ("192.0.2.1", port))
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", where) for where in hosts]

    monkeypatch.setattr(lookups, "look_up", found)
    listener = await FarListener.bind(Inet("a-name", 0))
    port = str(listener.endpoint.port)
    assert listener.socket_addresses == [
        {"type": "inet", "host": host, "port": port, "ipv4": True} for host in ("127.0.0.1", "127.0.0.3")
    ]
    listener.close()


async def test_a_wildcard_does_without_a_family_that_the_kernel_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = trio.socket.socket

    def without_ipv6(family: int, kind: int) -> trio.socket.SocketType:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, kind)

    monkeypatch.setattr(trio.socket, "socket", without_ipv6)
    listener = await FarListener.bind(Inet("", 0))
    (await connect(Inet("127.0.0.1", listener.endpoint.port), 5)).close()
    listener.close()
    with pytest.raises(OSError, match="family"):
        await FarListener.bind(Inet("::1", 0))


async def test_an_address_is_free_when_its_connections_have_ended() -> None:
    async with trio.open_nursery() as nursery:
        door, endpoint = await open_door(nursery)
        connection = await connect(endpoint, 5)
        await connection.send(b"QEVM")
        with trio.fail_after(9):
            await door.came.wait()
        nursery.cancel_scope.cancel()
    (await FarListener.bind(endpoint)).close()
    connection.close()


async def test_a_peer_that_left_is_seen_though_its_bytes_are_there(nursery: trio.Nursery) -> None:
    seen: list[bool] = []
    done = trio.Event()

    async def offer(connection: trio.socket.SocketType, kind: Kind) -> None:
        while alive(connection):
            await trio.sleep(0.001)
        seen.append(True)
        done.set()

    listener = await FarListener.bind(ANY_PORT)
    nursery.start_soon(listener.serve, offer)
    connection = await connect(listener.endpoint, 5)
    await connection.send(RECOVERED)
    connection.close()
    with trio.fail_after(9):
        await done.wait()
    assert seen == [True]


TWO = RECOVERED + struct.pack(">BHH", 8, 10, 3) + b"\x02vr"
RESUME = struct.pack(">BHH", 8, 9, 0)


@pytest.mark.parametrize("cut", [4, 5, 6, 9, 13, 17])
async def test_the_blocks_are_read_without_being_consumed(nursery: trio.Nursery, cut: int) -> None:
    answers: list[bool] = []
    left: list[bytes] = []
    done = trio.Event()

    async def offer(connection: trio.socket.SocketType, kind: Kind) -> None:
        answers.append(await listen.asks_for(connection, {b"pc.ram", b"vr"}))
        left.append(await connection.recv(100))
        done.set()

    listener = await FarListener.bind(ANY_PORT)
    nursery.start_soon(listener.serve, offer)
    connection = await connect(listener.endpoint, 5)
    await connection.send(TWO[:cut])
    await trio.sleep(0.01)
    await connection.send(TWO[cut:])
    with trio.fail_after(9):
        await done.wait()
    assert (answers, left) == ([True], [TWO])
    connection.close()


@pytest.mark.parametrize(
    ("begun", "blocks", "ours"),
    [
        (RECOVERED, {b"pc.ram"}, True),
        (RECOVERED, set(), True),
        (RECOVERED, {b"pc.ram", b"vga"}, False),
        (RECOVERED + RESUME, {b"pc.ram", b"vga"}, False),
        (TWO, {b"other"}, False),
        (RECOVERED[:9], set(), False),
    ],
)
async def test_a_recovered_channel_asks_for_all_our_blocks(
    nursery: trio.Nursery, begun: bytes, blocks: set[bytes], ours: bool
) -> None:
    async def offer(connection: trio.socket.SocketType, kind: Kind) -> None:
        answers.append(await listen.asks_for(connection, blocks))
        done.set()

    answers: list[bool] = []
    done = trio.Event()
    listener = await FarListener.bind(ANY_PORT)
    nursery.start_soon(listener.serve, offer)
    connection = await connect(listener.endpoint, 5)
    await connection.send(begun)
    if not ours:
        await trio.sleep(0.02)
        connection.close()
    with trio.fail_after(9):
        await done.wait()
    connection.close()
    assert answers == [ours]


async def test_who_said_nothing_can_be_taken_as_a_preempt_channel(nursery: trio.Nursery) -> None:
    door = Door()
    room = WaitingRoom()
    listener = await FarListener.bind(ANY_PORT, room)
    nursery.start_soon(listener.serve, door.offer)
    before, main, gone, silent = [await connect(listener.endpoint, 5) for _ in range(4)]
    gone.close()
    with trio.fail_after(9):
        while room.preempt_after(3, "127.0.0.1") is None:
            await trio.sleep(0.001)
    assert room.preempt_after(4, "127.0.0.1") is None  # it must have come after the main one
    assert room.preempt_after(1, "127.0.0.2") is None  # and from that host, if one is named
    assert room.preempt_after(1) is room.preempt_after(1, "127.0.0.1")
    arrival = room.preempt_after(2, "127.0.0.1")
    assert arrival is not None
    taken = await room.take(arrival)
    await silent.send(b"frame")
    assert await taken.recv(10) == b"frame"
    assert room.preempt_after(3, "127.0.0.1") is None
    for connection in (before, main, silent, taken):
        connection.close()


async def test_one_that_ended_without_a_word_can_be_taken_while_another_may_wait_for_it(
    nursery: trio.Nursery,
) -> None:
    async def offer(connection: trio.socket.SocketType, kind: Kind) -> None:
        await main_may_go.wait()

    main_may_go = trio.Event()
    room = WaitingRoom()
    listener = await FarListener.bind(ANY_PORT, room)
    nursery.start_soon(listener.serve, offer)
    main = await connect(listener.endpoint, 5)
    await main.send(b"QEVM")
    lane = await connect(listener.endpoint, 5)
    lane.close()

    async def found(number: int) -> waiting_room.Arrival:
        while (arrival := room.preempt_after(1, ended=True)) is None or arrival.number != number:
            await trio.sleep(0.001)
        return arrival

    with trio.fail_after(9):
        arrival = await found(2)
        assert room.preempt_after(1) is None  # where one is expected that lives
        another = await connect(listener.endpoint, 5)
        await found(3)
        taken = await room.take(arrival)
        assert await taken.recv(10) == b""
        another.close()
        while room.preempt_after(1) is not None:
            await trio.sleep(0.001)
        await found(3)
        main_may_go.set()
        while room.preempt_after(1, ended=True) is not None:  # nobody wants it any more
            await trio.sleep(0.001)
    for connection in (main, taken):
        connection.close()
