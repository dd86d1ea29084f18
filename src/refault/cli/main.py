"""The command line: `refault COMMAND`.

A command is a module of this package with ``add_parser(subparsers)``, which adds its argparse parser and sets
on it ``execute``, a callable from the parsed `argparse.Namespace` to the exit status. Only the module of the
command that was asked for is imported, so that the daemon does not carry the demo's imports.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from refault import __version__
from refault.cli import streams
from refault.daemon.host.errors import one_line, operator_errors

COMMANDS: tuple[str, ...] = (
    "check",
    "demo",
    "events",
    "inspect",
    "release",
    "run",
    "serve",
    "status",
    "tunnel",
    "watch",
)


class _Once(argparse.Action):
    """Stores the value of an option that is good for one: of two that differ one would be lost unseen."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        given = namespace.__dict__.setdefault("_given", set())
        if self.dest in given:
            raise argparse.ArgumentError(self, "given more than once")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """Tells a usage error in one line, and takes no option for another: they are to be written out."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.allow_abbrev = False
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)} (see {self.prog} --help)\n")


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for `arguments`: with the one command they name, else with all."""
    parser = _Parser(prog="refault", description="Recovers QEMU postcopy live migrations by itself.")
    parser.add_argument("--version", action="version", version=f"refault {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    first = arguments[0] if arguments else None
    for name in [first] if first in COMMANDS else COMMANDS:
        importlib.import_module(f"refault.cli.{name}").add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 for an error of the operator's, 2 for wrong usage, and
    what the command itself has beside these.

    Raises `SystemExit` from argparse for ``--help``, ``--version`` and wrong usage.
    """
    streams.prepare()
    try:
        try:
            return _execute(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        told = operator_errors(error)
        if not told:
            raise
        for each in told:
            if not (isinstance(each, streams.OutputLost) and each.quiet):
                print(f"refault: {one_line(str(each))}", file=sys.stderr)
        return 1


def _execute(arguments: Sequence[str]) -> int:
    options = build_parser(arguments).parse_args(arguments)
    execute: Callable[[argparse.Namespace], int] = options.execute
    return execute(options)
