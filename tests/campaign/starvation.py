"""How soon a vCPU whose request was lost with the channel runs again, and that it does not without replay.

    replay   a destination that repeats nothing (as QEMU before 5.2), refault replays
    stock    a destination that repeats its requests itself, refault does not replay
    neither  a destination that repeats nothing, refault does not replay

The request is lost inside the killed carrier; time is from the destination's postcopy-active to the moment
when the last of the vCPUs was seen to go on. `replay` and `stock` take turns. Exits with 1 unless the median
of `replay` is at most 1.2 times that of `stock`, and with `neither` a vCPU is still blocked after 10 s.

Run: python -m tests.campaign.starvation [--qemu QEMU] [--runs N] [--neither N]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import trio
from tests.integration.starving import Case, build_no_repeat, lose_a_request

from refault.lab import bare
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.qemu import DEFAULT_BINARY

GUEST = Guest(vcpus=4, log_pages=14, tick_ns=2_000_000)
BACKGROUND = 2 << 20
BLOCKED_SECONDS = 10.0
RATIO_MOST = 1.2


async def time_to_run(case: Case) -> float:
    """Seconds from the recovery until all vCPUs ran; the guest's memory is compared at the end."""
    with tempfile.TemporaryDirectory(prefix="refault-") as directory:
        async with lose_a_request(case, Path(directory)) as found:
            left = await found.run_again(BLOCKED_SECONDS)
            if left:
                raise SystemExit(f"vCPUs {sorted(left)} still blocked after {BLOCKED_SECONDS} s: {case}")
            await bare.finish(found.driver.source)
            verdict = await compare(case.guest, found.pair.destination.qmp, found.pair.source.qmp)
            if not verdict.right:
                raise SystemExit(str(verdict))
            return max(when - found.recovered for when in found.stood if when is not None)


async def blocked(case: Case) -> int:
    """How many vCPUs do not run within BLOCKED_SECONDS of the recovery."""
    with tempfile.TemporaryDirectory(prefix="refault-") as directory:
        async with lose_a_request(case, Path(directory)) as found:
            return len(await found.run_again(BLOCKED_SECONDS))


def told(name: str, times: list[float]) -> None:
    ms = sorted(time * 1000 for time in times)
    print(
        f"{name:8} median {statistics.median(ms):6.1f} ms   {ms[0]:.1f} to {ms[-1]:.1f} ms in {len(ms)} runs"
    )


async def main(arguments: argparse.Namespace) -> int:
    times: dict[str, list[float]] = {"replay": [], "stock": []}
    with tempfile.TemporaryDirectory(prefix="refault-") as directory:
        no_repeat = build_no_repeat(Path(directory))
        cases = {
            "replay": Case(GUEST, BACKGROUND, True, no_repeat, arguments.qemu),
            "stock": Case(GUEST, BACKGROUND, False, None, arguments.qemu),
        }
        for _ in range(arguments.runs):
            for name, case in cases.items():
                times[name].append(await time_to_run(case))
        neither = Case(GUEST, BACKGROUND, False, no_repeat, arguments.qemu)
        stuck = [await blocked(neither) for _ in range(arguments.neither)]
    for name, each in times.items():
        told(name, each)
    ratio = statistics.median(times["replay"]) / statistics.median(times["stock"])
    print(f"ratio    {ratio:.2f} (at most {RATIO_MOST})")
    print(f"neither  vCPUs blocked over {BLOCKED_SECONDS:g} s, of {GUEST.vcpus}: {stuck}")
    return 0 if ratio <= RATIO_MOST and all(stuck) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--qemu", default=DEFAULT_BINARY)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--neither", type=int, default=3)
    raise SystemExit(trio.run(main, parser.parse_args()))
