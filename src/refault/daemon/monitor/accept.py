"""Connections taken from a socket that listens, whatever becomes of one of them."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

import trio

from refault.daemon.host.descriptors import EXHAUSTED, Spare
from refault.daemon.kernel.polled import readable

PAUSE = 0.5
"""Seconds until it is tried again where none can be taken now: the one that waits waits on."""
_OF_THE_CONNECTION = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPERM,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENONET,
    }
)
"""What accept(2) says of a connection that is gone by then, or that a firewall forbids: the next comes."""


async def accepted(
    listening: socket.socket,
    tell: Callable[[OSError], None],
    *,
    spare: Spare | None = None,
    why_not: Callable[[], str | None] = lambda: None,
) -> socket.socket:
    """The next connection. `tell` hears why none can be taken now, each time that it is tried. `spare` is
    lent to it where there is no other descriptor; while `why_not` says why, it waits."""
    while True:
        await trio.lowlevel.wait_readable(listening)
        if not readable(listening):  # it may be a blocking one, where QEMU holds it too
            continue
        try:
            if (told := why_not()) is not None:
                raise OSError(errno.EMFILE, told)
            return listening.accept()[0]
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno in _OF_THE_CONNECTION:
                continue
            if error.errno in EXHAUSTED and spare is not None and spare.lend():
                continue
            tell(error)
        await trio.sleep(PAUSE)
