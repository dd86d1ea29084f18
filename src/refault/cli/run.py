"""`refault run`: the daemon in front of one QEMU."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refault.cli.arguments import path, vm_name
from refault.daemon.address import SUN_PATH, Address, host_port, parse_address, place_of
from refault.daemon.errors import OperatorError, operator_errors
from refault.daemon.options import Patience, RunOptions
from refault.daemon.paths import control_socket, runtime_directory, state_directory
from refault.migration.endpoint import Inet, parse_uri

_WEEK = 7 * 24 * 3600
_URI = re.compile(r"[a-z][a-z0-9+.-]*:.")


def add_parser(subparsers: Any) -> None:
    """Adds the command to argparse's `subparsers`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run",
        help="front one QEMU",
        description="Fronts one QEMU: takes its QMP clients, relays its migration channel, and recovers it.",
        epilog="ADDR is unix:/path, a bare path, or tcp:HOST:PORT, with QEMU's own options behind it; at a"
        " socket file of --listen also mode=, owner= and group=. docs/qmp.md has them all.",
    )
    parser.add_argument("--qemu", type=_qemu_address, metavar="ADDR", required=True, help="QEMU's monitor")
    parser.add_argument(
        "--listen",
        type=_listen_address,
        metavar="ADDR",
        required=True,
        action="append",
        help="where QMP clients come; may be given more than once",
    )
    parser.add_argument("--name", type=vm_name, help="the VM's name; default: the last part of --qemu")
    parser.add_argument(
        "--relay",
        choices=("auto", "off"),
        default="auto",
        help="carry the migration channel where that can be done (auto), or recover over QMP alone (off)",
    )
    parser.add_argument(
        "--recover-uri",
        type=_uri,
        metavar="URI",
        action="append",
        default=[],
        help="another address of the destination, at which the channel may be recovered; tried in turn",
    )
    for option, seconds, text in _PATIENCE:
        default = getattr(Patience, _field(option))
        parser.add_argument(option, type=seconds, metavar="SECONDS", default=default, help=text)
    parser.add_argument(
        "--incoming",
        type=_incoming,
        metavar="tcp:HOST:PORT,unix:PATH",
        help="serve a QEMU that was started with -incoming unix:PATH at this address",
    )
    parser.add_argument(
        "--metrics", type=_host_port, metavar="HOST:PORT", help="serve Prometheus metrics here"
    )
    parser.add_argument(
        "--control",
        type=path,
        metavar="PATH",
        help=f"status socket; default: {runtime_directory()}/NAME.control",
    )
    parser.add_argument(
        "--state-dir", type=path, metavar="DIR", help=f"state files, on a tmpfs; default: {state_directory()}"
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="log each step of the recovery policy and each request for metrics",
    )
    parser.set_defaults(execute=execute, usage_error=parser.error)


def run_options(arguments: argparse.Namespace) -> RunOptions:
    """The parsed command line as the daemon takes it. Raises `ValueError` with one clear line."""
    try:
        name = arguments.name or vm_name(_last_part(arguments.qemu))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--qemu gives no usable name ({error}); add --name") from error
    uris = arguments.recover_uri
    if repeated := {uri for uri in uris if uris.count(uri) > 1}:
        raise ValueError(f"--recover-uri {min(repeated)}: given more than once")
    control: Path = arguments.control or control_socket(name)
    length = len(os.fsencode(control))
    if length >= SUN_PATH:
        raise ValueError(
            f"--control {control}: a unix socket's path has at most {SUN_PATH - 1} bytes, this {length}"
        )
    _must_differ(arguments, control)
    return RunOptions(
        name=name,
        qemu=arguments.qemu,
        listen=tuple(arguments.listen),
        relay=arguments.relay,
        recover_uris=tuple(uris),
        incoming=arguments.incoming,
        metrics=arguments.metrics,
        control=control,
        state_dir=arguments.state_dir or state_directory(),
        patience=Patience(**{_field(option): getattr(arguments, _field(option)) for option, *_ in _PATIENCE}),
    )


def _must_differ(arguments: argparse.Namespace, control: Path) -> None:
    """Raises `ValueError` where one address has two uses."""
    uses: list[tuple[str, object, tuple[object, ...]]] = [
        ("--qemu", arguments.qemu, arguments.qemu.place),
        *(("--listen", address, address.place) for address in arguments.listen),
        ("--control", control, place_of(control)),
    ]
    if arguments.metrics is not None:
        metrics = Address(None, *arguments.metrics)
        uses.append(("--metrics", host_port(*arguments.metrics), metrics.place))
    if arguments.incoming is not None:
        path = arguments.incoming[1]
        uses.append(("--incoming", f"unix:{path}", place_of(path)))
    taken: dict[tuple[object, ...], str] = {}
    for option, written, place in uses:
        if place[0] == "tcp" and place[-1] == 0:
            continue  # the kernel chooses another port for each
        if place in taken:
            before = "was given before" if taken[place] == option else f"is that of {taken[place]}"
            raise ValueError(f"{option} {written}: this address {before}; each needs one of its own")
        taken[place] = option


def execute(arguments: argparse.Namespace) -> int:
    """Runs the daemon until a signal ends it: 0; 1 if it could not start or go on."""
    try:
        options = run_options(arguments)
    except ValueError as error:
        arguments.usage_error(str(error))

    import logging

    import trio

    from refault.daemon.app import serve
    from refault.daemon.log import AS_IT_IS, setup_logging

    setup_logging(logging.DEBUG if arguments.verbose else logging.INFO)
    os.umask(0o077)  # what is for others has its mode set
    try:
        trio.run(serve, options)
    except (OperatorError, BaseExceptionGroup) as error:
        told = operator_errors(error)
        if not told:
            raise
        for line in told:
            logging.getLogger("refault").error("refault: %s: %s", options.name, line, extra=AS_IT_IS)
        return 1
    return 0


def _address(text: str, *, server: bool = False) -> Address:
    try:
        return parse_address(text, server=server)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _qemu_address(text: str) -> Address:
    address = _not_a_directory(_address(text))
    if address.wait:
        raise argparse.ArgumentTypeError(
            f"address {text!r}: 'wait=on' stands at --listen, where the client comes that QEMU is to wait for"
        )
    return address


def _listen_address(text: str) -> Address:
    return _not_a_directory(_address(text, server=True))


def _not_a_directory(address: Address) -> Address:
    if address.path is not None and not address.abstract and os.path.isdir(address.path):
        raise argparse.ArgumentTypeError(f"{address} is a directory: name the socket in it")
    return address


def _last_part(address: Address) -> str:
    return Path(address.path).name if address.path is not None else f"{address.host}:{address.port}"


def _uri(text: str) -> str:
    if not _URI.match(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a migration URI such as tcp:0.0.0.0:4444")
    if text.startswith("tcp://"):
        raise argparse.ArgumentTypeError(f"{text!r} is a URL: write tcp:HOST:PORT")
    if text.startswith("tcp:") and "," not in text and not isinstance(parse_uri(text), Inet):
        raise argparse.ArgumentTypeError(f"{text!r} is not like tcp:0.0.0.0:4444")
    if re.match(r"tcp:.*:0\Z", text):
        raise argparse.ArgumentTypeError(f"{text!r} leaves the port open, so the source could not know it")
    return text


def _seconds(text: str, most: int = 3600) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to {most}")
    return seconds


def _long_seconds(text: str) -> float:
    return _seconds(text, _WEEK)


def _whole_seconds(text: str) -> int:
    seconds = _seconds(text)
    if seconds != int(seconds):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of seconds")
    return int(seconds)


_PATIENCE: tuple[tuple[str, Callable[[str], float], str], ...] = (
    (
        "--dead-after",
        _whole_seconds,
        "a relayed channel counts as lost after so much silence in postcopy; default: 5",
    ),
    (
        "--stall-after",
        _seconds,
        "without a relay, a postcopy that stands still for so long is paused; default: 15",
    ),
    (
        "--client-wait",
        _seconds,
        "what a client that paused or recovers by hand is left before refault does it; default: 10",
    ),
    (
        "--give-up-after",
        _long_seconds,
        "make no further attempt for a loss that is so old; default: never give up",
    ),
)
"""The options that are fields of `Patience`."""


def _field(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _incoming(text: str) -> tuple[Inet, str]:
    outside, _, path = text.partition(",unix:")
    endpoint = parse_uri(outside)
    if outside.startswith("tcp://"):
        raise argparse.ArgumentTypeError(f"{text!r} has a URL: write tcp:HOST:PORT,unix:PATH")
    if not isinstance(endpoint, Inet) or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not like tcp:0.0.0.0:4444,unix:/run/qemu/vm1.incoming")
    return endpoint, _address(f"unix:{path}").path or path


def _host_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    numbers = port.isascii() and port.isdigit() and int(port) <= 65535
    if not bare or "/" in bare or (":" in bare and bare == host) or not numbers:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT such as 127.0.0.1:9099 or [::1]:9099")
    return bare, int(port)
