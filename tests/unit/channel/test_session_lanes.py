"""Channels with lanes whose far legs become a session: each lane over connections of its own, lost at any
byte."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from tests.support.breaking_proxy import BreakingProxy
from tests.unit.channel.test_lanes import BEGINNING, DEVICE_STATE, RESET
from tests.unit.channel.test_relay import nothing_comes, tcp_pair
from tests.unit.channel.test_session import ID, PATIENCE, PONG, _exactly, until

from refault.channel.relay import Lane, LegState, Relay, SessionEnd, SessionState
from refault.daemon.kernel.polled import hung_up
from refault.migration.messages import message
from refault.migration.phase import Role
from refault.session.wire import Positions


@dataclass
class Ends:
    """Two relays of one channel. Of its connection n, 0 being the main one: QEMU's end at the source, QEMU's
    at the destination, and the plain connection between, where there is one."""

    source: Relay
    destination: Relay
    from_qemu: list[socket.socket] = field(default_factory=list)
    to_qemu: list[socket.socket] = field(default_factory=list)
    plain: list[tuple[socket.socket, socket.socket]] = field(default_factory=list)

    def add_local(self) -> tuple[socket.socket, socket.socket]:
        """The two relays' ends of a connection's local legs."""
        (near, from_qemu), (far, to_qemu) = socket.socketpair(), socket.socketpair()
        for end in (from_qemu, to_qemu):
            end.settimeout(PATIENCE)
        self.from_qemu.append(from_qemu)
        self.to_qemu.append(to_qemu)
        return near, far

    def add_plain(self, kind: Lane = Lane.PREEMPT, number: int | None = None) -> None:
        """A further connection, as one that QEMU opens before the discovery."""
        near, far = self.add_local()
        here, there = tcp_pair()
        self.plain.append((here.dup(), there.dup()))
        if number is None:
            number = len(self.plain) - 1
        self.source.add_lane(1, kind, near.detach(), here.detach(), number=number)
        self.destination.add_lane(1, kind, far.detach(), there.detach(), number=number)
        for relay in (self.source, self.destination):
            until(lambda relay=relay: relay.look().lanes == len(self.plain) - 1, "none")  # type: ignore[misc]

    def offered(self) -> None:
        """Until the destination has offered a session, and the source seen it."""
        self.to_qemu[0].sendall(PONG)
        until(lambda: self.states(self.source, 0) == [SessionState.OFFERED], "no offer")
        assert _exactly(self.from_qemu[0], len(PONG)) == PONG

    def states(self, relay: Relay, *lanes: int) -> list[SessionState]:
        views = [relay.session(lane) for lane in lanes]
        return [SessionState.NONE if view is None else view.state for view in views]

    def join(self, lane: int, ends: tuple[socket.socket, socket.socket] | None = None) -> bool:
        """The lane's next connection, with the handshake's words given from hand to hand."""
        here, there = ends or tcp_pair()
        hello = self.source.session_tell(lane)
        if hello is None or not self.destination.session_rejoin(hello, lane):
            return False
        welcome = self.destination.session_tell(lane)
        assert welcome is not None
        assert self.destination.session_adopt(there.fileno(), lane=lane)
        there.detach()
        if not self.source.session_adopt(here.fileno(), welcome, lane):
            return False
        here.detach()
        return True

    def passes(self, lane: int, data: bytes = b"forward") -> None:
        self.from_qemu[lane].sendall(data)
        assert _exactly(self.to_qemu[lane], len(data)) == data


@contextmanager
def ends_of(
    lanes: int, *, dials: SessionEnd = SessionEnd.DIALS, answers: SessionEnd = SessionEnd.ANSWERS
) -> Iterator[Ends]:
    ends = Ends(Relay(Role.SOURCE), Relay(Role.DESTINATION))
    near, far = ends.add_local()
    here, there = tcp_pair()
    ends.plain.append((here.dup(), there.dup()))
    try:
        for relay, local, away, end in (
            (ends.source, near, here, dials),
            (ends.destination, far, there, answers),
        ):
            relay.attach(
                local.detach(), away.detach(), recovered=False, may_replay=True,
                lanes=lanes, session=end, session_id=ID,
            )  # fmt: skip
        yield ends
    finally:
        for sock in (*ends.from_qemu, *ends.to_qemu, *(each for pair in ends.plain for each in pair)):
            sock.close()
        ends.source.close()
        ends.destination.close()


@pytest.mark.parametrize(
    ("dials", "answers"), [(SessionEnd.DIALS, SessionEnd.NO), (SessionEnd.NO, SessionEnd.ANSWERS)]
)
def test_beside_a_bare_end_all_lanes_are_as_ever(dials: SessionEnd, answers: SessionEnd) -> None:
    with ends_of(2, dials=dials, answers=answers) as ends:
        for _ in range(2):
            ends.add_plain()
        data = os.urandom(3 << 20)  # more than a ring has

        def says() -> None:
            ends.from_qemu[1].sendall(data)

        talk = threading.Thread(target=says)
        talk.start()
        ends.to_qemu[0].sendall(PONG)
        assert _exactly(ends.from_qemu[0], len(PONG))
        if answers is SessionEnd.ANSWERS:
            ends.destination.session_withdraw()
        assert _exactly(ends.to_qemu[1], len(data)) == data
        talk.join()
        for relay in (ends.source, ends.destination):
            assert ends.states(relay, 0, 1, 2) == [SessionState.NONE] * 3


def test_before_the_offer_the_loss_of_a_lane_is_one_as_ever() -> None:
    with ends_of(1) as ends:
        ends.add_plain()
        ends.plain[1][0].shutdown(socket.SHUT_RDWR)
        until(lambda: ends.source.look().far.lost and ends.destination.look().far.lost, "not told")


@pytest.mark.parametrize("lost", ["before it came", "then"])
def test_a_lane_that_was_there_is_resumed_by_itself(lost: str) -> None:
    with ends_of(1) as ends:
        ends.add_plain()
        ends.passes(1, b"plain")
        ends.offered()
        if lost == "before it came":
            ends.plain[1][0].shutdown(socket.SHUT_RDWR)
            for relay in (ends.source, ends.destination):
                until(lambda relay=relay: ends.states(relay, 1) == [SessionState.BETWEEN], "no loss")  # type: ignore[misc]
        ends.from_qemu[1].sendall(b" and")
        assert ends.join(0)
        assert ends.join(1)
        ends.passes(0)
        assert _exactly(ends.to_qemu[1], 4) == b" and"
        assert ends.destination.session_rejoin(_now(ends.source, 1), 1)  # its connection ends
        ends.from_qemu[1].sendall(b" on")
        until(lambda: ends.states(ends.source, 1) == [SessionState.BETWEEN], "no loss")
        assert ends.states(ends.source, 0) == [SessionState.CARRIED]
        ends.passes(0)
        assert ends.join(1)
        assert _exactly(ends.to_qemu[1], 3) == b" on"
        assert not ends.source.look().far.lost


def test_what_a_stranger_was_taken_for_the_lane_is_set_right() -> None:
    with ends_of(1) as ends:
        near, far = ends.add_local()
        here, there = tcp_pair()
        stranger, instead = tcp_pair()
        with there, stranger:
            ends.source.add_lane(1, Lane.PREEMPT, near.detach(), here.detach())
            ends.destination.add_lane(1, Lane.PREEMPT, far.detach(), instead.detach())
            ends.from_qemu[1].sendall(b"waited for")
            ends.offered()
            assert ends.join(0)
            assert ends.join(1)
            assert _exactly(ends.to_qemu[1], 10) == b"waited for"
            assert stranger.recv(1) == b""


def test_device_state_waits_for_a_lane_that_begins_as_one_of_the_session() -> None:
    """Since 8.0 QEMU opens it when it is needed."""
    with ends_of(1) as ends:
        ends.offered()
        assert ends.join(0)
        ends.passes(0, BEGINNING)
        ends.from_qemu[0].sendall(DEVICE_STATE)
        until(lambda: ends.source.look().waiting, "the source's does not wait")
        near, far = ends.add_local()
        ends.source.add_lane(1, Lane.PREEMPT, near.detach(), None)
        ends.from_qemu[1].sendall(b"page")
        until(lambda: ends.states(ends.source, 1) == [SessionState.BETWEEN], "it does not begin")
        until(lambda: ends.destination.look().waiting, "the destination's does not wait")
        assert nothing_comes(ends.to_qemu[0], 0.05)
        assert ends.join(1)
        assert nothing_comes(ends.to_qemu[0], 0.05)
        ends.destination.add_lane(1, Lane.PREEMPT, far.detach(), None)
        assert _exactly(ends.to_qemu[0], len(DEVICE_STATE)) == DEVICE_STATE
        assert _exactly(ends.to_qemu[1], 4) == b"page"


def test_an_offer_that_nobody_takes_is_none_of_the_lanes_either() -> None:
    with ends_of(2) as ends:
        ends.add_plain()
        ends.add_plain()
        ends.offered()
        for relay in (ends.source, ends.destination):
            relay.session_withdraw()
        until(lambda: ends.states(ends.destination, 1) == [SessionState.NONE], "it stays")
        ends.passes(1)
        ends.plain[2][0].shutdown(socket.SHUT_RDWR)
        until(lambda: ends.source.look().far.lost and ends.destination.look().far.lost, "not told")


def test_a_lane_that_is_lost_before_its_offer_is_withdrawn_is_a_loss_then() -> None:
    with ends_of(1) as ends:
        ends.add_plain()
        ends.offered()
        ends.plain[1][0].shutdown(socket.SHUT_RDWR)
        until(lambda: ends.states(ends.source, 1) == [SessionState.BETWEEN], "no loss")
        assert not ends.source.look().far.lost
        ends.source.session_withdraw()
        until(lambda: ends.source.look().far.lost, "not told")


@pytest.mark.parametrize("lane", [0, 1])
def test_a_lane_that_is_given_up_is_the_loss_of_all(lane: int) -> None:
    with ends_of(1) as ends:
        ends.add_plain()
        ends.offered()
        assert ends.join(0)
        assert ends.join(1)
        ends.source.session_give_up(110, lane)
        until(lambda: ends.source.look().far is LegState.FAILED, "not told")
        assert ends.source.look().far_error == 110
        ends.source.close_channel(1)
        if lane:
            until(lambda: ends.destination.look().far.lost, "the other end does not hear of it")
        else:
            assert ends.states(ends.source, 0, 1) == [SessionState.OVER] * 2


def test_all_lanes_end_when_all_is_said() -> None:
    with ends_of(1) as ends:
        ends.add_plain()
        ends.offered()
        assert ends.join(0)
        assert ends.join(1)
        ends.to_qemu[0].sendall(message(1, bytes(4)))  # SHUT
        for end in (*ends.from_qemu, *ends.to_qemu):
            end.close()
        for relay in (ends.source, ends.destination):
            until(lambda relay=relay: set(ends.states(relay, 0, 1)) == {SessionState.OVER}, "it stays")  # type: ignore[misc]


def test_a_lane_that_never_came_does_not_stay() -> None:
    with ends_of(1) as ends:
        ends.offered()
        assert ends.join(0)
        assert ends.join(1)  # who dials has opened it, and the other end's QEMU has not been given it
        for relay in (ends.source, ends.destination):
            relay.close_channel(1)
            until(lambda relay=relay: relay.look().local is LegState.CLOSED, "not closed")  # type: ignore[misc]
        for relay in (ends.source, ends.destination):
            until(lambda relay=relay: set(ends.states(relay, 0, 1)) == {SessionState.OVER}, "it stays")  # type: ignore[misc]


def _attach_next(relay: Relay, session: SessionEnd) -> tuple[socket.socket, socket.socket]:
    """The next channel: QEMU's end, and the other host's."""
    near, qemu = socket.socketpair()
    here, host = tcp_pair()
    relay.attach(
        near.detach(), here.detach(), recovered=True, may_replay=True, session=session, session_id=ID
    )  # fmt: skip
    return qemu, host


def test_a_lane_that_never_came_does_not_outlive_a_channel_that_qemu_ended() -> None:
    with ends_of(1) as ends:
        ends.offered()
        assert ends.join(0)
        here, there = tcp_pair()
        with here.dup() as connection:
            assert ends.join(1, (here, there))
            ends.to_qemu[0].sendall(message(1, bytes(4)))  # SHUT
            for end in (*ends.from_qemu, *ends.to_qemu):
                end.close()
            for relay in (ends.source, ends.destination):
                until(lambda relay=relay: relay.session().state is SessionState.OVER, "it stays")  # type: ignore[misc]
            assert not hung_up(connection)
            for relay in (ends.source, ends.destination):
                for end in _attach_next(relay, SessionEnd.NO):
                    end.close()
            until(lambda: hung_up(connection), "it stays")


def test_a_lane_that_the_session_has_not_come_to_does_not_outlive_its_channel() -> None:
    with ends_of(1) as ends:
        ends.add_plain()
        ends.offered()
        assert ends.join(0)
        ends.to_qemu[0].sendall(message(1, bytes(4)))  # SHUT
        ends.from_qemu[0].close()
        ends.to_qemu[0].close()
        for relay in (ends.source, ends.destination):
            until(lambda relay=relay: ends.states(relay, 0) == [SessionState.OVER], "it stays")  # type: ignore[misc]
        for end in _attach_next(ends.source, SessionEnd.NO):
            end.close()
        until(lambda: SessionState.OVER in ends.states(ends.source, 1), "it stays")


def test_what_is_left_of_the_channel_before_is_not_taken_for_the_next_one_s() -> None:
    with ends_of(0) as ends:
        ends.offered()
        here, there = tcp_pair()
        with here.dup() as connection:
            assert ends.join(0, (here, there))
            for end in _attach_next(ends.source, SessionEnd.DIALS):
                ends.from_qemu.append(end)
            until(lambda: ends.states(ends.source, 0) == [SessionState.PLAIN], "no next one")
            ends.to_qemu[0].close()
            until(lambda: hung_up(connection), "the one before stays")
            ends.source.session_withdraw()
            until(lambda: ends.states(ends.source, 0) != [SessionState.PLAIN], "it stays")
            assert ends.states(ends.source, 0) == [SessionState.NONE]


@pytest.mark.parametrize("comes", [True, False])
def test_a_lane_that_a_destination_ends_while_the_session_is_offered_ends_in_order(comes: bool) -> None:
    """QEMU closes those of multifd before it says SHUT, and HELLO may be late."""
    with ends_of(1) as ends:
        ends.add_plain(Lane.MULTIFD)
        ends.offered()
        ends.passes(1, b"pages")
        until(lambda: ends.states(ends.destination, 1) == [SessionState.OFFERED], "not offered")
        ends.to_qemu[1].close()
        assert nothing_comes(ends.plain[1][0], 0.05)
        if comes:
            assert ends.join(0)
            assert ends.join(1)
        else:
            for relay in (ends.source, ends.destination):  # the source's gives it up sooner
                relay.session_withdraw()
                until(lambda relay=relay: ends.states(relay, 1) == [SessionState.NONE], "it stays")  # type: ignore[misc]
        assert ends.from_qemu[1].recv(1) == b""
        ends.passes(0, b"main")
        assert not ends.source.look().far.lost


def test_lanes_are_known_by_their_numbers_and_not_by_when_they_came() -> None:
    with ends_of(3) as ends:
        for number in (3, 1, 2):
            ends.add_plain(Lane.MULTIFD, number)
        ends.offered()
        for lane in (0, 2, 3, 1):
            assert ends.join(lane)
        for place in range(4):
            ends.passes(place, bytes([place]))
        assert ends.states(ends.source, 0, 1, 2, 3) == [SessionState.CARRIED] * 4


def test_a_lane_of_no_number_stays_with_its_connection() -> None:
    with ends_of(2) as ends:
        ends.add_plain(Lane.MULTIFD, 0)
        ends.add_plain(Lane.MULTIFD, 1)
        ends.offered()
        assert ends.join(0)
        assert ends.join(1)
        ends.passes(1, b"plain")
        ends.passes(2, b"lane 1")
        ends.plain[1][0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        ends.plain[1][0].shutdown(socket.SHUT_RDWR)
        ends.passes(0, b"main")


def test_what_a_lane_said_before_its_end_comes_though_the_session_has_not_come_to_it() -> None:
    """A source that has completed closes all, be it right behind the discovery."""
    data = os.urandom(300_000)
    with ends_of(1) as ends:
        ends.add_plain(Lane.MULTIFD)
        ends.offered()
        assert ends.join(0)
        until(lambda: ends.states(ends.source, 0) == [SessionState.CARRIED], "no session")
        ends.from_qemu[1].sendall(data)
        ends.from_qemu[1].close()
        until(lambda: ends.states(ends.source, 1) == [SessionState.BETWEEN], "its connection stays")
        assert ends.join(1)
        assert _exactly(ends.to_qemu[1], len(data)) == data
        assert ends.to_qemu[1].recv(1) == b""
        assert not ends.destination.look().far.lost


@pytest.mark.parametrize("kind", list(Lane))
@pytest.mark.parametrize("seed", range(2))
def test_connections_of_all_lanes_are_lost_at_any_byte(kind: Lane, seed: int) -> None:
    count = 3
    data = [os.urandom(1 << 20) for _ in range(count)]
    heard: dict[int, bytes] = {}
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    with ends_of(count - 1) as ends, listening, BreakingProxy(port, seed, losses=40, most=100_000) as proxy:
        ends.add_plain(kind)
        ends.offered()
        near, far = ends.add_local()
        ends.source.add_lane(1, kind, near.detach(), None, number=2)
        ends.destination.add_lane(1, kind, far.detach(), None, number=2)

        def hear(lane: int) -> None:
            heard[lane] = _exactly(ends.to_qemu[lane], len(data[lane]))

        talks = [threading.Thread(target=hear, args=(lane,)) for lane in range(count)]
        talks += [
            threading.Thread(target=ends.from_qemu[lane].sendall, args=(data[lane],)) for lane in range(count)
        ]
        for talk in talks:
            talk.start()
        deadline = time.monotonic() + 2 * PATIENCE
        connected: set[int] = set()
        while any(talk.is_alive() for talk in talks):
            assert time.monotonic() < deadline, (heard.keys(), ends.source.sessions(), proxy.lost)
            for lane in random.sample(range(count), count):
                states = ends.states(ends.source, lane) + ends.states(ends.destination, lane)
                if lane not in connected or SessionState.BETWEEN in states:
                    here = socket.create_connection(("127.0.0.1", proxy.port))
                    there, _ = listening.accept()
                    if ends.join(lane, (here, there)):
                        connected.add(lane)
            time.sleep(0.001)
        assert [heard[lane] for lane in range(count)] == data
        assert not ends.source.look().far.lost


def _now(relay: Relay, lane: int) -> Positions:
    at = relay.session_tell(lane)
    assert at is not None
    return at
