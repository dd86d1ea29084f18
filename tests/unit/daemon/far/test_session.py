"""Both ends of a relayed session over a network that takes what it likes."""

from __future__ import annotations

import errno
import math
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.testing
from tests.unit.channel.test_relay import tcp_pair

from refault.channel.relay import Lane, LegState, Relay, SessionEnd, SessionState
from refault.daemon.far import patience, session, session_answered, session_dialled
from refault.daemon.far.connection import growing_pauses
from refault.daemon.far.dial import NoAnswer, connect
from refault.daemon.far.session import Around
from refault.daemon.far.session_answered import SessionAnswered, receive
from refault.daemon.far.session_dialled import SessionDialled
from refault.migration.endpoint import Inet
from refault.migration.messages import message
from refault.migration.phase import Role
from refault.session.handshake import Answering, Keys
from refault.session.wire import MESSAGE_BYTES, Code, Flag, Kind, Message, Positions, decode

ID = bytes([0x80, 1, 2, 3] * 4)
NEXT = bytes([0x90, 1, 2, 3] * 4)
PONG = message(2, (1).to_bytes(4, "big"))


@dataclass
class Seen:
    """Who hears of a session, and how long it waits."""

    seconds_: float = 30.0
    delivers: float = 30.0
    without_guest: bool = False
    began: int = 0
    resumed: int = 0

    def seconds(self) -> float:
        return self.seconds_

    def delivers_for(self) -> float:
        return self.delivers

    async def has_sent_all(self) -> bool:
        return False

    async def ended_without_guest(self) -> bool:
        return self.without_guest

    def session_began(self, session: bytes) -> None:
        assert session in (ID, NEXT)
        self.began += 1

    def session_resumed(self, seconds: float) -> None:
        self.resumed += 1


class End:
    """One relay, whose pump is listened to."""

    def __init__(
        self, role: Role, session: SessionEnd, far: socket.socket, *, lanes: int = 0, named: bytes = ID
    ) -> None:
        self.relay = Relay(role)
        near, self.qemu = socket.socketpair()
        self.qemu.setblocking(False)
        self.changed = trio.Event()
        self.seen = Seen()
        self.lanes: list[socket.socket] = []
        """QEMU's ends of them."""
        self.relay.attach(
            near.detach(), far.detach(), recovered=False, may_replay=True, lanes=lanes,
            session=session, session_id=named,
        )  # fmt: skip

    def around(self, name: str) -> Around:
        return Around(name, self.relay, lambda: self.changed, self.seen, self.seen)

    def add_lane(self, far: socket.socket | None, kind: Lane) -> None:
        near, qemu = socket.socketpair()
        qemu.setblocking(False)
        self.lanes.append(qemu)
        far_fd = far.detach() if far is not None else None
        self.relay.add_lane(1, kind, near.detach(), far_fd, number=len(self.lanes))

    async def watch(self) -> None:
        while not self.relay.closed:
            await trio.lowlevel.wait_readable(self.relay.notify_fd)
            os.eventfd_read(self.relay.notify_fd)
            self.changed.set()
            self.changed = trio.Event()

    @property
    def state(self) -> SessionState:
        view = self.relay.session()
        return view.state if view is not None else SessionState.NONE

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(30):
            while not condition():
                await trio.sleep(0.002)

    async def receive(self, count: int, lane: int = 0) -> bytes:
        data = b""
        qemu = self.lanes[lane - 1] if lane else self.qemu
        with trio.fail_after(30):
            while len(data) < count:
                await trio.lowlevel.wait_readable(qemu)
                data += qemu.recv(count - len(data))
        return data


@dataclass
class World:
    """Two ends, and a network between that loses a connection after so many bytes of both ways."""

    source: End
    destination: End
    dialled: SessionDialled
    answered: SessionAnswered
    plain: socket.socket
    network: list[int | None]
    """After how many bytes each of the next connections is lost; None: never."""
    knows: list[bool] = field(default_factory=lambda: [True])
    """Whether the destination's refault knows of sessions."""
    lose: Callable[[], None] = lambda: None
    """Loses the connections that there are."""
    port: int = 0
    behind: list[int] = field(default_factory=list)
    """The port to which the network brings who dials each of the two addresses."""
    came: list[int] = field(default_factory=list)
    """At which of them connections came, one after the other."""
    left: list[trio.socket.SocketType] = field(default_factory=list)
    """Those of no use that the source's end leaves to their peer."""


@asynccontextmanager
async def world(
    *lost_after: int | None, lanes: int = 0, kind: Lane = Lane.PREEMPT, session: bytes = ID
) -> AsyncIterator[World]:
    """With `lanes` further connections, which are there before the discovery."""
    here, there = tcp_pair()
    plain = here.dup()
    source = End(Role.SOURCE, SessionEnd.DIALS, here, lanes=lanes)
    destination = End(Role.DESTINATION, SessionEnd.ANSWERS, there, lanes=lanes, named=session)
    for _ in range(lanes):
        near, far = tcp_pair()
        source.add_lane(near, kind)
        destination.add_lane(far, kind)
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    networks = [(await trio.open_tcp_listeners(0, host="127.0.0.1"))[0] for _ in range(2)]
    addresses = [Inet("127.0.0.1", network.socket.getsockname()[1]) for network in networks]
    left_to_peer: list[trio.socket.SocketType] = []
    dialled, *further = [
        SessionDialled(source.around("src"), lambda: addresses, left_to_peer.append, lane)
        for lane in range(1 + lanes)
    ]
    answered = SessionAnswered(destination.around("dst"), session, lanes=lanes)
    scopes: list[trio.CancelScope] = []
    both = World(source, destination, dialled, answered, plain, list(lost_after), port=port)
    both.behind = [port, port]
    both.left = left_to_peer

    def lose() -> None:
        for scope in scopes:
            scope.cancel()

    both.lose = lose

    async def serve(stream: trio.SocketStream) -> None:
        await receive(stream.socket, answered if both.knows[0] else None, None, "dst")

    async def carry(near: trio.SocketStream) -> None:
        left = both.network.pop(0) if both.network else None
        at = addresses.index(Inet("127.0.0.1", near.socket.getsockname()[1]))
        both.came.append(at)
        far = await trio.open_tcp_stream("127.0.0.1", both.behind[at])
        with near.socket, far.socket, trio.CancelScope() as scope:
            scopes.append(scope)
            async with trio.open_nursery() as nursery:

                async def one_way(here: trio.SocketStream, there: trio.SocketStream) -> None:
                    nonlocal left
                    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                        while data := await here.receive_some(4096 if left is None else max(left, 1)):
                            if left is not None:
                                left -= len(data)
                            await there.send_all(data)
                            if left is not None and left <= 0:
                                break
                    nursery.cancel_scope.cancel()

                nursery.start_soon(one_way, near, far)
                nursery.start_soon(one_way, far, near)

    try:
        async with trio.open_nursery() as nursery:
            for end in (source, destination):
                nursery.start_soon(end.watch)
            for each in (dialled, *further, answered):
                nursery.start_soon(each.run, 1)
            nursery.start_soon(trio.serve_listeners, serve, [listener])
            nursery.start_soon(trio.serve_listeners, carry, networks)
            yield both
            nursery.cancel_scope.cancel()
    finally:
        for end in (source, destination):
            end.relay.close()
            for qemu in (end.qemu, *end.lanes):
                qemu.close()
        plain.close()
        for connection in left_to_peer:
            connection.close()


async def _becomes_a_session(both: World) -> None:
    both.destination.qemu.send(PONG)
    assert await both.source.receive(len(PONG)) == PONG
    # Where it is soon over that may be so before it is seen.
    await both.source.until(
        lambda: both.source.state is SessionState.CARRIED or both.source.relay.look().far.lost
    )


async def _is_of_use(both: World) -> None:
    """Something passes on the connection that there is, and both ends know it."""
    before = both.source.relay.session()
    assert before is not None
    both.source.qemu.send(b".")
    assert await both.destination.receive(1) == b"."
    await both.source.until(lambda: both.source.relay.session().moved > before.moved)  # type: ignore[union-attr]


# A HELLO of which nothing, a part, or all is lost; a WELCOME; and what follows.
@pytest.mark.parametrize("lost_after", [1, 70, MESSAGE_BYTES, MESSAGE_BYTES + 60, 2 * MESSAGE_BYTES, 300])
async def test_what_is_lost_of_the_handshake_is_said_again(lost_after: int) -> None:
    async with world(lost_after, lost_after) as both:
        both.source.qemu.send(b"forward")
        await _becomes_a_session(both)
        both.source.qemu.send(b" and on")
        assert await both.destination.receive(14) == b"forward and on"
        assert both.source.seen.began == both.destination.seen.began == 1


async def test_little_is_waited_between_attempts_though_several_are_lost_in_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []

    def pauses(*bounds: float) -> Iterator[float]:
        for pause in growing_pauses(*bounds):
            waited.append(pause)
            yield pause

    async with world() as both:
        await _becomes_a_session(both)
        await _is_of_use(both)
        monkeypatch.setattr(patience, "growing_pauses", pauses)
        both.network.extend([1, 70, MESSAGE_BYTES, MESSAGE_BYTES + 60])
        both.lose()
        both.source.qemu.send(b"on")
        assert await both.destination.receive(2) == b"on"
    assert len(waited) >= 4
    assert sum(waited[:4]) < 0.03


async def test_a_lost_connection_is_resumed_and_counted() -> None:
    async with world() as both:
        await _becomes_a_session(both)
        for i in range(3):
            both.lose()
            both.source.qemu.send(bytes([i]))
            assert await both.destination.receive(1) == bytes([i])
        assert both.source.relay.look().far.lost is False
        await both.source.until(lambda: both.source.seen.resumed >= 1)


async def test_the_end_is_delivered_over_another_connection_and_then_it_is_over() -> None:
    async with world() as both:
        await _becomes_a_session(both)
        both.lose()
        both.destination.qemu.send(PONG)  # as SHUT is: the last word
        both.destination.qemu.close()
        assert await both.source.receive(len(PONG)) == PONG
        both.source.qemu.close()
        with trio.fail_after(30):
            await both.dialled.over.wait()
            await both.answered.over.wait()


@pytest.mark.parametrize("without_guest", [False, True])
async def test_a_source_hears_that_its_destination_has_ended_without_the_guest(without_guest: bool) -> None:
    async with world() as both:
        await _becomes_a_session(both)
        both.destination.seen.without_guest = without_guest
        both.destination.qemu.close()
        with trio.fail_after(30):
            await both.dialled.over.wait()
            await both.answered.over.wait()
        view = both.source.relay.session()
        assert view is not None
        assert view.broke_there is without_guest


@pytest.mark.parametrize("connected", [False, True])
async def test_a_source_that_has_heard_all_and_says_no_end_is_not_waited_for_for_ever(
    connected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its refault has been killed, or is not to be believed."""
    monkeypatch.setattr(session, "DELIVERED_PATIENCE", 0.2)
    plain, there = tcp_pair()
    destination = End(Role.DESTINATION, SessionEnd.ANSWERS, there)
    destination.seen.delivers = math.inf
    answered = SessionAnswered(destination.around("dst"), ID)

    async def serve(stream: trio.SocketStream) -> None:
        await receive(stream.socket, answered, None, "dst")

    with plain, destination.qemu:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(destination.watch)
            nursery.start_soon(answered.run, 1)
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, serve, [listener])
            destination.qemu.send(message(1, bytes(4)))  # SHUT
            await destination.until(lambda: destination.state is SessionState.OFFERED)
            stream = await trio.open_tcp_stream(*listener.socket.getsockname())
            at = Positions(window=1 << 20)
            await stream.send_all(Message(Kind.HELLO, ID, 0, 1, flags=Flag.NEW, positions=at).encode())
            assert decode(await _exactly(stream, MESSAGE_BYTES)).code is Code.OK
            destination.qemu.close()
            while (head := await _exactly(stream, 16))[0] != 3:  # FIN
                await _exactly(stream, int.from_bytes(head[4:8], "big"))
            end = int.from_bytes(head[8:], "big") + 1
            await stream.send_all(struct.pack(">BxxxIQQ", 2, 8, end, end + (1 << 20)))
            if not connected:
                view = destination.relay.session
                await destination.until(lambda: view().delivered)  # type: ignore[union-attr]
                await stream.aclose()
            with trio.fail_after(20):
                await answered.over.wait()
            await stream.aclose()
            nursery.cancel_scope.cancel()
    destination.relay.close()


async def _asked(both: World, hello: Message) -> Message:
    stream = await trio.open_tcp_stream("127.0.0.1", both.port)
    async with stream:
        await stream.send_all(hello.encode())
        answer = b""
        with trio.fail_after(20):
            while len(answer) < MESSAGE_BYTES:
                answer += await stream.receive_some(MESSAGE_BYTES - len(answer))
    return decode(answer)


async def test_a_stranger_and_a_late_hello_end_nothing() -> None:
    async with world() as both:
        await _becomes_a_session(both)
        hello = Message(Kind.HELLO, ID, 0, 1, flags=Flag.NEW, positions=Positions(window=1))
        assert (await _asked(both, hello)).code is Code.STALE
        assert (await _asked(both, replace(hello, session=bytes(16)))).code is Code.UNKNOWN
        assert (await _asked(both, replace(hello, attempt=9, lane=1))).code is Code.UNKNOWN
        assert both.destination.state is SessionState.CARRIED
        assert both.destination.seen.resumed == 0
        both.source.qemu.send(b"on")
        assert await both.destination.receive(2) == b"on"


@pytest.mark.parametrize("lost_after", [(), (300, 70, 300, 200, MESSAGE_BYTES, 300)])
async def test_each_lane_is_resumed_by_itself(lost_after: tuple[int, ...]) -> None:
    async with world(*lost_after, lanes=2) as both:
        both.source.lanes[0].send(b"plain")
        await _becomes_a_session(both)
        await both.destination.until(lambda: all(_carried(both.destination, lane) for lane in (1, 2)))
        assert both.source.seen.began == both.destination.seen.began == 1
        for turn in range(3):
            both.lose()
            for lane, qemu in enumerate((both.source.qemu, *both.source.lanes)):
                qemu.send(bytes([turn, lane]))
        assert await both.destination.receive(6) == bytes([0, 0, 1, 0, 2, 0])
        assert await both.destination.receive(11, 1) == b"plain" + bytes([0, 1, 1, 1, 2, 1])
        assert await both.destination.receive(6, 2) == bytes([0, 2, 1, 2, 2, 2])
        assert not both.source.relay.look().far.lost


def _carried(end: End, lane: int) -> bool:
    view = end.relay.session(lane)
    return view is not None and view.state is SessionState.CARRIED


async def test_a_lane_before_its_turn_is_told_to_come_again_and_one_too_many_that_there_is_none() -> None:
    async with world(lanes=2) as both:
        hello = Message(Kind.HELLO, ID, 1, 1, flags=Flag.NEW, positions=Positions(window=1 << 20))
        assert (await _asked(both, hello)).code is Code.AGAIN
        assert (await _asked(both, replace(hello, lane=3))).code is Code.UNKNOWN
        await _becomes_a_session(both)
        await both.destination.until(lambda: all(_carried(both.destination, lane) for lane in (1, 2)))
        assert (await _asked(both, hello)).code is Code.STALE
        assert (await _asked(both, replace(hello, lane=3))).code is Code.UNKNOWN
        both.source.lanes[1].send(b"on")
        assert await both.destination.receive(2, 2) == b"on"


async def test_where_a_lane_is_waited_for_no_longer_the_channel_is_lost() -> None:
    async with world(lanes=1) as both:
        await _becomes_a_session(both)
        await both.destination.until(lambda: _carried(both.destination, 1))
        await both.source.until(lambda: _carried(both.source, 1))
        both.source.relay.session_rejoin(Positions(), 1)  # as a loss
        both.source.seen.seconds_ = 0.0
        await both.source.until(lambda: both.source.relay.look().far.lost)
        await both.destination.until(lambda: both.destination.relay.look().far.lost)


async def test_a_lane_that_the_session_never_comes_to_is_not_waited_for_for_ever() -> None:
    async with world(None, *[1] * 10_000, lanes=1) as both:
        both.source.seen.seconds_ = 0.3
        await _becomes_a_session(both)
        await both.source.until(lambda: both.source.relay.look().far.lost)
        assert both.source.relay.look().far_error == errno.ETIMEDOUT


async def test_a_destination_waits_no_longer_for_a_lane_that_is_only_offered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_answered, "OFFER_PATIENCE", 0.2)
    async with world(None, *[1] * 10_000, lanes=1) as both:
        both.destination.seen.seconds_ = 0.3
        await _becomes_a_session(both)
        await both.destination.until(lambda: both.destination.relay.look().far.lost)
        assert both.destination.relay.look().far_error == errno.ETIMEDOUT


async def _main_connection_ends(both: World) -> None:
    """Of a stream that cannot be read, whose end is the migration's for all that is known."""
    await both.destination.until(lambda: _carried(both.destination, 1))
    both.source.qemu.send(b"unreadable")
    assert await both.destination.receive(10)
    both.source.qemu.close()
    await both.source.until(lambda: both.source.relay.look().local is not LegState.OPEN)
    both.destination.qemu.close()
    await both.destination.until(lambda: both.destination.state is SessionState.OVER)


async def test_a_session_is_over_when_all_its_lanes_are() -> None:
    """Until then who comes for one of them is answered."""
    async with world(lanes=1, kind=Lane.MULTIFD) as both:
        await _becomes_a_session(both)
        await _main_connection_ends(both)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not both.answered.over.is_set()
        both.lose()
        for end in (both.source, both.destination):
            end.lanes[0].close()
        with trio.fail_after(20):
            await both.dialled.over.wait()
            await both.answered.over.wait()


async def test_a_lane_does_not_keep_a_session_that_has_ended_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_answered, "LANES_PATIENCE", 0.1)
    async with world(lanes=1, kind=Lane.MULTIFD) as both:
        await _becomes_a_session(both)
        await _main_connection_ends(both)
        with trio.fail_after(20):
            await both.answered.over.wait()


async def test_where_the_other_refault_knows_nothing_the_plain_connection_goes_on() -> None:
    async with world() as both:
        both.knows[0] = False
        both.destination.qemu.send(PONG)
        await both.source.until(lambda: both.dialled.over.is_set())
        both.source.qemu.send(b"plain")
        assert await both.destination.receive(5) == b"plain"
        assert both.source.state is SessionState.NONE


async def test_a_session_is_waited_for_no_longer_than_its_patience() -> None:
    async with world() as both:
        await _becomes_a_session(both)
        both.source.seen.seconds_ = both.destination.seen.seconds_ = 0.2
        both.network.extend([1] * 1000)
        both.lose()
        for end in (both.source, both.destination):
            await end.until(lambda end=end: end.relay.look().far.lost)  # type: ignore[misc]
            assert end.relay.look().far_error == errno.ETIMEDOUT


async def test_a_refault_that_came_back_without_the_session_has_it_lost_at_once() -> None:
    async with world() as both:
        await _becomes_a_session(both)
        both.knows[0] = False
        both.lose()
        await both.source.until(lambda: both.source.relay.look().far.lost)
        assert both.source.relay.look().far_error == errno.ECONNRESET


AFTER_WELCOME = 2 * MESSAGE_BYTES


async def test_a_network_that_loses_each_connection_right_after_its_welcome_is_none() -> None:
    async with world() as both:
        await _becomes_a_session(both)
        await _is_of_use(both)
        both.network.extend([AFTER_WELCOME] * 10_000)
        both.lose()
        await both.source.until(lambda: both.source.seen.resumed > 2)
        both.source.seen.seconds_ = both.destination.seen.seconds_ = 0.3
        for end in (both.source, both.destination):
            await end.until(lambda end=end: end.relay.look().far.lost)  # type: ignore[misc]
            assert end.relay.look().far_error == errno.ETIMEDOUT
        assert len(both.came) < 20  # and the pauses grow


async def test_what_each_connection_brings_a_little_of_goes_on_for_as_long_as_it_takes() -> None:
    async with world() as both:
        await _becomes_a_session(both)
        both.source.seen.seconds_ = both.destination.seen.seconds_ = 3.0
        sent = os.urandom(100_000)
        both.network.extend([AFTER_WELCOME + 3000] * 60)
        both.lose()
        both.source.qemu.send(sent)
        assert await both.destination.receive(len(sent)) == sent


@asynccontextmanager
async def _another_host(had: bytes | None) -> AsyncIterator[int]:
    """A refault that does not know the session, or no more; its port."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def serve(stream: trio.SocketStream) -> None:
        await receive(stream.socket, None, had, "another")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def test_another_host_that_has_taken_an_address_ends_no_session() -> None:
    async with world() as both, _another_host(None) as port:
        await _becomes_a_session(both)
        both.behind[0] = port
        for i in range(2):
            both.lose()
            both.source.qemu.send(bytes([i]))
            assert await both.destination.receive(1) == bytes([i])
        assert both.came[-3:] == [0, 1, 1]  # where it has been carried it is dialled again


async def test_two_sessions_whose_addresses_are_crossed_go_on_each_with_its_own() -> None:
    """Four hosts: each source's first address has been taken by the other's destination."""
    async with world() as one, world(session=NEXT) as other:
        for both in (one, other):
            await _becomes_a_session(both)
        one.behind[0], other.behind[0] = other.port, one.port
        for i in range(2):
            for both, said in ((one, b"one"), (other, b"two")):
                both.lose()
                both.source.qemu.send(said + bytes([i]))
                assert await both.destination.receive(4) == said + bytes([i])
        for both in (one, other):
            assert both.came[-3:] == [0, 1, 1]
            assert not both.source.relay.look().far.lost


@pytest.mark.parametrize("had", [None, ID])
async def test_a_session_that_nobody_knows_or_somebody_has_had_is_lost_at_once(had: bytes | None) -> None:
    async with world() as both, _another_host(had) as port:
        await _becomes_a_session(both)
        both.behind = [port, port if had is None else both.port]
        both.lose()
        await both.source.until(lambda: both.source.relay.look().far.lost)
        assert both.source.relay.look().far_error == errno.ECONNRESET


async def test_an_attempt_that_is_lost_where_somebody_accepts_is_made_there_again() -> None:
    async with world() as both:
        await _becomes_a_session(both)
        await _is_of_use(both)
        both.network.extend([1, 70])
        both.lose()
        both.source.qemu.send(b"on")
        assert await both.destination.receive(2) == b"on"
        assert both.came == [0] * len(both.came)


@pytest.mark.parametrize("ended", [False, True])
async def test_a_source_that_pauses_while_it_dials_says_no_hello(
    ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What QEMU wrote before may not have been taken from it yet, and then its side has not ended."""
    async with world() as both:
        await _becomes_a_session(both)
        both.source.seen.delivers = 0.0

        async def connects(endpoint: Inet, patience: float, **_: object) -> trio.socket.SocketType:
            connection = await connect(endpoint, patience)
            if not ended:
                both.source.seen.seconds_ = 0.0
                return connection
            both.source.relay.close_channel(1)
            await both.source.until(lambda: not both.source.relay.session().has_leg)  # type: ignore[union-attr]
            return connection

        monkeypatch.setattr(session_dialled, "connect", connects)
        both.lose()
        with trio.fail_after(20):
            await both.dialled.over.wait()
        assert both.destination.seen.resumed == 0
        assert [connection.fileno() >= 0 for connection in both.left] == [True]  # a close is deadly too


async def test_a_host_that_is_far_away_is_reached_though_there_are_several_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world() as both:

        async def connects(endpoint: Inet, patience: float, **_: object) -> trio.socket.SocketType:
            if patience < 0.5:
                raise NoAnswer("no answer")
            return await connect(endpoint, patience)

        monkeypatch.setattr(session_dialled, "connect", connects)
        await _becomes_a_session(both)


async def test_the_next_channel_is_a_session_of_its_own_but_for_what_is_counted() -> None:
    async with world() as both:
        await _becomes_a_session(both)
        await _is_of_use(both)
        both.network.append(AFTER_WELCOME + 1000)
        both.lose()
        both.source.qemu.send(bytes(10_000))  # which a part of is lost, and sent again
        await both.destination.receive(10_000)
        again = both.source.relay.retransmitted()
        assert again > 0
        both.knows[0] = False
        both.lose()
        await both.source.until(lambda: both.source.relay.look().far.lost)
        both.answered.give_up()
        here, there = tcp_pair()
        for end, session, far in (
            (both.source, SessionEnd.DIALS, here),
            (both.destination, SessionEnd.ANSWERS, there),
        ):
            end.qemu.close()
            near, end.qemu = socket.socketpair()
            end.qemu.setblocking(False)
            end.relay.attach(
                near.detach(), far.detach(), recovered=True, may_replay=True, session=session, session_id=NEXT
            )
        with trio.fail_after(20):
            await both.dialled.over.wait()
            await both.answered.over.wait()
        both.answered.give_up()  # of what is not its own any more
        both.destination.qemu.send(PONG)
        assert await both.source.receive(len(PONG)) == PONG
        await both.source.until(lambda: both.source.state is SessionState.OFFERED)
        view = both.source.relay.session()
        assert view is not None
        assert view.id == NEXT
        assert both.dialled.is_lost is False
        assert both.source.relay.retransmitted() == again


async def _answer(stream: trio.SocketStream, before: Callable[[], None]) -> None:
    """As the other refault, after something has happened; it may say nothing, and hear nothing."""
    async with stream:
        if hello := await stream.receive_some(MESSAGE_BYTES):
            before()
            with suppress(trio.BrokenResourceError):
                await stream.send_all(replace(decode(hello), kind=Kind.WELCOME, code=Code.OK).encode())


async def _exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = await stream.receive_some(count - len(data))
        assert more
        data += more
    return data


async def test_an_end_that_was_acknowledged_and_then_lost_is_in_order() -> None:
    """All is said and taken; the other end has forgotten it, and its END was lost."""
    here, host = tcp_pair()
    source = End(Role.SOURCE, SessionEnd.DIALS, here)
    came = 0

    async def answer(stream: trio.SocketStream) -> None:
        nonlocal came
        came += 1
        hello = decode(await _exactly(stream, MESSAGE_BYTES))
        if came > 1:  # and not how far it took the stream
            await stream.send_all(replace(hello, kind=Kind.WELCOME, code=Code.GONE).encode())
            return
        at = Positions(end=0, window=1 << 20)
        await stream.send_all(replace(hello, kind=Kind.WELCOME, flags=Flag(0), positions=at).encode())
        source.qemu.send(b"the last")
        source.qemu.shutdown(socket.SHUT_WR)
        while (head := await _exactly(stream, 16))[0] != 3:  # FIN
            await _exactly(stream, int.from_bytes(head[4:8], "big"))
        acknowledged = struct.pack(">BxxxIQQ", 2, 8, 9, 9 + (1 << 20))
        await stream.send_all(acknowledged + struct.pack(">BxxxIQ", 3, 0, 0))  # and our own FIN
        while (head := await _exactly(stream, 16))[0] != 2 or head[8:] != (1).to_bytes(8, "big"):
            await _exactly(stream, int.from_bytes(head[4:8], "big"))

    with host, source.qemu:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.watch)
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, answer, [listener])
            port = listener.socket.getsockname()[1]
            addresses = [Inet("127.0.0.1", port)]
            dialled = SessionDialled(source.around("src"), lambda: addresses, lambda each: each.close())
            host.sendall(b"".join(PONG[:4] + word for word in (b"\xf5\x72\x66\x73", *[ID[:4]] * 4)))
            await source.until(lambda: source.state is SessionState.OFFERED)
            with trio.fail_after(20):
                await dialled.run(1)
            assert came == 2
            assert not source.relay.look().far_error
            nursery.cancel_scope.cancel()
    source.relay.close()


@pytest.mark.parametrize("while_it_is", ["connected", "welcomed"])
async def test_a_migration_that_ends_in_a_handshake_is_no_error(
    while_it_is: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, host = tcp_pair()
    with host:
        source = End(Role.SOURCE, SessionEnd.DIALS, here)
        with source.qemu:
            if while_it_is == "connected":

                async def connects(endpoint: Inet, patience: float, **_: object) -> trio.socket.SocketType:
                    source.relay.close()
                    return await connect(endpoint, patience)

                monkeypatch.setattr(session_dialled, "connect", connects)
            async with trio.open_nursery() as nursery:
                [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
                nursery.start_soon(
                    trio.serve_listeners, lambda stream: _answer(stream, source.relay.close), [listener]
                )
                port = listener.socket.getsockname()[1]
                dialled = SessionDialled(
                    source.around("src"),
                    lambda: [Inet("127.0.0.1", port)],
                    lambda connection: connection.close(),
                )
                host.sendall(b"".join(PONG[:4] + word for word in (b"\xf5\x72\x66\x73", *[ID[:4]] * 4)))
                await source.until(lambda: source.state is SessionState.OFFERED)
                with trio.fail_after(20):
                    await dialled.run(1)
                assert source.relay.closed
                nursery.cancel_scope.cancel()


async def test_a_session_that_is_left_to_the_next_refault_is_not_said_to_be_gone() -> None:
    """As refault ends just when a HELLO is about to be judged."""
    relay = SimpleNamespace(closed=False, attached=1, session=lambda _: None)
    answered = SessionAnswered(Around("vm", cast(Relay, relay), trio.Event, Seen(), Seen()), ID)
    hello = Message(Kind.HELLO, ID, 0, 1, flags=Flag.NEW, positions=Positions())
    scope = trio.CancelScope()

    class Had:
        """A lock that is free, and had as refault ends."""

        async def __aenter__(self) -> None:
            scope.cancel()

        async def __aexit__(self, *_: object) -> None: ...

    answered._one = cast(trio.Lock, Had())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with scope:
            await answered.join(ours, Answering(Keys()), hello)
        assert scope.cancelled_caught
        with pytest.raises(BlockingIOError):
            theirs.recv(1, socket.MSG_DONTWAIT)
