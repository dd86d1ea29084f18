"""`refault release`: ends what a QEMU holds for a refault that was killed and that nobody followed."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import trio

from refault.cli.arguments import path
from refault.daemon.host.errors import OperatorError
from refault.daemon.host.paths import runtime_directories
from refault.daemon.kept.taken import SUFFIX as JOURNAL
from refault.daemon.kept.taken import holder_of, release
from refault.daemon.record.state_file import SUFFIX as RECORD
from refault.daemon.record.state_file import StateFile
from refault.daemon.record.state_lock import StateLock
from refault.daemon.relayed.handover import release as release_leg


def add_parser(subparsers: Any) -> None:
    """Adds the command to argparse's `subparsers`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "release",
        help="free a QEMU's monitor after a refault that was killed and does not come back",
        description="Ends the connections that a QEMU holds for a refault that was killed: its monitor is"
        " free, and clients are told the end. Not while a refault serves that QEMU: end that one (SIGTERM),"
        " which does the same.",
        epilog="Exit status: 0 when it is free, 1 when nothing was held or it could not be freed.",
    )
    parser.add_argument("vm", metavar="NAME|PID", help="the VM's name, or the process of its QEMU")
    parser.add_argument(
        "--state-dir",
        type=path,
        metavar="DIR",
        help="where its state is; default: below the runtime directory",
    )
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Frees it, or raises OperatorError."""
    directories = [arguments.state_dir] if arguments.state_dir else runtime_directories()
    found = [each for each in dict.fromkeys(_left(directories)) if _is_of(*each, arguments.vm)]
    freed = [_free(*each) for each in found]
    if not any(freed):
        raise OperatorError(
            f"nothing is held for {arguments.vm} by what is in {', '.join(map(str, directories))}; where its"
            " state is elsewhere, name that with --state-dir"
        )
    return 0


def _left(directories: list[Path]) -> Iterator[tuple[Path, str]]:
    """Where something is left of a VM, and its name: of its clients, or of a migration's channel."""
    for directory in directories:
        for suffix in (JOURNAL, RECORD):
            with contextlib.suppress(OSError):
                for each in sorted(directory.rglob(f"*{suffix}")):
                    yield each.parent, each.name.removesuffix(suffix)


def _is_of(directory: Path, name: str, vm: str) -> bool:
    if vm == name:
        return True
    record = StateFile(directory, name).left()
    pids = (holder_of(directory / f"{name}{JOURNAL}"), record.qemu_pid if record is not None else None)
    return any(pid is not None and vm == str(pid) for pid in pids)


def _free(directory: Path, name: str) -> bool:
    """Ends it, and says so; whether there was something. Raises OperatorError."""
    journal = directory / f"{name}{JOURNAL}"
    lock = StateLock(directory, name)
    trio.run(partial(lock.claim, wait=False))
    try:
        leg = release_leg(directory, name)
        if os.path.lexists(journal):
            pid, count = release(journal)
            said = f"QEMU, process {pid}, is free: {count} connections and listeners ended"
            said += ", and the channel of its migration" if leg is not None else ""
        elif leg is not None:
            said = f"the channel of its migration is ended, which QEMU, process {leg}, held"
        else:
            return False
    finally:
        lock.release()
    print(f"{name}: {said}", file=sys.stderr)
    return True
