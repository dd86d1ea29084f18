"""Runs migrations one after the other until all losses were made."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import trio
from tests.campaign.life import Life, compose, live
from tests.campaign.losses import LossClass, plan
from tests.campaign.record import Entry, Record

from refault.lab import bare
from refault.migration.versions import abilities

_PER_LIFE = 7
_LONGEST = 240.0  # seconds of one migration
_LONG = 3.0  # and of one recovery


async def run(
    binary: str,
    kinds: Sequence[LossClass],
    each: int,
    record: Record,
    seconds: float,
    *,
    also: Sequence[str] = (),
    keep: Path | None = None,
    logs: Path | None = None,
) -> Record:
    """Makes losses until the record has ``each`` of every class; begins no migration after ``seconds``.

    ``also``: capabilities that both QEMUs switch on besides. The record is written to ``keep`` after each
    migration, and the logs of those that ended worse than QEMU allows, or in which a recovery took long,
    below ``logs``.
    """
    capabilities = (*bare.CAPABILITIES, *also)
    print(f"seed {record.seed}", flush=True)
    began = trio.current_time()
    while any((left := record.left(kinds, each)).values()) and trio.current_time() - began < seconds:
        # By the migration's number, so that what is made in pieces is drawn as in one.
        draw = random.Random(f"{record.seed} {record.lives}")
        ends = not abilities(record.version).pauses_again_in_handshake
        plans = [plan(kind, draw) for kind in compose(draw, left, _PER_LIFE, handshake_ends_it=ends)]
        life = Life()
        record.lives += 1
        name = f"migration {record.lives}"
        with tempfile.TemporaryDirectory(prefix="refault-campaign-") as directory:
            try:
                with trio.fail_after(_LONGEST):
                    await live(Path(directory), binary, plans, life, capabilities)
            except Exception as error:
                failure = f"{error!r} at {life.making}"
                record.failures.append(f"{name}: {failure}")
                print(f"{name}: the lab failed: {failure}", flush=True)
                keep_logs(logs, directory, name)
                if len(record.failures) > 5:
                    raise
            entries = record.add(life)
            for entry in entries:
                print(f"{name}: {entry}", flush=True)
            told = tracebacks(directory)
            record.failures += [f"{name}: a traceback in {log}" for log in told]
            if told or any(record.is_defect(entry) or _slow(entry) for entry in entries):
                keep_logs(logs, directory, name)
        if keep is not None:
            record.keep(keep)
    return record


def _slow(entry: Entry) -> bool:
    """Whether one may want to know why it took so long."""
    client_waited_for = entry.kind is LossClass.PAUSE_CLIENT
    return entry.seconds is not None and entry.seconds > _LONG and not client_waited_for


def tracebacks(directory: str) -> list[str]:
    """The names of the logs in which a refault tells of an error of its own."""
    return [log.name for log in Path(directory).glob("refault*.log") if "Traceback" in log.read_text()]


def keep_logs(logs: Path | None, directory: str, name: str) -> None:
    """Copies the logs of what ended badly below ``logs``, where that is wanted."""
    if logs is not None:
        keep = logs / name.replace(" ", "-")
        shutil.rmtree(keep, ignore_errors=True)
        keep.mkdir(parents=True)
        for log in Path(directory).glob("*.log"):
            shutil.copy(log, keep)
