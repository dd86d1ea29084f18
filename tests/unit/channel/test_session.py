"""Two relays whose far leg becomes a session, over connections that end at any byte."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import select
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import pytest
from tests.support import until as support
from tests.support.breaking_proxy import BreakingProxy
from tests.unit.channel.test_relay import tcp_pair

from refault.channel.relay import LegState, Relay, SessionEnd, SessionState, SessionView
from refault.migration.messages import message
from refault.migration.phase import Role
from refault.session.wire import Positions

ID = b"".join((random.randrange(1 << 31) | 1 << 31).to_bytes(4, "big") for _ in range(4))
PONG = message(2, (1).to_bytes(4, "big"))
PATIENCE = 30.0


def until(condition: Callable[[], bool], what: str) -> None:
    support.until(condition, lambda: what, seconds=PATIENCE)


@dataclass
class Both:
    """The two relays, the two QEMUs' ends, and the plain connection between, which the test may end."""

    source: Relay
    destination: Relay
    from_qemu: socket.socket
    to_qemu: socket.socket
    plain: tuple[socket.socket, socket.socket]

    def offered(self) -> None:
        """Until the destination has offered a session, and the source seen it."""
        self.to_qemu.sendall(PONG)
        until(lambda: _state(self.source) is SessionState.OFFERED, "no offer")
        assert _exactly(self.from_qemu, len(PONG)) == PONG  # and nothing else of the offer

    def join(self, ends: tuple[socket.socket, socket.socket] | None = None) -> bool:
        """The next connection, with the handshake's words given from hand to hand."""
        here, there = ends or tcp_pair()
        hello = self.source.session_tell()
        if hello is None or not self.destination.session_rejoin(hello):
            return False
        welcome = self.destination.session_tell()
        assert welcome is not None
        assert self.destination.session_adopt(there.fileno())
        there.detach()
        if not self.source.session_adopt(here.fileno(), welcome):
            return False
        here.detach()
        return True


@contextmanager
def both(
    *,
    dials: SessionEnd = SessionEnd.DIALS,
    answers: SessionEnd = SessionEnd.ANSWERS,
    encrypted: bool = False,
) -> Iterator[Both]:
    source, destination = Relay(Role.SOURCE), Relay(Role.DESTINATION)
    near, from_qemu = socket.socketpair()
    far, to_qemu = socket.socketpair()
    here, there = tcp_pair()
    plain = here.dup(), there.dup()
    try:
        source.attach(
            near.detach(), here.detach(), recovered=False, may_replay=True,
            session=dials, encrypted=encrypted,
        )  # fmt: skip
        destination.attach(
            far.detach(), there.detach(), recovered=False, may_replay=True,
            session=answers, session_id=ID, encrypted=encrypted,
        )  # fmt: skip
        for end in (from_qemu, to_qemu):
            end.settimeout(PATIENCE)
        yield Both(source, destination, from_qemu, to_qemu, plain)
    finally:
        for sock in (from_qemu, to_qemu, *plain):
            sock.close()
        source.close()
        destination.close()


def _state(relay: Relay) -> SessionState:
    view = relay.session()
    return view.state if view is not None else SessionState.NONE


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        assert more, "it has ended"
        data += more
    return data


def test_bare_bytes_are_as_they_were_sent() -> None:
    for dials, answers in ((SessionEnd.DIALS, SessionEnd.NO), (SessionEnd.NO, SessionEnd.ANSWERS)):
        with both(dials=dials, answers=answers) as ends:
            ends.from_qemu.sendall(b"forward")
            assert _exactly(ends.to_qemu, 7) == b"forward"
            ends.to_qemu.sendall(PONG)
            if answers is SessionEnd.NO:
                assert _exactly(ends.from_qemu, len(PONG)) == PONG
                assert _state(ends.source) is SessionState.NONE
            else:  # five PONGs before, which a bare source takes
                told = _exactly(ends.from_qemu, 6 * len(PONG))
                assert told.endswith(PONG)
                assert told[:8] == bytes.fromhex("00020004f5726673")


def test_an_offer_that_nobody_takes_is_withdrawn_and_the_plain_connection_goes_on() -> None:
    with both() as ends:
        ends.offered()
        ends.source.session_withdraw()
        ends.destination.session_withdraw()
        data = os.urandom(3 << 20)
        threading.Thread(target=ends.from_qemu.sendall, args=(data,)).start()
        assert _exactly(ends.to_qemu, len(data)) == data
        assert _state(ends.source) is SessionState.NONE


def test_the_plain_connection_is_lost_right_after_the_offer() -> None:
    with both() as ends:
        ends.from_qemu.sendall(b"before")
        ends.offered()
        ends.plain[0].shutdown(socket.SHUT_RDWR)
        until(lambda: _state(ends.source) is SessionState.BETWEEN, "no loss")
        until(lambda: _state(ends.destination) is SessionState.BETWEEN, "no loss")
        ends.from_qemu.sendall(b" and behind")
        assert ends.source.look().far is LegState.OPEN
        assert ends.join()
        assert _exactly(ends.to_qemu, 17) == b"before and behind"


@contextmanager
def one(
    role: Role, end: SessionEnd, *, encrypted: bool = False
) -> Iterator[tuple[Relay, socket.socket, socket.socket]]:
    """One relay, the end that its QEMU has, and the other host's, which no refault is behind."""
    local, qemu = socket.socketpair()
    far, host = tcp_pair()
    relay = Relay(role)
    try:
        relay.attach(
            local.detach(), far.detach(), recovered=False, may_replay=True,
            session=end, session_id=ID, encrypted=encrypted,
        )  # fmt: skip
        qemu.settimeout(PATIENCE)
        host.setblocking(False)
        yield relay, qemu, host
    finally:
        qemu.close()
        host.close()
        relay.close()


def _arrived(host: socket.socket, sent: int) -> int:
    """Of so many bytes, those that the relay's kernel has acknowledged."""
    return sent - int.from_bytes(fcntl.ioctl(host, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def _send_until_it_waits_in_the_kernel(
    host: socket.socket, data: bytes, passed: Callable[[], int], *, least: int
) -> int:
    """Sends of `data` until more of it has arrived than has been passed on, by `least`; how much was sent."""
    sent = 0

    def waits() -> bool:
        nonlocal sent
        with suppress(BlockingIOError):
            sent += host.send(data[sent : sent + 65536])
        return _arrived(host, sent) - passed() > least

    until(waits, "nothing waits")
    return sent


def test_what_had_arrived_when_a_write_fails_is_passed_on_though_a_session_was_offered() -> None:
    data = os.urandom(8 << 20)
    with one(Role.DESTINATION, SessionEnd.ANSWERS) as (relay, qemu, host):
        chunk = 256 << 10
        sent = _send_until_it_waits_in_the_kernel(
            host, data, lambda: relay.look().forward_bytes, least=chunk + (32 << 10)
        )
        qemu.sendall(PONG)
        until(lambda: _state(relay) is SessionState.OFFERED, "no offer")
        arrived = _arrived(host, sent)
        host.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        host.close()
        with suppress(BrokenPipeError):
            qemu.sendall(PONG)
        assert _exactly(qemu, arrived) == data[:arrived]
        until(lambda: _state(relay) is SessionState.BETWEEN, "no loss")


def test_what_had_arrived_when_an_end_shows_is_passed_on_though_a_session_was_offered() -> None:
    offer = b"".join(
        PONG[:4] + word for word in (b"\xf5\x72\x66\x73", *(ID[i : i + 4] for i in (0, 4, 8, 12)))
    )
    data = PONG * (1 << 18)
    with one(Role.SOURCE, SessionEnd.DIALS) as (relay, qemu, host):
        host.sendall(offer)
        until(lambda: _state(relay) is SessionState.OFFERED, "no offer")
        sent = _send_until_it_waits_in_the_kernel(
            host, data, lambda: relay.look().return_bytes, least=32 << 10
        )
        arrived = _arrived(host, sent)
        host.shutdown(socket.SHUT_WR)
        time.sleep(0.05)  # in which nothing is to happen
        assert _exactly(qemu, arrived) == data[:arrived]
        qemu.setblocking(False)

        def lost() -> bool:
            with suppress(BlockingIOError):
                qemu.recv(1 << 20)
            return _state(relay) is SessionState.BETWEEN

        until(lost, "no loss")


@contextmanager
def offered() -> Iterator[tuple[Relay, socket.socket]]:
    """A destination's, which has had six bytes on its plain connection and sent a PONG; QEMU's end."""
    with one(Role.DESTINATION, SessionEnd.ANSWERS) as (relay, qemu, host):
        host.sendall(b"plain ")
        assert _exactly(qemu, 6) == b"plain "
        qemu.sendall(PONG)
        until(lambda: _state(relay) is SessionState.OFFERED, "no offer")
        yield relay, qemu


def test_what_had_arrived_on_a_connection_of_a_session_is_taken_when_it_fails() -> None:
    with offered() as (relay, qemu):
        here, there = tcp_pair()
        assert relay.session_rejoin(Positions(received=len(PONG), written=len(PONG), end=6, window=1 << 20))
        here.sendall(struct.pack(">BxxxIQ", 1, 8, 6) + b"and last")
        here.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        here.close()
        assert relay.session_adopt(there.fileno())
        there.detach()
        assert _exactly(qemu, 8) == b"and last"


def test_a_peer_that_says_its_side_broke_is_told_that_it_was_heard() -> None:
    with offered() as (relay, _):
        here, there = tcp_pair()
        with here:
            here.settimeout(PATIENCE)
            peer = Positions(received=len(PONG), written=len(PONG), end=6, window=1 << 20)
            assert relay.session_rejoin(peer)
            assert relay.session_adopt(there.detach())
            here.sendall(struct.pack(">BxxxIQ", 5, 0, 6))
            while (head := _exactly(here, 16))[0] != 6:  # END
                _exactly(here, int.from_bytes(head[4:8], "big"))
        until(lambda: relay.look().far_error == errno.ECONNRESET, "QEMU does not hear of it")
        until(lambda: _state(relay) is SessionState.OVER, "it stays")


@pytest.mark.parametrize("broke", [False, True])
def test_a_qemu_that_ends_without_a_word_is_not_over_before_it_is_told_what_became_of_it(
    broke: bool,
) -> None:
    with both() as ends:
        ends.offered()
        assert ends.join()
        ends.to_qemu.close()
        until(lambda: ends.source.look().far.lost, "it is not passed on")
        until(lambda: _now_of(ends.destination).delivered, "it is not heard")
        assert _now_of(ends.destination).word_due
        assert _state(ends.destination) is SessionState.CARRIED
        ends.destination.session_last_word(broke=broke)
        until(lambda: _state(ends.destination) is SessionState.OVER, "it stays")
        assert _now_of(ends.source).broke_there is broke


def test_that_it_broke_is_said_again_on_the_next_connection() -> None:
    with both() as ends:
        ends.offered()
        assert ends.join()
        ends.to_qemu.close()
        until(lambda: _now_of(ends.destination).delivered, "it is not heard")
        assert ends.destination.session_rejoin(_now(ends.source))
        ends.destination.session_last_word(broke=True)
        until(lambda: _state(ends.source) is SessionState.BETWEEN, "no loss")
        assert not _now_of(ends.source).broke_there
        assert not _now_of(ends.destination).complete
        assert ends.join()
        until(lambda: _state(ends.destination) is SessionState.OVER, "it stays")
        assert _now_of(ends.source).broke_there


def test_one_that_has_said_its_last_word_is_over_by_itself() -> None:
    with both() as ends:
        ends.offered()
        assert ends.join()
        ends.to_qemu.sendall(message(1, bytes(4)))  # SHUT
        ends.to_qemu.close()
        until(lambda: _state(ends.destination) is SessionState.OVER, "it stays")
        assert not _now_of(ends.source).broke_there


def test_a_hello_that_came_late_does_not_end_the_session() -> None:
    with both() as ends:
        ends.offered()
        early, next_ = _now(ends.source), _now(ends.source)
        ends.from_qemu.sendall(b"plain")
        assert _exactly(ends.to_qemu, 5) == b"plain"
        assert ends.destination.session_rejoin(early)  # and its connection is lost, before anybody is told
        assert ends.destination.session_rejoin(next_)
        assert ends.join()
        ends.from_qemu.sendall(b" and on")
        assert _exactly(ends.to_qemu, 7) == b" and on"


def test_each_loss_is_told_though_the_connection_before_it_was_not() -> None:
    with both() as ends:
        ends.offered()
        assert ends.join()
        hello = ends.source.session_tell()
        assert hello is not None
        assert ends.destination.session_rejoin(hello)
        for turn in range(30):
            until(lambda: _state(ends.destination) is SessionState.BETWEEN, "it is carried")
            while select.select([ends.destination.notify_fd], [], [], 0.002)[0]:
                os.eventfd_read(ends.destination.notify_fd)
            here, there = tcp_pair()
            with here:
                assert ends.destination.session_adopt(there.detach())
                assert ends.destination.session_rejoin(hello)  # mostly before the pump's turn
                told, _, _ = select.select([ends.destination.notify_fd], [], [], PATIENCE)
            assert told, f"loss {turn} was not told"


def test_before_the_offer_a_loss_is_one_as_ever() -> None:
    with both() as ends:
        ends.plain[0].shutdown(socket.SHUT_RDWR)
        until(lambda: ends.source.look().far.lost, "not told")


@pytest.mark.parametrize("seed", range(4))
def test_connections_are_lost_at_any_byte_and_none_is_missing_or_doubled(seed: int) -> None:
    data, back = os.urandom(2 << 20), PONG * 20_000
    heard: dict[str, bytes] = {}
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    with both() as ends, listening, BreakingProxy(port, seed, losses=25, most=150_000) as proxy:
        ends.offered()
        talks = [
            threading.Thread(target=ends.from_qemu.sendall, args=(data,)),
            threading.Thread(target=ends.to_qemu.sendall, args=(back,)),
            threading.Thread(target=lambda: heard.update(forward=_exactly(ends.to_qemu, len(data)))),
            threading.Thread(target=lambda: heard.update(back=_exactly(ends.from_qemu, len(back)))),
        ]
        for talk in talks:
            talk.start()
        deadline = time.monotonic() + 2 * PATIENCE
        connected = False
        while any(talk.is_alive() for talk in talks):
            assert time.monotonic() < deadline, (heard.keys(), ends.source.session(), proxy.lost)
            lost = SessionState.BETWEEN in (_state(ends.source), _state(ends.destination))
            if not connected or lost:
                here = socket.create_connection(("127.0.0.1", proxy.port))
                there, _ = listening.accept()
                connected = ends.join((here, there)) or connected
            time.sleep(0.002)
        assert (heard["forward"], heard["back"]) == (data, back)
        view = ends.source.session()
        assert view is not None
        assert view.end == len(data)


def test_the_end_of_a_source_is_delivered_though_it_is_said_without_a_connection() -> None:
    with both() as ends:
        ends.offered()
        assert ends.join()
        ends.source.session_rejoin(_now(ends.destination))  # its connection ends
        ends.from_qemu.sendall(b"the last")
        ends.from_qemu.close()
        until(lambda: _state(ends.destination) is SessionState.BETWEEN, "no loss")
        assert ends.join()
        assert _exactly(ends.to_qemu, 8) == b"the last"
        until(lambda: ends.destination.look().far is LegState.ENDED, "its end does not come")
        ends.to_qemu.close()
        until(lambda: _state(ends.source) is SessionState.OVER, "it does not end")
        until(lambda: _state(ends.destination) is SessionState.OVER, "it does not end")


def test_what_a_source_says_at_its_end_comes_though_the_session_is_only_asked_for() -> None:
    with both() as ends:
        ends.offered()
        hello = _now(ends.source)
        assert ends.destination.session_rejoin(hello)
        ends.from_qemu.sendall(b"the last")
        ends.from_qemu.close()
        until(lambda: ends.source.look().local.lost, "its end is not seen")
        here, there = tcp_pair()
        welcome = _now(ends.destination)
        assert ends.destination.session_adopt(there.detach())
        assert ends.source.session_adopt(here.fileno(), welcome)
        here.detach()
        assert _exactly(ends.to_qemu, 8) == b"the last"
        until(lambda: ends.destination.look().far is LegState.ENDED, "its end does not come")


def test_a_session_that_is_given_up_is_a_loss() -> None:
    with both() as ends:
        ends.offered()
        assert ends.join()
        ends.source.session_give_up(errno.ETIMEDOUT)
        until(lambda: ends.source.look().far.lost, "not told")
        assert ends.source.look().far_error == errno.ETIMEDOUT


def test_with_the_ring_full_and_no_connection_qemu_waits_and_nothing_is_lost() -> None:
    with both() as ends:
        ends.offered()
        assert ends.join()
        ends.source.session_rejoin(_now(ends.destination))
        data = os.urandom(4 << 20)
        talk = threading.Thread(target=ends.from_qemu.sendall, args=(data,))
        talk.start()
        until(lambda: _kept(ends.source) >= 1 << 20, "the ring is not filled")
        time.sleep(0.05)
        assert talk.is_alive()
        assert _kept(ends.source) <= 1 << 20
        until(lambda: _state(ends.destination) is SessionState.BETWEEN, "no loss")
        assert ends.join()
        assert _exactly(ends.to_qemu, len(data)) == data
        talk.join()


def _kept(relay: Relay) -> int:
    view = relay.session()
    return view.kept if view is not None else 0


def _now_of(relay: Relay) -> SessionView:
    view = relay.session()
    assert view is not None
    return view


def _now(relay: Relay) -> Positions:
    at = relay.session_tell()
    assert at is not None
    return at


LIES = [
    (field, value)
    for field in ("received", "written", "first_kept", "end", "window")
    for value in (1 << 32, 1 << 62, (1 << 64) - 1)
    # It may have said so much by now, and may have so much room.
    if (field, value) not in (("end", 1 << 32), ("end", 1 << 62), ("window", 1 << 32))
]


@pytest.mark.parametrize(("field", "value"), LIES)
def test_a_peer_that_lies_about_a_number_changes_nothing(field: str, value: int) -> None:
    with both() as ends:
        ends.from_qemu.sendall(b"some")
        ends.offered()
        assert _exactly(ends.to_qemu, 4) == b"some"
        told = {name: getattr(_now(ends.source), name) for name in Positions.__dataclass_fields__}
        assert not ends.destination.session_rejoin(Positions(**{**told, field: value}))
        assert ends.join()
        ends.from_qemu.sendall(b" more")
        assert _exactly(ends.to_qemu, 5) == b" more"
        assert ends.source.session_rejoin(_now(ends.destination))  # its connection ends
        hello, welcome = _now(ends.source), _now(ends.destination)
        here, there = tcp_pair()
        with here, there:
            lie = replace(welcome, **{field: value})
            assert not ends.source.session_adopt(here.fileno(), lie)
        assert ends.source.session_tell() == hello
        assert ends.join()
        ends.to_qemu.sendall(PONG)
        assert _exactly(ends.from_qemu, len(PONG)) == PONG
