"""`refault tunnel`: one end of a session for anybody's connections."""

from __future__ import annotations

import argparse
import os
import stat
from dataclasses import replace
from typing import Any

from refault.cli.arguments import path
from refault.daemon.host.errors import OperatorError, operator_errors
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.address_text import parse_address
from refault.daemon.tunnel.options import SESSION_PATIENCE, TunnelOptions
from refault.qmp.access import FREE
from refault.session.handshake import Keys
from refault.session.keys import KEY_BYTES

_SESSION = "session:"
_CREDENTIAL = "credential:"
_WEEK = 7 * 24 * 3600


def add_parser(subparsers: Any) -> None:
    """Adds the command to argparse's `subparsers`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tunnel",
        help="carry connections to another host, through losses of the network",
        description="One end of a tunnel; the other host has the other. What comes at one end leaves at the"
        " other, byte for byte, though the connection between them is lost again and again.",
        epilog="One of the two addresses is session:HOST:PORT, where the two refaults meet; the other is the"
        " plain side, unix:/path, a bare path, or tcp:HOST:PORT. Where connections come:"
        " --listen tcp:127.0.0.1:4444 --to session:HOST-B:4446; on HOST-B, where they leave:"
        " --listen session:0.0.0.0:4446 --to unix:/run/target.sock. docs/session.md has more.",
    )
    parser.add_argument(
        "--listen", metavar="ADDR", required=True, help="where connections, or the other refault, come"
    )
    parser.add_argument("--to", metavar="ADDR", required=True, help="where they go")
    parser.add_argument(
        "--key",
        metavar="FILE",
        help=f"{KEY_BYTES} bytes that both refaults have: a file, or credential:NAME of the systemd unit",
    )
    parser.add_argument(
        "--key-optional", action="store_true", help="with --key, take a refault that has no key all the same"
    )
    parser.add_argument(
        "--session-patience",
        type=_seconds,
        metavar="SECONDS",
        default=SESSION_PATIENCE,
        help="reset a connection when the other refault was not reached for so long; default:"
        f" {SESSION_PATIENCE:g}",
    )
    parser.set_defaults(execute=execute, usage_error=parser.error)


def tunnel_options(arguments: argparse.Namespace) -> TunnelOptions:
    """The parsed command line as the daemon takes it, without the key. Raises `ValueError` with one clear
    line."""
    answers, listen = _address("--listen", arguments.listen, server=True)
    dials, to = _address("--to", arguments.to, server=False)
    if answers == dials:
        which = "both" if answers else "none"
        raise ValueError(
            f"of --listen and --to one is session:HOST:PORT, where the refaults meet, not {which}"
        )
    if arguments.key_optional and arguments.key is None:
        raise ValueError("--key-optional goes with --key")
    if listen.place == to.place and listen.port != 0:
        raise ValueError(f"--to {arguments.to}: that is where --listen is")
    return TunnelOptions(listen, to, answers, Keys(), arguments.session_patience)


def _address(option: str, text: str, *, server: bool) -> tuple[bool, Address]:
    """Whether it is the session's side, and the address."""
    is_session = text.startswith(_SESSION)
    address = parse_address(f"tcp:{text.removeprefix(_SESSION)}" if is_session else text, server=server)
    if address.server != server:
        raise ValueError(f"{option} {text!r}: 'server' is not for a tunnel: --listen listens, --to connects")
    if address.wait or address.reconnect is not None:
        raise ValueError(f"{option} {text!r}: 'wait' and 'reconnect' are not for a tunnel")
    if address.callers or address.rule != FREE:
        raise ValueError(f"{option} {text!r}: who may say what is not for a tunnel")
    if is_session and not server and address != Address(None, address.host, address.port):
        raise ValueError(f"{option} {text!r}: expected session:HOST:PORT and no options")
    if not server and address.port == 0 and address.path is None:
        raise ValueError(f"{option} {text!r}: nobody listens at port 0")
    return is_session, address


def read_key(name: str) -> bytes:
    """The key in a file, or in a systemd credential. Raises `OperatorError`."""
    if name.startswith(_CREDENTIAL):
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        if directory is None:
            raise OperatorError(
                f"--key {name}: the service manager gave no credentials; add LoadCredential= to the unit"
            )
        file = os.path.join(directory, os.path.basename(name.removeprefix(_CREDENTIAL)))
    else:
        file = str(path(name))
    try:
        with open(file, "rb") as opened:
            status = os.fstat(opened.fileno())
            key = opened.read(KEY_BYTES + 1)
    except OSError as error:
        raise OperatorError(f"--key {name} cannot be read: {error.strerror}") from error
    if stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IRWXO:
        raise OperatorError(
            f"--key {name} is for everybody to read or write; chmod 0600 it, and make a new key"
        )
    if len(key) != KEY_BYTES:
        raise OperatorError(
            f"--key {name} must hold {KEY_BYTES} bytes, not {'more' if len(key) > KEY_BYTES else len(key)};"
            f" make one with: head -c {KEY_BYTES} /dev/urandom >FILE"
        )
    return key


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= _WEEK:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to {_WEEK}")
    return seconds


def execute(arguments: argparse.Namespace) -> int:
    """Runs the tunnel's end until a signal ends it: 0; 1 if it could not start or go on."""
    try:
        options = tunnel_options(arguments)
    except ValueError as error:
        arguments.usage_error(str(error))
    if arguments.key is not None:
        keys = Keys(read_key(arguments.key), arguments.key_optional)
        options = replace(options, keys=keys)

    import logging

    import trio

    from refault.daemon.host.log import AS_IT_IS, setup_logging
    from refault.daemon.tunnel.serve import serve

    setup_logging(logging.INFO)
    os.umask(0o077)  # what is for others has its mode set
    try:
        trio.run(serve, options)
    except (OperatorError, BaseExceptionGroup) as error:
        told = operator_errors(error)
        if not told:
            raise
        for line in told:
            logging.getLogger("refault").error("refault: tunnel: %s", line, extra=AS_IT_IS)
        return 1
    return 0
