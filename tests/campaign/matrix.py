"""What refault does on each QEMU: every check with every version, and a table at the end.

Run: python -m tests.campaign.matrix [--qemu QEMU]... [--only CHECK]...

Exits with 1 if a check failed. A check that a QEMU makes impossible says why, and does not fail.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import trio
from tests.campaign.starvation import (
    BACKGROUND,
    BLOCKED_SECONDS,
    MOSTLY_BACK_END,
    VAST,
    VAST_MOSTLY_BACK_END,
    back_end_blocked,
    blocked,
    time_to_run,
    time_to_run_back_end,
)
from tests.campaign.starvation import GUEST as STARVING_GUEST
from tests.campaign.truth import GUEST as TRUTH_GUEST
from tests.integration import memory_kinds as kinds
from tests.integration.in_flight import compare_bitmaps
from tests.integration.starving import Case, build_no_repeat
from tests.integration.truth import compare_with_trace

from refault.lab.channel import Loss
from refault.lab.qemu import DEFAULT_BINARY
from refault.lab.starving_back_end import BackEndCase

SECONDS = 150.0
"""What a check may take at most."""
LOSSES = 6


class NotPossibleError(Exception):
    """This QEMU or this machine cannot do it; the message says why."""


async def truth(directory: Path, binary: str) -> str:
    """The record against QEMU's trace events."""
    pauses = await compare_with_trace(TRUTH_GUEST, directory, list(Loss), binary)
    return f"{len(pauses)} pauses, {sum(len(pause.wanted) for pause in pauses)} pages"


async def bitmaps(directory: Path, binary: str) -> str:
    """Received bitmaps against what was forwarded."""
    losses = list(itertools.islice(itertools.cycle(Loss), LOSSES))
    found = list(itertools.chain.from_iterable(await compare_bitmaps(TRUTH_GUEST, directory, losses, binary)))
    return f"{len(found)} bitmaps, {sum(each.in_flight for each in found)} pages in flight"


async def vcpus_starve(directory: Path, binary: str) -> str:
    """vCPUs whose request was lost, with a destination that repeats nothing."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise NotPossibleError("the preloaded library is for KVM only")
    library = build_no_repeat(directory)
    seconds = await time_to_run(Case(STARVING_GUEST, BACKGROUND, True, library, binary))
    stuck = await blocked(Case(VAST, BACKGROUND, False, library, binary))
    assert stuck, "no vCPU is blocked without the replay"
    return f"{seconds * 1000:.0f} ms; without {stuck} vCPUs blocked over {BLOCKED_SECONDS:g} s"


async def back_end_starves(_: Path, binary: str) -> str:
    """The thread of a vhost-user back end whose request was lost."""
    seconds = await time_to_run_back_end(BackEndCase(MOSTLY_BACK_END, BACKGROUND, True, binary))
    stuck = await back_end_blocked(BackEndCase(VAST_MOSTLY_BACK_END, BACKGROUND, False, binary))
    assert stuck, "the back end is not blocked without the replay"
    return f"{seconds * 1000:.0f} ms; without blocked over {BLOCKED_SECONDS:g} s"


async def kind(memory: kinds.Kind, directory: Path, binary: str) -> str:
    """Memory of one kind, with losses."""
    await kinds.migrate(directory, memory, binary)
    return f"{len(memory.losses)} losses"


async def huge_pages(directory: Path, binary: str) -> str:
    """Memory in pages of 2 MiB, with losses."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(kinds.huge_pages(kinds.HUGE_PAGES))
        except OSError as error:
            raise NotPossibleError(str(error)) from None
        return await kind(kinds.HUGE_PAGES, directory, binary)


async def zero_pages(directory: Path, binary: str) -> str:
    """Zero pages that are asked for, one lost."""
    await kinds.ask_for_zero_pages(directory, binary)
    return "1 loss"


async def ignore_shared(directory: Path, binary: str) -> str:
    """Shared memory that stays: precopy, lost and made again."""
    await kinds.stay_in_shared_memory(directory, binary)
    return "1 loss in precopy"


async def demo(_: Path, binary: str) -> str:
    """The demo with losses."""
    command = [sys.executable, "-m", "refault", "demo", "--qemu", binary, "--losses", str(LOSSES), "--json"]
    run = await trio.run_process(
        [*command, "--memory", "64M"], capture_stdout=True, stderr=subprocess.DEVNULL, check=False
    )
    assert run.returncode == 0, run.stdout.decode()[-500:]
    return f"{LOSSES} losses"


Check = Callable[[Path, str], Awaitable[str]]
CHECKS: dict[str, Check] = {
    "truth": truth,
    "bitmaps": bitmaps,
    "vcpus-starve": vcpus_starve,
    "back-end-starves": back_end_starves,
    "two-blocks": partial(kind, kinds.TWO_BLOCKS),
    "many-blocks": partial(kind, kinds.MANY_BLOCKS),
    "xbzrle": partial(kind, kinds.XBZRLE),
    "huge-pages": huge_pages,
    "zero-pages": zero_pages,
    "ignore-shared": ignore_shared,
    "demo": demo,
}


async def make(check: Check, binary: str) -> tuple[str, str]:
    """Runs one: a word for the table, and what is to be said about it."""
    try:
        with tempfile.TemporaryDirectory(prefix="refault-") as directory, trio.fail_after(SECONDS):
            return "ok", await check(Path(directory), binary)
    except NotPossibleError as error:
        return "not possible", str(error)
    except (Exception, SystemExit) as error:  # a table with one failure is worth more than none
        return "FAILED", "".join(traceback.format_exception(error)[-3:]).strip()


def version(binary: str) -> str:
    """As the binary says it, for example `10.0.2`."""
    words = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.split()
    return words[words.index("version") + 1]


def main(arguments: argparse.Namespace) -> int:
    binaries = arguments.qemu or [DEFAULT_BINARY]
    versions = {binary: version(binary) for binary in binaries}
    table: dict[str, list[str]] = {}
    for name in arguments.only or CHECKS:
        for binary in binaries:
            start = time.monotonic()
            word, said = trio.run(make, CHECKS[name], binary)
            table.setdefault(name, []).append(word)
            print(
                f"{versions[binary]:8} {name:17} {word} ({time.monotonic() - start:.0f} s): {said}",
                flush=True,
            )
    print(f"\n| check | {' | '.join(versions.values())} |\n|---|{'---|' * len(versions)}")
    for name, words in table.items():
        print(f"| {name} | {' | '.join(words)} |")
    return int(any("FAILED" in words for words in table.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--qemu", action="append")
    parser.add_argument("--only", action="append", choices=list(CHECKS))
    raise SystemExit(main(parser.parse_args()))
