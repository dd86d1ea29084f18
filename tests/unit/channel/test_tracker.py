"""The tracker: facts, and the page map filled from both directions."""

from __future__ import annotations

import struct
import weakref
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.pagemap import Request
from tests.support.tracker import Tracker

from refault.channel.forward import reason_text
from refault.channel.tracker import Fact

from . import streams as s
from .streams import PAGE

RAM = b"pc.ram"
HANDSHAKE = s.recv_bitmap(RAM) + s.recv_bitmap(b"pc.bios")


def begun(data: bytes | None = None) -> Tracker:
    tracker = Tracker()
    tracker.channel_begin(recovered=False)
    tracker.forward(s.postcopy_stream()[:-1] if data is None else data, 1)
    return tracker


def bitmap(*pages: int) -> bytes:
    return sum(1 << page for page in pages).to_bytes(8, "little")


def test_the_facts_of_a_postcopy_migration_come_in_their_order() -> None:
    stream = s.postcopy_stream()
    tracker = Tracker()
    tracker.channel_begin(recovered=False)
    order = []
    seen = tracker.facts
    for i in range(len(stream)):
        tracker.forward(stream[i : i + 1], i)
        order += list(tracker.facts & ~seen)
        seen = tracker.facts
    assert order == [
        Fact.RAM_DECLARED,
        Fact.POSTCOPY_DISCARD_SEEN,
        Fact.PACKAGED_BEGUN,
        Fact.PACKAGED_PASSED,
        Fact.COMPLETION_BEGUN,
        Fact.EOF_PASSED,
    ]
    assert Fact.WHOLE_STREAM_SEEN in tracker.facts
    for value, fact in ((1, Fact(0)), (4, Fact(0)), (3, Fact.PONG_3)):
        before = tracker.facts
        tracker.backward(s.message(2, struct.pack(">I", value)), 0)
        assert tracker.facts & ~before == fact
    tracker.backward(s.message(1, bytes(4)), 0)
    assert Fact.SHUT_PASSED in tracker.facts


WAYS = ("forward", "preempt_forward", "backward")
# What passes on a recovered channel and on a preempt channel beside it, and what should not.
PASSED: dict[str, list[bytes]] = {
    "forward": [
        HANDSHAKE,
        s.command(9),
        s.part() + s.page(0, RAM) + s.zero(2 * PAGE) + s.EOS + s.footer(),
        s.discard(RAM, [(0, PAGE), (6 * PAGE, 2 * PAGE)]),
    ],
    "preempt_forward": [s.page(7 * PAGE, RAM) + s.page(8 * PAGE), s.zero(6 * PAGE, RAM), s.page(0, b"other")],
    "backward": [
        s.request(5 * PAGE, PAGE, RAM) + s.request(6 * PAGE, PAGE),
        s.request(7 * PAGE, 2 * PAGE, RAM),
        s.received(RAM, bitmap(0, 1, 2, 5)),
        s.received(b"pc.bios", bitmap(0)),
        s.message(6, b"\0\0\0\1"),
        s.message(99, b""),
    ],
}
STEPS = st.lists(
    st.sampled_from(WAYS).flatmap(lambda way: st.tuples(st.just(way), st.sampled_from(PASSED[way]))),
    max_size=12,
)


def all_of(tracker: Tracker) -> tuple[object, ...]:
    return (
        (tracker.facts, tracker.channel_facts, tracker.forward_opaque, tracker.return_opaque),
        (tracker.stats(), tracker.blocks(), list(tracker.records()), list(tracker.to_replay())),
    )


@settings(deadline=None, max_examples=60)
@given(STEPS, st.lists(st.integers(0, 1 << 30), max_size=20))
def test_any_chunking_gives_the_same_record(steps: list[tuple[str, bytes]], cuts: list[int]) -> None:
    """Of the main channel's directions and of the preempt channel, whatever passes on which of them."""
    whole, pieces = begun(), begun()
    for tracker in (whole, pieces):
        tracker.channel_begin(recovered=True)
        tracker.preempt_begin()
    for now, (way, data) in enumerate(steps, 3):
        getattr(whole, way)(data, now)
        for piece in s.chunks(data, cuts):
            getattr(pieces, way)(piece, now)
        assert all_of(pieces) == all_of(whole)


@pytest.mark.parametrize("walk", [Tracker.records, Tracker.to_replay])
def test_a_walk_keeps_its_tracker(walk: Callable[[Tracker], Iterator[Request]]) -> None:
    tracker = begun()
    kept = weakref.ref(tracker)
    walking = walk(tracker)
    del tracker
    assert kept() is not None
    assert list(walking) == []


def test_requests_and_answers() -> None:
    tracker = begun()
    tracker.trust_bitmaps()  # page 5 is received though it has not passed
    tracker.backward(s.request(5 * PAGE, PAGE, RAM) + s.request(6 * PAGE, PAGE), 10)
    assert tracker.stats().outstanding == 2
    tracker.channel_lost()
    tracker.channel_begin(recovered=True)
    assert tracker.channel_facts == Fact(0)
    tracker.forward(HANDSHAKE, 50)
    tracker.backward(s.received(RAM, bitmap(0, 1, 2, 5)) + s.received(b"pc.bios", bitmap(0)), 60)
    tracker.forward(s.command(9), 65)
    tracker.backward(s.message(6, b"\0\0\0\1"), 70)
    assert tracker.channel_facts == (Fact.RECV_BITMAP_ASKED | Fact.RESUME_SENT | Fact.RESUME_ACK_PASSED)
    assert [request.start for request in tracker.to_replay()] == [6 * PAGE]
    tracker.forward(s.part() + s.page(6 * PAGE, RAM), 80)
    assert (tracker.stats().outstanding, tracker.stats().recorded) == (0, 1)
    tracker.complete()
    assert list(tracker.records()) == []


def test_a_received_bitmap_of_another_vm_is_noticed() -> None:
    tracker = begun()
    tracker.channel_begin(recovered=True)
    tracker.backward(s.received(RAM, bitmap(0, 1, 2)), 3)
    assert Fact.FOREIGN_PAGES not in tracker.facts
    tracker.backward(s.received(RAM, bitmap(0, 1, 2, 40)), 3)
    assert Fact.FOREIGN_PAGES in tracker.facts & tracker.channel_facts


def test_a_foreign_bitmap_confirms_nothing_and_the_right_one_is_known_after_it() -> None:
    tracker = begun()
    tracker.backward(s.request(5 * PAGE, PAGE, RAM) + s.request(6 * PAGE, PAGE), 2)
    tracker.channel_begin(recovered=True)
    tracker.backward(s.received(b"pc.bios", bytes(8)) + s.received(RAM, bitmap(5, 6, 40)), 4)
    assert Fact.FOREIGN_PAGES in tracker.channel_facts
    tracker.channel_lost()
    tracker.channel_begin(recovered=True)
    tracker.backward(s.received(RAM, bitmap(0, 1, 2)) + s.received(b"pc.bios", bitmap(0)), 7)
    tracker.backward(s.message(6, b"\0\0\0\1"), 8)
    assert Fact.FOREIGN_PAGES not in tracker.channel_facts
    assert [request.start for request in tracker.to_replay()] == [5 * PAGE, 6 * PAGE]


def test_a_bitmap_that_might_be_the_destinations_confirms_nothing_before_resume_ack() -> None:
    tracker = begun()
    tracker.backward(s.request(PAGE, PAGE, RAM), 2)  # it has passed already, and is lost on its way
    tracker.channel_lost()
    for pages in ((0, 1, 2), (0, 2)):  # a stranger's, and the destination's
        tracker.channel_begin(recovered=True)
        tracker.backward(s.received(RAM, bitmap(*pages)) + s.received(b"pc.bios", bitmap(0)), 3)
        assert (tracker.stats().recorded, tracker.stats().confirmed) == (1, 0)
        if 1 in pages:
            tracker.channel_lost()
    tracker.backward(s.message(6, b"\0\0\0\1"), 4)
    assert [request.start for request in tracker.to_replay()] == [PAGE]


def pong(value: int) -> bytes:
    return s.message(2, struct.pack(">I", value))


def called_foreign(tracker: Tracker, *pages: int, over: bool = False) -> bool:
    """Of a received bitmap of pc.ram with these pages, on a channel of its own. ``over``: with RESUME_ACK."""
    tracker.channel_lost()
    tracker.channel_begin(recovered=True)
    tracker.backward(s.received(RAM, bitmap(*pages)) + s.received(b"pc.bios", bitmap(0)), 3)
    if over:
        tracker.backward(s.message(6, b"\0\0\0\1"), 3)
    return Fact.FOREIGN_PAGES in tracker.channel_facts


def test_after_pong_2_a_bitmap_without_a_page_of_precopy_is_another_vms() -> None:
    tracker = begun()
    assert not called_foreign(tracker)
    tracker = begun()
    tracker.backward(pong(1), 2)
    assert not called_foreign(tracker)
    tracker = begun()
    tracker.backward(pong(2), 2)
    assert called_foreign(tracker)
    assert called_foreign(tracker, 0, 2)
    assert not called_foreign(tracker, 1)  # the others were discarded, and then on their way
    assert not called_foreign(tracker, 0, 1, 2)
    tracker.backward(s.received(b"pc.bios", bytes(8)), 4)
    assert Fact.FOREIGN_PAGES in tracker.channel_facts


def test_a_pong_after_a_loss_says_nothing_of_what_is_loaded() -> None:
    tracker = begun()
    tracker.channel_lost()
    tracker.channel_begin(recovered=True)
    tracker.backward(pong(2), 2)
    assert not called_foreign(tracker)


def test_once_resumed_with_a_received_bitmap_only_grows() -> None:
    tracker = begun()
    assert not called_foreign(tracker, 1, 2)
    assert not called_foreign(tracker, 1)  # no handshake was over
    assert not called_foreign(tracker, 0, 2, over=True)
    tracker.forward(s.part() + s.page(5 * PAGE, RAM) + s.page(6 * PAGE) + s.EOS, 4)
    assert called_foreign(tracker, 0, 5)
    assert called_foreign(tracker, 5, 6)
    assert not called_foreign(tracker, 0, 2, 5, over=True)
    assert called_foreign(tracker, 0, 2)
    assert not called_foreign(tracker, 0, 2, 5)


def test_where_a_bitmap_was_missing_or_pages_passed_unseen_nothing_is_known_to_be_loaded() -> None:
    tracker = begun()
    tracker.backward(pong(2), 2)
    tracker.channel_begin(recovered=True)
    tracker.backward(s.received(RAM, bitmap(0, 1)) + s.message(6, b"\0\0\0\1"), 3)
    assert not called_foreign(tracker)
    tracker = begun()
    tracker.channel_begin(recovered=True)
    tracker.backward(s.received(RAM, bitmap(0, 1)) + s.received(b"pc.bios", bitmap(0)), 3)
    tracker.forward(s.part() + s.page(5 * PAGE, RAM) + s.EOS, 3)  # which no QEMU sends before RESUME_ACK
    tracker.backward(s.message(6, b"\0\0\0\1"), 3)
    assert not called_foreign(tracker, 0, 1)
    tracker = begun(s.postcopy_stream()[:-1] + b"\x99")
    tracker.backward(pong(2), 2)
    assert not called_foreign(tracker)
    assert not called_foreign(tracker, 0, over=True)
    tracker.forward(b"\x99", 4)
    assert not called_foreign(tracker)


def test_bitmaps_that_are_trusted_are_never_foreign() -> None:
    tracker = begun()
    tracker.trust_bitmaps()
    tracker.backward(pong(2), 2)
    tracker.channel_begin(recovered=True)
    tracker.backward(s.received(RAM, bitmap(0, 40)), 3)
    assert Fact.FOREIGN_PAGES not in tracker.facts


def test_without_the_whole_stream_no_bitmap_is_called_foreign() -> None:
    multifd = s.postcopy_stream().replace(s.EOS, struct.pack(">Q", 0x200) + s.EOS, 1)
    for tracker in (begun(multifd), begun(s.postcopy_stream()[:-1] + b"\x99")):
        assert Fact.WHOLE_STREAM_SEEN not in tracker.facts
        tracker.backward(pong(2), 2)
        tracker.channel_begin(recovered=True)
        tracker.backward(s.received(RAM, bitmap(40)), 3)
        assert Fact.FOREIGN_PAGES not in tracker.facts


def test_an_opaque_forward_stream_leaves_requests_outstanding_until_a_bitmap_tells() -> None:
    tracker = begun(s.postcopy_stream()[:-1] + b"\x99")
    assert reason_text(tracker.forward_opaque) == "an unknown section type"
    tracker.backward(s.request(0, PAGE, RAM) + s.request(7 * PAGE, PAGE), 5)
    assert tracker.stats().outstanding == 2
    tracker.channel_begin(recovered=True)
    assert tracker.forward_opaque == 0
    tracker.backward(s.received(RAM, bitmap(0)) + s.message(6, b"\0\0\0\1"), 7)
    assert [request.start for request in tracker.to_replay()] == [7 * PAGE]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (s.received(RAM, bytes(16)), "a received bitmap of another size than its RAM block"),
        (s.received(b"other", bytes(8)), "a received bitmap of an unknown RAM block"),
        (s.message(99, b""), "an unknown return path message"),
    ],
)
def test_an_opaque_return_path(data: bytes, text: str) -> None:
    tracker = begun()
    tracker.backward(data + s.request(0, PAGE, RAM), 5)
    assert reason_text(tracker.return_opaque) == text
    assert tracker.stats().requested == 0
    tracker.channel_begin(recovered=True)
    tracker.backward(s.request(7 * PAGE, PAGE, RAM), 7)
    assert tracker.stats().requested == 1


def test_pages_of_a_preempt_channel_answer_too() -> None:
    tracker = begun()
    tracker.preempt_begin()
    tracker.backward(s.request(7 * PAGE, PAGE, RAM) + s.request(8 * PAGE, PAGE), 5)
    tracker.preempt_forward(s.page(8 * PAGE, RAM) + s.page(7 * PAGE), 9)
    assert tracker.stats().outstanding == 0
    assert tracker.latency().max_ns == 4
    tracker.preempt_forward(s.page(0, b"other"), 9)
    assert reason_text(tracker.forward_opaque) == "a page of a RAM block that was not declared"


def test_huge_pages_are_answered_by_their_last_target_page() -> None:
    huge = 2 << 20
    data = s.HEADER + s.configuration(capabilities=[b"x-ignore-shared"]) + s.advise(0x201000)
    data += s.start(b"ram") + s.block_list([(b"mem", 2 * huge, struct.pack(">QQ", huge, 0))]) + s.EOS
    tracker = begun(data + s.part() + s.zero(0, b"mem"))
    assert [block.page_size for block in tracker.blocks()] == [huge]
    assert Fact.IGNORE_SHARED in tracker.facts
    tracker.backward(s.request(huge, huge, b"mem"), 5)
    for offset in range(huge, 2 * huge, PAGE):
        assert tracker.stats().outstanding == 1
        tracker.forward(s.zero(offset), 9)
    assert tracker.stats().outstanding == 0


def test_a_ceiling_too_low_for_the_guest_is_opaque() -> None:
    tracker = Tracker(ceiling=60_000)
    tracker.channel_begin(recovered=False)
    tracker.forward(s.postcopy_stream(length=1 << 44), 1)
    assert reason_text(tracker.forward_opaque) == "no memory left under the ceiling"
    tracker.backward(s.request(0, PAGE, RAM), 5)
