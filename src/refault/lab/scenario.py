"""The main job on real QEMUs: a postcopy migration whose channel is lost again and again, and at the end its
memory.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import trio

from refault.daemon.telling.snapshot import PagesStatus, SessionStatus

from . import bare
from .channel import Channel, Loss, free_port, start_channel
from .driver import Driver, Relay, bare_driver, refault_driver
from .guest import PAGE, Guest
from .memory import compare
from .process import Process
from .qemu import DEFAULT_BINARY, Pair, PairOptions, start_pair
from .qmp_client import QmpClient, QmpClosed, QmpError
from .story import SIDES, LossResult, Sample, Side, Story
from .tasks import background

Who = Literal["refault", "script", "nobody"]
Session = Literal["auto", "off"]
_Counts = dict[Side, PagesStatus]
VCPUS = 4
_GAP = 0.3  # seconds between a recovery and the next loss, so that requests are made
_SAMPLE = 0.03
_SETTLE = 0.3  # seconds after a recovery in which requests are repeated and replayed
_SETTLE_AT_LAST = 5.0  # and the same for the first of them, on a busy machine
_FAST = 1 << 40


class ScenarioFailed(Exception):  # noqa: N818 - it says what happened
    """The run could not go on; the message says what happened and what to do."""


@dataclass(frozen=True)
class Options:
    """What is run: ``memory`` in bytes, ``who`` recovers, how long one recovery and the completion may take
    (s).
    """

    losses: int = 6
    memory: int = 256 << 20
    relay: Relay = "auto"
    session: Session = "off"
    who: Who = "refault"
    binary: str = DEFAULT_BINARY
    recovery_deadline: float = 30.0
    completion_deadline: float = 120.0
    meddle: Callable[[Pair], None] | None = None

    @property
    def duration(self) -> float:
        """How long postcopy must last so that all losses fall into it, in seconds."""
        return 8 + self.losses * (_GAP + 0.5)

    @property
    def guest(self) -> Guest:
        """A guest whose faults alone take twice that long to fetch its memory."""
        tick = 2 * self.duration * VCPUS * PAGE / self.memory
        return Guest.of_size(self.memory, VCPUS, min(max(int(tick * 1e9), 500_000), 1_000_000_000))

    @property
    def bandwidth(self) -> int:
        """What postcopy may send unasked, in bytes per second: a quarter of the memory in that time."""
        return max(int(self.memory / (4 * self.duration)), 64 << 10)


async def run(options: Options, story: Story, directory: Path) -> None:
    """Runs it all and tells ``story``; ``directory`` takes sockets and logs.

    Losses that are not recovered and wrong memory are in the story. Raises ScenarioFailed, ProcessFailed,
    QmpError, QmpClosed or trio.TooSlowError where the run cannot go on.
    """
    guest = options.guest
    story.total = guest.ram_bytes
    size = f"{guest.written_bytes >> 20} MiB"
    story.note(f"starting two QEMUs; a guest with {guest.vcpus} vCPUs fills {size} of memory")
    async with (
        start_pair(guest, directory, PairOptions(options.binary, options.binary)) as pair,
        start_channel(directory, free_port()) as channel,
    ):
        async with _driver(options, pair, channel, directory) as driver, background() as nursery:
            processes = (pair.source.process, pair.destination.process, *driver.processes)
            for process in processes:
                nursery.start_soon(_must_live, process)
            nursery.start_soon(_watch, driver, story)
            try:
                await _begin(driver, channel, options, story)
                for number, loss in enumerate(itertools.islice(itertools.cycle(Loss), options.losses), 1):
                    await _lose(driver, channel, loss, number, options, story)
                await _complete(driver, options, story)
            except QmpClosed:
                await _who_ended(processes)
                raise
        await _check_memory(pair, options, story)


@contextlib.asynccontextmanager
async def _driver(options: Options, pair: Pair, channel: Channel, directory: Path) -> AsyncIterator[Driver]:
    if options.who == "refault":
        further = ("--session", options.session)
        async with refault_driver(
            pair, channel, directory, relay=options.relay, options=(further, further)
        ) as driver:
            yield driver
    else:
        async with bare_driver(pair, channel, by_hand=options.who == "script") as driver:
            yield driver


async def _who_ended(processes: Iterable[Process]) -> None:
    """A closed monitor is the first sign of a process that dies; raises ProcessFailed when one has."""
    with trio.move_on_after(2):
        while True:
            for process in processes:
                process.must_run()
            await trio.sleep(0.01)


async def _must_live(process: Process) -> None:
    await process.wait()
    process.must_run()


async def _begin(driver: Driver, channel: Channel, options: Options, story: Story) -> None:
    source, destination = driver.source, driver.destination
    story.facts["QEMU"] = ".".join(map(str, source.version))
    story.note("an ordinary QMP client starts a postcopy migration")
    with _deadline(60, "the migration did not reach postcopy in 60 s", story):
        for qmp in (source, destination):
            await bare.set_capabilities(qmp, *bare.CAPABILITIES)
        limits = {
            "max-bandwidth": max(options.memory // 2, 1 << 20),
            "max-postcopy-bandwidth": options.bandwidth,
            "downtime-limit": bare.DOWNTIME_LIMIT,
        }
        await source.execute("migrate-set-parameters", limits)
        await destination.execute("migrate-incoming", {"uri": channel.target_uri})
        await channel.wait_open()
        await source.execute("migrate", {"uri": channel.uri})
        await bare.wait_sent(source, 0.1)
        await source.execute("migrate-start-postcopy")
        await source.wait_migration("postcopy-active")
        await destination.wait_event(lambda event: event.name == "RESUME")
        await destination.wait_migration("postcopy-active")
        await driver.postcopy_began()
        if options.session == "auto":
            while (await _session(driver)).state != "carried":
                await trio.sleep(_SAMPLE)
    story.note("postcopy: the guest runs at the destination, most of its memory is still at the source")


async def _lose(
    driver: Driver, channel: Channel, loss: Loss, number: int, options: Options, story: Story
) -> None:
    await trio.sleep(_GAP)
    sides = (driver.source, driver.destination)
    since = [len(qmp.events) for qmp in sides]
    if any(story.status(side) == "completed" for side in SIDES):
        raise ScenarioFailed(
            f"the migration completed before loss {number}: give the guest more to do with --memory"
        )
    before, session = await _counts(driver), await _session(driver)
    lost = await channel.lose(loss)
    at_loss = await _counts(driver)
    result = LossResult(number, loss, lost.when - story.began, lost.bytes_inside)
    if "destination" in at_loss:
        result.outstanding = at_loss["destination"].outstanding
    story.losses.append(result)
    inside = f" with {lost.bytes_inside} bytes of page requests inside" if lost.bytes_inside else ""
    story.note(f"loss {number}: {loss.value}{inside}")
    with trio.move_on_after(options.recovery_deadline):
        if options.session == "auto":
            result.recovered = await _resumed(driver, session, sides, since)
        if result.recovered is None:
            await driver.repair(since[1])
            back = [
                await qmp.wait_migration("postcopy-active", "completed", since=start)
                for qmp, start in zip(sides, since, strict=True)
            ]
            result.recovered = max(event.when for event in back) - lost.when
        else:
            result.noticed = False
    if result.recovered is None:
        states = " and ".join(f"the {side} {story.status(side)}" for side in SIDES)
        raise ScenarioFailed(
            f"loss {number} ({loss.value}) was not recovered in {options.recovery_deadline:g} s: {states}; "
            "nothing but a recovery helps the guest now, and this lab's guest is given up"
        )
    await _count_requests(driver, before, result, story)
    counts = f"; {result.counts}" if result.counts else ""
    again = "both active again" if result.noticed else "no QEMU noticed it, bytes again"
    story.note(f"loss {number}: {again} after {result.recovered * 1000:.0f} ms{counts}")


async def _session(driver: Driver) -> SessionStatus:
    """As the source's refault tells it."""
    told = [vm.session for vm in await driver.statuses() if vm.migration.role == "source"]
    return told[0] if told else SessionStatus()


async def _resumed(
    driver: Driver, before: SessionStatus, sides: Sequence[QmpClient], since: Sequence[int]
) -> float | None:
    """Seconds until the session's bytes ran again; None where a QEMU has noticed the loss."""
    while not any(
        event.name == "MIGRATION"
        for qmp, start in zip(sides, since, strict=True)
        for event in qmp.events[start:]
    ):
        now = (await _session(driver)).resumptions
        if now.count > before.resumptions.count:
            return now.sum - before.resumptions.sum
        await trio.sleep(_SAMPLE)
    return None


async def _count_requests(driver: Driver, before: _Counts, result: LossResult, story: Story) -> None:
    """Fills in the loss's page requests; waits a little, for they may come after QEMU's events."""
    during = [sample.outstanding for sample in story.samples if sample.when >= result.when - _SAMPLE]
    counted = [count for count in (result.outstanding, *during) if count is not None]
    result.outstanding = max(counted, default=None)
    began = trio.current_time()
    while True:
        await trio.sleep(_SAMPLE)
        after = await _counts(driver)
        result.repeated = _since(before, after, "repeated", ("destination",))
        result.replayed = _since(before, after, "replayed", SIDES)
        again = (result.repeated or 0) + (result.replayed or 0)
        if again >= (result.outstanding or 0):
            return
        if trio.current_time() >= began + (_SETTLE if again or not result.noticed else _SETTLE_AT_LAST):
            return


def _since(
    before: _Counts, after: _Counts, count: Literal["repeated", "replayed"], sides: Iterable[Side]
) -> int | None:
    """How much a count has grown over the sides; None where one of them could not tell."""
    if not all(side in each for side in sides for each in (before, after)):
        return None
    growth: list[int] = [getattr(after[side], count) - getattr(before[side], count) for side in sides]
    return sum(growth)


async def _complete(driver: Driver, options: Options, story: Story) -> None:
    story.note("no more losses: the bandwidth limit is lifted")
    late = f"the migration did not complete in {options.completion_deadline:g} s"
    with _deadline(options.completion_deadline, late, story):
        await driver.source.execute("migrate-set-parameters", {"max-postcopy-bandwidth": _FAST})
        await driver.source.wait_migration("completed")
        await driver.destination.wait_migration("completed")
        story.completed = story.now()
        while any(story.status(side) != "completed" for side in SIDES):  # who looks on sees it later
            await trio.sleep(_SAMPLE)
    story.note("the migration has completed")


async def _check_memory(pair: Pair, options: Options, story: Story) -> None:
    with _deadline(60, "the guest does not go on at the destination", story):
        await pair.destination.wait_progress(60)
    if options.meddle is not None:
        options.meddle(pair)
    story.note("stopping the guest and comparing every page with what it must hold")
    story.verdict = await compare(options.guest, pair.destination.qmp, pair.source.qmp)
    story.note(f"memory: {story.verdict}")


async def _watch(driver: Driver, story: Story) -> None:
    """Looks at both ends until cancelled."""
    seen = dict.fromkeys(SIDES, 0)
    clients = {"source": driver.source, "destination": driver.destination}
    for turn in itertools.count():
        for side in SIDES:
            events = clients[side].events[seen[side] :]
            seen[side] += len(events)
            story.statuses[side] += [
                (event.when - story.began, event.data["status"])
                for event in events
                if event.name == "MIGRATION"
            ]
        remaining = await _remaining(driver) if turn % 5 == 0 else None
        counts = await _counts(driver)
        sample = Sample(story.now(), remaining=remaining)
        if "destination" in counts:  # the source's refault does not know what was lost on the way
            seen_there = counts["destination"]
            sample = Sample(
                sample.when,
                seen_there.outstanding,
                seen_there.requested,
                seen_there.arrived,
                seen_there.repeated,
                sum(each.replayed for each in counts.values()),
                remaining,
            )
        story.samples.append(sample)
        await trio.sleep(_SAMPLE)


async def _remaining(driver: Driver) -> int | None:
    # The source's main thread is never stuck on a page, but a command of somebody else's may be before ours.
    try:
        answer = await driver.source.execute("query-migrate", timeout=0.5)
    except (trio.TooSlowError, QmpError, QmpClosed):
        return None
    remaining = answer.get("ram", {}).get("remaining")
    return None if remaining is None else int(remaining)


async def _counts(driver: Driver) -> _Counts:
    """The page counts of the refaults that can read the channel, by their side."""
    statuses = {vm.migration.role: vm for vm in await driver.statuses()}
    return {
        side: statuses[side].pages
        for side in SIDES
        if side in statuses and statuses[side].migration.relay == "tracking"
    }


@contextlib.contextmanager
def _deadline(seconds: float, text: str, story: Story) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError as error:
        states = " and ".join(f"the {side} is {story.status(side)}" for side in SIDES)
        raise ScenarioFailed(f"{text}; {states}") from error
