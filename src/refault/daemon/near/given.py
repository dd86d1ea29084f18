"""The connection to the other host that a client has passed to QEMU and names in its `migrate`, as `fd:NAME`,
as libvirt does up to 10.2. It becomes the far leg; where it leads is where a recovery dials."""

from __future__ import annotations

import socket

import trio

from refault.daemon.monitor.monitor import Monitor, WatchedCommand
from refault.daemon.near.local import take_back
from refault.migration.endpoint import Endpoint, Inet, endpoint_of


class Given:
    """One, by QEMU's `name`; `endpoint` is its other end. It is closed unless it is taken."""

    def __init__(self, monitor: Monitor, name: str, connection: socket.socket) -> None:
        self._monitor = monitor
        self._name = name
        self._connection = connection
        host, port, *more = connection.getpeername()
        self.endpoint = Inet(f"{host}%{more[1]}" if more and more[1] else host, port)

    async def take(self) -> trio.socket.SocketType:
        """The connection, which from here on is ours alone: QEMU closes its own descriptor of it."""
        try:
            await self.taken()
        except BaseException:
            self.close()
            raise
        return self.lend()

    def lend(self) -> trio.socket.SocketType:
        """The connection, while QEMU has yet to say whether it takes the command that names it."""
        return trio.socket.from_stdlib_socket(self._connection)

    async def taken(self) -> None:
        """QEMU has taken the command, with an address of ours instead: it closes its own descriptor."""
        self._monitor.passed.forget(self._name)
        await take_back(self._monitor, self._name)

    def close(self) -> None:
        """It is not used: QEMU's own descriptor of it is as it was."""
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
        return Given(monitor, known_as, connection)
    except OSError:  # it has ended
        connection.close()
        return None


def _fd_name(endpoint: Endpoint | None) -> str | None:
    uri = endpoint.uri if endpoint is not None else ""
    return uri.removeprefix("fd:") if uri.startswith("fd:") else None
