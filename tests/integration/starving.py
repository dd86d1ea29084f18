"""A request lost inside the killed carrier, with a destination that repeats it or not, and a refault that
replays it or not."""

from __future__ import annotations

import contextlib
import math
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import trio

from refault.lab import bare
from refault.lab.channel import Channel, Lost, free_port, start_channel
from refault.lab.driver import REFAULT, RefaultDriver, refault_driver
from refault.lab.guest import Guest
from refault.lab.qemu import DEFAULT_BINARY, Pair, PairOptions, start_pair
from refault.lab.starving_back_end import WITHOUT_REPLAY
from refault.lab.story import SIDES, Side

WOKEN = 8.0
"""Seconds in which those run again whose request is replayed. How soon they do: make campaign-starvation."""


def build_no_repeat(directory: Path) -> Path:
    """Compiles the library that keeps a destination from repeating requests by itself."""
    library = directory / "no_repeat.so"
    source = Path(__file__).with_name("no_repeat.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@dataclass(frozen=True)
class Case:
    """One way to run it. ``no_repeat``: the preloaded library, None for the destination as it is."""

    guest: Guest
    background: int
    """Bytes a second that postcopy sends unasked."""
    replay: bool
    no_repeat: Path | None
    binary: str = DEFAULT_BINARY
    killed: tuple[Side, ...] = ()
    """The sides whose refault is killed with the request under way, and started again."""
    forget: bool = False
    """Whether what they have on record is deleted before that."""


@dataclass
class Recovered:
    """A migration that was lost at ``lost`` and is active again since ``recovered`` (trio's clock; 0 until
    then)."""

    pair: Pair
    driver: RefaultDriver
    lost: float
    recovered: float
    moved: list[list[float]]
    """By vCPU: when it was seen to have gone on, since the loss."""

    def stood(self) -> list[float | None]:
        """By vCPU: when it was first seen to have gone on after the recovery."""
        since = self.recovered or math.inf
        return [next((when for when in times if when >= since), None) for times in self.moved]

    def starved(self) -> set[int]:
        """The vCPUs that have not gone on."""
        return {vcpu for vcpu, when in enumerate(self.stood()) if when is None}

    async def run_again(self, seconds: float) -> set[int]:
        """Those that are still starved when all have gone on or this time is over."""
        with trio.move_on_after(seconds):
            while self.starved():
                await trio.sleep(0.001)
        return self.starved()


async def _watch(pair: Pair, found: Recovered) -> None:
    """Notes when each vCPU goes on; before the recovery all come to stand still."""
    before = pair.destination.progress()
    while found.starved():
        # In a thread: the loop itself sleeps whole milliseconds, and a request is answered in less.
        await trio.to_thread.run_sync(time.sleep, 0.0002)
        now = pair.destination.progress()
        when = trio.current_time()
        for vcpu, progress in enumerate(now):
            if progress != before[vcpu]:
                found.moved[vcpu].append(when)
        before = now


async def _lose(case: Case, channel: Channel, driver: RefaultDriver, directory: Path) -> Lost:
    """Kills the carrier with a request inside, and the refaults that are to be killed; starts those again."""
    if not case.killed:
        return await channel.kill(last=True)
    inside = await channel.freeze_with_request()
    for side in case.killed:
        driver.processes[SIDES.index(side)].kill()
        if case.forget:
            (directory / f"{side}.state" / f"{side}.pages").unlink()
    lost = await channel.kill(request_inside=False, last=True)
    for side in case.killed:
        driver.start_again(SIDES.index(side))
    return Lost(lost.loss, lost.when, inside)


@contextlib.asynccontextmanager
async def lose_a_request(case: Case, directory: Path) -> AsyncIterator[Recovered]:
    """Migrates, loses the channel with a request inside, and waits for refault's recovery."""
    prefix = ["env", f"LD_PRELOAD={case.no_repeat}"] if case.no_repeat else []
    options = PairOptions(case.binary, case.binary, destination_prefix=prefix)
    command = REFAULT if case.replay else WITHOUT_REPLAY
    async with (
        start_pair(case.guest, directory, options) as pair,
        start_channel(directory, free_port()) as channel,
        refault_driver(pair, channel, directory, command=command) as driver,
        trio.open_nursery() as nursery,
    ):
        await bare.start_postcopy(driver.source, driver.destination, channel, bandwidth=case.background)
        await trio.sleep(0.2)
        events = pair.destination.qmp  # its own monitor: what it tells passes nobody else
        await bare.heard_of_postcopy(pair.source.qmp, events)
        since = len(events.events)
        lost = await _lose(case, channel, driver, directory)
        assert lost.bytes_inside > 0
        found = Recovered(pair, driver, lost.when, 0.0, [[] for _ in range(case.guest.vcpus)])
        nursery.start_soon(_watch, pair, found)
        with trio.fail_after(60):  # a refault may have to be started in it
            event = await events.wait_migration("postcopy-active", since=since)
            found.recovered = event.emitted
        yield found
        nursery.cancel_scope.cancel()
