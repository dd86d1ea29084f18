"""Where host pages are larger than target pages, a recovered source gets no request before its first page has
shown that it does not go on with one that was cut (cext/replay.h)."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from refault.channel.relay import LegState
from refault.migration.phase import Role

from . import streams as s
from .test_relay import (
    PAGE,
    RESUME_ACK,
    Ends,
    nothing_comes,
    read_exactly,
    received_bitmap,
    relaying,
    request,
)

HUGE = 16 * PAGE
BLOCK = b"mem"
PAGES = 4 * HUGE // PAGE
BEGINNING = (
    s.HEADER + s.configuration() + s.command(1) + s.advise(HUGE)
    + s.start(b"ram") + s.block_list([(BLOCK, 4 * HUGE, struct.pack(">Q", HUGE))]) + s.EOS + s.footer()
)  # fmt: skip
LOST = request(HUGE, BLOCK, HUGE)
NEXT = request(2 * HUGE, BLOCK, HUGE)
PONG = struct.pack(">HHI", 2, 4, 9)


EARLY = s.HEADER + s.configuration() + s.start(b"virtio-mem-early", 0, 1, kind=4)


@contextmanager
def lost_with_a_request(beginning: bytes = BEGINNING) -> Iterator[Ends]:
    with relaying(Role.SOURCE) as ends:
        ends.channel()
        forward(ends, beginning)
        ends.host.sendall(LOST)
        assert read_exactly(ends.qemu, len(LOST)) == LOST
        lose(ends)
        yield ends


def forward(ends: Ends, data: bytes) -> None:
    ends.qemu.sendall(data)
    assert read_exactly(ends.host, len(data)) == data


def lose(ends: Ends) -> None:
    channel = ends.relay.look().channel
    ends.host.close()
    ends.until(lambda view: view.far.lost)
    ends.relay.close_channel(channel)
    ends.until(lambda view: view.local is LegState.CLOSED)


def recover(ends: Ends, *, lanes: int = 0) -> None:
    """As far as RESUME_ACK, with a request right behind it."""
    ends.channel(recovered=True, lanes=lanes)
    forward(ends, s.recv_bitmap(BLOCK))
    bitmap = received_bitmap(set(), PAGES, BLOCK)
    ends.host.sendall(bitmap)
    assert read_exactly(ends.qemu, len(bitmap)) == bitmap
    if lanes:
        ends.lane()
    forward(ends, s.command(9))
    ends.host.sendall(RESUME_ACK + NEXT)
    assert read_exactly(ends.qemu, len(RESUME_ACK)) == RESUME_ACK


def section(offset: int) -> bytes:
    return s.part() + s.zero(offset, BLOCK)


@pytest.mark.parametrize("beginning", [BEGINNING, EARLY], ids=["declared", "undeclared"])
def test_they_follow_a_first_page_that_is_whole(beginning: bytes) -> None:
    with lost_with_a_request(beginning) as ends:
        recover(ends)
        assert nothing_comes(ends.qemu)
        forward(ends, section(3 * HUGE))
        assert read_exactly(ends.qemu, len(NEXT + LOST)) == NEXT + LOST
        assert ends.until(lambda view: view.replayed == 1).last_replay_ns > 0
        ends.host.sendall(LOST)
        assert read_exactly(ends.qemu, len(LOST)) == LOST


@pytest.mark.parametrize("beginning", [BEGINNING, EARLY], ids=["declared", "undeclared"])
def test_behind_a_page_that_is_cut_they_wait_for_the_next_channel(beginning: bytes) -> None:
    with lost_with_a_request(beginning) as ends:
        recover(ends)
        forward(ends, section(HUGE + PAGE))
        forward(ends, s.zero(3 * HUGE))
        assert nothing_comes(ends.qemu)
        lose(ends)
        recover(ends)
        forward(ends, section(3 * HUGE))
        assert read_exactly(ends.qemu, len(NEXT + LOST)) == NEXT + LOST  # each once
        assert nothing_comes(ends.qemu)


def test_where_the_stream_cannot_be_read_they_pass() -> None:
    with lost_with_a_request() as ends:
        recover(ends)
        forward(ends, b"\xee" * 64)
        assert read_exactly(ends.qemu, len(NEXT)) == NEXT


def test_nothing_else_overtakes_them() -> None:
    with lost_with_a_request() as ends:
        recover(ends)
        ends.host.sendall(PONG)
        assert read_exactly(ends.qemu, len(NEXT + PONG)) == NEXT + PONG


def test_with_preempt_they_follow_resume_ack() -> None:
    with lost_with_a_request() as ends:
        recover(ends, lanes=1)
        assert read_exactly(ends.qemu, len(NEXT + LOST)) == NEXT + LOST


@pytest.mark.parametrize("size", [PAGE, HUGE])
def test_a_destination_holds_nothing(size: int) -> None:
    with relaying(Role.DESTINATION) as ends:
        ends.channel()
        ends.host.sendall(BEGINNING)
        read_exactly(ends.qemu, len(BEGINNING))
        lose(ends)
        ends.channel(recovered=True)
        ends.qemu.sendall(RESUME_ACK + request(0, BLOCK, size))
        expected = RESUME_ACK + request(0, BLOCK, size)
        assert read_exactly(ends.host, len(expected)) == expected
