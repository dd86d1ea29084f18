"""Connections that clients have passed to QEMU with `getfd`, for as long as QEMU knows them by name and
nothing has used them: a `migrate` may name one, and the relay then takes its place.

We hold a duplicate of each, which is closed as soon as QEMU is told of its name again.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable

import msgspec

_MOST = 8
"""Duplicates; the oldest makes way."""
_WORD_ENDS = re.compile(r"[\s:=,]+")
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


class Passed:
    """Those of one QEMU, by QEMU's names."""

    def __init__(self) -> None:
        self._sockets: dict[str, socket.socket] = {}

    def sends(self, messages: Iterable[tuple[bytes, int]]) -> None:
        """What goes to QEMU, each with the descriptor that goes with it or -1."""
        for data, fd in messages:
            if self._sockets:
                self._drop_named(data)
            if fd >= 0 and (sock := connected(fd)) is not None:
                if (name := _getfd_name(data)) is None:
                    sock.close()
                    continue
                if len(self._sockets) >= _MOST:
                    self.forget(next(iter(self._sockets)))
                self._sockets[name] = sock

    def _drop_named(self, data: bytes) -> None:
        try:
            message = msgspec.json.decode(data)
        except msgspec.DecodeError:  # QEMU's JSON is wider: in doubt nothing is ours
            return self.clear()
        arguments = message.get("arguments") if isinstance(message, dict) else None
        for text in _strings(arguments):
            for name in _WORD_ENDS.split(text):  # fd:NAME, NAME:NAME, a line for the human monitor
                self.forget(name)
        return None

    def get(self, name: str) -> socket.socket | None:
        """Another duplicate, the caller's to close; None where there is none of this name. Raises OSError."""
        sock = self._sockets.get(name)
        return sock.dup() if sock is not None else None

    def forget(self, name: str) -> None:
        """It is not to be used any more."""
        if (sock := self._sockets.pop(name, None)) is not None:
            sock.close()

    def clear(self) -> None:
        """QEMU went away."""
        for name in list(self._sockets):
            self.forget(name)


def connected(fd: int) -> socket.socket | None:
    """A duplicate of a descriptor that is a TCP connection; None where it is another thing."""
    try:
        copy = os.dup(fd)
    except OSError:
        return None
    try:
        sock = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None
    try:
        if sock.family in _FAMILIES and sock.type == socket.SOCK_STREAM:
            sock.getpeername()
            return sock
    except OSError:
        pass
    sock.close()
    return None


def _getfd_name(data: bytes) -> str | None:
    try:
        message = msgspec.json.decode(data)
    except msgspec.DecodeError:
        return None
    match message:
        case {"execute": "getfd", "arguments": {"fdname": str(name)}}:
            return name
    return None


def _strings(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
