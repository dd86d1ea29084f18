"""Sockets that the service manager has opened for us (sd_listen_fds(3)), known by their addresses.

A process is given them once, at its start, and keeps them open for as long as it runs: what is served at one
gets a descriptor of its own. They are the manager's: their files are neither made, changed nor removed here.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping

_log = logging.getLogger(__name__)

_FIRST = 3
"""SD_LISTEN_FDS_START."""
_sockets: dict[object, socket.socket] = {}
"""By what getsockname(2) says: of TCP host and port, of a path where it really is."""


def adopt(environment: MutableMapping[str, str] = os.environ, first: int = _FIRST) -> None:
    """Takes what the manager has handed to this very process, and out of the environment."""
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return
    for number in range(first, first + int(count)):
        try:
            sock = socket.socket(fileno=number)
        except OSError as error:
            _log.warning("descriptor %d, from the service manager: %s", number, error.strerror)
            continue
        sock.set_inheritable(False)
        if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            _log.warning("descriptor %d, from the service manager, is no listening stream socket", number)
            sock.close()
            continue
        sock.setblocking(False)
        _sockets[_key(sock.getsockname())] = sock
        _log.info("the service manager has opened %s", sock.getsockname())


def handed(where: object) -> socket.socket | None:
    """Another descriptor of the one that listens there, as getsockname(2) has it."""
    sock = _sockets.get(_key(where))
    return None if sock is None else sock.dup()


def is_handed(where: object) -> bool:
    """Whether there is one."""
    return _key(where) in _sockets


def _key(where: object) -> object:
    if isinstance(where, tuple):
        return where[:2]
    if isinstance(where, str):
        directory, name = os.path.split(where)
        return os.path.join(os.path.realpath(directory), name)
    return where
