"""Makes docs/speed.md anew: what refault costs a migration, and what it gains, as shares of direct's.

Run: python -m tests.bench.speed docs/speed.md [--qemu QEMU] [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from . import bench_faults, bench_precopy
from .ways import options_of, rows_of

HEAD = """# What refault costs a migration's speed, and what it gains

Made by `python -m tests.bench.speed docs/speed.md`. Each part alone, and beside another checkout, is made by
`bench_faults.py` and `bench_precopy.py` (`make bench`), which say what is measured. The ways take turns.
Figures are medians of {rounds} runs; "x" is of direct's, in the same run. "source" is a refault at the source
alone, "both" one at each side, with their default options. "socat, 3 of 5": the others did not end.

{machine}

Both hosts share these CPUs, so that what stands between takes its time from the QEMUs; on two it does not.
A guest that waits less for its pages asks for more of them. Why the queues are as they are:
`cext/queues.h`.
"""
PARTS = (
    ("Postcopy", "One vCPU that writes to pages in no order, as fast as it can.", bench_faults.measure),
    ("Precopy", "256 MiB that are all written.", bench_precopy.measure),
)


def machine(qemu: str) -> str:
    """Where it was measured, and what else went on there."""
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in facts if line.startswith("model name")), "unknown")
    version = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    return (
        f"At {commit or 'no commit'}, {datetime.now(UTC):%Y-%m-%d}, QEMU {version.split()[3]}, Linux"
        f" {platform.release()}, {os.cpu_count()} CPUs ({cpu}), load {os.getloadavg()[0]:.0f} when it began."
    )


def markdown(rows: list[list[str]]) -> str:
    """A table."""
    head, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *others])


def main() -> None:
    """Measures all, for some minutes, and writes the page."""
    page = Path(sys.argv.pop(1))
    options: argparse.Namespace = options_of(__doc__ or "")
    text = HEAD.format(rounds=options.rounds, machine=machine(options.qemu))
    for title, what, measure in PARTS:
        text += f"\n## {title}\n\n{what}\n"
        for name, ways in measure(options).items():
            text += f"\n{name}:\n\n{markdown(rows_of(ways))}\n"
    page.write_text(text)


if __name__ == "__main__":
    main()
