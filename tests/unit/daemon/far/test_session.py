"""Both ends of a relayed session over a network that takes what it likes."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import pytest
import trio
from tests.unit.channel.test_relay import tcp_pair

from refault.channel.relay import Relay, SessionEnd, SessionState
from refault.daemon.far import session_dialled
from refault.daemon.far.connection import growing_pauses
from refault.daemon.far.dial import connect
from refault.daemon.far.session_answered import SessionAnswered, receive
from refault.daemon.far.session_dialled import SessionDialled
from refault.migration.endpoint import Inet
from refault.migration.messages import message
from refault.migration.phase import Role
from refault.session.wire import MESSAGE_BYTES, Code, Flag, Kind, Message, Positions, decode

ID = bytes([0x80, 1, 2, 3] * 4)
PONG = message(2, (1).to_bytes(4, "big"))


@dataclass
class Seen:
    """Who hears of a session, and how long it waits."""

    seconds_: float = 30.0
    began: int = 0
    resumed: int = 0

    def seconds(self) -> float:
        return self.seconds_

    def delivers_for(self) -> float:
        return self.seconds_

    async def has_sent_all(self) -> bool:
        return False

    def session_began(self) -> None:
        self.began += 1

    def session_resumed(self, seconds: float) -> None:
        self.resumed += 1


class End:
    """One relay, whose pump is listened to."""

    def __init__(self, role: Role, session: SessionEnd, far: socket.socket) -> None:
        self.relay = Relay(role)
        near, self.qemu = socket.socketpair()
        self.qemu.setblocking(False)
        self.changed = trio.Event()
        self.seen = Seen()
        self.relay.attach(
            near.detach(), far.detach(), recovered=False, may_replay=True, session=session, session_id=ID
        )

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
        with trio.fail_after(10):
            while not condition():
                await trio.sleep(0.002)

    async def receive(self, count: int) -> bytes:
        data = b""
        with trio.fail_after(10):
            while len(data) < count:
                await trio.lowlevel.wait_readable(self.qemu)
                data += self.qemu.recv(count - len(data))
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


@asynccontextmanager
async def world(*lost_after: int | None) -> AsyncIterator[World]:
    here, there = tcp_pair()
    plain = here.dup()
    source = End(Role.SOURCE, SessionEnd.DIALS, here)
    destination = End(Role.DESTINATION, SessionEnd.ANSWERS, there)
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    [network_listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    network_port = network_listener.socket.getsockname()[1]
    dialled = SessionDialled(
        "src", source.relay, lambda: source.changed, source.seen, source.seen,
        lambda: [Inet("127.0.0.1", network_port)],
    )  # fmt: skip
    answered = SessionAnswered(
        "dst", destination.relay, lambda: destination.changed, destination.seen, destination.seen, ID
    )
    scopes: list[trio.CancelScope] = []
    both = World(source, destination, dialled, answered, plain, list(lost_after), port=port)

    def lose() -> None:
        for scope in scopes:
            scope.cancel()

    both.lose = lose

    async def serve(stream: trio.SocketStream) -> None:
        await receive(stream.socket, answered if both.knows[0] else None, "dst")

    async def carry(near: trio.SocketStream) -> None:
        left = both.network.pop(0) if both.network else None
        far = await trio.open_tcp_stream("127.0.0.1", port)
        with near.socket, far.socket, trio.CancelScope() as scope:
            scopes.append(scope)
            async with trio.open_nursery() as nursery:

                async def one_way(here: trio.SocketStream, there: trio.SocketStream) -> None:
                    nonlocal left
                    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                        while data := await here.receive_some(4096 if left is None else max(left, 1)):
                            if left is not None:
                                left -= len(data)
                            if left is not None and left <= 0:
                                break
                            await there.send_all(data)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(one_way, near, far)
                nursery.start_soon(one_way, far, near)

    try:
        async with trio.open_nursery() as nursery:
            for end in (source, destination):
                nursery.start_soon(end.watch)
            nursery.start_soon(dialled.run, 1)
            nursery.start_soon(answered.run, 1)
            nursery.start_soon(trio.serve_listeners, serve, [listener])
            nursery.start_soon(trio.serve_listeners, carry, [network_listener])
            yield both
            nursery.cancel_scope.cancel()
    finally:
        for end in (source, destination):
            end.relay.close()
            end.qemu.close()
        plain.close()


async def _becomes_a_session(both: World) -> None:
    both.destination.qemu.send(PONG)
    assert await both.source.receive(len(PONG)) == PONG
    await both.source.until(lambda: both.source.state is SessionState.CARRIED)


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
        monkeypatch.setattr(session_dialled, "growing_pauses", pauses)
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
        with trio.fail_after(10):
            await both.dialled.over.wait()
            await both.answered.over.wait()


async def _asked(both: World, hello: Message) -> Message:
    stream = await trio.open_tcp_stream("127.0.0.1", both.port)
    async with stream:
        await stream.send_all(hello.encode())
        answer = b""
        with trio.fail_after(5):
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


async def _answer(stream: trio.SocketStream, before: Callable[[], None]) -> None:
    """As the other refault, after something has happened; it may say nothing, and hear nothing."""
    async with stream:
        if hello := await stream.receive_some(MESSAGE_BYTES):
            before()
            with suppress(trio.BrokenResourceError):
                await stream.send_all(replace(decode(hello), kind=Kind.WELCOME, code=Code.OK).encode())


@pytest.mark.parametrize("while_it_is", ["connected", "welcomed"])
async def test_a_migration_that_ends_in_a_handshake_is_no_error(
    while_it_is: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, host = tcp_pair()
    with host:
        source = End(Role.SOURCE, SessionEnd.DIALS, here)
        with source.qemu:
            if while_it_is == "connected":

                async def connects(endpoint: Inet, patience: float) -> trio.socket.SocketType:
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
                    "src", source.relay, lambda: source.changed, source.seen, source.seen,
                    lambda: [Inet("127.0.0.1", port)],
                )  # fmt: skip
                host.sendall(b"".join(PONG[:4] + word for word in (b"\xf5\x72\x66\x73", *[ID[:4]] * 4)))
                await source.until(lambda: source.state is SessionState.OFFERED)
                with trio.fail_after(5):
                    await dialled.run(1)
                assert source.relay.closed
                nursery.cancel_scope.cancel()
