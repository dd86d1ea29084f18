"""What reaches a QEMU, asked of QEMU itself: descriptors that are passed, and the way to our sockets.

A forwarder between, a security module, a chroot or a mount namespace can keep them away, and a migration
would show it too late.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket

import trio

from refault.daemon.monitor.monitor import QmpError
from refault.daemon.near.local import Executes, hand_connection, take_back
from refault.daemon.near.local_unix import PrivateSockets

PROBE_TIMEOUT = 5.0
_COME_WITHIN = 1.0
_numbers = itertools.count(1)


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
    """Whether QEMU can connect to a socket of ours, and is who it is taken for: a character device does, and
    is removed again.

    Raises OSError where no socket can be made, and what `execute` raises, but QmpError.
    """
    sockets.make_if_missing()
    listening = sockets.listen()
    name = f"refault-{os.getpid()}-{next(_numbers)}"
    place = {"type": "unix", "data": {"path": listening.path}}
    backend = {"type": "socket", "data": {"addr": place, "server": False}}
    try:
        await monitor.execute("chardev-add", {"id": name, "backend": backend}, timeout=PROBE_TIMEOUT)
        try:
            with trio.move_on_after(_COME_WITHIN):
                (await listening.accept()).close()
                return True
        finally:
            with trio.CancelScope(shield=True), contextlib.suppress(QmpError):
                await monitor.execute("chardev-remove", {"id": name}, timeout=PROBE_TIMEOUT)
    except QmpError:
        pass
    finally:
        listening.close()
    return False
