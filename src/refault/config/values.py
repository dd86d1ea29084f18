"""Values as an operator writes them. All raise `ValueError`, which names the value and what is allowed."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from refault.daemon.host.errors import must_be_one_line
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.address_text import parse_address
from refault.migration.endpoint import Inet, parse_uri
from refault.qmp.access import FREE

_WEEK = 7 * 24 * 3600
_URI = re.compile(r"[a-z][a-z0-9+.-]*:.")
_ADDRESS = re.compile("(unix|tcp|vsock|fd|exec|file|https?):")


def path(text: str) -> Path:
    """A path; a ~ that the shell has left, as in ``--control=~/x``, is a home directory to it too."""
    if not text:
        raise ValueError(f"{text!r} is no path")
    _must_be_one_line(text)
    if _ADDRESS.match(text):
        raise ValueError(
            f"{text!r} is an address, and a path is wanted; a file of this directory is ./{text}"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text!r}: {error}") from error


def _must_be_one_line(text: str) -> None:
    try:
        must_be_one_line(text)
    except ValueError as error:
        raise ValueError(f"{text!r} {error}") from None


def socket_path(text: str) -> Path:
    """The path of a socket file, as it is or as an address."""
    return path(text.removeprefix("unix:"))


def vm_name(text: str) -> str:
    """A name that can be part of a file's: refault puts sockets and state under it."""
    if not text or text in (".", "..") or "/" in text or not text.isprintable():
        raise ValueError(f"{text!r} is not a name: it must be printable, without '/'")
    if len(text.encode()) > 64:
        raise ValueError(f"{text!r} is too long for a name: at most 64 bytes")
    return text


def qemu_address(text: str) -> Address:
    """QEMU's monitor."""
    address = _not_a_directory(parse_address(text))
    if address.wait:
        raise ValueError(
            f"address {text!r}: 'wait=on' stands at a listener, where the client comes that QEMU waits for"
        )
    return address


def listen_address(text: str) -> Address:
    """Where clients come."""
    return _not_a_directory(parse_address(text, server=True))


def _not_a_directory(address: Address) -> Address:
    if address.path is not None and not address.abstract and os.path.isdir(address.path):
        raise ValueError(f"{address} is a directory: name the socket in it")
    return address


def last_part(address: Address) -> str:
    """What a VM is called that nobody has named."""
    return Path(address.path).name if address.path is not None else f"{address.host}:{address.port}"


def migration_uri(text: str) -> str:
    """An address of QEMU's at which a migration can be recovered."""
    _must_be_one_line(text)
    if not _URI.match(text):
        raise ValueError(f"{text!r} is not a migration URI such as tcp:0.0.0.0:4444")
    if text.startswith("tcp://"):
        raise ValueError(f"{text!r} is a URL: write tcp:HOST:PORT")
    if text.startswith("tcp:") and "," not in text and not isinstance(parse_uri(text), Inet):
        raise ValueError(f"{text!r} is not like tcp:0.0.0.0:4444")
    if re.match(r"tcp:.*:0\Z", text):
        raise ValueError(f"{text!r} leaves the port open, so the source could not know it")
    return text


def seconds(value: str | float, most: int = 3600) -> float:
    """A time, from one second to `most`."""
    try:
        number = float(value)
    except (ValueError, OverflowError):
        number = 0.0
    if not 1 <= number <= most:
        raise ValueError(f"{value!r} is not a number of seconds from 1 to {most}")
    return number


def long_seconds(value: str | float) -> float:
    """A time of up to a week."""
    return seconds(value, _WEEK)


def whole_seconds(value: str | float) -> int:
    """A time that the kernel counts in seconds."""
    number = seconds(value)
    if number != int(number):
        raise ValueError(f"{value!r} is not a whole number of seconds")
    return int(number)


def incoming(text: str) -> tuple[Inet, str]:
    """Where others find a destination, and the path at which its QEMU listens."""
    _must_be_one_line(text)
    outside, _, inside = text.partition(",unix:")
    endpoint = parse_uri(outside)
    if outside.startswith("tcp://"):
        raise ValueError(f"{text!r} has a URL: write tcp:HOST:PORT,unix:PATH")
    if not isinstance(endpoint, Inet) or not inside:
        raise ValueError(f"{text!r} is not like tcp:0.0.0.0:4444,unix:/run/qemu/vm1.incoming")
    return endpoint, parse_address(f"unix:{inside}").path or inside


def control(text: str) -> Address:
    """The path of a socket file to be listened at, with the options that such a listener has."""
    address = parse_address(f"unix:{socket_path(text)}", server=True)
    if address.abstract or not address.server or address.wait or address.rule != FREE:
        raise ValueError(
            f"{text!r}: behind such a path stand mode=, owner=, group=, allow-user= and allow-group= alone"
        )
    return address


def hand_over(text: str) -> Address:
    """The same, of where libvirt's emulator comes: `hide-pause` is libvirt's own."""
    address = parse_address(f"unix:{socket_path(text)}", server=True)
    rule = replace(address.rule, hide_pause=None)
    if address.abstract or not address.server or address.wait or rule != FREE:
        raise ValueError(
            f"{text!r}: behind such a path stand mode=, owner=, group=, allow-user=, allow-group= and"
            " hide-pause= alone"
        )
    return address


def metrics(text: str) -> Address:
    """An address of TCP, or a socket file, to be listened at."""
    if text.startswith("unix:"):
        return control(text)
    _must_be_one_line(text)
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    numbers = port.isascii() and port.isdigit() and int(port) <= 65535
    if not bare or "/" in bare or (":" in bare and bare == host) or not numbers:
        raise ValueError(f"{text!r} is not HOST:PORT such as 127.0.0.1:9099 or [::1]:9099, nor unix:/path")
    return Address(None, bare, int(port), server=True)
