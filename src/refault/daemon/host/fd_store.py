"""Descriptors that the service manager keeps for us over our end (sd_pid_notify_with_fds(3)), and hands to
the next process of the same unit (`handed`). It drops them when the unit is stopped.

How many it keeps stands in $FDSTORE, which systemd sets from 254 on, and the units before that.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Mapping

from refault.daemon.host.notify import address_of

PREFIX = "refault-kept-"
"""Of the names of those that are in the store."""

_names: set[str] = set()
"""Of this process's unit, those that are in it or on their way."""
_over: list[str] = []
"""Those of them that are to be removed, for which there was no room in the manager's queue."""


def has(names: Iterable[str]) -> None:
    """They are in it since the process before this one."""
    _names.update(names)


class FdStore:
    """Raises OSError where the manager cannot be reached; BlockingIOError where its queue has no room now."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = address_of(environment)
        room = environment.get("FDSTORE", "")
        self._room = int(room) if room.isdigit() else 0
        self.offered = self._address is not None and self._room > 0
        """Whether there is one."""

    def put(self, name: str, sock: socket.socket) -> None:
        """Has it kept, also when the other side has hung up (FDPOLL=0), for who reads the end is to come.
        Raises OSError where it keeps so many already: it would not say that it does not keep this."""
        self._remove_all()
        if name not in _names and len(_names) >= self._room:
            raise OSError(
                errno.ENOSPC, f"systemd keeps {self._room} descriptors and no more (FileDescriptorStoreMax=)"
            )
        self._send(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", [sock.fileno()])
        _names.add(name)

    def remove(self, name: str) -> None:
        """It is kept no more. Where the queue has no room that is made up for with the next one."""
        if name in _names and name not in _over:
            _over.append(name)
        self._remove_all()

    def _remove_all(self) -> None:
        while _over:
            self._send(f"FDSTOREREMOVE=1\nFDNAME={_over[0]}", [])
            _names.discard(_over.pop(0))

    def _send(self, text: str, fds: list[int]) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.connect(self._address or "")
            passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd)) for fd in fds]
            sender.sendmsg([text.encode()], passed, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
