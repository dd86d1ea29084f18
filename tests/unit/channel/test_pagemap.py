"""The page map against a model of what cext/pagemap.h says it is."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.support.pagemap import PageMap, PageMapError
from tests.support.tracker import Tracker

from . import streams as s

PAGE = 4096
HUGE = 16 * PAGE  # stands for 2 MiB, so that the model stays small
BLOCKS = {b"pc.ram": (64 * PAGE, PAGE), b"huge": (16 * HUGE, HUGE), b"rom": (3 * PAGE, PAGE)}
NAMES = st.sampled_from(sorted(BLOCKS))


def bitmap_of(pages: set[int], count: int) -> bytes:
    out = bytearray((count + 63) // 64 * 8)
    for page in pages:
        out[page // 8] |= 1 << page % 8
    return bytes(out)


@dataclass
class Record:
    name: bytes
    start: int
    time: int
    unconfirmed: set[int]
    missing: set[int]
    requested_on: int
    replayed_on: int = 0


@dataclass
class BlockModel:
    forwarded: set[int] = field(default_factory=set)
    bitmap_on: int = 0
    in_flight: set[int] = field(default_factory=set)
    behind: set[int] = field(default_factory=set)
    """Passed since the last PING or handshake."""


class Model(RuleBasedStateMachine):
    """Requests for whole pages of declared blocks, mixed with arrivals, losses and received bitmaps."""

    @initialize()
    def make(self) -> None:
        self.map = PageMap()
        self.index = {name: self.map.declare(name, *sizes) for name, sizes in BLOCKS.items()}
        self.blocks = {name: BlockModel() for name in BLOCKS}
        self.records: list[Record] = []
        self.now = 0
        self.channel = 1
        self.requested = self.answers = self.repeated = self.confirmed = 0
        self.pinged = self.loaded_known = self.passed = self.agreed = False
        self.unswept = self.was_unswept = False

    def tick(self) -> int:
        self.now += 10
        return self.now

    def pages(self, name: bytes, unit: int) -> tuple[int, set[int]]:
        length, size = BLOCKS[name]
        start = unit % (length // size) * size
        return start, set(range(start // PAGE, (start + size) // PAGE))

    def of(self, name: bytes) -> list[Record]:
        return [record for record in self.records if record.name == name]

    @rule(name=NAMES, unit=st.integers(0, 63))
    def request(self, name: bytes, unit: int) -> None:
        start, pages = self.pages(name, unit)
        now = self.tick()
        block = self.blocks[name]
        missing = pages - block.forwarded
        known = [record for record in self.records if (record.name, record.start) == (name, start)]
        assert self.map.request(name, start, BLOCKS[name][1], now) == (not known)
        if known:
            self.repeated += 1
            known[0].requested_on = self.channel
            if not known[0].missing and missing and (self.agreed or block.bitmap_on != self.channel):
                known[0].missing = known[0].unconfirmed - block.forwarded
            return
        self.requested += 1
        self.records.append(Record(name, start, now, set(pages), missing, self.channel))

    @rule(name=NAMES, page=st.integers(0, 255), count=st.integers(1, 40))
    def arrive(self, name: bytes, page: int, count: int) -> None:
        total = BLOCKS[name][0] // PAGE
        page %= total
        self.map.arrived(self.index[name], page * PAGE, count * PAGE, self.tick())
        gone = set(range(page, min(page + count, total)))
        self.passed = True
        self.blocks[name].behind |= gone - self.blocks[name].forwarded
        self.blocks[name].forwarded |= gone
        for record in self.records:
            if record.name == name and record.missing:
                record.missing -= gone
                self.answers += not record.missing

    @rule()
    def sweep(self) -> None:
        while self.map.sweep():
            pass
        self.unswept = False

    @rule(name=NAMES, page=st.integers(0, 255))
    def discard(self, name: bytes, page: int) -> None:
        self.sweep()  # none comes behind a received bitmap
        page %= BLOCKS[name][0] // PAGE
        self.map.discarded(self.index[name], page * PAGE, PAGE)
        self.blocks[name].forwarded -= {page}

    @rule(sweep=st.booleans())
    def lose(self, sweep: bool) -> None:
        self.sweep()  # what is not judged by then is by the bitmaps of the next channel
        self.map.channel_lost()
        for name, block in self.blocks.items():  # a handshake that came to nothing has said nothing
            block.forwarded |= block.in_flight
            block.in_flight.clear()
            if block.bitmap_on == self.channel and not self.agreed:
                block.bitmap_on = 0
                for record in self.of(name):
                    record.unconfirmed = self.pages(name, record.start // BLOCKS[name][1])[1]
        if sweep:
            self.sweep()
        self.agreed = False
        self.map.channel_begin()
        self.channel += 1
        self.pinged = self.passed = False

    @rule()
    def ping(self) -> None:
        self.map.ping_passed()
        self.pinged, self.loaded_known = True, False
        for block in self.blocks.values():
            block.behind.clear()

    @rule()
    def pong(self) -> None:
        self.map.pong_passed()
        self.loaded_known |= self.pinged

    @rule(sweep=st.booleans())
    def handshake_over(self, sweep: bool) -> None:
        self.map.handshake_over(sweep=sweep)
        self.unswept = not sweep
        self.was_unswept |= self.unswept
        for name, block in self.blocks.items():
            for record in self.of(name) if block.bitmap_on == self.channel else ():
                record.missing = record.unconfirmed - block.forwarded
                if not record.unconfirmed:
                    self.confirmed += 1
                    self.records.remove(record)
        self.agreed = True
        self.pinged = False
        told = all(block.bitmap_on == self.channel for block in self.blocks.values())
        self.loaded_known = told and not self.passed
        for block in self.blocks.values():
            block.in_flight.clear()
            block.behind.clear()

    @rule(names=st.permutations(sorted(BLOCKS)), seed=st.integers(0, 1 << 30))
    def recover(self, names: list[bytes], seed: int) -> None:
        self.lose(seed % 2 == 0)
        for name in names:
            self.received(name, seed, 8)
        self.handshake_over(seed % 4 > 1)

    @rule(name=NAMES, seed=st.integers(0, 1 << 30), chunk=st.integers(1, 9))
    def received(self, name: bytes, seed: int, chunk: int) -> None:
        if self.unswept:
            self.sweep()  # none comes behind RESUME_ACK
        rng = random.Random(seed)
        total = BLOCKS[name][0] // PAGE
        there = {page for page in range(total) if rng.random() < rng.choice([0.1, 0.9])}
        block = self.blocks[name]
        report = self.map.received(name, bitmap_of(there, total), chunk)
        assert report.received == len(there)
        assert report.forwarded_not_received == len(block.forwarded - there)
        assert report.received_not_forwarded == len(there - block.forwarded)
        loaded = block.forwarded - block.behind if self.loaded_known else set()
        assert report.loaded_not_received == len(loaded - there)
        block.in_flight |= block.forwarded - there
        block.forwarded &= there
        block.bitmap_on = self.channel
        self.agreed = False
        for record in self.of(name):
            record.unconfirmed -= there

    @rule(name=NAMES, seed=st.integers(0, 1 << 30))
    def received_in_part(self, name: bytes, seed: int) -> None:
        """A bitmap whose end never comes, as of a stranger that is cut off: it has said nothing."""
        self.sweep()
        total = BLOCKS[name][0] // PAGE
        there = {page for page in range(total) if random.Random(seed + page).random() < 0.5}
        self.map.received_in_part(name, bitmap_of(there, total), 8)
        self.agreed = False
        self.blocks[name].bitmap_on = self.channel
        self.lose(seed % 2 == 0)

    @rule(count=st.integers(0, 3))
    def replay(self, count: int) -> None:
        wanted = [record for record in self.records if self.to_replay(record)]
        given_records = list(self.map.to_replay())
        assert [(r.name, r.start, r.time) for r in given_records] == [
            (r.name, r.start, r.time) for r in wanted
        ]
        for record, model in list(zip(given_records, wanted, strict=True))[:count]:
            self.map.replayed(record.id)
            model.replayed_on = self.channel

    def to_replay(self, record: Record) -> bool:
        return bool(
            record.missing
            and self.agreed
            and self.blocks[record.name].bitmap_on == self.channel
            and record.requested_on != self.channel
            and record.replayed_on != self.channel
        )

    @rule()
    def complete(self) -> None:
        self.sweep()
        self.map.complete()
        self.records.clear()

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "map") or self.unswept:
            return
        stats = self.map.stats()
        live = sum(bool(record.missing) for record in self.records)
        assert (stats.outstanding, stats.recorded) == (live, len(self.records))
        assert (stats.requested, stats.repeated, stats.confirmed) == (
            self.requested,
            self.repeated,
            self.confirmed,
        )
        assert stats.requested == stats.arrived + stats.outstanding
        answers = self.map.latency().count
        # Before the sweep has come one that passed is not known to be one, nor that a page was there already.
        most = self.answers + self.confirmed
        assert answers <= most if self.was_unswept else answers == self.answers
        for block in self.map.blocks():
            mine = [record for record in self.records if record.name == block.name]
            assert (block.recorded, block.outstanding) == (len(mine), sum(bool(r.missing) for r in mine))
            assert block.requested == block.arrived + block.outstanding
            cell = -(-BLOCKS[block.name][0] // 64)
            where = Counter(record.start // cell for record in mine if record.missing)
            assert {at: count for at, count in enumerate(block.cells) if count} == where
            assert block.present == len(self.blocks[block.name].forwarded) * PAGE
        assert [(r.name, r.start, r.length, r.time, r.outstanding) for r in self.map.records()] == [
            (r.name, r.start, BLOCKS[r.name][1], r.time, bool(r.missing)) for r in self.records
        ]


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def declared(**options: int) -> PageMap:
    page_map = PageMap(**options)
    page_map.declare(b"pc.ram", 1 << 30)
    return page_map


def test_requests_made_before_the_block_is_known_have_their_cells_too() -> None:
    page_map = PageMap()
    for start in (0, PAGE, 40 * PAGE, 63 * PAGE, 1 << 40):
        page_map.request(b"pc.ram", start, PAGE, now=1)
    assert page_map.blocks()[0].cells == (0,) * 64
    page_map.declare(b"pc.ram", 64 * PAGE)
    (block,) = page_map.blocks()
    assert [at for at, count in enumerate(block.cells) if count] == [0, 1, 40, 63]
    assert sum(block.cells) == block.outstanding == 4


@pytest.mark.parametrize(
    ("name", "start", "length", "text"),
    [
        (b"other", 0, PAGE, "unknown RAM block"),
        (b"", 0, PAGE, "bad name"),
        (b"x" * 256, 0, PAGE, "bad name"),
        (b"pc.ram", 1, PAGE, "not aligned"),
        (b"pc.ram", 0, 0, "not aligned"),
        (b"pc.ram", 0, 100, "not aligned"),
        (b"pc.ram", 1 << 30, PAGE, "beyond the end"),
        (b"pc.ram", (1 << 64) - PAGE, PAGE, "beyond the end"),
        (b"pc.ram", (1 << 30) - PAGE, 2 * PAGE, "beyond the end"),
    ],
)
def test_impossible_requests_are_refused_and_counted(name: bytes, start: int, length: int, text: str) -> None:
    page_map = declared()
    with pytest.raises(PageMapError, match=text):
        page_map.request(name, start, length, 0)
    assert page_map.stats().refused == 1
    assert page_map.stats().requested == 0
    assert list(page_map.records()) == []


def test_a_request_that_crossed_its_page_is_not_outstanding_but_recorded() -> None:
    page_map = declared()
    page_map.arrived(0, 0, PAGE, 5)
    page_map.request(b"pc.ram", 0, PAGE, 10)
    stats = page_map.stats()
    assert (stats.crossed, stats.outstanding, stats.recorded, stats.arrived) == (1, 0, 1, 1)
    assert page_map.latency().count == 0


def test_an_answer_lost_behind_the_relay_is_replayed() -> None:
    page_map = declared()
    page_map.request(b"pc.ram", 0, PAGE, 10)
    page_map.request(b"pc.ram", PAGE, PAGE, 20)
    page_map.arrived(0, 0, 2 * PAGE, 30)
    page_map.channel_lost()
    page_map.channel_begin()
    assert list(page_map.to_replay()) == []
    page_map.received(b"pc.ram", b"\x02" + bytes((1 << 15) - 1))
    assert list(page_map.to_replay()) == []
    page_map.handshake_over()
    (request,) = page_map.to_replay()
    assert (request.name, request.start, request.length, request.time) == (b"pc.ram", 0, PAGE, 10)
    page_map.replayed(request.id)
    assert list(page_map.to_replay()) == []
    page_map.arrived(0, 0, PAGE, 70)
    stats = page_map.stats()
    assert (stats.replayed, stats.reopened, stats.outstanding, stats.recorded) == (1, 1, 0, 1)
    with pytest.raises(PageMapError):
        page_map.replayed(request.id + 100)


@pytest.mark.parametrize("whole", [True, False])
def test_a_bitmap_that_was_not_resumed_with_confirms_nothing(whole: bool) -> None:
    """Such as a stranger's, which nothing shows to be one."""
    page_map = declared()
    for page in range(4):
        page_map.request(b"pc.ram", page * PAGE, PAGE, 10)
    page_map.arrived(0, 3 * PAGE, PAGE, 15)
    page_map.channel_lost()
    page_map.channel_begin()
    (page_map.received if whole else page_map.received_in_part)(b"pc.ram", b"\x0f" + bytes((1 << 15) - 1))
    while page_map.sweep():
        pass
    stats = page_map.stats()
    assert (stats.confirmed, stats.recorded, stats.outstanding) == (0, 4, 3)
    page_map.channel_lost()
    page_map.channel_begin()
    page_map.received(b"pc.ram", b"\x01" + bytes((1 << 15) - 1))
    page_map.handshake_over()
    assert [request.start // PAGE for request in page_map.to_replay()] == [1, 2, 3]
    assert page_map.stats().confirmed == 1


def test_a_handshake_that_came_to_nothing_leaves_the_counts_as_they_were() -> None:
    page_map = PageMap()
    page_map.declare(b"huge", 16 * HUGE, HUGE)
    page_map.request(b"huge", 0, HUGE, 10)
    page_map.arrived(0, PAGE, HUGE - PAGE, 20)
    page_map.channel_begin()
    page_map.received(b"huge", b"\x01" + bytes(31))  # another VM's, perhaps: it lacks what passed
    page_map.arrived(0, PAGE, HUGE - PAGE, 30)
    assert page_map.stats().outstanding == 1
    page_map.channel_lost()
    while page_map.sweep():
        pass
    assert page_map.stats().outstanding == 1
    (huge,) = page_map.blocks()
    assert huge.present == HUGE - PAGE


def test_what_has_passed_stays_answered_though_another_vms_bitmap_lacks_it() -> None:
    page_map = declared()
    page_map.request(b"pc.ram", 0, PAGE, 10)
    page_map.arrived(0, 0, PAGE, 20)
    page_map.channel_begin()
    page_map.received_in_part(b"pc.ram", bytes(1 << 15))
    page_map.disown()
    for lost in (page_map.channel_lost, page_map.channel_begin):
        while page_map.sweep():
            pass
        assert page_map.stats().outstanding == 0
        lost()
    (ram,) = page_map.blocks()
    assert ram.present == PAGE


def test_a_pong_proves_all_that_passed_before_its_ping_and_no_more() -> None:
    page_map = declared()
    for page in range(3):
        page_map.arrived(0, page * PAGE, PAGE, 10)
        page_map.ping_passed()
    page_map.arrived(0, 3 * PAGE, PAGE, 20)
    page_map.arrived(0, PAGE, PAGE, 20)  # again: it was there
    page_map.pong_passed()
    page_map.discarded(0, 0, PAGE)
    report = page_map.received(b"pc.ram", bytes(1 << 15))
    assert (report.forwarded_not_received, report.loaded_not_received) == (3, 2)


def test_a_request_that_the_destination_repeats_is_not_replayed() -> None:
    page_map = declared()
    page_map.request(b"pc.ram", 0, PAGE, 10)
    page_map.channel_begin()
    page_map.received(b"pc.ram", bytes(1 << 15))
    page_map.handshake_over()
    assert len(list(page_map.to_replay())) == 1
    page_map.request(b"pc.ram", 0, PAGE, 60)
    assert list(page_map.to_replay()) == []


def test_a_long_replay_takes_no_longer_for_each_request_than_a_short_one() -> None:
    pages = 20_000
    page_map = PageMap()
    page_map.declare(b"pc.ram", pages * PAGE)
    for page in range(pages):
        page_map.request(b"pc.ram", page * PAGE, PAGE, page)
    page_map.channel_lost()
    page_map.channel_begin()
    page_map.received(b"pc.ram", bitmap_of(set(), pages))
    page_map.handshake_over()
    times = []
    for request in page_map.to_replay():
        page_map.replayed(request.id)
        times.append(time.thread_time())
    assert len(times) == pages
    assert times[-1] - times[-2000] < 5 * (times[1999] - times[0])


def test_a_table_that_grows_or_ends_does_not_stop_the_pump() -> None:
    """In CPU time, but for one step, which an interrupt may have met; bench_pagemap.py goes on to 2^21."""
    requests = (1 << 18) + 1
    page_map = PageMap()
    page_map.declare(b"pc.ram", requests * PAGE)
    steps = []
    for first in range(0, requests, 64):
        before = time.thread_time_ns()
        for page in range(first, min(first + 64, requests)):
            page_map.request(b"pc.ram", page * PAGE, PAGE, page)
        steps.append(time.thread_time_ns() - before)
    assert page_map.stats().recorded == requests
    assert sorted(steps)[-2] < 5_000_000
    held, before = page_map.stats().memory, time.thread_time_ns()
    page_map.complete()
    assert time.thread_time_ns() - before < 5_000_000
    assert page_map.stats().recorded == 0
    for page in range(1000):  # in the room of those before
        page_map.request(b"pc.ram", page * PAGE, PAGE, page)
    assert [record.start for record in page_map.records()] == [page * PAGE for page in range(1000)]
    assert page_map.stats().memory <= held


@pytest.mark.parametrize("confirmed", [True, False])
def test_a_received_bitmap_does_not_stop_the_pump_for_the_records_it_judges(confirmed: bool) -> None:
    """In CPU time, but for one step, which an interrupt may have met; bench_pagemap.py goes on to 2^21."""
    requests = 1 << 16
    page_map = PageMap()
    page_map.declare(b"pc.ram", requests * PAGE)
    for page in range(requests):
        page_map.request(b"pc.ram", page * 7919 % requests * PAGE, PAGE, page)
    page_map.arrived(0, 0, requests * PAGE, requests)
    page_map.channel_lost()
    page_map.channel_begin()
    dense = bitmap_of(set(range(requests) if confirmed else [7]), requests)
    before = time.thread_time_ns()
    page_map.received(b"pc.ram", dense)
    page_map.handshake_over(sweep=False)
    steps = [time.thread_time_ns() - before]
    if not confirmed:  # judged as they are looked for
        assert page_map.stats().outstanding == 0
        before = time.thread_time_ns()
        assert next(page_map.to_replay()).start == 0
        steps.append(time.thread_time_ns() - before)
    more = True
    while more:
        before = time.thread_time_ns()
        more = page_map.sweep()
        steps.append(time.thread_time_ns() - before)
    assert len(steps) > 10
    assert sorted(steps)[-2] < 5_000_000
    stats = page_map.stats()
    left = 0 if confirmed else requests - 1
    assert (stats.recorded, stats.outstanding, stats.confirmed) == (left, left, requests - left)


def test_a_record_is_found_for_the_replay_behind_any_number_that_need_none() -> None:
    requests = 5000
    page_map = PageMap()
    page_map.declare(b"pc.ram", requests * PAGE)
    for page in range(requests):
        page_map.request(b"pc.ram", page * PAGE, PAGE, page)
    page_map.channel_lost()
    page_map.channel_begin()
    page_map.received(b"pc.ram", bitmap_of(set(range(requests - 1)), requests))
    page_map.handshake_over(sweep=False)
    assert [record.start for record in page_map.to_replay(looks=10)] == [(requests - 1) * PAGE]


def test_blocks_known_by_name_until_a_bitmap_tells_their_size() -> None:
    page_map = PageMap()
    page_map.request(b"pc.ram", 7 * PAGE, PAGE, 1)
    page_map.request(b"pc.ram", 4096 * PAGE, PAGE, 2)
    (block,) = page_map.blocks()
    assert (block.declared, block.used_length, block.outstanding) == (False, 0, 2)
    page_map.channel_begin()
    page_map.received(b"pc.ram", bytes(64))
    assert (page_map.stats().recorded, page_map.stats().refused) == (1, 1)
    (block,) = page_map.blocks()
    assert (block.used_length, block.requested, block.outstanding) == (512 * PAGE, 1, 1)
    page_map.arrived(0, 7 * PAGE, PAGE, 4)
    assert page_map.stats().outstanding == 0


def test_bitmaps_of_another_size_are_refused() -> None:
    page_map = declared()
    for size in (8, 1 << 14, (1 << 15) + 8):
        with pytest.raises(PageMapError, match="size contradicts"):
            page_map.received(b"pc.ram", bytes(size))
    with pytest.raises(PageMapError, match="unknown RAM block"):
        page_map.received(b"other", bytes(8))


def test_odd_requests_are_kept_as_made() -> None:
    page_map = declared()
    page_map.request(b"pc.ram", 0, 3 * PAGE, 1)
    page_map.request(b"pc.ram", PAGE, PAGE, 2)
    page_map.arrived(0, 0, 2 * PAGE, 3)
    assert [(r.start, r.length, r.outstanding) for r in page_map.records()] == [
        (0, 3 * PAGE, True),
        (PAGE, PAGE, False),
    ]
    page_map.arrived(0, 2 * PAGE, PAGE, 4)
    assert page_map.stats().outstanding == 0


def test_declarations_that_contradict_each_other() -> None:
    page_map = declared()
    assert page_map.declare(b"pc.ram", 1 << 30, 2 << 20) == 0
    for length, size, text in [(2 << 30, 0, "size"), (1 << 30, 3000, "aligned"), (1 << 60, 0, "size")]:
        with pytest.raises(PageMapError, match=text):
            page_map.declare(b"pc.ram", length, size)


def test_the_ceiling_holds_and_answered_records_go_first() -> None:
    ceiling = 400_000
    page_map = declared(ceiling=ceiling)
    page_map.request(b"pc.ram", 0, PAGE, 0)
    refused = 0
    for page in range(1, 20_000):
        if page < 10_000:
            page_map.arrived(0, page * PAGE, PAGE, page)
        try:
            page_map.request(b"pc.ram", page * PAGE, PAGE, page)
        except PageMapError:
            refused += 1
    stats = page_map.stats()
    assert stats.memory <= ceiling
    assert stats.evicted > 0
    assert refused == stats.refused > 0
    assert stats.requested == stats.arrived + stats.outstanding
    assert next(page_map.records()).start == 0


def test_a_guest_of_a_tebibyte_costs_little_until_it_is_sent() -> None:
    page_map = PageMap()
    page_map.declare(b"pc.ram", 1 << 40)
    assert page_map.stats().memory < 1 << 20


def test_no_ceiling_below_the_map_itself() -> None:
    with pytest.raises(MemoryError):
        PageMap(ceiling=1000)


@given(st.lists(st.integers(0, 1 << 62), min_size=1, max_size=200), st.floats(0, 1))
@settings(deadline=None)
def test_latencies_are_told_within_a_thirty_second(latencies: list[int], share: float) -> None:
    page_map = declared()
    for i, latency in enumerate(latencies):
        page_map.request(b"pc.ram", i * PAGE, PAGE, 0)
        page_map.arrived(0, i * PAGE, PAGE, latency)
    told = page_map.latency()
    latencies.sort()
    assert (told.count, told.max_ns) == (len(latencies), latencies[-1])
    assert told.sum_ns == sum(latencies) % (1 << 64)
    rank = max(0, -(-int(share * len(latencies) * 2**20) // 2**20) - 1)
    quantile = told.quantile_ns(share)
    assert latencies[rank] * 31 // 32 <= quantile <= latencies[-1]
    assert told.at_most((1 << 64) - 1) == len(latencies)


def test_readers_see_consistent_counts_while_the_map_is_written() -> None:
    """It is written in few long calls, which hold no interpreter lock: with a call for each page the writer
    would wait as often for the reader to let go of that, and on a busy machine each time for its turn."""
    pages = 1 << 12
    tracker = Tracker()
    tracker.channel_begin(recovered=False)
    tracker.forward(s.postcopy_stream(length=pages * PAGE)[:-1], 1)
    tracker.backward(b"".join(s.request(page * PAGE, PAGE, b"pc.ram") for page in range(pages)), 2)
    section = s.part() + b"".join(s.zero(page * PAGE, b"pc.ram") for page in range(pages)) + s.EOS
    enough = threading.Event()

    def write() -> None:
        while not enough.is_set():
            tracker.forward(section + s.discard(b"pc.ram", [(0, pages * PAGE)]), 3)
            tracker.forward(s.recv_bitmap(b"pc.ram"), 3)
            acknowledged = s.received(b"pc.ram", bytes(pages // 8)) + s.message(6, b"\0\0\0\1")
            tracker.backward(acknowledged, 3)  # all are outstanding again

    writer = threading.Thread(target=write)
    writer.start()
    seen: set[int] = set()
    try:
        while len(seen) < 20:
            stats = tracker.stats()
            assert not stats.consistent or stats.requested == stats.arrived + stats.outstanding
            if stats.consistent:
                seen.add(stats.outstanding)
    finally:
        enough.set()
        writer.join()
