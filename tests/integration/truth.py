"""Compares the record with QEMU's own trace events, page by page, in paused migrations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from refault.daemon.kernel.userfaultfd import waiting
from refault.lab import bare
from refault.lab.channel import Loss, free_port, start_channel
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.qemu import DEFAULT_BINARY, PairOptions, start_pair

from .relay_tap import RelayTap

EVENTS = ("postcopy_ram_fault_thread_request", "postcopy_page_req_add", "postcopy_page_req_del")
_LINE = re.compile(
    rb"postcopy_(?:ram_fault_thread_request Request for HVA=(?P<fault>0x[0-9a-f]+)"
    rb" rb=(?P<block>\S+) offset=(?P<offset>0x[0-9a-f]+)"
    rb"|page_req_add new page req (?P<add>0x[0-9a-f]+)|page_req_del resolved page req (?P<gone>0x[0-9a-f]+))"
)
_PAGE = 4096

Page = tuple[bytes, int]
"""A RAM block's name and an offset in it, in bytes."""


@dataclass
class Traced:
    """What QEMU's log tells (migration/postcopy-ram.c and migration.c): its faults, and its own list of pages
    that it wants and has not got."""

    faulted: list[Page] = field(default_factory=list)
    wanted: set[Page] = field(default_factory=set)

    @classmethod
    def read(cls, log: Path) -> Traced:
        traced = cls()
        pages: dict[int, Page] = {}
        for found in _LINE.finditer(log.read_bytes()):
            if found["fault"]:
                page = found["block"], int(found["offset"], 16)
                pages[int(found["fault"], 16) // _PAGE] = page
                traced.faulted.append(page)
            elif found["add"]:
                traced.wanted.add(pages[int(found["add"], 16) // _PAGE])
            else:
                traced.wanted.remove(pages[int(found["gone"], 16) // _PAGE])
        return traced


@dataclass(frozen=True)
class Pause:
    """What was on record and what QEMU wanted, while both legs were closed."""

    record: frozenset[Page]
    last_id: int
    wanted: frozenset[Page]
    unsent: int
    """Pages that QEMU wants and could not ask for any more (0 or 1: its fault thread then waits)."""
    threads: int
    """Threads that wait, by the kernel, and whose faults QEMU has read."""
    faults: int
    """Faults that QEMU has read, by its trace, on pages that it wants; many threads can fault on one page."""


async def _still(log: Path) -> Traced:
    """The log, when nothing has been added to it for 0.2 s."""
    size = -1
    with trio.fail_after(20):
        while size != (size := (await trio.Path(log).stat()).st_size):
            await trio.sleep(0.2)
    return Traced.read(log)


async def _look_at_pause(tap: RelayTap, log: Path, pid: int, before: Pause | None) -> Pause:
    traced = await _still(log)
    requests = tap.records()
    record = frozenset((request.name, request.start) for request in requests)
    assert len(record) == len(requests)

    unsent = traced.wanted - record
    assert unsent <= set(traced.faulted[-1:]), f"asked for and not on record: {sorted(unsent)}"
    assert record <= set(traced.faulted), "on record and never asked for"
    if before is not None:
        left = {(request.name, request.start) for request in requests if request.id <= before.last_id}
        assert left == before.record & before.wanted, "the received bitmap ended other records than QEMU's"
    stats = tap.relay.pages()
    assert stats.recorded == len(record)
    assert stats.outstanding == len(record & traced.wanted), "the live count is not what QEMU waits for"
    assert stats.refused == 0
    kernel = waiting(pid)
    assert kernel is not None
    assert kernel.total >= len(traced.wanted), "QEMU wants a page that no thread waits for"
    return Pause(
        record=record,
        last_id=max((request.id for request in requests), default=0),
        wanted=frozenset(traced.wanted),
        unsent=len(unsent),
        threads=kernel.total - kernel.pending,
        faults=sum(page in traced.wanted for page in traced.faulted),
    )


async def compare_with_trace(
    guest: Guest, directory: Path, losses: Sequence[Loss], binary: str = DEFAULT_BINARY
) -> list[Pause]:
    """Migrates with these losses; what was seen at each pause. Raises AssertionError where the two
    differ."""
    pauses: list[Pause] = []
    trace = [word for event in EVENTS for word in ("-trace", event)]
    tap = RelayTap(directory, free_port())
    log = directory / "dst.log"
    try:
        async with (
            start_pair(guest, directory, PairOptions(binary, binary, trace)) as pair,
            start_channel(directory, tap._listen_port) as channel,
            trio.open_nursery() as nursery,
        ):
            await tap.begin_behind(channel, nursery)
            source, destination = pair.source.qmp, pair.destination.qmp
            await bare.start_postcopy(source, destination, tap, bandwidth=1 << 20)
            before: Pause | None = None
            for loss in losses:
                await trio.sleep(0.1)
                since = len(destination.events)
                await tap.lose(loss)
                with trio.fail_after(20):
                    await destination.wait_migration("postcopy-paused", since=since)
                before = await _look_at_pause(tap, log, pair.destination.pid, before)
                pauses.append(before)
                await bare.recover(source, destination, tap, since=since)
            await bare.finish(source)
            with trio.fail_after(20):
                while not tap.relay.passed().shut:
                    await trio.sleep(0.005)
            assert tap.relay.pages().outstanding == 0
            assert (await _still(log)).wanted == set()
            tap.relay.complete()
            with trio.fail_after(20):
                while tap.relay.pages().recorded > 0:
                    await trio.sleep(0.005)
            verdict = await compare(guest, destination, source)
            assert verdict.right, verdict
            nursery.cancel_scope.cancel()
    finally:
        tap.relay.close()
    return pauses
