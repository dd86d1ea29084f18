"""A channel that is a session goes from one process to the next: every byte passes once, both ways."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.channel.test_relay import tcp_pair
from tests.unit.channel.test_session import ID, PATIENCE, Both, _exactly, _state, until

from refault.channel.relay import LegState, Relay, SessionEnd, SessionState
from refault.migration.messages import message
from refault.migration.phase import Role

NAMED = message(3, bytes(8) + (4096).to_bytes(4, "big") + b"\x06pc.ram")
"""A page request, by whose block the next ones go that name none."""
UNNAMED = message(4, (8192).to_bytes(8, "big") + (4096).to_bytes(4, "big"))


class World:
    """Two relays between which a session is carried, and our ends of both legs, which QEMU holds as well."""

    def __init__(self) -> None:
        near, from_qemu = socket.socketpair()
        far, to_qemu = socket.socketpair()
        here, there = tcp_pair()
        self.held = {Role.SOURCE: near.dup(), Role.DESTINATION: far.dup()}
        self.both = Both(
            Relay(Role.SOURCE), Relay(Role.DESTINATION), from_qemu, to_qemu, (here.dup(), there.dup())
        )
        for qemu in (from_qemu, to_qemu):
            qemu.settimeout(PATIENCE)
        self.both.source.attach(
            near.detach(), here.detach(), recovered=False, may_replay=True, session=SessionEnd.DIALS
        )
        self.both.destination.attach(
            far.detach(),
            there.detach(),
            recovered=False,
            may_replay=True,
            session=SessionEnd.ANSWERS,
            session_id=ID,
        )

    def close(self) -> None:
        both = self.both
        for sock in (*self.held.values(), both.from_qemu, both.to_qemu, *both.plain):
            sock.close()
        both.source.close()
        both.destination.close()

    def of(self, role: Role) -> Relay:
        return self.both.source if role is Role.SOURCE else self.both.destination

    def hand_over(self, role: Role) -> None:
        """To a relay that has nothing but what is written down, and the leg; the session goes on."""
        handed = self.of(role).hand_over()
        assert handed is not None
        self.of(role).close()
        after = Relay(role)
        assert after.go_on(os.dup(self.held[role].fileno()), handed, recovered=False)
        if role is Role.SOURCE:
            self.both.source = after
        else:
            self.both.destination = after
        both = SessionState.BETWEEN
        until(lambda: all(_state(self.of(each)) is both for each in Role), "no loss")
        assert self.both.join()


def cut_off(world: World) -> None:
    """The session has no connection any more."""
    hello = world.both.destination.session_tell()
    assert hello is not None
    assert world.both.source.session_rejoin(hello)
    until(lambda: all(_state(world.of(each)) is SessionState.BETWEEN for each in Role), "no loss")


@contextmanager
def session() -> Iterator[World]:
    world = World()
    try:
        world.both.offered()
        assert world.both.join()
        yield world
    finally:
        world.close()


@pytest.mark.parametrize("role", Role)
def test_every_byte_passes_once_over_many(role: Role) -> None:
    chance = random.Random()
    forward = chance.randbytes(1 << 20)
    backward = NAMED + UNNAMED * 4000
    with session() as world:
        came: dict[str, bytes] = {}
        ends = world.both

        def take(name: str, sock: socket.socket, count: int) -> None:
            came[name] = _exactly(sock, count)

        tasks = [
            threading.Thread(target=ends.from_qemu.sendall, args=(forward,)),
            threading.Thread(target=ends.to_qemu.sendall, args=(backward,)),
            threading.Thread(target=take, args=("forward", ends.to_qemu, len(forward))),
            threading.Thread(target=take, args=("backward", ends.from_qemu, len(backward))),
        ]
        for task in tasks:
            task.start()
        for _ in range(5):
            time.sleep(chance.random() * 0.01)
            world.hand_over(role)
        for task in tasks:
            task.join(PATIENCE)
        assert came == {"forward": forward, "backward": backward}


@pytest.mark.parametrize("role", Role)
def test_a_request_without_a_block_goes_by_the_one_before_it(role: Role) -> None:
    """And one that was cut by it comes whole."""
    with session() as world:
        ends = world.both
        ends.to_qemu.sendall(NAMED)
        assert _exactly(ends.from_qemu, len(NAMED)) == NAMED
        world.hand_over(role)
        ends.to_qemu.sendall(UNNAMED + UNNAMED[:7])
        assert _exactly(ends.from_qemu, len(UNNAMED)) == UNNAMED
        world.hand_over(role)
        ends.to_qemu.sendall(UNNAMED[7:])
        assert _exactly(ends.from_qemu, len(UNNAMED)) == UNNAMED


def test_what_the_other_host_does_not_take_yet_is_kept() -> None:
    """The ring is full, and so is what was read beside it."""
    data = random.Random(1).randbytes(4 << 20)
    with session() as world:
        ends = world.both
        ends.to_qemu.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sent = 0
        ends.from_qemu.setblocking(False)
        while True:
            try:
                sent += ends.from_qemu.send(data[sent : sent + 65536])
            except BlockingIOError:
                before = world.of(Role.SOURCE).look().forward_bytes
                time.sleep(0.02)
                if world.of(Role.SOURCE).look().forward_bytes == before:
                    break
        for role in Role:
            world.hand_over(role)
        assert _exactly(ends.to_qemu, sent) == data[:sent]


def test_what_a_destination_said_last_is_delivered_by_the_next_process() -> None:
    """Its QEMU has ended its leg, which nobody needs any more. As often as need be."""
    last = message(1, bytes(4))
    with session() as world:
        ends = world.both
        ends.from_qemu.sendall(b"forward")
        assert _exactly(ends.to_qemu, 7) == b"forward"
        cut_off(world)
        ends.to_qemu.sendall(last)
        ends.to_qemu.close()
        for _ in range(2):
            until(lambda: ends.destination.look().local is not LegState.OPEN, "its end is not seen")
            handed = ends.destination.hand_over()
            assert handed is not None
            ends.destination.close()
            assert not Relay(Role.SOURCE).go_on(-1, handed, recovered=False)
            ends.destination = Relay(Role.DESTINATION)
            assert ends.destination.go_on(-1, handed, recovered=False)
            until(lambda: ends.destination.look().channel == 1, "it has not begun")
        view = ends.destination.session()
        assert view is not None
        assert (view.id, view.state, view.has_leg) == (ID, SessionState.BETWEEN, False)
        assert ends.join()
        assert _exactly(ends.from_qemu, len(last)) == last
        until(lambda: ends.source.look().far is LegState.ENDED, "its end has not come")
        ends.from_qemu.close()
        until(lambda: _state(ends.destination) is SessionState.OVER, "it is not over")
        assert ends.destination.hand_over() is None


def test_what_ends_between_is_handed_over_as_well() -> None:
    """QEMU holds our end of its leg, and has ended its own since."""
    with session() as world:
        ends = world.both
        cut_off(world)
        ends.to_qemu.close()
        until(lambda: ends.destination.look().local is not LegState.OPEN, "its end is not seen")
        handed = ends.destination.hand_over()
        assert handed is not None
        ends.destination.close()
        ends.destination = Relay(Role.DESTINATION)
        assert ends.destination.go_on(os.dup(world.held[Role.DESTINATION].fileno()), handed, recovered=False)
        assert ends.join()
        until(lambda: ends.source.look().far is LegState.ENDED, "its end has not come")


def test_what_is_no_session_stays_and_goes_on() -> None:
    world = World()
    try:
        for role in Role:
            assert world.of(role).hand_over() is None
        world.both.from_qemu.sendall(b"forward")
        assert _exactly(world.both.to_qemu, 7) == b"forward"
    finally:
        world.close()


def test_a_channel_without_its_far_side_is_lost_and_the_leg_is_there() -> None:
    with session() as world:
        assert world.of(Role.SOURCE).hand_over() is not None
        world.of(Role.SOURCE).close()
        after = world.both.source = Relay(Role.SOURCE)
        assert not after.go_on(-1, b"nothing", recovered=False)
        assert after.go_on(os.dup(world.held[Role.SOURCE].fileno()), None, recovered=False)
        until(lambda: after.look().far is LegState.FAILED, "the far leg is not lost")
        assert after.look().local is LegState.OPEN
        assert after.opaque_reason() is not None
        after.close_channel(1)
        assert world.both.from_qemu.recv(1) == b""


@pytest.fixture(scope="module")
def handed() -> bytes:
    with session() as world:
        world.both.from_qemu.sendall(b"forward")
        world.both.to_qemu.sendall(NAMED + UNNAMED[:5])
        assert _exactly(world.both.from_qemu, len(NAMED)) == NAMED
        made = world.of(Role.DESTINATION).hand_over()
    assert made is not None
    return made


@given(st.data())
@settings(max_examples=50)
def test_what_is_damaged_is_refused_or_does_no_harm(handed: bytes, data: st.DataObject) -> None:
    """Beside the checksum of the file that it is in."""
    damaged = bytearray(handed)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    relay = Relay(Role.DESTINATION)
    ours, qemu = socket.socketpair()
    with ours, qemu:
        if relay.go_on(ours.fileno(), bytes(damaged[:cut]), recovered=False):
            ours.detach()
        relay.close()
