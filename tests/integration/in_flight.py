"""Compares each received bitmap with what the forward decoder counted before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trio
from tests.support.returnpath import Kind as ReturnKind
from tests.support.returnpath import ReturnPathDecoder

from refault.channel.forward import Event, ForwardDecoder, Kind, Mode
from refault.channel.tracker import Fact
from refault.lab import bare
from refault.lab.channel import Loss, free_port, start_channel
from refault.lab.guest import Guest
from refault.lab.qemu import DEFAULT_BINARY, PairOptions, start_pair

from .tap import Passed, Tap

_PAGE = 4096


@dataclass(frozen=True)
class Difference:
    """What one recovery's bitmap of one RAM block said, in pages."""

    block: bytes
    received: int
    in_flight: int


def received_bitmaps(channel: Passed) -> dict[bytes, set[int]]:
    """The pages that the destination said to have, by RAM block."""
    bitmaps: dict[bytes, bytes] = {}
    for event in ReturnPathDecoder().feed(bytes(channel.backward)):
        if event.kind is ReturnKind.BITMAP_DATA:
            bitmaps[event.name] = bitmaps.get(event.name, b"") + event.data
    pages: dict[bytes, set[int]] = {}
    for name, dense in bitmaps.items():
        bits = int.from_bytes(dense, "little")
        pages[name] = {page for page in range(bits.bit_length()) if bits >> page & 1}
    return pages


class Forwarded:
    """The pages that passed the decoder, over all channels, and in which order on the last one."""

    def __init__(self) -> None:
        self.pages: dict[bytes, set[int]] = {}
        self.order: list[tuple[bytes, int]] = []

    def channel(self, passed: Passed, *, recovered: bool) -> None:
        self.order = []
        decoder = ForwardDecoder(Mode.RECOVERED if recovered else Mode.FRESH)
        for event in decoder.feed(bytes(passed.forward)):
            self._take(event)

    def _take(self, event: Event) -> None:
        if event.kind is Kind.BLOCK:
            self.pages[event.name] = set()
        elif event.kind is Kind.PAGE:
            self.pages[event.name].add(event.offset // _PAGE)
            self.order.append((event.name, event.offset // _PAGE))
        elif event.kind is Kind.DISCARD:
            first = event.offset // _PAGE
            self.pages[event.name] -= set(range(first, first + event.length // _PAGE))

    def compare(self, bitmaps: dict[bytes, set[int]]) -> list[Difference]:
        """Checks that received is a subset of forwarded, in every block, and that the rest was in flight: on
        the channel's end, none of it before a page that arrived. Goes on with what was received."""
        assert set(bitmaps) == set(self.pages)
        found: list[Difference] = []
        for name, received in bitmaps.items():
            assert received <= self.pages[name], f"{name!r}: received and never forwarded"
            lost = self.pages[name] - received
            order = [page for block, page in self.order if block == name]
            assert lost <= set(order[len(order) - len(lost) :] if lost else ()), f"{name!r}: not in flight"
            self.pages[name] = set(received)
            found.append(Difference(name, len(received), len(lost)))
        return found


async def compare_bitmaps(
    guest: Guest, directory: Path, losses: Sequence[Loss], binary: str = DEFAULT_BINARY
) -> list[list[Difference]]:
    """Migrates with these losses; what each recovery's bitmaps said. Raises AssertionError."""
    async with (
        start_pair(guest, directory, PairOptions(binary, binary)) as pair,
        start_channel(directory, free_port()) as channel,
        trio.open_nursery() as nursery,
    ):
        tap = Tap(channel, nursery)
        await tap.begin()
        source, destination = pair.source.qmp, pair.destination.qmp
        await bare.start_postcopy(source, destination, tap, bandwidth=1 << 20)
        for loss in losses:
            await trio.sleep(0.1)
            since = len(destination.events)
            await channel.lose(loss)
            await bare.recover(source, destination, tap, since=since)
            assert Fact.FOREIGN_PAGES not in tap.tracker.facts
        await bare.finish(source)
        with trio.fail_after(20):
            while Fact.SHUT_PASSED not in tap.tracker.facts:
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()
    forwarded = Forwarded()
    differences: list[list[Difference]] = []
    for number, passed in enumerate(tap.channels):
        if number > 0:
            differences.append(forwarded.compare(received_bitmaps(passed)))
        forwarded.channel(passed, recovered=number > 0)
    assert len(differences) == len(losses)
    return differences
