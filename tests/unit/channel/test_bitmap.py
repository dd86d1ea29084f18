"""The sparse bitmap against a Python set."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.support.bitmap import Bitmap

SIZES = st.sampled_from([1, 63, 64, 65, 4095, 4096, 65535, 65537, 300_000, (1 << 22) + 5, 20_000_000])
# Near the edges of words, leaves and middles, and anywhere.
EDGES = [0, 1, 63, 64, 4095, 4096, (1 << 16) - 1, 1 << 16, (1 << 18) + 4096, (1 << 22) - 1, 1 << 22, 1 << 24]
INDEXES = st.one_of(
    st.sampled_from(EDGES), st.integers(0, 20_000_001), st.integers(0, 5000), st.integers(0, 5000)
)
COUNTS = st.one_of(st.integers(0, 200), st.integers(0, 20_000))


def dense(bits: set[int], first_byte: int, length: int) -> bytes:
    out = bytearray(length)
    for bit in bits:
        byte = bit // 8 - first_byte
        if 0 <= byte < length:
            out[byte] |= 1 << bit % 8
    return bytes(out)


class Model(RuleBasedStateMachine):
    @initialize(bits=SIZES)
    def make(self, bits: int) -> None:
        self.bits = bits
        self.map = Bitmap(bits)
        self.set: set[int] = set()

    @rule(index=INDEXES)
    def put(self, index: int) -> None:
        if index >= self.bits:
            with pytest.raises(IndexError):
                self.map.set(index)
            return
        assert self.map.set(index) == (index in self.set)
        self.set.add(index)

    @rule(index=INDEXES)
    def take(self, index: int) -> None:
        if index < self.bits:
            assert self.map.clear(index) == (index in self.set)
            self.set.discard(index)

    @rule(first=INDEXES, count=COUNTS)
    def put_range(self, first: int, count: int) -> None:
        new = set(range(first, min(first + count, self.bits))) - self.set
        assert self.map.set_range(first, count) == len(new)
        self.set |= new

    @rule(first=INDEXES, count=COUNTS)
    def take_range(self, first: int, count: int) -> None:
        old = {bit for bit in self.set if first <= bit < first + count}
        assert self.map.count_range(first, count) == len(old)
        assert self.map.clear_range(first, count) == len(old)
        self.set -= old

    @rule(index=INDEXES)
    def find(self, index: int) -> None:
        assert (index in self.map) == (index in self.set)
        assert self.map.next(index) == min((bit for bit in self.set if bit >= index), default=None)

    @rule(room=st.integers(0, 300))
    def drain(self, room: int) -> None:
        lowest = sorted(self.set)[:room]
        untouched = 1 << 50
        out = array("Q", [untouched]) * room
        assert self.map.drain(out) == len(lowest)
        assert list(out) == lowest + [untouched] * (room - len(lowest))
        self.set -= set(lowest)

    @rule(
        data=st.data(),
        first_byte=st.integers(0, 3000),
        length=st.integers(0, 1200),
        seed=st.integers(0, 1 << 30),
    )
    def with_dense(self, data: st.DataObject, first_byte: int, length: int, seed: int) -> None:
        rng = random.Random(seed)
        share = rng.choice([0.0, 0.1, 0.9, 1.0])
        inside = range(first_byte * 8, (first_byte + length) * 8)
        ones = {bit for bit in inside if rng.random() < share}
        covered = {bit for bit in self.set if bit in inside}
        given_bytes = dense(ones, first_byte, length)
        only_dense = {bit for bit in ones if bit < self.bits} - self.set
        assert self.map.compare(given_bytes, first_byte) == (len(covered - ones), len(only_dense))
        if data.draw(st.booleans()):
            assert self.map.and_not(given_bytes, first_byte) == len(covered & ones)
            self.set -= covered & ones
        else:
            assert self.map.intersect(given_bytes, first_byte) == len(covered - ones)
            self.set -= covered - ones

    @rule()
    def clear_all(self) -> None:
        self.map.clear_all()
        self.set.clear()

    @invariant()
    def same(self) -> None:
        if hasattr(self, "map"):
            assert len(self.map) == len(self.set)
            assert list(self.map) == sorted(self.set)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_an_idle_map_of_a_tebibyte_is_small_and_gives_everything_back() -> None:
    bitmap = Bitmap(1 << 28)
    idle = bitmap.memory
    assert idle < 1 << 10
    bitmap.set_range(1 << 20, 1 << 20)
    assert bitmap.memory > idle
    bitmap.clear_range(0, 1 << 28)
    assert bitmap.memory == idle


def test_memory_follows_what_is_set() -> None:
    bitmap = Bitmap(1 << 28)
    for index in range(0, 1 << 28, 1 << 18):
        bitmap.set(index)
    assert bitmap.memory < 1024 * 160
    bitmap.set_range(0, 1 << 28)
    assert bitmap.memory < (1 << 25) * 1.05


def test_a_leaf_that_grows_through_every_size_and_empties_again() -> None:
    bitmap = Bitmap(1 << 17)
    idle = bitmap.memory
    order = random.Random(1).sample(range(1 << 16), 6000)
    for number, index in enumerate(order, 1):
        assert not bitmap.set(index)
        assert bitmap.set(index)
        assert len(bitmap) == number
        if number in (29, 30, 61, 62, 4093, 4094, 6000):
            assert list(bitmap) == sorted(order[:number])
    for index in order:
        assert bitmap.clear(index)
        assert not bitmap.clear(index)
    assert bitmap.memory == idle


@pytest.mark.parametrize("bits", [-1, (1 << 44) + 1])
def test_impossible_sizes_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="a bitmap of"):
        Bitmap(bits)


@given(first_byte=st.integers(1 << 40, (1 << 63) - 1))
def test_dense_bytes_far_beyond_the_map_change_nothing(first_byte: int) -> None:
    bitmap = Bitmap(100)
    bitmap.set_range(0, 100)
    assert bitmap.and_not(b"\xff" * 64, first_byte) == 0
    assert bitmap.compare(b"\xff" * 64, first_byte) == (0, 0)
    assert len(bitmap) == 100


def test_dense_bytes_over_leaves_of_every_kind_that_lie_apart() -> None:
    """Looking ahead over leaves of one bit, of few, of many, and of many that few are left of."""
    bitmap = Bitmap(1 << 24)
    rng = random.Random(1)
    expected: set[int] = set()
    for leaf in range(0, 1 << 8, 3):
        for place in rng.sample(range(1 << 16), rng.choice([1, 7, 8, 127, 128, 300])):
            bitmap.set((leaf << 16) + place)
            expected.add((leaf << 16) + place)
    for leaf in (1, 64, 65, 200):  # none of those above
        bitmap.set_range(leaf << 16, 5000)
        bitmap.clear_range((leaf << 16) + 50, 5000)
        expected |= set(range(leaf << 16, (leaf << 16) + 50))
    first_byte = 10_000
    ones = bytes(rng.choices([0xFF, 0x3F, 0, 0x7F], k=(1 << 21) - 2 * first_byte))
    inside = {bit for bit in expected if 0 <= bit // 8 - first_byte < len(ones)}
    gone = {bit for bit in inside if ones[bit // 8 - first_byte] >> bit % 8 & 1}
    only_dense = int.from_bytes(ones).bit_count() - len(gone)
    assert bitmap.compare(ones, first_byte) == (len(inside - gone), only_dense)
    assert bitmap.and_not(ones, first_byte) == len(gone)
    assert list(bitmap) == sorted(expected - gone)
