"""One migration from its beginning to its end, with losses on the way."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio
from tests.campaign.invariants import Watch
from tests.campaign.losses import KILLED, LossClass, Phase, Place, Planned
from tests.campaign.outcomes import Outcome, allowed
from tests.campaign.steady import Steady

from refault.daemon.recovery.doubt import TAKE_BACK
from refault.lab import bare
from refault.lab.channel import Between, Channel, Cut, Loss, free_port, start_channel
from refault.lab.driver import RefaultDriver, refault_driver
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.netns import two_hosts
from refault.lab.process import Process, ProcessFailed
from refault.lab.qemu import DEFAULT_BINARY, Pair, PairOptions, Qemu, disks, start_pair
from refault.lab.qmp_client import QmpClient, QmpClosed, QmpError
from refault.lab.story import SIDES
from refault.lab.tasks import background

GUEST = Guest(vcpus=4, log_pages=11, tick_ns=10_000_000)
DISKS = 4
_POSTCOPY_BANDWIDTH = 512 << 10
_NO_LIMIT: tuple[str, dict[str, object]] = ("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
_PRECOPY_BANDWIDTH = 4 << 20  # so that it takes a busy machine less to begin postcopy than QEMU to complete
_SLOW_PRECOPY = 6 << 20
_ACTIVE = ("postcopy-active", "completed")
_SETTLED = 0.15  # seconds for which both must stay active
_TAKES_BACK = 3.0  # seconds after which a source does not take its guest back any more
_ASKED = 12.0  # and one that must: its QEMU answers nobody while it writes, and is asked again
_HELD = 2.5  # seconds after which a hold is not a passing one: longer than refault's RUN_SECONDS
_HELD_WRONGLY = 15.0  # and where it must pass, on a busy machine
_ANSWERS = 1.0  # seconds within which a source answers that is not at its end
_PAUSES = 40.0  # seconds within which both have paused
_DEADLINE = 45.0  # of one recovery; a client's migrate-pause alone is waited for 10 s


@dataclass
class Result:
    """What became of one loss. ``seconds`` from the loss until both sides were active again."""

    planned: Planned
    outcome: Outcome
    seconds: float | None = None
    note: str = ""
    outstanding: int = 0
    """Page requests that waited for their answer when the channel was lost."""
    at_its_end: bool = False
    """Whether the source had turned to its completion by then, which its class does not say."""


@dataclass
class Life:
    """What became of a migration: its losses, and what was not as it must be."""

    results: list[Result] = field(default_factory=list)
    version: tuple[int, int, int] = (0, 0, 0)
    pages_compared: int = 0
    replayed: int = 0
    """Page requests that the refaults wrote."""
    making: Planned | None = None
    """The loss that is being made, or was made last."""


@dataclass
class _Stage:
    pair: Pair
    channel: Channel
    driver: RefaultDriver
    watch: Watch
    steady: Sequence[Steady]
    capabilities: Sequence[str] = bare.CAPABILITIES
    at_its_end: bool = False
    """Whether the source had turned to its completion when a refault was killed."""

    @property
    def both(self) -> tuple[Qemu, Qemu]:
        return self.pair.source, self.pair.destination

    def marks(self) -> list[int]:
        return [len(qemu.qmp.events) for qemu in self.both]

    async def held(self) -> str | None:
        reasons = [
            f"{vm.name}: {vm.migration.held}" for vm in await self.driver.statuses() if vm.migration.held
        ]
        return "; ".join(reasons) or None


def _last(qemu: Qemu, since: int = 0) -> tuple[str, float]:
    found = [event for event in qemu.qmp.events[since:] if event.name == "MIGRATION"]
    return (found[-1].data["status"], found[-1].when) if found else ("none", 0.0)


@contextlib.asynccontextmanager
async def _stage(directory: Path, binary: str, capabilities: Sequence[str]) -> AsyncIterator[_Stage]:
    """Two QEMUs and two refaults, in two network namespaces where that may be done."""
    async with contextlib.AsyncExitStack() as stack:
        prefixes: tuple[Sequence[str], Sequence[str]] = ((), ())
        if os.geteuid() == 0:
            here, there = stack.enter_context(two_hosts())
            prefixes = here.prefix, there.prefix
        options = PairOptions(
            binary,
            binary,
            extra=disks(DISKS),
            source_prefix=prefixes[0],
            destination_prefix=prefixes[1],
        )
        pair = await stack.enter_async_context(start_pair(GUEST, directory, options))
        host, between = "127.0.0.1", None
        if prefixes[0]:
            host, between = here.address, Between(prefixes[0], there.address, pair.destination.pid)
        channel = await stack.enter_async_context(
            start_channel(directory, free_port(), host=host, between=between)
        )
        driver = await stack.enter_async_context(refault_driver(pair, channel, directory, prefixes=prefixes))
        watch = Watch(pair)
        nursery = await stack.enter_async_context(background())
        nursery.start_soon(watch.run)
        steady = [Steady(qemu) for qemu in (pair.source, pair.destination)]
        for each, side in zip(steady, SIDES, strict=True):
            nursery.start_soon(each.run, str(directory / f"{side}.client"))
        yield _Stage(pair, channel, driver, watch, steady, capabilities)


async def live(
    directory: Path,
    binary: str,
    plans: Sequence[Planned],
    life: Life,
    capabilities: Sequence[str] = bare.CAPABILITIES,
) -> None:
    """Runs one migration and makes the losses of ``plans`` as far as it comes; tells ``life``.

    Raises what a part of the lab raises that failed itself.
    """
    async with _stage(directory, binary or DEFAULT_BINARY, capabilities) as stage:
        life.version = stage.pair.source.qmp.version
        for planned in plans:
            life.making = planned
            if not await _make(stage, planned, life):
                break
        life.replayed = sum(vm.pages.replayed for vm in await stage.driver.statuses())
        await _end(stage, life)
        for each in stage.steady:
            await each.settle()
        if life.results:
            _tell_broken(stage, life.results[-1], refused=_refused(directory))


def _tell_broken(stage: _Stage, result: Result, *, refused: bool) -> None:
    """What must not be, whatever became of the last loss. Some QEMUs die of some, and no client notices more
    than that."""
    broken = stage.watch.broken
    noticed = [text for each in stage.steady for text in each.noticed]
    if any("dead" not in text for text in broken):
        result.outcome = Outcome.DOUBLED
    elif noticed:
        result.outcome = Outcome.NOTICED
    elif broken:
        result.outcome = Outcome.DEAD
    elif refused:
        result.outcome = Outcome.REFUSED
    if broken or noticed:
        result.note = "; ".join([*broken, *noticed])


def _refused(directory: Path) -> bool:
    """Whether a refault has taken its own VM's destination for another VM's."""
    return any("answers for another VM" in log.read_text() for log in directory.glob("refault-*.log"))


async def _make(stage: _Stage, planned: Planned, life: Life) -> bool:
    """Makes one loss; False where the migration does not go on after it."""
    if planned.kind.place is Place.ALONE:
        before = _setup if planned.kind.phase is Phase.SETUP else _precopy
        life.results.append(await before(stage, planned))
        return False
    since = [0, 0]
    stage.at_its_end = False
    if planned.kind.in_switchover:
        when = await _begin(stage, planned)
    else:
        if not life.results:
            await _begin(stage, None)
        if planned.kind.phase not in (Phase.RECOVERY, Phase.LAST):
            await trio.sleep(planned.after)
        if any(_last(qemu)[0] == "completed" for qemu in stage.both):
            return False
        since = stage.marks()
        made = await _lose(stage, planned)
        if made is None:
            return False
        when = made
    outstanding = max((vm.pages.outstanding for vm in await stage.driver.statuses()), default=0)
    result = await _judge(stage, planned, when, since)
    result.outstanding = outstanding
    result.at_its_end = stage.at_its_end and await _is_at_its_end(stage.pair.source)
    life.results.append(result)
    return result.outcome is Outcome.RECOVERED


async def _begin(stage: _Stage, planned: Planned | None) -> float:
    """Until the guest runs at the destination, or, with ``planned``, until the loss; gives its time."""
    source, destination = stage.driver.source, stage.driver.destination
    with trio.fail_after(60):
        await _start(stage, _PRECOPY_BANDWIDTH)
        await bare.wait_sent(source, 0.3)
        if planned is not None and planned.kind.phase is not None:
            return await _die_in_switchover(stage, planned)
        if planned is not None and planned.cut is not None:
            await stage.channel.cut_at(planned.cut)
        await source.execute("migrate-start-postcopy")
        if planned is not None and planned.cut is not None:
            return (await stage.channel.was_cut(planned.cut)).when
        await bare.wait_status(source, "postcopy-active")
        await destination.wait_event(lambda event: event.name == "RESUME")
        await destination.wait_migration("postcopy-active")
    return trio.current_time()


async def _start(stage: _Stage, bandwidth: int) -> None:
    await _prepare(stage, bandwidth)
    await stage.driver.source.execute("migrate", {"uri": stage.channel.uri})


async def _prepare(stage: _Stage, bandwidth: int) -> None:
    """All but the source's `migrate`."""
    source, destination = stage.driver.source, stage.driver.destination
    for qmp in (source, destination):
        await bare.set_capabilities(qmp, *stage.capabilities)
    limits = {
        "max-bandwidth": bandwidth,
        "max-postcopy-bandwidth": _POSTCOPY_BANDWIDTH,
        "downtime-limit": bare.DOWNTIME_LIMIT,
    }
    await source.execute("migrate-set-parameters", limits)
    await destination.execute("migrate-incoming", {"uri": stage.channel.target_uri})
    await stage.channel.wait_open()


async def _setup(stage: _Stage, planned: Planned) -> Result:
    """`migrate` was given and is not answered: QEMU has it and fails it or goes on, or never had it. The
    client's connection stays, and is answered."""
    client = stage.driver.source
    dies = partial(_die, stage, planned, after=planned.after)
    refused = ""
    with trio.move_on_after(60):
        async with trio.open_nursery() as nursery:
            command = {"uri": stage.channel.uri}
            nursery.start_soon(dies)
            try:
                await client.execute("migrate", command, timeout=math.inf)
            except QmpError as error:
                refused = str(error)
            except QmpClosed as error:
                return Result(planned, Outcome.NOTICED, note=str(error))
        return await _what_became_of_setup(stage, planned, refused)
    return Result(planned, Outcome.STUCK, note=_words(stage))


async def _what_became_of_setup(stage: _Stage, planned: Planned, refused: str) -> Result:
    """Whether the guest goes on at the source, or the migration does; the deadline is the caller's."""
    source = stage.pair.source
    while True:
        status = await bare.migration_status(source.qmp)
        if status in ("failed", "none") and (await source.qmp.execute("query-status"))["running"]:
            await source.wait_progress()
            if status == "failed" or refused:
                return Result(planned, Outcome.SOURCE_GOES_ON, note=refused)
        if status == "active" and not refused:
            with contextlib.suppress(RuntimeError):  # it fails all the same
                await bare.wait_sent(source.qmp, 0.3)
                return Result(planned, Outcome.UNHARMED)
        await trio.sleep(0.02)


async def _precopy(stage: _Stage, planned: Planned) -> Result:
    """A lost precopy: the guest goes on at the source, whatever becomes of the destination."""
    with trio.fail_after(60):
        await _start(stage, _SLOW_PRECOPY)
        await bare.wait_sent(stage.driver.source, planned.after)
        if planned.kind.phase is not None:
            await _die(stage, planned)
        elif planned.how is Loss.KILL:
            await stage.channel.kill(request_inside=False)
        else:
            await stage.channel.lose(planned.how)
    with trio.move_on_after(40):
        await bare.wait_status(stage.pair.source.qmp, "failed")
        if (await stage.pair.source.qmp.execute("query-status"))["running"]:
            await stage.pair.source.wait_progress()
            return Result(planned, Outcome.SOURCE_GOES_ON)
    return Result(planned, Outcome.STUCK, note=_words(stage))


async def _lose(stage: _Stage, planned: Planned) -> float | None:
    """Makes the loss; gives its time, None where no request came by for the carrier to die with."""
    qemu = stage.pair.source if planned.side == "source" else stage.pair.destination
    client = stage.driver.source if planned.side == "source" else stage.driver.destination
    when = trio.current_time()
    match planned.kind:
        case LossClass.PAUSE_SOURCE:
            await stage.pair.source.qmp.execute("migrate-pause", oob=True)
        case LossClass.PAUSE_DESTINATION:
            await stage.pair.destination.qmp.execute("migrate-pause", oob=True)
        case LossClass.PAUSE_CLIENT:
            await client.execute("migrate-pause", oob=True)
        case kind if kind in KILLED:
            return await _kill_refaults(stage, KILLED[kind], planned)
        case kind if kind.phase is not None:
            return await _die_in(kind.phase, stage, planned)
        case LossClass.EOF if planned.cut is not None:
            await stage.channel.cut_at(planned.cut)
            await stage.driver.source.execute(*_NO_LIMIT)
            return (await stage.channel.was_cut(planned.cut)).when
        case LossClass.ONE_OF_TWO if planned.cut is not None:
            await stage.channel.cut_at(planned.cut)
            return (await stage.channel.was_cut(planned.cut)).when
        case _ if planned.cut is not None:
            await stage.channel.cut_at(planned.cut)
            await stage.channel.lose(planned.how)
            return (await stage.channel.was_cut(planned.cut)).when
        case _:
            try:
                return (await stage.channel.lose(planned.how)).when
            except trio.TooSlowError:
                qemu.process.must_run()
                return None
    return when


async def both_paused(ends: Sequence[QmpClient], since: Sequence[int]) -> None:
    """Waits until both have paused, by their events from the numbers ``since`` on: the refault of a source
    whose destination a client has paused resumes it within milliseconds, and a look may come too late.
    """
    with trio.fail_after(_PAUSES):
        for qmp, mark in zip(ends, since, strict=True):
            await qmp.wait_migration("postcopy-paused", since=mark)


async def _kill_refaults(stage: _Stage, ends: Sequence[int], planned: Planned) -> float:
    """Kills them and starts them again; gives the time of the last kill."""
    driver = stage.driver
    when = trio.current_time()
    for end in ends:
        driver.processes[end].kill()
    await trio.sleep(planned.down)
    for end in ends:
        driver.start_again(end)
    if planned.again:
        end = SIDES.index(planned.side)
        await trio.sleep(planned.again)
        when = trio.current_time()
        driver.processes[end].kill()
        driver.start_again(end)
    for end in ends:
        await _connect_again(stage, end)
    return when


async def _die_in_switchover(stage: _Stage, planned: Planned) -> float:
    """Before its QEMU sends the package, in the midst of that, or when the destination is about to run."""
    if planned.cut is not None:
        return await _die_where_frozen(stage, planned, planned.cut, "migrate-start-postcopy")
    if planned.hangs and not planned.after:
        stage.driver.processes[SIDES.index(planned.side)].signal(signal.SIGSTOP)
    await stage.pair.source.qmp.execute("migrate-start-postcopy")
    return await _die(stage, planned, after=planned.after)


async def _die_in(phase: Phase, stage: _Stage, planned: Planned) -> float:
    """In postcopy, and what comes with it and after it."""
    match phase:
        case Phase.PAUSED:  # for ten seconds, which are the client's
            since = stage.marks()
            client = stage.driver.source if planned.pauses == "source" else stage.driver.destination
            await client.execute("migrate-pause", oob=True)
            await both_paused([each.qmp for each in stage.both], since)
        case Phase.RECOVERY:
            await stage.channel.lose(planned.how)
            return await _die(stage, planned, after=planned.after)
        case Phase.LAST if planned.cut is not None:
            return await _die_where_frozen(stage, planned, planned.cut, *_NO_LIMIT)
        case Phase.LAST:
            await stage.driver.source.execute(*_NO_LIMIT)
            return await _die(stage, planned, after=planned.after)
        case _:
            pass
    return await _die(stage, planned)


async def _die_where_frozen(
    stage: _Stage, planned: Planned, place: Cut, command: str, arguments: dict[str, object] | None = None
) -> float:
    """One is killed while nothing passes between the two, from a place in the stream on that comes after the
    source has taken a command."""
    await stage.channel.cut_at(place, freezes=True)
    await stage.driver.source.execute(command, arguments)
    await stage.channel.was_frozen()
    return await _die(stage, planned, after=planned.after, frozen=True)


async def _die(stage: _Stage, planned: Planned, *, after: float = 0.0, frozen: bool = False) -> float:
    """Has one killed, outright or after it has stood still, and starts it again; gives the time of the kill.
    Where the channel is ``frozen`` something passes again then."""
    await trio.sleep(after)
    end = SIDES.index(planned.side)
    refault = stage.driver.processes[end]
    if planned.hangs:
        refault.signal(signal.SIGSTOP)
        await trio.sleep(planned.hangs)
        await _look_at_its_end(stage, planned)
        await _abort(refault)
        when = trio.current_time()
    else:
        refault.kill()
        when = trio.current_time()
        if frozen:
            stage.channel.thaw()
        await _look_at_its_end(stage, planned)
    await trio.sleep(planned.down)
    stage.driver.start_again(end)
    await _connect_again(stage, end)
    return when


async def _look_at_its_end(stage: _Stage, planned: Planned) -> None:
    """Of a kill in postcopy: one at its end does not pause, so that it may as well be asked afterwards."""
    stage.at_its_end = planned.kind.place is Place.MIDDLE and await _is_at_its_end(stage.pair.source)


async def _is_at_its_end(source: Qemu) -> bool:
    """Whether a source has turned to its completion, by its own word: nothing is left to send, or it answers
    nobody while it sends the rest (migration/word.py)."""
    try:
        told = await source.qmp.execute("query-migrate", timeout=_ANSWERS)
    except trio.TooSlowError:
        return True
    except (QmpError, QmpClosed):
        return False
    return bool(told["status"] == "postcopy-active" and told["ram"]["remaining"] == 0)


async def _abort(refault: Process) -> None:
    """As systemd does when a service has said nothing for WatchdogSec=."""
    refault.signal(signal.SIGABRT)
    refault.signal(signal.SIGCONT)
    with trio.fail_after(30):
        await refault.wait()


async def _connect_again(stage: _Stage, end: int) -> None:
    """A client at a refault that was killed, unless its QEMU has ended: that is to be judged."""
    with trio.fail_after(30):
        while True:
            with contextlib.suppress(QmpClosed), trio.move_on_after(2):
                await stage.driver.connect_again(end)
                return
            try:
                stage.both[end].process.must_run()
            except ProcessFailed:
                return


async def _judge(stage: _Stage, planned: Planned, when: float, since: Sequence[int]) -> Result:
    """Waits until it is clear how the loss has ended."""
    held_since: float | None = None
    deadline = when + _DEADLINE
    destination = stage.pair.destination.process
    while trio.current_time() < deadline:
        ended_before = destination.status is not None
        if await _ended_without_guest(stage, planned):
            return Result(planned, Outcome.LEFT_AT_SOURCE, note=_words(stage))
        if _asks_the_operator(stage, planned) and (taken_back := await _operate(stage, planned)):
            return taken_back
        last = [_last(qemu, mark) for qemu, mark in zip(stage.both, since, strict=True)]
        if last[0][0] == "failed":
            return await _source_failed(stage, planned)
        if planned.kind.in_switchover and destination.status is not None and not ended_before:
            continue  # whether it ended without the guest is asked first
        stage.watch.look_at_processes()
        if stage.watch.broken:
            return Result(planned, Outcome.DEAD, note=_words(stage))
        if all(_goes_on_since(when, *each) for each in last) and _settled(last):
            took = max(at for _, at in last) - when
            return Result(planned, Outcome.RECOVERED, took if took > 0 else None)
        held = await stage.held()
        held_since = (held_since or trio.current_time()) if held else None
        passes = Outcome.HELD not in allowed(planned.kind, stage.pair.source.qmp.version)
        most = _HELD_WRONGLY if passes else _HELD
        if _never_leaves_device(stage, planned, last) and held:
            return Result(planned, Outcome.LEFT_AT_SOURCE, note=f"{held}; {_words(stage)}")
        if held_since is not None and trio.current_time() - held_since > most:
            completed = last[1][0] == "completed"
            return Result(
                planned,
                Outcome.COMPLETED_HELD if completed else Outcome.HELD,
                note=f"{held}; {_words(stage)}",
            )
        await trio.sleep(0.01)
    return Result(planned, Outcome.STUCK, note=_words(stage))


def _asks_the_operator(stage: _Stage, planned: Planned) -> bool:
    told = "ALERT: the channel was lost in the switchover"
    return planned.kind.in_switchover and told in stage.driver.processes[0].tail(50)


async def _operate(stage: _Stage, planned: Planned) -> Result | None:
    """What the alert says that the operator do, where the guest never ran at the destination."""
    source, destination = stage.both
    if any(event.name == "RESUME" for event in destination.qmp.events):
        return None
    note = _words(stage)
    if destination.process.status is None:
        if (await destination.qmp.execute("query-status"))["status"] != "inmigrate":
            return None
        destination.process.kill()
    await stage.driver.source.execute("migrate", {"uri": TAKE_BACK, "resume": True})
    with trio.fail_after(40):
        await bare.wait_status(source.qmp, "failed")
        await source.wait_progress()
    return Result(planned, Outcome.TAKEN_BACK, note=note)


async def _ended_without_guest(stage: _Stage, planned: Planned) -> bool:
    """Whether the destination has ended before it had the guest."""
    destination = stage.pair.destination.process
    if not planned.kind.in_switchover or destination.status is None:
        return False
    refault = stage.driver.processes[1]
    stays = Outcome.LEFT_AT_SOURCE in allowed(planned.kind, stage.pair.source.qmp.version)
    with trio.move_on_after(_TAKES_BACK if stays else _ASKED):
        while not _asks_the_operator(stage, planned):
            if _last(stage.pair.source)[0] == "failed":
                return False
            await trio.sleep(0.05)
        return False
    closed = planned.kind.phase is not None or "in precopy: closing QEMU's" in refault.tail(50)
    return closed and not stage.watch.handed_over


def _never_leaves_device(stage: _Stage, planned: Planned, last: Sequence[tuple[str, float]]) -> bool:
    """Whether a 10.0 was still writing the package as a killed refault's leg ended, and stays in `device`, as
    a bare one does. The destination's refault, which lives, holds what without it would have ended."""
    (status, since), there = last[0], stage.watch.handed_over
    waited = trio.current_time() - since > _HELD
    return planned.kind.phase is Phase.SWITCHOVER and status == "device" and waited and not there


def _goes_on_since(when: float, status: str, at: float) -> bool:
    """Whether a QEMU goes on after a loss, by its last word; one that is `completed` needs nothing more."""
    return status == "completed" or (status in _ACTIVE and at > when)


def _settled(last: Sequence[tuple[str, float]]) -> bool:
    now = trio.current_time()
    return all(status == "completed" or now - at > _SETTLED for status, at in last)


async def _source_failed(stage: _Stage, planned: Planned) -> Result:
    await trio.sleep(1.0)  # refault stops it
    running = (await stage.pair.source.qmp.execute("query-status"))["running"]
    outcome = Outcome.SOURCE_GOES_ON if running else Outcome.STOPPED
    return Result(planned, outcome, note=_words(stage))


def _words(stage: _Stage) -> str:
    statuses = (f"{qemu.name} {_last(qemu)[0]}" for qemu in stage.both)
    return ", ".join([*statuses, *stage.watch.broken])


async def _end(stage: _Stage, life: Life) -> None:
    """Lets the migration complete where it can, and compares the memory wherever the guest is whole."""
    if not life.results:
        return
    result = life.results[-1]
    source, destination = stage.both
    here = (Outcome.SOURCE_GOES_ON, Outcome.TAKEN_BACK, Outcome.STOPPED, Outcome.LEFT_AT_SOURCE)
    if result.outcome in here:
        verdict = await compare(GUEST, source.qmp)
    elif result.outcome in (Outcome.RECOVERED, Outcome.UNHARMED, Outcome.COMPLETED_HELD):
        try:
            with trio.fail_after(60):
                if result.outcome is Outcome.UNHARMED:
                    await stage.driver.source.execute("migrate-start-postcopy")
                if result.outcome is not Outcome.COMPLETED_HELD:
                    await stage.driver.source.execute(*_NO_LIMIT)
                    await source.qmp.wait_migration("completed")
                await destination.qmp.wait_migration("completed")
                await destination.wait_progress(30)
            stage.watch.look_at_processes()
            verdict = await compare(GUEST, destination.qmp, source.qmp)
        except (trio.TooSlowError, QmpError, QmpClosed) as error:
            result.outcome, result.note = Outcome.STUCK, f"afterwards: {error!r}; {_words(stage)}"
            stage.watch.look_at_processes()
            return
    else:
        return
    life.pages_compared = verdict.pages
    if not verdict.right:
        result.outcome, result.note = Outcome.WRONG_MEMORY, str(verdict)


def compose(
    draw: random.Random, remaining: dict[LossClass, int], per_life: int, *, handshake_ends_it: bool
) -> list[LossClass]:
    """Draws the classes of one migration from what is still to be made.

    ``handshake_ends_it``: no QEMU of this version goes on after a loss in the recovery handshake.
    """
    left = [kind for kind, count in remaining.items() if count > 0]
    first = [kind for kind in left if kind.place is Place.FIRST]
    middle = [kind for kind in left if kind.place is Place.MIDDLE]
    last = [kind for kind in left if kind.place is Place.LAST]
    if handshake_ends_it:
        last += [kind for kind in middle if kind.in_handshake]
        middle = [kind for kind in middle if not kind.in_handshake]
    alone = [kind for kind in left if kind.place is Place.ALONE]
    if alone and (alone == left or draw.random() < 1 / 3):
        return [draw.choice(alone)]
    pool = [kind for kind in middle for _ in range(remaining[kind])]
    draw.shuffle(pool)
    begins = [draw.choice(first)] if first and (draw.random() < 0.5 or not pool) else []
    ends = [draw.choice(last)] if last else []
    return [*begins, *pool[:per_life], *ends]
