"""`refault release`: ends what a QEMU holds for a refault that was killed and that nobody followed."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import trio

from refault.cli.arguments import path
from refault.daemon.host.errors import OperatorError
from refault.daemon.host.paths import runtime_directories
from refault.daemon.kept.taken import SUFFIX, holder_of, release
from refault.daemon.record.state_lock import StateLock


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
    found = [each for each in _journals(directories) if _is_of(each, arguments.vm)]
    if not found:
        raise OperatorError(
            f"nothing is held for {arguments.vm} by what is in {', '.join(map(str, directories))}; where its"
            " state is elsewhere, name that with --state-dir"
        )
    for each in found:
        name = each.name.removesuffix(SUFFIX)
        lock = StateLock(each.parent, name)
        trio.run(partial(lock.claim, wait=False))
        try:
            pid, count = release(each)
        finally:
            lock.release()
        print(
            f"{name}: QEMU, process {pid}, is free: {count} connections and listeners ended", file=sys.stderr
        )
    return 0


def _journals(directories: list[Path]) -> Iterator[Path]:
    for directory in directories:
        with contextlib.suppress(OSError):
            yield from sorted(directory.rglob(f"*{SUFFIX}"))


def _is_of(journal: Path, vm: str) -> bool:
    if journal.name == f"{vm}{SUFFIX}":
        return True
    return vm.isdigit() and holder_of(journal) == int(vm)
