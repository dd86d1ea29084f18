"""Sockets that the service manager has opened for us (sd_listen_fds(3)), known by their addresses.

A process is given them once, at its start, and keeps them open for as long as it runs: what is served at one
gets a descriptor of its own. They are the manager's: their files are neither made, changed nor removed here.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, MutableMapping
from itertools import zip_longest

from refault.daemon.host.fd_store import PREFIX, has

_log = logging.getLogger(__name__)

_FIRST = 3
"""SD_LISTEN_FDS_START."""
_stored: dict[str, socket.socket] = {}
"""From the store, by the names that they have there."""
_spared: set[str] = set()
"""Names of those for which somebody is to come yet."""
_sockets: dict[object, socket.socket] = {}
"""By what getsockname(2) says: of TCP host and port, of a path where it really is."""


def adopt(environment: MutableMapping[str, str] = os.environ, first: int = _FIRST) -> None:
    """Takes what the manager has handed to this very process, and out of the environment."""
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return
    for number, name in zip_longest(range(first, first + int(count)), names[: int(count)], fillvalue=""):
        assert isinstance(number, int)  # noqa: S101 - there are no more names
        try:
            sock = socket.socket(fileno=number)
        except OSError as error:
            _log.warning("descriptor %d, from the service manager: %s", number, error.strerror)
            continue
        sock.set_inheritable(False)
        if name.startswith(PREFIX):
            _stored[name] = sock
            has([name])
            continue
        if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            _log.warning("descriptor %d, from the service manager, is no listening stream socket", number)
            sock.close()
            continue
        sock.setblocking(False)
        _sockets[_key(sock.getsockname())] = sock
        _log.info("the service manager has opened %s", sock.getsockname())


def stored(name: str) -> socket.socket | None:
    """Another descriptor of what the last process of this unit has put into the manager's store."""
    sock = _stored.get(name)
    return None if sock is None else sock.dup()


def claim_stored(names: Iterable[str]) -> None:
    """Somebody has these, or they are over."""
    for name in names:
        _spared.discard(name)
        if (sock := _stored.pop(name, None)) is not None:
            sock.close()


def spare_stored(names: Iterable[str]) -> None:
    """Somebody is to come for these yet, however late."""
    _spared.update(names)


def unclaimed() -> list[str]:
    """The names of those that nobody has come for, nor is to."""
    return [name for name in _stored if name not in _spared]


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
