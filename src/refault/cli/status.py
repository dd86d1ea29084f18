"""`refault status`: what the daemons say about their VMs, for people or, with ``--json``, for programs."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from refault.cli.arguments import path, vm_name
from refault.daemon import snapshot
from refault.daemon.control import NoAnswer, NoDaemon, NotPermitted, query
from refault.daemon.errors import OperatorError
from refault.daemon.paths import CONTROL_SUFFIX, runtime_directories, short_name
from refault.daemon.snapshot import ListenerStatus, Status, VmStatus

_ANSWER_SECONDS = 5.0
_LABEL_WIDTH = 11


NO_DAEMON, NOT_PERMITTED, NO_ANSWER, NO_QEMU = 3, 4, 5, 6
"""Exit statuses: of several that hold the lowest."""
_EXIT_STATUS: tuple[tuple[type[OperatorError], int], ...] = (
    (NoDaemon, NO_DAEMON),
    (NotPermitted, NOT_PERMITTED),
    (NoAnswer, NO_ANSWER),
    (OperatorError, 1),
)


def add_parser(subparsers: Any) -> None:
    """Adds the command to argparse's `subparsers`."""
    where = " and ".join(map(str, runtime_directories()))
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "status",
        help="what refault knows about each VM",
        description="What refault knows about each VM.",
        epilog=f"Exit status: 0 when all is well, {NO_DAEMON} where there is no daemon, {NOT_PERMITTED} where"
        f" it may not be asked, {NO_ANSWER} where it does not answer, {NO_QEMU} where a VM has no QEMU.",
    )
    parser.add_argument("name", nargs="?", type=vm_name, metavar="NAME", help="of this VM alone")
    parser.add_argument(
        "--control",
        type=path,
        metavar="PATH",
        help=f"ask the daemon at this socket; default: all *{CONTROL_SUFFIX} in {where} and the directories"
        " in it",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document (docs/status.md)")
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Prints the status of the daemons asked, and the errors of those that did not answer."""
    answers: list[Status] = []
    errors: list[OperatorError] = []
    for socket in [options.control] if options.control else _control_sockets(options.name, errors):
        try:
            answers.append(query(socket, _ANSWER_SECONDS))
        except OperatorError as error:
            errors.append(error)
    if options.name is not None:
        answers = [_of_vm(status, options.name) for status in answers]
        answers = [status for status in answers if status.vms]
        if answers:
            errors.clear()  # of others' daemons
        elif not errors:
            where = f"the daemon at {options.control} has no" if options.control else "no daemon has a"
            errors.append(NoDaemon(f"{where} VM {options.name}; is `refault run` running for it?"))
    for told in errors:
        print(f"refault: {told}", file=sys.stderr)
    if answers:
        status = join(answers)
        if options.json:
            sys.stdout.write(snapshot.encode(status).decode())
        else:
            sys.stdout.write(render(status, shutil.get_terminal_size().columns))
    gone = [NO_QEMU for status in answers for vm in status.vms if not vm.qemu.connected]
    return min([*map(_exit_status, errors), *gone], default=0)


def _exit_status(error: OperatorError) -> int:
    return next(status for kind, status in _EXIT_STATUS if isinstance(error, kind))


def _of_vm(status: Status, name: str) -> Status:
    return msgspec.structs.replace(status, vms=tuple(vm for vm in status.vms if vm.name == name))


def _control_sockets(name: str | None, errors: list[OperatorError]) -> list[Path]:
    """The sockets to ask: those that the VM `name` has by default where there is one, else all.

    Where there is none at all `errors` gets the reason.
    """
    directories = runtime_directories()
    refused: list[OSError] = []
    found = [_sockets_in(directory, refused) for directory in directories]
    everywhere = [path for paths in found for path in paths]
    if name is not None:
        # refault@.service gives each instance a directory of its own below the common one.
        homes = [home for directory in directories for home in (directory, directory / name)]
        called = {home / short_name(home, name, CONTROL_SUFFIX) for home in homes}
        return [path for path in everywhere if path in called] or everywhere
    for error in refused if not everywhere else ():
        errors.append(NotPermitted(f"{error.filename} may not be looked into: {error.strerror}; be root"))
    if not everywhere and not refused:
        where = " or ".join(map(str, directories))
        errors.append(NoDaemon(f"no daemon found in {where}; start one, or name its socket with --control"))
    return next(filter(None, found), [])


def _sockets_in(directory: Path, refused: list[OSError]) -> list[Path]:
    found = []
    try:
        for entry in os.scandir(directory):
            if entry.name.endswith(CONTROL_SUFFIX):
                found.append(Path(entry.path))
            elif directory in runtime_directories() and entry.is_dir():
                found += _sockets_in(Path(entry.path), refused)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        refused.append(error)
    return sorted(found)


def join(answers: Sequence[Status]) -> Status:
    """One status of several daemons', the VMs in the order of the answers; one alone stays as it is."""
    if len(answers) == 1:
        return answers[0]
    return Status(
        troubles=tuple(trouble for status in answers for trouble in status.troubles),
        log_lines_dropped=sum(status.log_lines_dropped for status in answers),
        vms=tuple(vm for status in answers for vm in status.vms),
    )


def render(status: Status, width: int) -> str:
    """The status for people, in lines of at most `width` columns where the words allow it."""
    told = [_vm_lines(vm, width) for vm in status.vms]
    if status.troubles:
        told.append([f"TROUBLE      {trouble}" for trouble in status.troubles])
    if status.log_lines_dropped:
        told.append([f"{status.log_lines_dropped} lines of the log are lost: not read, or a full disk"])
    return "\n".join("".join(f"{_printable(line)}\n" for line in lines) for lines in told)


def _vm_lines(vm: VmStatus, width: int) -> list[str]:
    qemu, clients, migration, channel = vm.qemu, vm.clients, vm.migration, vm.channel
    latency, recovery = vm.latency_seconds, vm.recovery
    last = f", the last in {_seconds(recovery.last_seconds)}" if recovery.last_seconds is not None else ""
    version = f" {qemu.version}" if qemu.version else ""
    facts = [
        (
            "qemu",
            f"{'connected' if qemu.connected else 'NOT CONNECTED'}, QEMU{version} at {qemu.address}"
            + (f", pid {qemu.pid}" if qemu.pid is not None else ""),
        ),
        *(("listens", _listener(listener)) for listener in vm.listeners),
        (
            "clients",
            f"{clients.connected} connected, {clients.total} in all; {clients.commands} commands, "
            f"{clients.events} events; {clients.slow_disconnected} dropped for not reading",
        ),
        (
            "migration",
            f"{migration.role if migration.role != 'none' else 'neither source nor destination'}"
            + (f", {migration.status}" if migration.status else "")
            + (f", phase {migration.phase}" if migration.phase else ""),
        ),
        ("relay", migration.relay + (f": {migration.relay_reason}" if migration.relay_reason else "")),
    ]
    if migration.held:
        facts.append(("HELD", migration.held))
    if recovery.given_up:
        facts.append(("GIVEN UP", "no further attempt for this loss; recover by hand, or restart refault"))
    if vm.state.error:
        facts.append(("NOT KEPT", vm.state.error))
    facts += [
        ("channel", f"{_bytes(channel.bytes_forward)} forward, {_bytes(channel.bytes_return)} return path"),
        (
            "recovery",
            f"{recovery.losses} losses, {recovery.attempts} attempts, {recovery.recoveries} recoveries"
            + last
            + (f"; last error: {recovery.last_error}" if recovery.last_error else ""),
        ),
        (
            "latency",
            f"p50 {_seconds(latency.p50)}, p99 {_seconds(latency.p99)}, max {_seconds(latency.max)}, "
            f"of {latency.count} answered requests",
        ),
        ("repeats", f"{vm.pages.repeated} requests repeated by QEMU itself"),
    ]
    lines = [vm.name]
    for label, text in facts:
        lines += textwrap.wrap(
            text,
            width=max(width, 40),
            initial_indent=f"  {label:<{_LABEL_WIDTH}}",
            subsequent_indent=" " * (2 + _LABEL_WIDTH),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines + _page_table(vm, width)


def _listener(listener: ListenerStatus) -> str:
    if listener.listening:
        return listener.address
    return f"NOT at {listener.address}: {listener.trouble or 'there is no QEMU'}"


def _page_table(vm: VmStatus, width: int) -> list[str]:
    pages = vm.pages
    heads = ("requested", "arrived", "replayed", "outstanding", "recorded")
    rows = [
        (
            f"{block.name} ({_bytes(block.size_bytes)} of {_bytes(block.page_size_bytes)})",
            (block.requested, block.arrived, block.replayed, block.outstanding),
        )
        for block in pages.blocks
    ]
    total = (pages.requested, pages.arrived, pages.replayed, pages.outstanding, pages.recorded)
    numbers = "".join(f"{{:>{len(head) + 2}}}" for head in heads)
    room = max(width, 40) - 2 - sum(len(head) + 2 for head in heads)
    names = max([len("pages"), *(len(name) for name, _ in rows)])
    lines = [f"  {'pages':<{min(names, max(room, 5))}}" + numbers.format(*heads)]
    for name, counts in [*rows, ("all", total)]:
        cells = numbers.format(*counts, *[""] * (len(heads) - len(counts)))
        if len(name) > max(room, 5):  # a long name has a line of its own, and the numbers keep their columns
            lines.append(f"  {name}")
            name = ""
        lines.append(f"  {name:<{min(names, max(room, 5))}}{cells}".rstrip())
    if pages.kernel_waiting is not None:
        lines.append(f"  threads waiting for a page, as the kernel counts: {pages.kernel_waiting}")
    return lines


def _printable(line: str) -> str:
    """Keeps what a guest or a peer put into a name or an error from steering the terminal."""
    return "".join(character if character.isprintable() else "?" for character in line)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} s"


def _bytes(count: int) -> str:
    """Binary units, exact where the number is round: 4 KiB, 1.5 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
