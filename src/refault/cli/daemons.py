"""The daemons that a command asks: which there are, what they answer, and why one did not."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from refault.cli.arguments import socket_path, vm_name
from refault.daemon.host.errors import OperatorError
from refault.daemon.host.paths import CONTROL_SUFFIX, runtime_directories, short_name
from refault.daemon.telling.control import NoAnswer, NoDaemon, NotPermitted, query
from refault.daemon.telling.snapshot import Status

_ANSWER_SECONDS = 5.0

NO_DAEMON, NOT_PERMITTED, NO_ANSWER, NO_QEMU = 3, 4, 5, 6
"""Exit statuses: of several that hold the lowest."""
_EXIT_STATUS: tuple[tuple[type[OperatorError], int], ...] = (
    (NoDaemon, NO_DAEMON),
    (NotPermitted, NOT_PERMITTED),
    (NoAnswer, NO_ANSWER),
    (OperatorError, 1),
)


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ask` to a command's."""
    where = " and ".join(map(str, runtime_directories()))
    parser.add_argument("name", nargs="?", type=vm_name, metavar="NAME", help="of this VM alone")
    parser.add_argument(
        "--control",
        type=socket_path,
        metavar="PATH",
        help=f"ask the daemon at this socket; default: all *{CONTROL_SUFFIX} in {where} and the directories"
        " in it",
    )


def ask(name: str | None, control: Path | None) -> tuple[list[Status], list[OperatorError]]:
    """What the daemons answer, of the VM `name` alone where it is given, and the errors of the others.

    Takes at most some seconds for each daemon.
    """
    answers: list[Status] = []
    errors: list[OperatorError] = []
    for socket in [control] if control else _control_sockets(name, errors):
        try:
            answers.append(query(socket, _ANSWER_SECONDS))
        except OperatorError as error:
            errors.append(error)
    if name is not None:
        troubles = [trouble for status in answers for trouble in status.troubles]
        answers = [_of_vm(status, name) for status in answers]
        answers = [status for status in answers if status.vms]
        if answers:
            errors.clear()  # of others' daemons
        elif why := [trouble for trouble in troubles if trouble.startswith(f"{name}: ")]:
            errors[:] = [NoDaemon("; ".join(why))]
        elif not errors:
            where = f"the daemon at {control} has no" if control else "no daemon has a"
            errors.append(NoDaemon(f"{where} VM {name}; is `refault run` running for it?"))
    return answers, errors


def exit_status(error: OperatorError) -> int:
    """That of a command which ends with the error."""
    return next(status for kind, status in _EXIT_STATUS if isinstance(error, kind))


def _of_vm(status: Status, name: str) -> Status:
    return msgspec.structs.replace(status, vms=tuple(vm for vm in status.vms if vm.name == name))


def join(answers: Sequence[Status]) -> Status:
    """One status of several daemons', the VMs in the order of the answers; one alone stays as it is."""
    if len(answers) == 1:
        return answers[0]
    return Status(
        troubles=tuple(trouble for status in answers for trouble in status.troubles),
        log_lines_dropped=sum(status.log_lines_dropped for status in answers),
        vms=tuple(vm for status in answers for vm in status.vms),
    )


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
