"""`refault run`: the daemon in front of one QEMU."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from refault.cli.arguments import checked, vm_name
from refault.config import values
from refault.config.options import DaemonTable, VmTable, WrongOptionError, fields_of, vm_options
from refault.daemon import uses
from refault.daemon.host.errors import OperatorError, operator_errors
from refault.daemon.host.paths import SUN_PATH, control_socket, state_directory
from refault.daemon.monitor.address import Address
from refault.daemon.options import Configuration, HostOptions


def add_parser(subparsers: Any) -> None:
    """Adds the command to argparse's `subparsers`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="front one QEMU",
        description="Fronts one QEMU: takes its QMP clients, relays its migration channel, and recovers it.",
        epilog="ADDR is unix:/path, a bare path, or tcp:HOST:PORT, with QEMU's own options behind it; at a"
        " socket file of --listen also mode=, owner= and group=, at each --listen allow-user=, allow-group=,"
        " read-only=, deny=, audit= and hide-pause=. docs/qmp.md and docs/access.md have them all.",
    )
    options = {**fields_of(DaemonTable), **fields_of(VmTable)}
    del options["log_level"]  # --verbose
    del options["exec"]  # that makes VMs
    for name, field in sorted(options.items(), key=lambda item: not item[1].required):
        repeated: dict[str, Any] = {"action": "append"} if field.repeats else {}
        parser.add_argument(
            _option(name),
            type=checked(field.option.read),
            choices=field.choices,
            metavar=field.option.metavar,
            required=field.required,
            help=field.option.help,
            **repeated,
        )
    parser.add_argument("--name", type=vm_name, help="the VM's name; default: the last part of --qemu")
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="log each step of the recovery policy and each request for metrics",
    )
    parser.set_defaults(execute=execute, usage_error=parser.error)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def configuration(arguments: argparse.Namespace) -> Configuration:
    """The parsed command line as the daemon takes it. Raises `ValueError` with one clear line."""
    try:
        name = arguments.name or values.vm_name(values.last_part(arguments.qemu))
    except ValueError as error:
        raise ValueError(f"--qemu gives no usable name ({error}); add --name") from error
    given = {key: value for key, value in vars(arguments).items() if value is not None}
    try:
        vm = vm_options(name, given, state_directory())
    except WrongOptionError as error:
        raise ValueError(f"{_option(error.key)} {error.text}") from error
    default = control_socket(name)
    length = len(os.fsencode(default))
    if length >= SUN_PATH and not arguments.control:
        raise ValueError(
            f"--control {default}: a unix socket's path has at most {SUN_PATH - 1} bytes, this {length}"
        )
    control: Address = arguments.control or Address(str(default), server=True)
    taken = [*uses.of_vm(name, vm), uses.of_control(name, control)]
    if arguments.metrics is not None:
        taken.append(uses.of_metrics(name, arguments.metrics))
    for use, first in uses.clashes(taken):
        option = _option(use.option)
        before = "was given before" if first.option == use.option else f"is that of {_option(first.option)}"
        raise ValueError(f"{option} {use.written}: this address {before}; each needs one of its own")
    return Configuration(
        host=HostOptions(metrics=arguments.metrics, control=control),
        log_level="debug" if arguments.verbose else "info",
        vms=(vm,),
    )


def execute(arguments: argparse.Namespace) -> int:
    """Runs the daemon until a signal ends it: 0; 1 if it could not start or go on."""
    try:
        wanted = configuration(arguments)
    except ValueError as error:
        arguments.usage_error(str(error))
    [vm] = wanted.vms
    return run_daemon(wanted, vm.name)


def run_daemon(wanted: Configuration, name: str, reload: Callable[[], Configuration] | None = None) -> int:
    """Runs the daemon, called `name`, until a signal ends it: 0; 1 if it could not start or go on."""
    import logging

    import trio

    from refault.daemon.app import serve
    from refault.daemon.host.log import AS_IT_IS, level_of, setup_logging

    setup_logging(level_of(wanted.log_level))
    os.umask(0o077)  # what is for others has its mode set
    try:
        trio.run(serve, wanted, name, reload)
    except (OperatorError, BaseExceptionGroup) as error:
        told = operator_errors(error)
        if not told:
            raise
        for line in told:
            logging.getLogger("refault").error("refault: %s: %s", name, line, extra=AS_IT_IS)
        return 1
    return 0
