"""What is waited out, and how: slow migrations, a blocked main thread, and a source that nobody answers.

    slow              1 MiB/s and a guest that faults little: it runs its time out and is never paused
    slow-unrelayed    the same with --relay off
    silent-unrelayed  --relay off and the link down: each side sees by itself that nothing moves
                      (--stall-after), the destination by its threads that wait
    blocked           the destination's main thread sleeps on a missing page: recovery runs out-of-band alone
    refused           a source whose channel is lost and at whose address nobody listens
    churn             the same, on a host where a link comes or goes five times a second
    no-route          the same, and its link is down
    mute              the same, and whoever accepts there says nothing

The last four tell how often the source tried and what share of a CPU its refault took. Exits with 1 where
one is paused, cut, lost, or takes 1% or more.

Run: python -m tests.campaign.patience [--qemu QEMU] [--seconds 20] [--only SCENARIO]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio
from tests.campaign.hosts import Setting, TwoHosts, on_two_hosts, refault_command
from tests.campaign.record import commit_of
from tests.campaign.scenarios import NotWell, tell

from refault.channel.relay import DEAD_AFTER_SECONDS
from refault.daemon.known.patience import Patience
from refault.daemon.telling import control
from refault.lab.guest import PAGE, Guest
from refault.lab.netns import Host
from refault.lab.process import Process, started
from refault.lab.qemu import DEFAULT_BINARY, Qemu
from refault.migration.versions import abilities

BANDWIDTH = 1 << 20
LAZY = Guest(vcpus=1, log_pages=13, tick_ns=1_000_000_000)
CPU_MOST = 0.01
_ADVICE = ("failed", "ALERT", "does not answer")
LONGEST_PAUSE = 2.0 * 1.25
"""Seconds between two tries: the longest back-off, with its jitter."""
QUIET = 1.4
"""Seconds without a try: the back-off is at its longest now or next, for the one before is 1.6 s at most."""
_CPUCLOCK_SCHED = 2
"""linux/posix-timers.h; clock_getcpuclockid(3) does the same."""
STALL_AFTER = Patience.stall_after
STALL_MARGIN = 1.4
"""It is looked at 20 times in that time, and the source counts from the last that TCP took."""
_TRY = 10.0
"""What one try may itself take (source.HANDSHAKE_TIMEOUT)."""


@dataclass
class Stage:
    """Two hosts in postcopy, and what is to be ended with them."""

    lab: TwoHosts
    seconds: float
    processes: contextlib.ExitStack


async def slow(stage: Stage) -> str:
    lab = stage.lab
    began = trio.current_time()
    with trio.fail_after(120):
        await lab.pair.source.qmp.wait_migration("completed")
    for qemu in lab.qemus:
        if "postcopy-paused" in statuses(qemu):
            raise NotWell(f"{qemu.name} was paused: {statuses(qemu)}")
    return f"postcopy took {trio.current_time() - began:.0f} s and was not paused"


async def silent(stage: Stage) -> str:
    lab = stage.lab
    since, began = lab.marks(), trio.current_time()
    lab.hosts[1].link("down")
    told = []
    for qemu, when in zip(lab.qemus, await lab.both("postcopy-paused", since, STALL_AFTER * 3), strict=True):
        told.append(f"the {qemu.name} paused after {when - began:.1f} s")
        if when - began > STALL_AFTER * STALL_MARGIN:
            raise NotWell(told[-1])
    since, up = lab.marks(), trio.current_time()
    lab.hosts[1].link("up")
    active = max(await lab.both("postcopy-active", since, 60)) - up
    return f"{', '.join(told)}; recovered {active:.2f} s after the link was up"


async def blocked(stage: Stage) -> str:
    lab = stage.lab
    destination = lab.pair.destination
    since = lab.marks()
    lab.hosts[1].link("down")
    async with trio.open_nursery() as nursery:
        await trio.sleep(0.5)  # what is on its way may come yet
        target = {"val": _missing_page(destination), "size": PAGE, "filename": str(lab.directory / "page")}
        nursery.start_soon(partial(lab.clients[1].execute, "pmemsave", target, timeout=120))
        with trio.fail_after(20):
            while not await _hangs(lab):
                await trio.sleep(0.02)
        await lab.both("postcopy-paused", since, DEAD_AFTER_SECONDS * 6)
        await _must_hang(lab)
        since, up = lab.marks(), trio.current_time()
        lab.hosts[1].link("up")
        active = max(await lab.both("postcopy-active", since, 60)) - up
    return f"recovered {active:.2f} s after the link was up; the command that hung came back"


def _missing_page(qemu: Qemu) -> int:
    """The address of a page that the destination has not got, and not the next of the background copy, which
    may be on its way still."""
    pages = (qemu.guest.arena(0) + offset for offset in reversed(range(0, qemu.guest.arena_bytes, PAGE)))
    return next(page for page in pages if qemu.memory.read(page, 1) is None)


async def _hangs(lab: TwoHosts) -> bool:
    """Whether the destination's main thread is blocked."""
    try:
        await lab.pair.destination.qmp.execute("query-status", timeout=0.5)
    except trio.TooSlowError:
        return True
    return False


async def _must_hang(lab: TwoHosts) -> None:
    if not await _hangs(lab):
        raise NotWell("the destination's main thread is not blocked")


async def refused(stage: Stage) -> str:
    return await _unanswered(stage)


async def churn(stage: Stage) -> str:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_links_come_and_go, stage.lab.hosts[0])
        told = await _unanswered(stage)
        nursery.cancel_scope.cancel()
    return told


async def _links_come_and_go(host: Host) -> None:
    kind = ["type", "veth", "peer", "name", "churn-peer"]
    for change in itertools.cycle((["add", "churn", *kind], ["del", "churn"])):
        await trio.run_process([*host.prefix, "ip", "link", *change])
        await trio.sleep(0.2)


async def no_route(stage: Stage) -> str:
    stage.lab.hosts[0].link("down")
    try:
        return await _unanswered(stage)
    finally:
        stage.lab.hosts[0].link("up")


async def mute(stage: Stage) -> str:
    lab = stage.lab
    with lab.hosts[1].socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((lab.hosts[1].address, lab.port))
        listener.listen(64)
        # Before 8.2 whoever accepted may be a QEMU that does not survive to be given up.
        waits = not abilities(lab.pair.source.qmp.version).pauses_again_in_handshake
        return await _unanswered(stage, waits=waits)


async def _unanswered(stage: Stage, *, waits: bool = False) -> str:
    """`waits`: one try, that is told of and goes on, will do."""
    lab = stage.lab
    source = lab.refaults[0]
    await _slowest_pace(lab)
    before, tried = _cpu_seconds(source), await _tries(lab)
    await trio.sleep(stage.seconds)
    share = (_cpu_seconds(source) - before) / stage.seconds
    tries = await _tries(lab) - tried
    advice = next(
        (line for line in reversed(lab.log("src")) if any(word in line for word in _ADVICE)), "none"
    )
    pace = f"{tries} tries, one in {stage.seconds / tries:.1f} s" if tries else "one that goes on"
    told = f"{pace}, {tried} before; {share:.2%} of a CPU; it says: {advice.partition(' src: ')[2]}"
    at_pace = (tries + 1) * (LONGEST_PAUSE + _TRY) >= stage.seconds
    if share >= CPU_MOST or not (at_pace or (waits and "going on to wait" in advice)):
        raise NotWell(told)
    return told


async def _slowest_pace(lab: TwoHosts) -> None:
    """Waits until the quick tries are over."""
    with trio.fail_after(60):
        tried = -1
        while tried != (tried := await _tries(lab)):
            await trio.sleep(QUIET)


def _cpu_seconds(process: Process) -> float:
    """What it has run, to the nanosecond: proc(5)'s stat counts hundredths, too coarse for a few seconds."""
    return time.clock_gettime((~process.pid << 3) | _CPUCLOCK_SCHED)


async def _tries(lab: TwoHosts) -> int:
    document = await trio.to_thread.run_sync(control.query, lab.directory / "src.control", 20.0)
    return document.vms[0].recovery.attempts


def statuses(qemu: Qemu) -> list[str]:
    """The migration statuses that a QEMU has told, in order."""
    return [event.data["status"] for event in qemu.qmp.events if event.name == "MIGRATION"]


SCENARIOS: dict[str, Callable[[Stage], Awaitable[str]]] = {
    "slow": slow,
    "slow-unrelayed": slow,
    "silent-unrelayed": silent,
    "blocked": blocked,
    "refused": refused,
    "churn": churn,
    "no-route": no_route,
    "mute": mute,
}


async def one(directory: Path, name: str, binary: str, seconds: float) -> str:
    """One scenario, with its memory compared; what became of it. Raises where it did not end well."""
    setting = Setting(binary, relay="off" if name.endswith("-unrelayed") else "auto")
    if "slow" in name:
        setting = Setting(binary, LAZY, relay=setting.relay)
    with contextlib.ExitStack() as processes:
        async with on_two_hosts(directory, setting) as lab:
            stage = Stage(lab, seconds, processes)
            await lab.begin(BANDWIDTH * 16, BANDWIDTH)
            await lab.postcopy()
            if name not in ("refused", "churn", "no-route", "mute"):
                told = await SCENARIOS[name](stage)
            else:
                since = lab.marks()
                lab.refaults[1].kill()
                await lab.both("postcopy-paused", since, 40)
                told = await SCENARIOS[name](stage)
                since = lab.marks()
                command = refault_command(directory, "dst", lab.pair.destination, lab.hosts, setting)
                processes.enter_context(started("refault (dst)", command, directory / "again.log"))
                await lab.both("postcopy-active", since, 40)
            return f"{told}; {await lab.finish(60)}"


async def measure(binary: str, seconds: float, names: list[str]) -> int:
    """How many did not end as they must."""
    bad = 0
    for name in names:
        scenario = partial(one, name=name, binary=binary, seconds=seconds)
        bad += not await tell(name, "refault", scenario)
    return bad


def main() -> int:
    """The process's beginning."""
    parser = argparse.ArgumentParser(prog="make campaign-patience")
    parser.add_argument("--qemu", default=DEFAULT_BINARY)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="how long an unanswered source is watched"
    )
    parser.add_argument("--only", action="append", choices=list(SCENARIOS), help="these alone")
    arguments = parser.parse_args()
    print(f"command  python -m tests.campaign.patience {' '.join(sys.argv[1:])}")
    print(f"commit   {commit_of()}\nQEMU     {arguments.qemu}\n", flush=True)
    names = arguments.only or list(SCENARIOS)
    return 1 if trio.run(measure, arguments.qemu, arguments.seconds, names) else 0


if __name__ == "__main__":
    sys.exit(main())
