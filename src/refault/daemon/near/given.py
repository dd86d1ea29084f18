"""The connection to the other host that a client has passed to QEMU and names in its `migrate`, as `fd:NAME`,
as libvirt does up to 10.2. It becomes the far leg; where it leads is where a recovery dials."""

from __future__ import annotations

import socket

import trio

from refault.daemon.monitor.monitor import Monitor, WatchedCommand
from refault.migration.endpoint import Endpoint, Inet, endpoint_of


class Given:
    """One, by QEMU's `name`; `endpoint` is its other end."""

    def __init__(self, name: str, connection: socket.socket) -> None:
        self.name = name
        self._connection = connection
        host, port, *more = connection.getpeername()
        self.endpoint = Inet(f"{host}%{more[1]}" if more and more[1] else host, port)

    def lend(self) -> trio.socket.SocketType:
        """The connection. QEMU has a descriptor of it too, until it is told to close that."""
        return trio.socket.from_stdlib_socket(self._connection)

    def close(self) -> None:
        """It is not used, unless it is joined."""
        self._connection.close()


def given_in(monitor: Monitor, command: WatchedCommand) -> Given | None:
    """What a command names; None where that is no connection that was passed."""
    name = _fd_name(endpoint_of(command.arguments))
    if name is None:
        return None
    known_as = monitor.name_upstream(command.client, name)
    try:
        connection = monitor.passed.get(known_as)
    except OSError:
        return None
    if connection is None:
        return None
    try:
        return Given(known_as, connection)
    except OSError:  # it has ended
        connection.close()
        return None


def _fd_name(endpoint: Endpoint | None) -> str | None:
    uri = endpoint.uri if endpoint is not None else ""
    return uri.removeprefix("fd:") if uri.startswith("fd:") else None
