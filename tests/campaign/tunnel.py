"""A long copy through `refault tunnel`, whose connections are lost again and again: no byte is wrong.

Bytes go in both directions at once, an eighth as many back. Each connection between the two refaults is lost
after a random number of bytes, by a reset, by a close, or with what was sent arriving later.

Run: python -m tests.campaign.tunnel [--size 10] [--losses 500] [--connections 1] [--key] [--seed N]
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

from tests.campaign.record import commit_of
from tests.support.tunnels import Tunnel, copies, tunnel

_RESUMED = re.compile(r"resumed after ([\d.]+) s")
_LEAST_RATE = 2 << 20
"""Bytes a second below which it is stuck."""


def _quantiles(log: str) -> str:
    times = sorted(float(found) for found in _RESUMED.findall(log))
    if not times:
        return "no resumption"
    p50, p90, p99 = (times[min(int(len(times) * part), len(times) - 1)] * 1000 for part in (0.5, 0.9, 0.99))
    longest = times[-1] * 1000
    return f"{len(times)} resumptions: p50 {p50:.0f} ms, p90 {p90:.0f}, p99 {p99:.0f}, longest {longest:.0f}"


def _run(both: Tunnel, options: argparse.Namespace) -> str:
    """Copies and compares; raises where a byte is wrong. What there is to tell."""
    size = int(options.size * (1 << 30)) // options.connections
    pairs = [both.connect() for _ in range(options.connections)]
    began = time.monotonic()
    both.proxy.lose(options.losses, max(2 * options.connections * size // max(options.losses, 1), 1000))
    running = copies(pairs, size, size // 8)
    for each in running:
        each.check(60 + size / _LEAST_RATE)
    seconds = time.monotonic() - began
    for sock in (each for pair in pairs for each in pair):
        sock.close()
    total = sum(each.count for each in running)
    return (
        f"{total / (1 << 30):.2f} GiB in {seconds:.0f} s, {total / seconds / (1 << 20):.0f} MiB/s; "
        f"{both.proxy.lost} connections lost; every byte right\n{_quantiles(both.plain.text())}\n"
        f"memory: {both.plain.memory() >> 20} MiB where connections come,"
        f" {both.session.memory() >> 20} MiB where they leave"
    )


def main(arguments: list[str]) -> int:
    """Runs it once and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=float, default=10.0, help="GiB in the one direction (10)")
    parser.add_argument("--losses", type=int, default=500)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--key", action="store_true", help="both ends have a key")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args(arguments)
    print(f"commit {commit_of()}: python -m tests.campaign.tunnel {' '.join(arguments)}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        given: list[str] = []
        if options.key:
            key = Path(directory) / "key"
            key.touch(0o600)
            key.write_bytes(os.urandom(32))
            given = ["--key", str(key)]
        with tunnel(*given, seed=options.seed) as both:
            print(_run(both, options), flush=True)
            statuses = both.plain.end(), both.session.end()
            assert statuses == (0, 0), statuses
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
