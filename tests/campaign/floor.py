"""How soon both sides are active again after the far leg was closed, beside what QEMU itself takes.

    refault  two `refault run`; the far leg is closed
    floor    bare QEMUs over the same link; the connection is closed, and the script that closes it issues
             `exec-oob migrate-recover` and `migrate` with `resume` as soon as each QEMU says it has paused

Both in two network namespaces joined by a link of 100 Mbit/s, plain TCP, nothing in between; the connection
is shut down from outside, at both ends. Time is from that moment until the later of the QEMUs said
`postcopy-active`, by QEMU's own clock. The two take turns, some losses in each migration. Exits with 1 unless
the median with refault is at most 1.5 times the floor's and the p99 below 100 ms; so too for the moment when
the source begins the recovery, which leaves out how the network carries the handshake: there a bare QEMU
waits for delayed acknowledgements, and one behind a relay does not.

Run: python -m tests.campaign.floor [--qemu QEMU] [--losses 100]
"""

from __future__ import annotations

import argparse
import contextlib
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import trio
from tests.campaign.connection import connection_of
from tests.campaign.hosts import Setting, TwoHosts, on_two_hosts
from tests.campaign.record import commit_of

from refault.lab.channel import free_port
from refault.lab.driver import REFAULT
from refault.lab.guest import Guest
from refault.lab.qemu import DEFAULT_BINARY, Qemu

GUEST = Guest(vcpus=2, log_pages=14, tick_ns=5_000_000)
LINK = "100mbit"
"""QEMU itself is given no limit: one that keeps to a limit sleeps, and notices a loss up to 0.1 s later."""
LINK_AT_THE_END = "10gbit"
RATIO_MOST = 1.5
P99_MOST = 0.1
_LOSSES_OF_ONE = 10
_DEADLINE = 40.0


STEPS = ("postcopy-paused", "postcopy-recover", "postcopy-active")
Steps = dict[tuple[str, str], float]
"""Seconds from the loss until a QEMU, by name, said each of STEPS."""
BEGUN = ("src", "postcopy-recover")


async def lose(lab: TwoHosts) -> Steps:
    """Closes the connection and, where no refault does it, recovers."""
    with contextlib.ExitStack() as stack:
        owners = lab.refaults if lab.setting.refault else lab.qemus
        ends = [stack.enter_context(connection_of(owner.pid, lab.port)) for owner in owners]
        since = lab.marks()
        lost = time.time()
        for end in ends:
            with contextlib.suppress(OSError):  # the other end may have answered with a reset already
                end.shutdown(socket.SHUT_RDWR)
        if not lab.setting.refault:
            await _recover(lab, since)
        await lab.both("postcopy-active", since, _DEADLINE)
    return {
        (qemu.name, step): _stamp(qemu, step, mark) - lost
        for qemu, mark in zip(lab.qemus, since, strict=True)
        for step in STEPS
    }


def _stamp(qemu: Qemu, step: str, since: int) -> float:
    return next(event.stamp for event in qemu.qmp.events[since:] if event.data.get("status") == step)


def until_active(steps: Steps) -> float:
    """The seconds until both were active again."""
    return max(seconds for (_, step), seconds in steps.items() if step == "postcopy-active")


async def _recover(lab: TwoHosts, since: Sequence[int]) -> None:
    """The two commands; at a new port, for QEMU's first listener may still be open."""
    source, destination = lab.clients
    lab.port = free_port()
    with trio.fail_after(_DEADLINE):
        await lab.pair.destination.qmp.wait_migration("postcopy-paused", since=since[1])
        await destination.execute("migrate-recover", {"uri": lab.uri}, oob=True)
        await lab.pair.source.qmp.wait_migration("postcopy-paused", since=since[0])
        await source.execute("migrate", {"uri": lab.uri, "resume": True})


async def losses_of_one(
    binary: str, refault: bool, losses: int, command: Sequence[str] = REFAULT
) -> tuple[list[Steps], tuple[int, int, int]]:
    """One migration with so many losses, compared at its end; what each took, and QEMU's version. `command`:
    how refault is started."""
    taken: list[Steps] = []
    with tempfile.TemporaryDirectory(prefix="refault-floor-") as directory:
        setting = Setting(binary, GUEST, refault, command=command)
        async with on_two_hosts(Path(directory), setting) as lab:
            lab.hosts[0].limit(LINK)
            await lab.begin(0)
            await lab.postcopy()
            for _ in range(losses):
                await trio.sleep(random.uniform(0.15, 0.35))
                taken.append(await lose(lab))
            lab.hosts[0].limit(LINK_AT_THE_END)
            await lab.finish()
            return taken, lab.pair.source.qmp.version


async def measure(binary: str, losses: int) -> tuple[list[Steps], list[Steps], tuple[int, int, int]]:
    """So many losses with refault and as many of the floor, taking turns."""
    with_refault: list[Steps] = []
    floor: list[Steps] = []
    version = (0, 0, 0)
    while len(floor) < losses:
        now = min(_LOSSES_OF_ONE, losses - len(floor))
        for refault, taken in ((True, with_refault), (False, floor)):
            try:
                more, version = await losses_of_one(binary, refault, now)
            except Exception as error:
                if refault:
                    raise
                print(f"floor: a migration was lost, and is made again: {error!r}", flush=True)
                more, version = await losses_of_one(binary, refault, now)
            taken += more
    return with_refault, floor, version


def p99(times: Sequence[float]) -> float:
    """The 99th percentile of 100; of fewer the longest."""
    return sorted(times)[min(len(times) - 1, int(len(times) * 0.99))]


def told(name: str, taken: Sequence[Steps]) -> None:
    """Prints what the losses of one kind took, step by step."""
    print(f"{name:8} {len(taken)} losses: {_figures([until_active(steps) for steps in taken])}")
    for key in sorted(taken[0], key=lambda key: statistics.median(steps[key] for steps in taken)):
        print(f"           {' '.join(key):22} {_figures([steps[key] for steps in taken])}")


def _figures(times: Sequence[float]) -> str:
    ms = [time * 1000 for time in times]
    return f"median {statistics.median(ms):6.1f} ms, p99 {p99(ms):6.1f} ms, longest {max(ms):6.1f} ms"


def ratio(times: Sequence[float], least: Sequence[float]) -> float:
    """Of the medians."""
    return statistics.median(times) / statistics.median(least)


def main() -> int:
    """The process's beginning."""
    parser = argparse.ArgumentParser(prog="make campaign-floor")
    parser.add_argument("--qemu", default=DEFAULT_BINARY)
    parser.add_argument("--losses", type=int, default=100)
    arguments = parser.parse_args()
    with_refault, floor, version = trio.run(measure, arguments.qemu, arguments.losses)
    print(f"command  python -m tests.campaign.floor {' '.join(sys.argv[1:])}")
    print(f"commit   {commit_of()}")
    print(f"QEMU     {'.'.join(map(str, version))}")
    told("refault", with_refault)
    told("floor", floor)
    ours = [until_active(steps) for steps in with_refault]
    active = ratio(ours, [until_active(steps) for steps in floor])
    begun = ratio([steps[BEGUN] for steps in with_refault], [steps[BEGUN] for steps in floor])
    print(
        f"ratio of the medians: until active {active:.2f}, until the source begins {begun:.2f}"
        f" (aim {RATIO_MOST})"
    )
    return 0 if max(active, begun) <= RATIO_MOST and p99(ours) < P99_MOST else 1


if __name__ == "__main__":
    sys.exit(main())
