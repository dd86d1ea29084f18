"""`refault serve`: the daemon in front of all QEMUs of a host."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from refault.cli.arguments import path
from refault.cli.run import run_daemon
from refault.config.files import DEFAULT, VMS_D, ConfigError, Files

NAME = "refault"


def add_parser(subparsers: Any) -> None:
    """Adds the command to argparse's `subparsers`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "serve",
        help="front all QEMUs that files name",
        description="Fronts the QEMUs that the configuration names, each as `refault run` would."
        " SIGHUP has it read anew.",
        epilog="docs/configuration.md says what stands in the files, `refault check` whether they are right.",
    )
    parser.add_argument(
        "--config",
        type=path,
        metavar="FILE",
        default=DEFAULT,
        help=f"read this, and NAME.toml in {VMS_D} beside it; default: {DEFAULT}",
    )
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Runs the daemon until a signal ends it: 0; 1 if it could not go on, 2 if the files are wrong."""
    files = Files(arguments.config)
    try:
        wanted = files.load()
    except ConfigError as error:
        for line in error.lines:
            print(line, file=sys.stderr)
        return 2
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    return run_daemon(wanted, NAME, files.load)
