"""Binding one TCP port at all addresses of a name."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Sequence
from dataclasses import replace

from refault.daemon.monitor.address import Address

log = logging.getLogger("refault.qmp")

BACKLOG = 128


Where = tuple[socket.AddressFamily | int, tuple[object, ...]]
"""A family and an address of it, as getaddrinfo gives them."""


def bind_all(
    address: Address, where: Sequence[Where], ports: Sequence[int]
) -> tuple[list[socket.socket], Address]:
    """Listening sockets, and the address that they have: at the first port that nobody has at any of the
    addresses, or else at any one that is left. Raises OSError."""
    trouble: OSError | None = None
    for partly in (False, True):
        for port in ports:
            socks, missed = _try_port(address, where, port)
            if socks and (partly or not any(e.errno == errno.EADDRINUSE for e in missed.values())):
                bound = replace(address, port=socks[0].getsockname()[1], to=0)
                for host, error in missed.items():
                    log.warning("%s: not at %s of it: %s", bound, host, error.strerror)
                return socks, bound
            for sock in socks:
                sock.close()
            trouble = next(iter(missed.values()), trouble)
    raise trouble or OSError(errno.EADDRNOTAVAIL, "it has no address")


def _try_port(
    address: Address, where: Sequence[Where], port: int
) -> tuple[list[socket.socket], dict[str, OSError]]:
    """The sockets that could be bound, and why the others could not."""
    socks: list[socket.socket] = []
    missed: dict[str, OSError] = {}
    for family, sockaddr in where:
        host = str(sockaddr[0])
        try:
            socks.append(_bind_one(address, family, (host, port, *sockaddr[2:])))
        except OSError as error:
            missed[host] = error
            continue
        port = socks[0].getsockname()[1]
    return socks, missed


def _bind_one(address: Address, family: int, where: tuple[object, ...]) -> socket.socket:
    """As util/qemu-sockets.c has it in try_bind(): one IPv6 socket for both families, if it may be."""
    both = family == socket.AF_INET6 and not address.v6only
    try:
        return _bind_inet(family, where, v6only=not both)
    except OSError as error:
        if not both or error.errno != errno.EADDRINUSE:
            raise
        return _bind_inet(family, where, v6only=True)


def _bind_inet(family: int, where: tuple[object, ...], *, v6only: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        sock.bind(where)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
