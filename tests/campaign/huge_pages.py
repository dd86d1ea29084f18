"""Guests in pages of 2 MiB whose channel is lost while the source serves a request: how often QEMU pauses
again, how long that lasts, and whether the migration is brought to its end.

One loss in each migration, four vCPUs, each touching a page every 30 ms; memory compared at the end. Exits
with 1 where one has not come to rest within --seconds, or did not end.

Run: python -m tests.campaign.huge_pages [--qemu QEMU] [--losses 12] [--seconds 6]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import trio
from tests.campaign.record import commit_of
from tests.integration import memory_kinds as kinds

from refault.lab import bare
from refault.lab.channel import Loss, free_port, start_channel
from refault.lab.driver import RefaultDriver, refault_driver
from refault.lab.memory import compare
from refault.lab.qemu import DEFAULT_BINARY, PairOptions, start_pair

KIND = kinds.HUGE_PAGES
FINISH_SECONDS = 20.0


@dataclass(frozen=True)
class Told:
    """What became of one loss."""

    pauses: int
    """How often the destination paused, the loss itself included."""
    seconds: float
    """From the loss until both sides were active for good."""
    rests: bool
    ended: bool


async def one(binary: str, seconds: float) -> Told | None:
    """One migration with one loss; None where it was over before."""
    with tempfile.TemporaryDirectory(prefix="refault-huge-") as place:
        directory = Path(place)
        async with (
            start_pair(KIND.guest, directory, PairOptions(binary, binary, KIND.arguments())) as pair,
            start_channel(directory, free_port()) as channel,
            refault_driver(pair, channel, directory) as driver,
        ):
            await bare.start_postcopy(
                driver.source,
                driver.destination,
                channel,
                bandwidth=KIND.bandwidth,
                precopy_bandwidth=KIND.precopy_bandwidth,
                precopy_share=KIND.precopy_share,
            )
            await trio.sleep(random.uniform(0.1, 0.4))
            since, lost = len(driver.destination.events), time.time()
            await channel.lose(Loss.RESET)
            try:
                await kinds.at_rest(driver, seconds)
            except trio.TooSlowError:
                rests = False
            else:
                rests = True
            statuses = [
                (event.stamp, event.data["status"])
                for event in driver.destination.events[since:]
                if event.name == "MIGRATION"
            ]
            if not statuses:
                return None
            pauses = sum(status == "postcopy-paused" for _, status in statuses)
            ended = await _ends(driver)
            if ended:
                verdict = await compare(KIND.guest, pair.destination.qmp, pair.source.qmp)
                assert verdict.right, verdict
            return Told(pauses, statuses[-1][0] - lost, rests, ended)


async def _ends(driver: RefaultDriver) -> bool:
    with trio.move_on_after(FINISH_SECONDS):
        await bare.finish(driver.source)
        return True
    return False


async def measure(binary: str, losses: int, seconds: float) -> int:
    """How many did not end as they must."""
    bad = 0
    with kinds.huge_pages(KIND):
        for number in range(1, losses + 1):
            told = None
            while told is None:
                told = await one(binary, seconds)
            bad += not (told.rests and told.ended)
            rest = "at rest" if told.rests else "no rest"
            end = "memory right" if told.ended else "NOT ENDED"
            took = f"{told.seconds * 1000:.0f} ms"
            print(f"loss {number}: {told.pauses - 1} more pauses, {rest} after {took}; {end}", flush=True)
    return bad


def main() -> int:
    """The process's beginning."""
    parser = argparse.ArgumentParser(prog="make campaign-huge_pages")
    parser.add_argument("--qemu", default=DEFAULT_BINARY)
    parser.add_argument("--losses", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=6.0, help="until it must have come to rest")
    arguments = parser.parse_args()
    print(f"command  python -m tests.campaign.huge_pages {' '.join(sys.argv[1:])}")
    print(f"commit   {commit_of()}\nQEMU     {arguments.qemu}\n", flush=True)
    return 1 if trio.run(measure, arguments.qemu, arguments.losses, arguments.seconds) else 0


if __name__ == "__main__":
    sys.exit(main())
