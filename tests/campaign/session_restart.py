"""Migrations over sessions whose refaults are restarted again and again, as planned: no QEMU notices it.

Of either end or of both, at moments drawn from a seed: in precopy, around the switchover, in postcopy, and as
the source sends the last of it. Some come while the one before is still under way, and end a refault that has
not come to serve.

Run: python -m tests.campaign.session_restart [--qemu BINARY] [--restarts 200] [--seed N]
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import trio
from tests.campaign.invariants import Watch
from tests.campaign.record import commit_of
from tests.campaign.session import SEEN
from tests.integration.test_session import Lab, lab

from refault.lab.process import ProcessFailed
from refault.lab.qemu import DEFAULT_BINARY
from refault.lab.qmp_client import QmpClosed, QmpError

ENDS = ("source", "destination")
LEFT = "the channel is left to the next refault"
_MIB = 1 << 20


async def _restart(world: Lab, directory: Path, end: int, became: Counter[str]) -> None:
    process, log = world.driver.processes[end], directory / f"refault-{ENDS[end]}.log"
    before = log.read_text().count(LEFT)
    process.signal(signal.SIGUSR2)
    await process.wait()
    if log.read_text().count(LEFT) > before:
        became["gone on with"] += 1
    elif process.status != 0:
        became["ended in its start"] += 1
    else:
        became["the migration was over" if _is_over(world) else "not handed over"] += 1
    world.driver.start_again(end)


def _is_over(world: Lab) -> bool:
    qemus = (world.pair.source.qmp, world.pair.destination.qmp)
    return any(event.data.get("status") == "completed" for qmp in qemus for event in qmp.events)


async def _course(world: Lab, directory: Path, draw: random.Random, became: Counter[str]) -> None:
    source, destination = world.pair.source.qmp, world.pair.destination.qmp

    async def restarts() -> None:
        for _ in range(draw.randrange(1, 3)):
            await trio.sleep(draw.random() * 0.4)
            async with trio.open_nursery() as nursery:
                for end in draw.choice(([0], [1], [0, 1])):
                    nursery.start_soon(_restart, world, directory, end, became)

    async def meanwhile(command: str, arguments: Mapping[str, object] | None = None) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(restarts)
            await trio.sleep(draw.random() * 0.4)
            await world.driver.source.execute(command, dict(arguments or {}))

    await world.until_a_session()
    slow = {"max-postcopy-bandwidth": draw.choice((1, 1, _MIB))}
    await meanwhile("migrate-set-parameters", slow)
    await meanwhile("migrate-start-postcopy")
    await destination.wait_event(lambda event: event.name == "RESUME")
    await source.wait_migration("postcopy-active")
    fast = {"max-postcopy-bandwidth": draw.choice((0, 5 * _MIB, 30 * _MIB))}
    await meanwhile("migrate-set-parameters", fast)
    await world.complete(pauses=0)


async def _one(binary: str, seed: int, became: Counter[str]) -> list[str]:
    """One migration; what was wrong with it."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        try:
            async with lab(directory, binary) as world, trio.open_nursery() as nursery:
                watch = Watch(world.pair)
                nursery.start_soon(watch.run)
                try:
                    await _course(world, directory, random.Random(seed), became)
                finally:
                    watch.look_at_processes()
                    wrong += watch.broken
                    for qemu in (world.pair.source, world.pair.destination):
                        told = {str(e.data["status"]) for e in qemu.qmp.events if e.name == "MIGRATION"}
                        wrong += [f"{qemu.name}: {status}" for status in sorted(told - SEEN)]
                    nursery.cancel_scope.cancel()
        except* (trio.TooSlowError, QmpError, QmpClosed, ProcessFailed, AssertionError) as group:
            wrong += [f"{type(error).__name__}: {error}" for error in group.exceptions]
        for side in ENDS:
            said = (directory / f"refault-{side}.log").read_text().splitlines()
            bad = ("internal error", "ALERT", "it counts as lost")
            wrong += [line for line in said if any(each in line for each in bad)]
    return wrong


async def campaign(binary: str, restarts: int, seed: int) -> int:
    """Runs it, and prints what became of the restarts and of each migration that noticed one."""
    became: Counter[str] = Counter()
    migrations = noticed = 0
    while became.total() < restarts:
        wrong = await _one(binary, seed + migrations, became)
        if wrong:
            noticed += 1
            print(f"seed {seed + migrations}: {'; '.join(wrong)}", flush=True)
        migrations += 1
    print(f"{binary}: {became.total()} restarts in {migrations} migrations, {noticed} noticed one")
    for what, count in became.most_common():
        print(f"{count} x {what}")
    return 1 if noticed else 0


def main(arguments: list[str]) -> int:
    """Runs it once and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--qemu", default=DEFAULT_BINARY)
    parser.add_argument("--restarts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args(arguments)
    said = " ".join(arguments)
    print(
        f"commit {commit_of()}: python -m tests.campaign.session_restart {said} (seed {options.seed})",
        flush=True,
    )
    return trio.run(campaign, options.qemu, options.restarts, options.seed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
