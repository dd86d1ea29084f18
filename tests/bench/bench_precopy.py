"""How long a precopy migration takes, and what of the CPUs, directly and through what stands between.

Two QEMUs on two hosts (network namespaces) and a guest of 256 MiB, all written, that then changes little,
over a link of 1 Gbit/s (tbf) and one without a limit: directly, through a socat at both sides, a refault at
the source, one at both sides. The ways take turns, so that what else the machine does meets all alike. Needs
root.

Run: python -m tests.bench.bench_precopy [--qemu QEMU] [--rounds N] [--beside CHECKOUT] [--json]
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

from refault.lab.guest import Guest

from .ways import Cell, Run, Spent, Way, compared, laid, tell

RATES: tuple[str | None, ...] = ("1gbit", None)
GUEST = Guest(vcpus=1, log_pages=16, tick_ns=500_000_000)
NO_LIMIT = 1 << 40


async def migrate(binary: str, cell: Cell, way: Way, directory: Path) -> Run:
    """One migration at full speed."""
    async with laid(way, GUEST, directory, cell.rate, binary=binary, trace=False) as pair:
        before = Spent.of(pair.between)
        await pair.migrate({"max-bandwidth": NO_LIMIT, "downtime-limit": 300}, [])
        return await pair.result(before)


def measures(runs: list[Run]) -> dict[str, float]:
    """What is told of a way."""
    return {
        "total, s": statistics.median(run.total for run in runs),
        "downtime, ms": statistics.median(run.downtime for run in runs) * 1e3,
        "CPU s a GiB": statistics.median(run.seconds / run.gib for run in runs),
        "switches a GiB": statistics.median(run.switches / run.gib for run in runs),
    }


def measure(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """For each link the measures of each way."""
    return compared(options, map(Cell, RATES), partial(migrate, options.qemu), measures)


def main() -> None:
    """Prints a table for each link."""
    tell(measure, __doc__ or "")


if __name__ == "__main__":
    main()
