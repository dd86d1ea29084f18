"""`refault check`: whether the files of `refault serve` can be as they are."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from refault.cli.arguments import path
from refault.config.files import DEFAULT, VMS_D, ConfigError, load, load_alone


def add_parser(subparsers: Any) -> None:
    """Adds the command to argparse's `subparsers`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "check",
        help="read the configuration files without starting",
        description="Reads the files as `refault serve` would, and starts nothing. Says a line for each thing"
        " that is wrong.",
        epilog="Exit status: 0 when all is well, 2 when something is wrong.",
    )
    parser.add_argument(
        "files", nargs="*", type=path, metavar="FILE", help="read these alone, and all together"
    )
    parser.add_argument(
        "--config",
        type=path,
        metavar="FILE",
        help=f"read this, and NAME.toml in {VMS_D} beside it; default: {DEFAULT}",
    )
    parser.set_defaults(execute=execute, usage_error=parser.error)


def execute(arguments: argparse.Namespace) -> int:
    """Says what is wrong and ends with 2, or what there is."""
    if arguments.files and arguments.config:
        arguments.usage_error("--config reads what is beside it too: name files, or --config")
    try:
        found = load_alone(arguments.files) if arguments.files else load(arguments.config or DEFAULT)
    except ConfigError as error:
        for line in error.lines:
            print(line, file=sys.stderr)
        return 2
    for vm in found.vms:
        print(f"{vm.name}: {vm.qemu} on {', '.join(map(str, vm.listen))}")
    for watch in found.watches:
        print(watch)
    if not found.vms and not found.watches:
        print("no VM")
    return 0
