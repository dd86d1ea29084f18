"""Lanes at their edges: an END that is lost, ends and resets of who is relayed, and strangers."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable

import pytest
import trio
import trio.testing

from refault.daemon.far.answered import Answered, _Offer, _Stranger, host_of, who_goes
from refault.daemon.far.dialled import Dialled
from refault.daemon.far.lane import LaneEnd
from refault.daemon.far.patience import FIRST_PAUSE, Patience
from refault.daemon.monitor.address_text import parse_address
from refault.daemon.tunnel.options import TunnelOptions
from refault.daemon.tunnel.plain import Plain
from refault.daemon.tunnel.serve import Tunnel
from refault.migration.endpoint import Inet
from refault.session.course import Event, Role
from refault.session.handshake import Answering, Keys
from refault.session.memory import FIRST, Memory
from refault.session.stream import Stream
from refault.session.wire import Code, Flag, Kind, Message


class Told:
    """A local side that notes what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def wake(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        self.said.append("close")

    def reset(self) -> None:
        self.said.append("reset")

    def say_no_more(self) -> None:
        self.said.append("say no more")


def _end(role: Role = Role.DIALS) -> tuple[LaneEnd, Told]:
    end, told = LaneEnd(role, "connection 1", Memory()), Told()
    end.attach(told)
    return end, told


def _pass(one: Stream, other: LaneEnd) -> None:
    """All that one end has to say, to the other."""
    while pieces := one.next():
        data = b"".join(pieces)
        one.sent(len(data))
        other.stream.take(data)
    other.heard()


def _over(dials: LaneEnd, answers: LaneEnd) -> None:
    """Each says something and ends; all of it is taken and acknowledged, and END is not delivered."""
    for end, peer in ((dials, answers), (answers, dials)):
        end.stream.resume(peer.stream.tell())
    for end, peer in ((dials, answers), (answers, dials)):
        end.stream.space()[:5] = b"hello"
        end.stream.put(5)
        end.stream.finish()
        _pass(end.stream, peer)
        peer.stream.wrote(5)
        peer.stream.wrote_fin()
        peer.stream.acknowledge()
    _pass(dials.stream, answers)


def test_an_end_that_is_lost_is_one_in_order_where_every_byte_was_delivered() -> None:
    (dials, told), (answers, told_there) = _end(), _end(Role.ANSWERS)
    _over(dials, answers)
    assert told_there.said == ["close"]
    assert answers.done_at == 6
    assert told.said == []  # its own end's acknowledgement went with the connection
    Dialled(dials, Inet("127.0.0.1", 1), Keys(), 1.0)._forgotten(answers.done_at)
    assert told.said == ["close"]
    assert dials.over.is_set()


@pytest.mark.parametrize("taken", [0, 5])
def test_who_is_forgotten_before_all_was_taken_is_reset(taken: int) -> None:
    (dials, told), (answers, _) = _end(), _end(Role.ANSWERS)
    _over(dials, answers)
    Dialled(dials, Inet("127.0.0.1", 1), Keys(), 1.0)._forgotten(taken)
    assert told.said == ["reset"]


def test_a_local_side_that_comes_late_hears_what_has_happened() -> None:
    end = LaneEnd(Role.ANSWERS, "connection 1", Memory())
    end.tell(Event.BROKE_HERE)
    told = Told()
    end.attach(told)
    assert told.said == ["reset"]


def test_room_is_given_only_to_who_has_used_what_it_had() -> None:
    (dials, _), (answers, _) = _end(), _end(Role.ANSWERS)
    answers.stream.resume(dials.stream.tell())
    more = bytes([7, 0, 0, 0]) + bytes(4) + FIRST.to_bytes(8, "big")
    for _ in range(3):
        answers.stream.take(more)
        answers.heard()
    assert answers.stream.facts().in_size == FIRST
    answers.stream.take(bytes([1, 0, 0, 0]) + FIRST.to_bytes(4, "big") + bytes(8) + bytes(FIRST))
    answers.stream.wrote(FIRST)
    answers.stream.take(more)
    answers.heard()
    assert answers.stream.facts().in_size == 2 * FIRST


def _pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname(), timeout=20)
        return client, listening.accept()[0]


@pytest.mark.parametrize(
    ("ends", "expected"), [(Plain.close, b""), (Plain.reset, None), (lambda _: None, None)]
)
async def test_only_what_ends_in_order_is_an_orderly_end(
    ends: Callable[[Plain], None], expected: bytes | None
) -> None:
    client, sock = _pair()
    end, _ = _end()
    plain = Plain(sock, end)
    with client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(plain.run)
            await trio.testing.wait_all_tasks_blocked()
            ends(plain)
            nursery.cancel_scope.cancel()  # as when the tunnel ends, or another part of it fails
        if expected is None:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        else:
            assert client.recv(1) == expected


async def test_what_nobody_takes_is_read_so_that_the_answer_comes_whole() -> None:
    client, sock = _pair()
    end, _ = _end()
    stop = bytes([4]) + bytes(15)
    end.stream.take(stop)
    end.heard()
    plain = Plain(sock, end)
    with client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(plain.run)
            client.sendall(bytes(1000))
            await trio.testing.wait_all_tasks_blocked(0.01)
            sock.send(b"the answer")
            plain.close()
        assert client.recv(100) == b"the answer"
        assert client.recv(100) == b""


async def test_connections_that_are_lost_at_once_use_patience_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    rest = Patience(lambda: 7)
    rest.lost()
    assert rest.is_fresh
    pauses: list[float] = []
    while rest.spent < 1.0 and len(pauses) < 100:
        pauses.append(rest.pause())
        await trio.sleep(pauses[-1])
        rest.connected()
        if len(pauses) > 1:
            await trio.sleep(1)
            rest.lost()
            assert not rest.is_fresh
        else:
            rest.lost()
    assert pauses[:3] == [FIRST_PAUSE, FIRST_PAUSE, 2 * FIRST_PAUSE]
    assert len(pauses) < 20


@pytest.mark.parametrize(
    ("seconds", "silent", "spent"),
    [(10, False, 0.5), (3600, True, 0.5), (10, True, 0.5), (9, True, 9.5), (5, True, 5.5), (4, False, 0.5)],
)
async def test_a_connection_that_stays_is_of_use_unless_nothing_was_heard_on_it(
    seconds: float, silent: bool, spent: float, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    rest = Patience(lambda: 7)
    rest.lost()
    rest.connected()
    rest.lost()
    await trio.sleep(0.0)
    rest.connected()
    await trio.sleep(seconds)
    rest.lost(silent=silent)
    assert rest.is_fresh is (spent == 0.5 and seconds > 4)
    await trio.sleep(0.5)
    assert rest.spent == pytest.approx(spent)


@pytest.mark.parametrize("dials", [False, True])
async def test_a_silence_that_took_longer_than_the_patience_ends_the_lane(
    dials: bool, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    end, told = _end()
    far = Dialled(end, Inet("127.0.0.1", 1), Keys(), 5.0) if dials else Answered(end, 5.0)
    rest = far._rest = Patience(lambda: 7)
    rest.lost()
    rest.connected()
    await trio.sleep(9)
    rest.lost(silent=True)
    await far.keep()
    assert told.said == ["reset"]


async def test_what_only_the_other_end_knew_of_a_connection_is_of_use_too(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    at = [0]
    rest = Patience(lambda: at[0])
    for at[0] in range(5):
        rest.lost()
        await trio.sleep(1)
        rest.connected()
    rest.lost()
    assert rest.spent == 0


def test_a_host_with_many_strangers_does_not_take_the_places_of_others() -> None:
    def stranger(peer: str) -> _Stranger:
        return _Stranger(trio.CancelScope(), host_of(peer))

    one, two, three = (stranger(peer) for peer in ("192.0.2.1", "2001:db8::1", "2001:db8::2"))
    assert two.host == three.host
    assert stranger("::ffff:192.0.2.1").host == one.host
    assert stranger("fe80::1%lo").host == stranger("fe80::2").host
    assert who_goes(deque([one, two, three])) is two
    assert who_goes(deque([one, two])) is one


async def test_who_is_welcomed_and_silent_may_begin_anew(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its connection stays, and is ended here; who dials may have lost the WELCOME, and comes with NEW."""
    del autojump_clock
    here = parse_address("tcp:127.0.0.1:1", server=False)
    tunnel = Tunnel(TunnelOptions(here, here, answers=True))
    hello = Message(Kind.HELLO, bytes(16), 0, 1, flags=Flag.NEW)
    client, sock = _pair()
    sock.setblocking(False)
    table = tunnel._table
    with client:
        async with trio.open_nursery() as tunnel._nursery:
            assert table.judge(hello, proven=False).code is Code.OK
            far = tunnel._begin_answered(hello.session)
            assert far is not None
            far.offer(_Offer(sock, Answering(Keys()), hello))
        assert len(table) == 0
        assert table.judge(hello, proven=False).code is Code.OK


async def test_who_has_made_every_attempt_gives_the_lane_up() -> None:
    end, told = _end()
    far = Dialled(end, Inet("127.0.0.1", 1), Keys(), 5.0)
    far._attempt = (1 << 32) - 1
    await far.keep()
    assert told.said == ["reset"]
