"""What reaches a QEMU, asked of QEMU itself: descriptors that are passed, and the way to our sockets.

A forwarder between, a security module, a chroot or a mount namespace can keep them away, and a migration
would show it too late.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from refault.daemon.monitor.monitor import QmpError
from refault.daemon.near.local import Executes, hand_connection, take_back
from refault.daemon.near.local_unix import PrivateSockets

PROBE_TIMEOUT = 5.0
_COME_WITHIN = 1.0


async def takes_descriptor(monitor: Executes) -> bool:
    """Whether a descriptor that is passed to QEMU arrives. Raises what `execute` raises, but QmpError."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            name = await hand_connection(monitor, theirs.fileno())
        except QmpError:
            return False
    await take_back(monitor, name)
    return True


async def comes(monitor: Executes, sockets: PrivateSockets) -> bool:
    """Whether QEMU can connect to a socket of ours, and is who it is taken for. Raises OSError where no
    socket can be made, and what `execute` raises, but QmpError."""
    sockets.make_if_missing()
    listening = sockets.listen()
    try:
        async with _device(monitor, listening.path, server=False):
            with trio.move_on_after(_COME_WITHIN):
                (await listening.accept()).close()
                return True
    except QmpError:
        pass
    finally:
        listening.close()
    return False


async def listens(monitor: Executes, sockets: PrivateSockets) -> None:
    """Has QEMU listen for a moment where sockets for it may lie: a security module or another mount namespace
    may forbid it, and a `migrate-incoming` that fails there would be QEMU 10.0's last.

    Raises what `execute` raises where it cannot.
    """
    async with _device(monitor, sockets.path(), server=True):
        pass


@asynccontextmanager
async def _device(monitor: Executes, path: str, *, server: bool) -> AsyncIterator[None]:
    """A character device of QEMU's at a socket, which shows what QEMU may do there, and is removed again."""
    name = f"refault-trial-{secrets.token_hex(8)}"
    data: dict[str, object] = {"addr": {"type": "unix", "data": {"path": path}}, "server": server}
    if server:
        data["wait"] = False
    backend = {"type": "socket", "data": data}
    await monitor.execute("chardev-add", {"id": name, "backend": backend}, timeout=PROBE_TIMEOUT)
    try:
        yield
    finally:
        with trio.CancelScope(shield=True), contextlib.suppress(QmpError):
            await monitor.execute("chardev-remove", {"id": name}, timeout=PROBE_TIMEOUT)
