"""How soon a thread whose request was lost with the channel runs again, and that it does not without replay.

    replay   a destination that repeats nothing (as QEMU before 5.2), refault replays
    stock    a destination that repeats its requests itself, refault does not replay
    neither  a destination that repeats nothing, refault does not replay

are about vCPUs, of which the last counts; with neither those are blocked whose request was lost, one at
least. Then the thread of a vhost-user back end, with a stock destination, for no QEMU repeats what a back
end asked for:

    back end, replay      refault replays
    back end, no replay   it does not

The request is lost inside the killed carrier; time is from the destination's postcopy-active to the moment
when the thread was seen to go on. Those with `replay` and `stock` take turns. Exits with 1 unless the median
of `replay` is at most 1.2 times that of `stock`, and without either a thread is still blocked after 10 s.

Run: python -m tests.campaign.starvation [--qemu QEMU] [--runs N] [--neither N]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import trio
from tests.integration.starving import Case, Recovered, build_no_repeat, lose_a_request

from refault.lab import bare
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.qemu import DEFAULT_BINARY
from refault.lab.starving_back_end import BackEndCase, BackEndMigration, start_with_back_ends

GUEST = Guest(vcpus=4, log_pages=14, tick_ns=2_000_000)
MOSTLY_BACK_END = Guest(vcpus=1, log_pages=16, tick_ns=1_000_000_000)
VAST = Guest(vcpus=4, log_pages=16, tick_ns=2_000_000)
VAST_MOSTLY_BACK_END = Guest(vcpus=1, log_pages=18, tick_ns=1_000_000_000)
"""1 GiB each, so that the background copy hardly comes to a lost page in BLOCKED_SECONDS by itself."""
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
            await memory_is_right(found)
            return max(when - found.recovered for when in found.stood() if when is not None)


async def time_to_run_back_end(case: BackEndCase) -> float:
    """The same for the thread of a back end."""
    with tempfile.TemporaryDirectory(prefix="refault-") as directory:
        async with start_with_back_ends(case, Path(directory)) as found:
            await found.start_postcopy()
            await found.lose()
            if (seconds := await found.run_again(BLOCKED_SECONDS)) is None:
                raise SystemExit(f"the back end is still blocked after {BLOCKED_SECONDS} s: {case}")
            await memory_is_right(found)
            return seconds


async def memory_is_right(found: Recovered | BackEndMigration) -> None:
    """Ends the migration and compares."""
    await bare.finish(found.driver.source)
    verdict = await compare(found.pair.source.guest, found.pair.destination.qmp, found.pair.source.qmp)
    if not verdict.right:
        raise SystemExit(str(verdict))


async def blocked(case: Case) -> int:
    """How many vCPUs do not run within BLOCKED_SECONDS of the recovery."""
    with tempfile.TemporaryDirectory(prefix="refault-") as directory:
        async with lose_a_request(case, Path(directory)) as found:
            return len(await found.run_again(BLOCKED_SECONDS))


async def back_end_blocked(case: BackEndCase) -> bool:
    """Whether the back end's thread does not run within BLOCKED_SECONDS of the recovery."""
    with tempfile.TemporaryDirectory(prefix="refault-") as directory:
        async with start_with_back_ends(case, Path(directory)) as found:
            await found.start_postcopy()
            await found.lose()
            return await found.run_again(BLOCKED_SECONDS) is None


def told(name: str, times: list[float]) -> None:
    ms = sorted(time * 1000 for time in times)
    print(
        f"{name:19} median {statistics.median(ms):.1f} ms, {ms[0]:.1f} to {ms[-1]:.1f} ms in {len(ms)} runs"
    )


async def main(arguments: argparse.Namespace) -> int:
    times: dict[str, list[float]] = {"replay": [], "stock": [], "back end, replay": []}
    with tempfile.TemporaryDirectory(prefix="refault-") as directory:
        no_repeat = build_no_repeat(Path(directory))
        replay = Case(GUEST, BACKGROUND, True, no_repeat, arguments.qemu)
        stock = Case(GUEST, BACKGROUND, False, None, arguments.qemu)
        neither = Case(VAST, BACKGROUND, False, no_repeat, arguments.qemu)
        back_end = BackEndCase(MOSTLY_BACK_END, BACKGROUND, True, arguments.qemu)
        for _ in range(arguments.runs):
            times["replay"].append(await time_to_run(replay))
            times["stock"].append(await time_to_run(stock))
            times["back end, replay"].append(await time_to_run_back_end(back_end))
        stuck = [await blocked(neither) for _ in range(arguments.neither)]
        alone = BackEndCase(VAST_MOSTLY_BACK_END, BACKGROUND, False, arguments.qemu)
        stuck_back_ends = [await back_end_blocked(alone) for _ in range(arguments.neither)]
    print(f"QEMU {arguments.qemu}, background {BACKGROUND >> 20} MiB/s; from the recovery until all run:")
    for name, each in times.items():
        told(name, each)
    ratio = statistics.median(times["replay"]) / statistics.median(times["stock"])
    print(f"ratio               {ratio:.2f} (at most {RATIO_MOST})")
    print(f"neither             blocked over {BLOCKED_SECONDS:g} s, of {GUEST.vcpus} vCPUs: {stuck}")
    print(f"back end, no replay blocked over {BLOCKED_SECONDS:g} s: {stuck_back_ends}")
    return 0 if ratio <= RATIO_MOST and all(stuck) and all(stuck_back_ends) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--qemu", default=DEFAULT_BINARY)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--neither", type=int, default=3)
    raise SystemExit(trio.run(main, parser.parse_args()))
