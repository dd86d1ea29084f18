"""The compiled stream beside its model, over connections that end at any byte."""

from __future__ import annotations

import random
import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refault.session._session import ffi, lib
from tests.unit.session.model import Lie, Model

from refault.session.stream import Frame, Stream, Wrong
from refault.session.wire import Positions

RING = 1 << 10
ORIGINS = (0, (1 << 32) - 700, (1 << 63) - (1 << 40) - (1 << 20))
"""Beginnings; the second has positions pass 2^32, the third is near the last position that there is."""


def saved(stream: Stream) -> bytes:
    data = bytearray(lib.rf_stream_saved_size(stream._stream))
    lib.rf_stream_save(stream._stream, ffi.from_buffer(data))
    return bytes(data)


def restored(data: bytes, *, largest: int) -> Stream:
    """Raises ValueError where it is not believed."""
    stream = Stream(RING, RING)
    raw = lib.rf_stream_restore(ffi.from_buffer(data), len(data), largest)
    if raw == ffi.NULL:
        raise ValueError("it cannot have been a stream")
    stream._stream = ffi.gc(raw, lib.rf_stream_free)
    return stream


class End:
    """A compiled stream and its model, told the same and compared; and what its local side said and took."""

    def __init__(self, origin: int, ring: int = RING, window: int = RING) -> None:
        self.stream, self.model = Stream(ring, window, origin), Model(ring, window, origin)
        self.said, self.took = b"", b""
        self.wire = b""
        """On its way to the peer."""

    def compare(self) -> None:
        facts, model = self.stream.facts(), self.model
        here = facts.here
        assert model.positions() == Positions(
            here.received, here.written, here.first_kept, here.end, here.window
        )
        for name in ("acknowledged", "sent", "limit", "told", "retransmitted", "wanted"):
            assert getattr(facts, name) == getattr(model, name), name
        for name in ("stopped_there", "reset_here", "reset_there", "end_there"):
            assert bool(getattr(facts, name)) == getattr(model, name), name
        assert facts.at_fin == model.at_fin()
        assert here.received - here.written <= facts.in_size + 1

    def say(self, data: bytes) -> None:
        while data:
            space = self.stream.space()
            length = min(len(space), len(data))
            assert (length > 0) == (self.model.room() > 0)
            if not length:
                return
            space[:length] = data[:length]
            self.stream.put(length)
            self.model.put(data[:length])
            self.said += data[:length]
            data = data[length:]
        self.compare()

    def finish(self) -> None:
        self.stream.finish()
        self.model.fin = True
        self.compare()

    def grow(self) -> None:
        if self.model.ring < 16 * RING:
            assert self.stream.grow(2 * self.model.ring)
            self.model.ring *= 2

    def widen(self) -> None:
        if self.model.window < 16 * RING:
            assert self.stream.widen(2 * self.model.window)
            self.model.window *= 2
            self.model.wrote(0)
            self.model.acknowledge = True
            self.compare()

    def take(self, most: int) -> None:
        data = bytes(self.stream.unwritten())[:most]
        assert self.model.unwritten().startswith(data)
        assert data or not self.model.unwritten() or not most
        self.stream.wrote(len(data))
        self.model.wrote(len(data))
        self.took += data
        if self.model.at_fin():
            self.stream.wrote_fin()
            self.model.wrote_fin()
        self.compare()

    def stop(self) -> None:
        self.stream.stop()
        self.model.stop()
        self.compare()

    def reset(self) -> None:
        self.stream.reset()
        self.model.reset_here = True
        self.compare()

    def acknowledge(self) -> None:
        self.stream.acknowledge()
        self.model.acknowledge = self.model.acknowledge or self.model.told != self.model.written

    def send(self, most: int) -> None:
        """Gives at most so many bytes of the next frame to the connection."""
        data = b"".join(bytes(piece) for piece in self.stream.next())
        assert data == self.model.to_send()
        data = data[:most]
        self.stream.sent(len(data))
        self.model.gone(len(data))
        self.wire += data
        self.compare()

    def receive(self, data: bytes) -> None:
        self.stream.take(data)
        self.model.take(data)
        self.compare()

    def lose(self) -> None:
        self.stream.lost()
        self.model.lost()
        self.wire = b""

    def hand_over(self) -> None:
        """Another process goes on with it, without a connection."""
        self.lose()
        self.stream = restored(saved(self.stream), largest=16 * RING)
        self.compare()

    def tell(self) -> Positions:
        told = self.stream.tell()
        assert told == self.model.tell()
        return told

    def resume(self, peer: Positions) -> None:
        self.stream.resume(peer)
        self.model.resume(peer)
        self.compare()

    @property
    def is_done(self) -> bool:
        facts = self.stream.facts()
        return bool(facts.delivered and facts.taken)


class Pair:
    """Two ends and the connection between them, if there is one."""

    def __init__(self, origin: int) -> None:
        self.ends = (End(origin), End(origin))
        self.connect()

    def connect(self, reach: int = 2) -> None:
        """The first dials. HELLO is lost with a `reach` of 0, WELCOME with 1."""
        dials, answers = self.ends
        dials.lose()
        hello = dials.tell()
        self.connected = False
        if reach == 0:
            return
        answers.lose()
        answers.resume(hello)
        welcome = answers.tell()
        if reach == 1:
            return
        dials.resume(welcome)
        self.connected = True

    def carry(self, source: int, length: int) -> None:
        end = self.ends[source]
        data, end.wire = end.wire[:length], end.wire[length:]
        self.ends[1 - source].receive(data)

    def settle(self) -> None:
        """Everything that can happen without the local sides happens."""
        for _ in range(1000):
            if all(end.is_done for end in self.ends):
                return
            for source, end in enumerate(self.ends):
                end.take(1 << 20)
                end.acknowledge()
                end.send(1 << 20)
                self.carry(source, 1 << 20)
        raise AssertionError("it does not come to an end")


@given(
    st.lists(
        st.tuples(st.sampled_from("ssttxxxxccccgwalohAF"), st.integers(0, 1), st.integers(0, 2000)),
        max_size=80,
    ),
    st.sampled_from(ORIGINS),
    st.integers(0, 1 << 32),
)
@settings(max_examples=40)
def test_every_byte_arrives_once_whatever_is_lost_when(
    steps: list[tuple[str, int, int]], origin: int, seed: int
) -> None:
    """Said, taken, sent and carried in any order, and connections that end at any byte, HELLO's and WELCOME's
    included; at each step the compiled stream is where the model is."""
    pair, chance = Pair(origin), random.Random(seed)
    for what, which, amount in steps:
        end = pair.ends[which]
        match what:
            case "s":
                end.say(chance.randbytes(amount))
            case "t":
                end.take(amount)
            case "x" if pair.connected:
                end.send(amount)
            case "c" if pair.connected:
                pair.carry(which, amount)
            case "g":
                end.grow()
            case "w":
                end.widen()
            case "a":
                end.acknowledge()
            case "l":
                pair.connect(amount % 4)
            case "o":
                pair.connect()
            case "h":
                end.hand_over()
                pair.connected = False
            case "F" if amount < 500:
                end.finish()
    pair.connect()
    for end in pair.ends:
        end.finish()
    pair.settle()
    for one, other in (pair.ends, pair.ends[::-1]):
        assert one.said == other.took


def test_positions_pass_two_to_the_32() -> None:
    pair = Pair((1 << 32) - 700)
    data = random.Random(1).randbytes(1000)
    pair.ends[0].say(data)
    for _ in range(3):
        pair.ends[0].send(500)
    pair.carry(0, 900)
    pair.connect()
    for end in pair.ends:
        end.finish()
    pair.settle()
    assert pair.ends[1].took == data
    assert pair.ends[1].stream.facts().here.received > 1 << 32


def test_what_is_full_when_the_connection_is_lost_goes_on() -> None:
    """The ring, and the room that was promised."""
    pair = Pair(0)
    here, there = pair.ends
    here.say(bytes(range(256)) * 4)
    assert not len(here.stream.space())
    here.send(1 << 20)
    here.send(1 << 20)
    pair.carry(0, 1 << 20)
    here.send(1 << 20)  # MORE
    pair.carry(0, 1 << 20)
    assert there.stream.facts().wanted == RING
    pair.connect()
    assert not here.stream.space()
    here.send(1 << 20)
    assert here.wire[0] == Frame.ACK  # nothing of the peer's room is left
    there.take(100)
    there.acknowledge()
    there.send(1 << 20)
    pair.carry(1, 1 << 20)
    assert len(here.stream.space()) == 100


def test_an_end_that_was_acknowledged_and_then_lost_is_known() -> None:
    pair = Pair(0)
    here, there = pair.ends
    here.finish()
    here.send(100)
    here.send(100)
    pair.carry(0, 100)
    there.take(0)
    there.send(100)  # ACK, which nobody receives
    there.send(100)
    pair.connect()
    assert here.stream.facts().delivered
    pair.ends[1].finish()
    pair.settle()
    assert here.model.retransmitted == 0


def test_a_peer_that_takes_no_more_ends_the_stream_where_it_is() -> None:
    pair = Pair(0)
    here, there = pair.ends
    here.say(bytes(600))
    here.send(24)  # ACK
    here.send(300)
    pair.carry(0, 200)
    there.stop()
    there.say(b"answer")
    for _ in range(3):
        there.send(100)
    pair.carry(1, 1 << 20)
    assert here.stream.facts().stopped_there
    assert not len(here.stream.space())
    there.finish()
    pair.settle()
    assert here.took == b"answer"
    assert here.stream.facts().delivered


def test_a_reset_comes_behind_what_there_is_room_for_and_ends_what_comes() -> None:
    pair = Pair(0)
    here, there = pair.ends
    here.say(bytes(100))
    here.reset()
    for _ in range(4):
        here.send(1 << 20)
    pair.carry(0, 1 << 20)
    assert there.stream.facts().reset_there
    assert len(there.stream.unwritten()) == 100
    pair.connect()  # RESET is told again
    for _ in range(4):
        here.send(1 << 20)
    assert here.wire[24] == Frame.RESET
    pair.carry(0, 1 << 20)


def _busy() -> End:
    """An end that has sent 500 of 600 bytes, of which 200 are acknowledged, and received 300, of which it has
    written 100 and told 50."""
    pair = Pair(0)
    here, there = pair.ends
    here.say(bytes(600))
    here.send(24)
    here.send(516)
    pair.carry(0, 540)
    there.take(200)
    there.acknowledge()
    there.say(bytes(300))
    there.send(24)
    there.send(316)
    pair.carry(1, 340)
    here.take(50)
    here.tell()
    here.take(50)
    return here


@given(st.data())
@settings(max_examples=200)
def test_what_is_not_a_stream_that_was_written_down_is_none(data: st.DataObject) -> None:
    """Or it is one that holds what its positions say."""
    whole = saved(_busy().stream)
    restored(whole, largest=RING)
    for wrong in (whole[:-1], whole + b"x", b"", whole[:50]):
        with pytest.raises(ValueError, match="cannot have been"):
            restored(wrong, largest=RING)
    with pytest.raises(ValueError, match="cannot have been"):
        restored(whole, largest=RING // 2)
    words = list(struct.unpack(">14Q", whole[:112]))
    at = data.draw(st.integers(0, 13))
    near = st.sampled_from([0, 1, RING, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, *words])
    words[at] = data.draw(st.integers(0, (1 << 64) - 1) | near)
    try:
        stream = restored(struct.pack(">14Q", *words) + whole[112:], largest=RING)
    except ValueError:
        return
    facts = stream.facts()
    assert facts.told <= facts.here.written <= facts.here.received <= facts.here.written + facts.in_size + 1
    assert facts.acknowledged <= facts.sent <= facts.here.end <= facts.acknowledged + facts.out_size + 1


TRUE = Positions(received=400, written=300, first_kept=50, end=400, window=RING)


def test_the_truth_is_believed() -> None:
    end = _busy()
    end.resume(TRUE)
    assert end.stream.facts().acknowledged == 300


@pytest.mark.parametrize(
    "lie",
    [
        replace(TRUE, received=501),  # never sent
        replace(TRUE, received=299),  # less than written
        replace(TRUE, received=1 << 63),
        replace(TRUE, received=(1 << 64) - 1),
        replace(TRUE, written=199),  # less than acknowledged
        replace(TRUE, written=401),
        replace(TRUE, written=(1 << 64) - 1, window=300),
        replace(TRUE, first_kept=51),  # more than we told
        replace(TRUE, first_kept=401),
        replace(TRUE, first_kept=(1 << 64) - 1),
        replace(TRUE, end=299),  # less than we have
        replace(TRUE, end=49),
        replace(TRUE, end=1 << 63),
        replace(TRUE, window=RING - 101),  # room taken back
        replace(TRUE, window=(1 << 40) + 1),
        replace(TRUE, window=(1 << 64) - 1),
        replace(TRUE, window=(1 << 64) - 300),  # a sum that wraps
    ],
)
def test_a_lie_about_a_position_changes_nothing(lie: Positions) -> None:
    end = _busy()
    before = end.model.positions()
    with pytest.raises(Wrong):
        end.stream.resume(lie)
    with pytest.raises(Lie):
        end.model.resume(lie)
    end.compare()
    assert end.model.positions() == before
    end.resume(TRUE)


def _frame(
    kind: int, offset: int, body: bytes = b"", length: int | None = None, fill: bytes = b"\0\0\0"
) -> bytes:
    return struct.pack(">B3sIQ", kind, fill, len(body) if length is None else length, offset) + body


def _ack(written: int, limit: int) -> bytes:
    return _frame(Frame.ACK, written, struct.pack(">Q", limit))


@pytest.mark.parametrize(
    "lie",
    [
        _frame(0, 0),
        _frame(8, 0),
        _frame(255, 0),
        _frame(Frame.FIN, 300, fill=b"\0\0\1"),
        _frame(Frame.DATA, 300),
        _frame(Frame.DATA, 300, length=(1 << 20) + 1),
        _frame(Frame.DATA, 300, length=(1 << 32) - 1),
        _frame(Frame.DATA, 301, b"x"),  # a gap
        _frame(Frame.DATA, 1 << 63, b"x"),
        _frame(Frame.DATA, (1 << 64) - 1, b"x"),  # a sum that wraps
        _frame(Frame.DATA, 300, length=RING - 100),  # 1 + 300 more than there is room for
        _frame(Frame.FIN, 299),
        _frame(Frame.FIN, 301),
        _frame(Frame.FIN, 300, b"x"),
        _frame(Frame.ACK, 300, b"1234567"),
        _ack(501, 501 + RING),
        _ack(199, 200 + RING),
        _ack(300, 199 + RING),
        _ack(300, 1 << 63),
        _ack(300, (1 << 64) - 1),
        _frame(Frame.MORE, 1 << 62),
        _frame(Frame.FIN, 300) + _frame(Frame.DATA, 300, b"x"),
        _frame(Frame.FIN, 300) + _frame(Frame.FIN, 301),
    ],
)
def test_a_lie_in_a_frame_is_refused(lie: bytes) -> None:
    stream = _busy().stream

    def take_all() -> None:
        for at in range(len(lie)):
            stream.take(lie[at : at + 1])

    with pytest.raises(Wrong):
        take_all()
    with pytest.raises(Wrong):
        stream.take(bytes(100))


def test_sizes_that_are_none_are_refused() -> None:
    for ring, window in ((0, 1), (1, 0), (3, 4), (4, 6)):
        with pytest.raises(MemoryError):
            Stream(ring, window)
    assert not Stream(64, 64).grow(64)
    assert not Stream(64, 64).widen(100)


@pytest.mark.parametrize("pieces", [1, 7, 1000])
def test_bytes_that_are_known_are_trimmed(pieces: int) -> None:
    """What comes twice, in whole or in part, is taken once."""
    end = _busy()
    data = bytes(300) + bytes(range(1, 61))
    wire = b"".join(
        _frame(Frame.DATA, at, data[at:to]) for at, to in ((0, 100), (250, 330), (290, 360), (10, 360))
    )
    for at in range(0, len(wire), pieces):
        end.receive(wire[at : at + pieces])
    end.take(1000)
    assert end.took == data


def test_an_end_that_was_told_stays_though_the_peer_takes_no_more() -> None:
    pair = Pair(0)
    here, there = pair.ends
    here.say(b"all")
    here.finish()
    for _ in range(3):
        here.send(100)
    there.stop()
    there.send(100)
    pair.carry(1, 100)
    assert here.stream.facts().here.end == 4
    pair.carry(0, 100)
    there.finish()
    pair.settle()
