"""How long a postcopy page fault takes, and the migration, directly and through what stands between.

Two QEMUs on two hosts (network namespaces), over a link of 1 Gbit/s (tbf) and one without a limit, with and
without postcopy-preempt: directly, through a socat at both sides, a refault at the source, one at both sides.
The ways take turns, so that what else the machine does meets all alike. A fault lasts from the trace of the
request to that of its page. Needs root.

Run: python -m tests.bench.bench_faults [--qemu QEMU] [--rounds N] [--vcpus N] [--beside CHECKOUT] [--json]
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

import trio

from refault.lab import bare
from refault.lab.guest import Guest

from .ways import Cell, Run, Spent, Way, compared, laid, tell

RATES: tuple[str | None, ...] = ("1gbit", None)
LOG_PAGES = 15
"""128 MiB a vCPU."""


async def migrate(binary: str, vcpus: int, cell: Cell, way: Way, directory: Path) -> Run:
    """One migration, turned to postcopy at its beginning. Seconds count from there."""
    guest = Guest(vcpus, LOG_PAGES + (cell.rate is None) - (vcpus > 1) * 2, tick_ns=0)
    capabilities = ["postcopy-ram", *(["postcopy-preempt"] if cell.preempt else [])]
    limits = {
        "max-bandwidth": bare.PRECOPY_BANDWIDTH,
        "max-postcopy-bandwidth": 0,
        "downtime-limit": bare.DOWNTIME_LIMIT,
    }
    async with laid(way, guest, directory, cell.rate, binary=binary, trace=True) as pair:
        await pair.migrate(limits, capabilities)
        with trio.fail_after(30):
            await bare.wait_sent(pair.clients[0], 0.03)
        before, since = Spent.of(pair.between), trio.current_time()
        await pair.clients[0].execute("migrate-start-postcopy")
        run = await pair.result(before)
        run.total = trio.current_time() - since
        run.faults = pair.faults()
        return run


def quantile(runs: list[Run], share: float) -> float:
    """The median over runs of that quantile of their faults, in seconds."""
    return statistics.median(sorted(run.faults)[int(share * (len(run.faults) - 1))] for run in runs)


def measures(runs: list[Run]) -> dict[str, float]:
    """What is told of a way."""
    return {
        "fault p50, ms": quantile(runs, 0.5) * 1e3,
        "fault p99, ms": quantile(runs, 0.99) * 1e3,
        "faults": statistics.median(len(run.faults) for run in runs),
        "total, s": statistics.median(run.total for run in runs),
        "downtime, ms": statistics.median(run.downtime for run in runs) * 1e3,
    }


def measure(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """For each link and mode the measures of each way."""
    cells = (Cell(rate, preempt) for preempt in (False, True) for rate in RATES)
    return compared(options, cells, partial(migrate, options.qemu, options.vcpus), measures)


def main() -> None:
    """Prints a table for each link and mode."""
    tell(measure, __doc__ or "")


if __name__ == "__main__":
    main()
