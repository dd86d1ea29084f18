"""Runs migrations one after the other until all losses were made."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import trio
from tests.campaign.life import Life, compose, live
from tests.campaign.losses import LossClass, plan
from tests.campaign.outcomes import allowed
from tests.campaign.record import Record, commit_of

from refault.migration.versions import abilities

_PER_LIFE = 7
_LONGEST = 240.0  # seconds of one migration


async def run(
    binary: str, kinds: Sequence[LossClass], losses: int, seed: int, seconds: float, logs: Path | None = None
) -> Record:
    """Makes ``losses`` losses, spread evenly over ``kinds``; begins no migration after ``seconds``.

    The logs of migrations that ended worse than QEMU allows are kept below ``logs``.
    """
    draw = random.Random(seed)
    print(f"seed {seed}", flush=True)
    record = Record(" ".join(["python -m tests.campaign", *sys.argv[1:]]), commit_of(), seed)
    each, more = divmod(losses, len(kinds))
    remaining = {kind: each + (at < more) for at, kind in enumerate(draw.sample(kinds, len(kinds)))}
    began = trio.current_time()
    while any(count > 0 for count in remaining.values()) and trio.current_time() - began < seconds:
        ends = not abilities(record.version).pauses_again_in_handshake
        drawn = compose(draw, remaining, _PER_LIFE, handshake_ends_it=ends)
        plans = [plan(kind, draw) for kind in drawn]
        life = Life()
        record.lives += 1
        with tempfile.TemporaryDirectory(prefix="refault-campaign-") as directory:
            try:
                with trio.fail_after(_LONGEST):
                    await live(Path(directory), binary, plans, life)
            except Exception as error:
                record.failures.append(f"migration {record.lives}: {error!r}")
                print(f"migration {record.lives}: the lab failed: {error!r}", flush=True)
                keep_logs(logs, directory, f"migration-{record.lives}")
                if len(record.failures) > 5:
                    raise
            record.version = max(record.version, life.version)
            record.pages_compared += life.pages_compared
            record.results += life.results
            for result in life.results:
                remaining[result.planned.kind] -= 1
                took = "" if result.seconds is None else f" in {result.seconds * 1000:.0f} ms"
                told = f"{result.planned}: {result.outcome.value}{took} {result.note}".rstrip()
                print(f"migration {record.lives}: {told}", flush=True)
            if any(
                result.outcome not in allowed(result.planned.kind, life.version) for result in life.results
            ):
                keep_logs(logs, directory, f"migration-{record.lives}")
    return record


def keep_logs(logs: Path | None, directory: str, name: str) -> None:
    """Copies the logs of what ended badly below ``logs``, where that is wanted."""
    if logs is not None:
        keep = logs / name
        shutil.rmtree(keep, ignore_errors=True)
        keep.mkdir(parents=True)
        for log in Path(directory).glob("*.log"):
            shutil.copy(log, keep)
