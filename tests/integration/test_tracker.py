"""The tracker on real migrations: what it has on record is what the destination asked for and has not got."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import trio
from tests.support.returnpath import Kind, ReturnPathDecoder
from tests.support.tracker import Tracker

from refault.channel.tracker import Fact
from refault.lab import bare
from refault.lab.channel import Loss, free_port, start_channel
from refault.lab.guest import Guest
from refault.lab.qemu import PairOptions, start_pair

from .qemus import BINARIES
from .tap import Passed, Tap, save_directory

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

GUEST = Guest(vcpus=4, log_pages=11, tick_ns=4_000_000)


def requests_and_bitmaps(channel: Passed) -> tuple[set[tuple[bytes, int]], dict[bytes, bytes]]:
    """What the destination asked for on this channel, and the received bitmaps it sent."""
    asked: set[tuple[bytes, int]] = set()
    bitmaps: dict[bytes, bytes] = {}
    for event in ReturnPathDecoder().feed(bytes(channel.backward)):
        if event.kind is Kind.REQUEST:
            asked.add((event.name, event.start))
        elif event.kind is Kind.BITMAP_DATA:
            bitmaps[event.name] = bitmaps.get(event.name, b"") + event.data
    return asked, bitmaps


def must_be_on_record(channels: list[Passed]) -> set[tuple[bytes, int]]:
    """All that was asked for, less what a later channel's bitmap confirmed."""
    wanted: set[tuple[bytes, int]] = set()
    for channel in channels:
        asked, bitmaps = requests_and_bitmaps(channel)
        wanted = {
            (name, start)
            for name, start in wanted
            if name not in bitmaps or not bitmaps[name][start // 4096 // 8] >> start // 4096 % 8 & 1
        } | asked
    return wanted


def check(tracker: Tracker, channels: list[Passed]) -> None:
    assert {(request.name, request.start) for request in tracker.records()} == must_be_on_record(channels)
    stats = tracker.stats()
    assert stats.requested == stats.arrived + stats.outstanding
    assert stats.refused == 0
    assert (tracker.forward_opaque, tracker.return_opaque) == (0, 0)
    assert Fact.WHOLE_STREAM_SEEN in tracker.facts
    assert Fact.FOREIGN_PAGES not in tracker.facts


async def passed(tracker: Tracker, fact: Fact) -> None:
    """What QEMU tells over QMP may be ahead of what it has sent."""
    with trio.fail_after(20):
        while fact not in tracker.facts:
            await trio.sleep(0.01)


@pytest.mark.parametrize("binary", BINARIES)
@pytest.mark.parametrize("more", [(), ("xbzrle",), ("postcopy-preempt",)], ids=["plain", "xbzrle", "preempt"])
async def test_losses(tmp_path: Path, binary: str, more: tuple[str, ...]) -> None:
    capabilities = (*bare.CAPABILITIES, *more)
    async with (
        start_pair(GUEST, tmp_path, PairOptions(binary, binary)) as pair,
        start_channel(tmp_path, free_port()) as channel,
        trio.open_nursery() as nursery,
    ):
        tap = Tap(channel, nursery)
        await tap.begin()
        tracker = tap.tracker
        source, destination = pair.source.qmp, pair.destination.qmp
        await bare.start_postcopy(source, destination, tap, bandwidth=1 << 20, capabilities=capabilities)
        assert Fact.PACKAGED_PASSED | Fact.POSTCOPY_DISCARD_SEEN in tracker.facts
        await passed(tracker, Fact.PONG_3)
        for loss in (Loss.RESET, Loss.KILL):
            await trio.sleep(0.2)
            since = len(destination.events)
            await channel.lose(loss)
            await bare.recover(source, destination, tap, since=since)
            handshake = Fact.RECV_BITMAP_ASKED | Fact.RESUME_SENT
            assert handshake | Fact.RESUME_ACK_PASSED in tracker.channel_facts
            check(tracker, tap.channels)
        await bare.finish(source)
        await passed(tracker, Fact.SHUT_PASSED)
        check(tracker, tap.channels)
        assert Fact.EOF_PASSED in tracker.facts
        assert tracker.stats().outstanding == 0
        assert tracker.stats().losses >= 2
        assert tracker.latency().count > 0
        tracker.complete()
        assert list(tracker.records()) == []
        if (directory := save_directory()) is not None:
            tap.save(directory, f"{binary}-{'-'.join(more) or 'plain'}")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("binary", BINARIES)
async def test_no_page_is_counted_twice_or_missed(tmp_path: Path, binary: str) -> None:
    """Every page of RAM has passed when a migration that was lost once completes."""
    async with (
        start_pair(GUEST, tmp_path, PairOptions(binary, binary)) as pair,
        start_channel(tmp_path, free_port()) as channel,
        trio.open_nursery() as nursery,
    ):
        tap = Tap(channel, nursery)
        await tap.begin()
        source, destination = pair.source.qmp, pair.destination.qmp
        await bare.start_postcopy(source, destination, tap, bandwidth=1 << 20)
        since = len(destination.events)
        await channel.lose(Loss.CLOSE)
        await bare.recover(source, destination, tap, since=since)
        await bare.finish(source)
        await passed(tap.tracker, Fact.SHUT_PASSED)
        for block in tap.tracker.blocks():
            assert block.declared
            assert block.forwarded >= block.used_length // 4096
        nursery.cancel_scope.cancel()
    assert struct.unpack_from(">I", tap.channels[0].forward)[0] == 0x5145564D
