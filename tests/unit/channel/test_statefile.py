"""The state file: what a refault that was killed leaves, and what the next one makes of it."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import mmap
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tracker import Tracker

from refault.channel.forward import reason_text
from refault.channel.relay import Relay
from refault.channel.tracker import Fact, Kept, Restored, StateFds
from refault.migration.phase import Role

from . import streams as s
from .streams import PAGE

RAM, BIOS = b"pc.ram", b"pc.bios"
KEY = b"vm 42 1700 an-id"
RECORDS_AT = 4096 + 4096 * 272
"""Where the record table begins (cext/statefile.c); the block table begins at 4096."""

FACTS_AT = 8 + 4 + 4 + 512 + 8

Row = tuple[bytes, int, int, int]
Operation = tuple[str, int]


@pytest.fixture
def fd() -> Iterator[int]:
    descriptor = os.memfd_create("state", os.MFD_ALLOW_SEALING)
    yield descriptor
    os.close(descriptor)


@contextlib.contextmanager
def reopened(old: int, key: bytes = KEY) -> Iterator[Tracker]:
    """What the next refault makes of it, with a file of its own."""
    new = os.memfd_create("next")
    try:
        yield Tracker(state=StateFds(new, key, old))
    finally:
        os.close(new)


def writer(fd: int) -> Tracker:
    """Of a migration in postcopy, with some requests made."""
    tracker = Tracker(state=StateFds(fd, KEY))
    tracker.trust_bitmaps()  # the handshakes here tell of pages that never passed
    tracker.channel_begin(recovered=False)
    tracker.forward(s.postcopy_stream()[:-1], 1)
    tracker.backward(
        s.message(2, b"\0\0\0\3") + s.request(9 * PAGE, PAGE, RAM) + s.request(3 * PAGE, PAGE), 5
    )
    return tracker


def rows(tracker: Tracker) -> dict[Row, bool]:
    """What is on record, oldest first, and whether it is outstanding."""
    return {
        (record.name, record.start, record.length, record.time): record.outstanding
        for record in tracker.records()
    }


def handshake(tracker: Tracker, pages: set[int], now: int) -> None:
    """A loss, and a recovery in which the destination says that it has these pages of pc.ram."""
    tracker.channel_lost()
    tracker.channel_begin(recovered=True)
    tracker.forward(s.recv_bitmap(RAM) + s.recv_bitmap(BIOS), now)
    dense = sum(1 << page for page in pages).to_bytes(8, "little")
    tracker.backward(s.received(RAM, dense) + s.received(BIOS, bytes(8)) + s.message(6, b"\0\0\0\1"), now)


def apply(tracker: Tracker, operation: Operation, now: int) -> None:
    what, number = operation
    match what:
        case "request":
            tracker.backward(s.request(number * PAGE, PAGE, RAM), now)
        case "request the other block":
            tracker.backward(s.request(0, PAGE, BIOS), now)
        case "page":
            tracker.forward(s.part() + s.page(number * PAGE, RAM) + s.EOS, now)
        case "half a page":
            tracker.forward((s.part() + s.page(number * PAGE, RAM))[: 100 + number], now)
            tracker.channel_lost()
            tracker.channel_begin(recovered=True)
        case "pong":
            tracker.backward(s.message(2, struct.pack(">I", number)), now)
        case "recovery":
            handshake(tracker, set(range(number)), now)
        case "opaque":
            tracker.forward(b"\x99", now)
        case _:
            tracker.complete()


OPERATIONS = st.one_of(
    st.tuples(st.just("request"), st.integers(0, 63)),
    st.tuples(st.just("page"), st.integers(0, 63)),
    st.tuples(st.just("pong"), st.integers(1, 5)),
    st.tuples(st.just("recovery"), st.integers(0, 64)),
    st.tuples(
        st.sampled_from(["request the other block", "half a page", "opaque", "complete"]), st.integers(0, 63)
    ),
)


@settings(max_examples=60, deadline=None)
@given(operations=st.lists(OPERATIONS, max_size=25), received=st.integers(0, 64))
def test_after_every_operation_the_file_holds_what_the_map_holds(
    operations: list[Operation], received: int
) -> None:
    fd = os.memfd_create("state")
    try:
        tracker = writer(fd)
        for now, operation in enumerate(operations, 10):
            apply(tracker, operation, now)
            with reopened(fd) as after:
                assert after.restored is Restored.WHOLE
                assert list(rows(after).items()) == list(rows(tracker).items())
                assert after.facts == tracker.facts & ~Fact.WHOLE_STREAM_SEEN
                known = [(block.name, block.used_length, block.page_size, block.declared)
                         for block in tracker.blocks()]  # fmt: skip
                assert known == [(block.name, block.used_length, block.page_size, block.declared)
                                 for block in after.blocks()]  # fmt: skip
                stats = after.stats()
                assert stats.requested == stats.arrived + stats.outstanding
        with reopened(fd) as after:  # and both go on alike
            for each in (tracker, after):
                handshake(each, set(range(received)), 100)
            assert rows(after) == rows(tracker)
            assert [r.start for r in after.to_replay()] == [r.start for r in tracker.to_replay()]
            assert after.forward_opaque == after.return_opaque == 0
            assert Fact.FOREIGN_PAGES not in after.channel_facts
    finally:
        os.close(fd)


def bulk(tracker: Tracker, draw: random.Random, now: int) -> None:
    """One operation of many steps, so that a kill falls into the midst of it."""
    match draw.randrange(4):
        case 0 | 1:
            pages = [draw.randrange(64) for _ in range(40)]
            tracker.backward(b"".join(s.request(page * PAGE, PAGE, RAM) for page in pages), now)
        case 2:
            pages = [draw.randrange(64) for _ in range(20)]
            tracker.forward(s.part() + b"".join(s.zero(page * PAGE, RAM) for page in pages) + s.EOS, now)
        case _:
            handshake(tracker, set(draw.sample(range(64), 30)), now)


def run_until_killed(fd: int, counts: memoryview, seed: int) -> None:
    """`counts`: operations begun and done, by one store each (struct.pack_into zeroes a word first)."""
    tracker, draw = writer(fd), random.Random(seed)
    for number in range(1, 1 << 30):
        counts[0] = number
        bulk(tracker, draw, number + 10)
        counts[1] = number


def in_a_child(run: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            run()
        finally:
            os._exit(0)
    return child


def test_a_kill_leaves_an_operation_under_way_done_or_not_begun() -> None:
    draw = random.Random(5)
    under_way = 0
    for seed in range(40):
        fd, counts = os.memfd_create("state"), memoryview(mmap.mmap(-1, 16)).cast("Q")
        child = in_a_child(partial(run_until_killed, fd, counts, seed))
        while counts[1] < 3:
            time.sleep(0.0001)
        time.sleep(draw.uniform(0, 0.004))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        begun, done = counts
        scratch = os.memfd_create("model")
        model, again = writer(scratch), random.Random(seed)
        for number in range(1, done + 1):
            bulk(model, again, number + 10)
        before = rows(model)
        if begun > done:
            bulk(model, again, begun + 10)
            under_way += 1
        after = rows(model)
        with reopened(fd) as found:
            assert found.restored is Restored.WHOLE
            kept = rows(found)
        assert kept.keys() >= before.keys() & after.keys()
        assert kept.keys() <= before.keys() | after.keys()
        new = [row for row in after if row not in before]
        assert [row for row in kept if row not in before] == new[: len(kept.keys() - before.keys())]
        for row, outstanding in kept.items():
            assert outstanding in (before.get(row), after.get(row), True)
        os.close(fd)
        os.close(scratch)
    assert under_way > 0


def put(fd: int, at: int, data: bytes) -> None:
    os.pwrite(fd, data, at)


def flip(fd: int, at: int) -> None:
    put(fd, at, bytes([os.pread(fd, 1, at)[0] ^ 0x10]))


DAMAGES: dict[str, tuple[Callable[[int], None], Restored]] = {
    "empty": (lambda fd: os.truncate(fd, 0), Restored.TORN),
    "cut in the header": (lambda fd: os.truncate(fd, 300), Restored.TORN),
    "cut in the block table": (lambda fd: os.truncate(fd, 4096 + 100), Restored.TORN),
    "cut in the record table": (lambda fd: os.truncate(fd, RECORDS_AT + 1000), Restored.TORN),
    "no magic": (lambda fd: flip(fd, 0), Restored.TORN),
    "another version": (lambda fd: flip(fd, 8), Restored.VERSION),
    "a changed key": (lambda fd: flip(fd, 20), Restored.TORN),
    "changed facts": (lambda fd: flip(fd, FACTS_AT), Restored.TORN),
    "a changed word of what has ended": (lambda fd: flip(fd, FACTS_AT + 5 * 8), Restored.TORN),
    "a changed block name": (lambda fd: flip(fd, 4096 + 2), Restored.TORN),
    "a changed block size": (lambda fd: flip(fd, 4096 + 264), Restored.TORN),
    "a file of 1 TiB": (lambda fd: os.truncate(fd, 1 << 40), Restored.TORN),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_file_is_recognised_and_not_used(fd: int, damage: str) -> None:
    harm, restored = DAMAGES[damage]
    writer(fd)
    harm(fd)
    with reopened(fd) as after:
        assert after.restored is restored
        assert after.blocks() == []
        assert after.facts == Fact(0)
        assert after.kept is Kept.ALL
        after.channel_begin(recovered=True)  # it is a tracker like any other
        after.backward(s.request(PAGE, PAGE, RAM), 9)
        assert after.stats().recorded == 1


@pytest.mark.parametrize("at", [0, 8, 16, 24, 32])
def test_a_torn_record_is_left_out(fd: int, at: int) -> None:
    writer(fd)
    flip(fd, RECORDS_AT + at + 1)
    with reopened(fd) as after:
        assert after.restored is Restored.WHOLE
        assert [row[1] for row in rows(after)] == [3 * PAGE]


def test_records_that_have_ended_at_once_are_not_torn_though_their_slots_are_taken_again(fd: int) -> None:
    tracker = writer(fd)
    tracker.complete()
    tracker.backward(s.request(5 * PAGE, PAGE, RAM), 9)
    flip(fd, RECORDS_AT + 40 + 9)  # of the second, as one who is killed leaves it in its midst
    with reopened(fd) as after:
        assert [row[1] for row in rows(after)] == [5 * PAGE]
        assert after.stats().torn == 0


@pytest.mark.parametrize("key", [b"", KEY[:-1], KEY + b"x", b"another 42 1700 an-id"])
def test_a_file_of_another_qemu_or_migration_is_not_used(fd: int, key: bytes) -> None:
    writer(fd)
    with reopened(fd, key) as after:
        assert after.restored is Restored.FOREIGN
        assert list(after.records()) == []


def test_what_is_no_regular_file_is_torn() -> None:
    reading, writing = os.pipe()
    with reopened(reading) as after:
        assert after.restored is Restored.TORN
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (s.recv_bitmap(b"another.ram"), b""),
        (s.recv_bitmap(RAM), s.received(b"another.ram", bytes(8))),
        (s.recv_bitmap(RAM), s.received(RAM, bytes(16))),
    ],
)
def test_a_block_list_that_does_not_agree_disowns_the_file(fd: int, forward: bytes, backward: bytes) -> None:
    writer(fd)
    with reopened(fd) as after:
        after.channel_begin(recovered=True)
        after.forward(forward, 9)
        after.backward(backward + s.message(6, b"\0\0\0\1"), 9)
        for _ in range(2):
            assert "not those of this migration" in reason_text(after.forward_opaque)
            assert after.return_opaque == after.forward_opaque
            assert (after.stats().outstanding, list(after.to_replay())) == (0, [])
            after.channel_begin(recovered=True)


def test_without_room_for_a_file_tracking_goes_on_in_memory(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    tracker = writer(fd)
    assert (tracker.kept, tracker.stats().recorded) == (Kept.NOTHING, 2)


def test_the_first_records_are_kept_where_there_is_room_for_no_more(fd: int) -> None:
    tracker = Tracker(state=StateFds(fd, KEY))
    tracker.channel_begin(recovered=False)
    tracker.forward(s.postcopy_stream(length=4096 * PAGE)[:-1], 1)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    tracker.backward(b"".join(s.request(page * PAGE, PAGE, RAM) for page in range(4096)), 5)
    assert (tracker.kept, tracker.stats().recorded) == (Kept.PART, 4096)
    with reopened(fd) as after:
        assert 1000 < after.stats().recorded < 4096


def test_a_million_requests_are_kept_and_one_more_is_not(fd: int) -> None:
    """By a pump, which takes them in C."""
    pages = (1 << 20) + 1
    relay = Relay(Role.SOURCE, state=StateFds(fd, KEY))
    local, qemu = socket.socketpair()
    far, host = socket.socketpair()
    relay.attach(local.detach(), far.detach(), recovered=False, may_replay=True)

    def asked(requests: bytes) -> None:
        sending = threading.Thread(target=host.sendall, args=(requests,))
        sending.start()
        left = len(requests)
        while left > 0:
            left -= len(qemu.recv(1 << 20))
        sending.join()

    with contextlib.closing(relay), qemu, host:
        stream = s.postcopy_stream(length=pages * PAGE)[:-1]
        qemu.sendall(stream)
        assert len(host.recv(len(stream), socket.MSG_WAITALL)) == len(stream)
        unnamed = struct.Struct(">HHQI")
        asked(
            s.request(0, PAGE, RAM)
            + b"".join(unnamed.pack(4, 12, page * PAGE, PAGE) for page in range(1, pages - 1))
        )
        assert relay.kept is Kept.ALL
        asked(s.request((pages - 1) * PAGE, PAGE))
        assert (relay.kept, relay.pages().recorded) == (Kept.PART, pages)
        assert os.fstat(fd).st_size < 48 << 20
    with reopened(fd) as after:
        assert after.stats().recorded == 1 << 20


def test_a_guest_of_one_tebibyte_is_restored_within_little_memory(fd: int) -> None:
    tracker = Tracker(state=StateFds(fd, KEY))
    tracker.channel_begin(recovered=False)
    tracker.forward(s.postcopy_stream(length=1 << 40)[:-1], 1)
    tracker.backward(s.request((1 << 40) - PAGE, PAGE, RAM), 5)
    new = os.memfd_create("next")
    after = Tracker(1 << 20, StateFds(new, KEY, fd))
    assert (after.restored, after.stats().outstanding) == (Restored.WHOLE, 1)
    after = Tracker(50_000, StateFds(new, KEY, fd))
    assert (after.restored, after.blocks()) == (Restored.NO_MEMORY, [])
    os.close(new)
