"""Where a QMP socket is."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass

from refault.daemon.host.paths import SUN_PATH
from refault.qmp.access import ANYBODY, FREE, Callers, Rule


@dataclass(frozen=True)
class Address:
    """Where a QMP socket is, and whether refault listens there (`server`) or connects.

    `path` is a unix socket's, or its abstract name, else None; `host` and `port` are TCP's.
    """

    path: str | None
    host: str = ""
    port: int = 0
    server: bool = False
    wait: bool = False
    """QEMU is not connected to before a client has come here."""
    abstract: bool = False
    """`path` is a name in Linux's abstract namespace: there is no file."""
    tight: bool = True
    """An abstract name ends where it ends; else zero bytes fill it up."""
    ipv4: bool | None = None
    ipv6: bool | None = None
    """Which families: as `family` has it."""
    to: int = 0
    """The last port to be tried for listening; 0: `port` alone."""
    reconnect: float | None = None
    """The longest pause between two tries to connect, in seconds; None: refault's own."""
    mode: int | None = None
    owner: int | None = None
    group: int | None = None
    """What the socket file is to have; None: see `listener.bind_unix`."""
    fd: int | None = None
    """A descriptor that listens there already, somebody else's: clients are let in while a QEMU is there, and
    wait else."""
    callers: Callers = ANYBODY
    """Who may speak there, by peer credentials."""
    rule: Rule = FREE
    """What a client that comes there may say."""

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path.replace(',', ',,')}" + (",abstract=on" if self.abstract else "")
        return f"tcp:{host_port(self.host, self.port)}"

    @property
    def family(self) -> socket.AddressFamily:
        """For getaddrinfo, as util/qemu-sockets.c has it in inet_ai_family_from_address()."""
        if self.ipv4 and self.ipv6:
            return socket.AF_UNSPEC if self.host else socket.AF_INET6
        if self.ipv6 or self.ipv4 is False:
            return socket.AF_INET6
        if self.ipv4 or self.ipv6 is False:
            return socket.AF_INET
        return socket.AF_UNSPEC

    @property
    def v6only(self) -> bool:
        """Whether an IPv6 listener leaves IPv4 alone (util/qemu-sockets.c, try_bind)."""
        return (self.ipv4, self.ipv6) not in ((None, None), (True, True))

    @property
    def sun_path(self) -> str | bytes:
        """A unix socket's address, as `socket` takes it."""
        assert self.path is not None  # noqa: S101 - asked of unix sockets only
        if not self.abstract:
            return self.path
        name = b"\0" + os.fsencode(self.path)
        return name if self.tight else name.ljust(SUN_PATH, b"\0")

    @property
    def place(self) -> tuple[object, ...]:
        """Equal for two addresses that are the same, however they are written."""
        if self.path is None:
            host = self.host.lower()
            try:
                return ("tcp", ipaddress.ip_address(host), self.port)
            except ValueError:
                return ("tcp", host, self.port)
        if self.abstract:
            return ("abstract", self.sun_path)
        return place_of(self.path)


def place_of(path: str | os.PathLike[str]) -> tuple[object, ...]:
    """`Address.place` of a unix socket's path."""
    directory, name = os.path.split(os.path.abspath(path))
    return ("unix", os.path.realpath(directory), name)


def host_port(host: str, port: int) -> str:
    """As it is written: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
