"""The record against QEMU's own trace events in many paused migrations, and received bitmaps against what the
forward decoder counted, in many losses. Ends with a traceback at the first difference.

Run: python -m tests.campaign.truth [--qemu QEMU]... [--migrations N] [--losses N]
"""

from __future__ import annotations

import argparse
import collections
import itertools
import tempfile
from pathlib import Path

import trio
from tests.integration.in_flight import Difference, compare_bitmaps
from tests.integration.truth import Pause, compare_with_trace

from refault.lab.channel import Loss
from refault.lab.guest import Guest
from refault.lab.qemu import DEFAULT_BINARY

GUEST = Guest(vcpus=8, log_pages=10, tick_ns=500_000)
PAUSES_EACH = 2
LOSSES_EACH = 5


async def compare_records(binary: str, migrations: int, losses: itertools.cycle[Loss]) -> None:
    pauses: list[Pause] = []
    for _ in range(migrations):
        with tempfile.TemporaryDirectory(prefix="refault-") as directory:
            some = list(itertools.islice(losses, PAUSES_EACH))
            pauses += await compare_with_trace(GUEST, Path(directory), some, binary)
    kernel = collections.Counter(pause.threads - pause.faults for pause in pauses)
    print(
        f"{binary}: {migrations} migrations, {len(pauses)} pauses, {GUEST.vcpus} vCPUs:"
        f" {sum(len(pause.record) for pause in pauses)} pages on record,"
        f" {sum(len(pause.wanted) for pause in pauses)} of QEMU's not there yet and all but"
        f" {sum(pause.unsent for pause in pauses)} (not sent yet) on record; nothing else differs."
        f" Kernel's threads less faults that QEMU traced: {dict(sorted(kernel.items()))}",
        flush=True,
    )
    if set(kernel) != {0}:
        raise SystemExit("the kernel counts other threads than QEMU has read faults of")


async def compare_all_bitmaps(binary: str, count: int, losses: itertools.cycle[Loss]) -> None:
    differences: list[Difference] = []
    for first in range(0, count, LOSSES_EACH):
        with tempfile.TemporaryDirectory(prefix="refault-") as directory:
            some = list(itertools.islice(losses, min(LOSSES_EACH, count - first)))
            found = await compare_bitmaps(GUEST, Path(directory), some, binary)
            differences += itertools.chain.from_iterable(found)
    flight = [difference.in_flight for difference in differences]
    print(
        f"{binary}: {count} losses, {len(differences)} received bitmaps, each a part of what was forwarded;"
        f" in flight: {sum(flight)} pages in all, at most {max(flight)}, all of them the last that were sent",
        flush=True,
    )


async def main(arguments: argparse.Namespace) -> None:
    losses = itertools.cycle(Loss)
    for binary in arguments.qemu or [DEFAULT_BINARY]:
        await compare_records(binary, arguments.migrations, losses)
        await compare_all_bitmaps(binary, arguments.losses, losses)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--qemu", action="append")
    parser.add_argument("--migrations", type=int, default=50)
    parser.add_argument("--losses", type=int, default=20)
    trio.run(main, parser.parse_args())
