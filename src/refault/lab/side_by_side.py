"""Two migrations beside each other whose vhost-user back ends lose a request: one refault replays, one does
not.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import trio

from .guest import Guest
from .memory import Verdict, compare
from .qemu import DEFAULT_BINARY
from .starving_back_end import BackEndCase, BackEndMigration, start_with_back_ends
from .story import Notes
from .tasks import background

Way = Literal["with the replay", "without it"]
WAYS: tuple[Way, ...] = ("with the replay", "without it")
GUEST = Guest(vcpus=1, log_pages=14, tick_ns=1_000_000_000)
BACKGROUND = 16 << 10
"""Bytes a second; QEMU sends a page every 0.1 s at least. Of 16384 it seldom comes to the lost one soon."""
LOOKED = 3.0
"""Seconds after the recovery for which who is not helped must be seen to be blocked."""
_AT_LAST = 60.0
SAMPLE = 0.1


@dataclass
class Half:
    """What happened in one of the two; times are in seconds since the beginning of the story."""

    way: Way
    stage: str = "starting"
    touches: list[int] = field(default_factory=list)
    """Pages that the back end has touched, every `SAMPLE`."""
    lost: float | None = None
    recovered: float | None = None
    ran_again: float | None = None
    """When the back end's thread was seen to run on."""
    kernel_waiting: int | None = None
    """The kernel's count of threads that wait for a page, while the back end's was blocked."""
    verdict: Verdict | None = None

    @property
    def recovery_seconds(self) -> float | None:
        """From the loss until QEMU was active again."""
        return None if self.lost is None or self.recovered is None else self.recovered - self.lost

    @property
    def blocked_seconds(self) -> float | None:
        """From then until the back end's thread ran on."""
        return None if self.recovered is None or self.ran_again is None else self.ran_again - self.recovered

    def document(self) -> dict[str, Any]:
        """Its part of the JSON document."""
        return {
            "replay": self.way == WAYS[0],
            "recovered_seconds": _rounded(self.recovery_seconds),
            "blocked_seconds": _rounded(self.blocked_seconds),
            "threads_waiting": self.kernel_waiting,
            "memory_right": None if self.verdict is None else self.verdict.right,
        }


@dataclass
class SideBySide(Notes):
    """Both."""

    halves: tuple[Half, Half] = field(default_factory=lambda: (Half(WAYS[0]), Half(WAYS[1])))

    @property
    def ok(self) -> bool:
        """Whether the one ran on, the other did not for `LOOKED`, and the memory of both is right."""
        helped, left = (half.blocked_seconds for half in self.halves)
        right = all(half.verdict is not None and half.verdict.right for half in self.halves)
        return (
            self.failure is None
            and (helped is not None and helped < LOOKED)
            and (left is not None and left >= LOOKED)
            and right
        )

    def document(self) -> dict[str, Any]:
        """The run as one JSON document."""
        return {
            "ok": self.ok,
            "failure": self.failure,
            "looked_seconds": LOOKED,
            "migrations": [half.document() for half in self.halves],
        }


class _Together:
    """A line at which each of the two waits for the other."""

    def __init__(self) -> None:
        self._missing = len(WAYS)
        self._all = trio.Event()

    async def arrive(self) -> None:
        self._missing -= 1
        if not self._missing:
            self._all.set()
        await self._all.wait()


async def run(story: SideBySide, directory: Path, binary: str = DEFAULT_BINARY) -> None:
    """Runs both at once and tells ``story``; ``directory`` takes sockets and logs.

    Raises ProcessFailed, QmpError, QmpClosed or trio.TooSlowError where the run cannot go on.
    """
    started, looked = _Together(), _Together()
    story.note("starting two pairs of QEMUs, each QEMU with a vhost-user back end and a refault")
    try:
        async with trio.open_nursery() as nursery:
            for half in story.halves:
                place = directory / ("with" if half.way == WAYS[0] else "without")
                place.mkdir()
                nursery.start_soon(_half, half, story, place, binary, started, looked)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None  # the other was cancelled, or failed of the same


async def _half(
    half: Half,
    story: SideBySide,
    directory: Path,
    binary: str,
    started: _Together,
    looked: _Together,
) -> None:
    case = BackEndCase(GUEST, BACKGROUND, replay=half.way == WAYS[0], binary=binary)
    async with start_with_back_ends(case, directory) as migration:
        half.stage = "precopy"
        await migration.start_postcopy()
        async with _counting(half, migration):
            half.stage = "postcopy"
            await started.arrive()
            if case.replay:
                story.note("postcopy: the back ends touch the guest's pages; now the network is lost")
            await _lose_and_look(half, story, migration)
            await looked.arrive()
            if case.replay:
                story.note("no more losses: the bandwidth limit is lifted")
            await _complete(half, story, migration)


async def _lose_and_look(half: Half, story: SideBySide, migration: BackEndMigration) -> None:
    half.stage = "lost"
    await migration.lose()
    if migration.lost is None or migration.recovered is None:
        raise RuntimeError("lost and recovered, and no time of it")
    half.lost, half.recovered = migration.lost - story.began, migration.recovered - story.began
    half.stage = "recovered"
    story.note(f"{half.way}: both QEMUs active again after {milliseconds(half.recovery_seconds)}")
    blocked = await migration.run_again(LOOKED)
    if blocked is not None:
        _ran(half, story, blocked)
        await trio.sleep(max(0.0, half.recovered + LOOKED - story.now()))
    else:
        counts = [status.pages.kernel_waiting for status in await migration.driver.statuses()]
        half.kernel_waiting = next((count for count in counts if count is not None), None)
        story.note(f"{half.way}: the back end's thread is still blocked, {LOOKED:g} s after the recovery")


async def _complete(half: Half, story: SideBySide, migration: BackEndMigration) -> None:
    await migration.driver.source.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
    if half.ran_again is None and (blocked := await migration.run_again(_AT_LAST)) is not None:
        _ran(half, story, blocked)
    with trio.fail_after(_AT_LAST):
        await migration.driver.source.wait_migration("completed")
        await migration.driver.destination.wait_migration("completed")
    half.stage = "completed"
    pair = migration.pair
    with trio.fail_after(_AT_LAST):
        await pair.destination.wait_progress(_AT_LAST)
        half.verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
    story.note(f"{half.way}: memory: {half.verdict}")


def _ran(half: Half, story: SideBySide, blocked: float) -> None:
    if half.recovered is None:
        raise RuntimeError("ran again before the recovery")
    half.ran_again = half.recovered + blocked
    story.note(f"{half.way}: the back end's thread runs again, {milliseconds(blocked)} after the recovery")


@contextlib.asynccontextmanager
async def _counting(half: Half, migration: BackEndMigration) -> AsyncIterator[None]:
    async def count() -> None:
        before = migration.back_end.counts()[1]
        while True:
            await trio.sleep(SAMPLE)
            now = migration.back_end.counts()[1]
            half.touches.append(now - before)
            before = now

    async with background() as nursery:
        nursery.start_soon(count)
        yield


def milliseconds(seconds: float | None) -> str:
    """In words, for people."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
