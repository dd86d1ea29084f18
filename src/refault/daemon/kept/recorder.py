"""All reading and sending of one monitor's sockets, and all that befalls its core, written down on the way,
while it is to be."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from refault.daemon.host.repeats import repeats
from refault.daemon.kept.journal import Journal, NoRoomError
from refault.daemon.kept.sockets import ONE_FD, passed_descriptor
from refault.daemon.kernel.passing import send_with
from refault.qmp.journal import Kind

log = logging.getLogger("refault.qmp")

TAKEN_WITHIN = 0.1
"""Seconds for which a descriptor is left in its client's socket until QEMU has it, where the client may have
something urgent to say behind it."""

_OFTEN = 32
_WITHIN = 0.5
"""More often than so often in so many seconds it is not begun anew where that can wait."""
_LARGE = 256 << 10
"""Bytes of what it is begun with, from which on it rests after each time."""
_RESTS = 20
"""Times as long as that took: it holds up all else meanwhile."""

_RECEIVE = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
_SEND = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT


class Recorder:
    """Of the monitor `name`. `before` gives all that is so far; `failed` is called once when nothing is
    written down any more."""

    def __init__(
        self, name: str, path: Path | None, before: Callable[[], bytes], failed: Callable[[], None]
    ) -> None:
        self._name = name
        self._journal = Journal(path) if path is not None else None
        self._before = before
        self._failed = failed
        self.on = False
        self._left = False
        self._rests_until = 0.0
        self._begun: deque[float] = deque(maxlen=_OFTEN)
        self._peeked: dict[int, tuple[socket.socket, int, int, trio.Event]] = {}
        """Descriptors that are in a client's socket yet, with so many bytes."""

    def begin(self) -> bool:
        """Writes down from here on, or anew; False where that cannot be."""
        if self._journal is None:
            return False
        began = time.perf_counter()
        try:
            before = self._before()
            self._journal.begin(before)
        except (OSError, OverflowError, msgspec.MsgspecError) as error:
            self._fail(error)
            return False
        self.on = True
        now = time.perf_counter()
        self._begun.append(now)
        self._rests_until = now + _RESTS * (now - began) if len(before) > _LARGE else 0.0
        if len(self._begun) == _OFTEN:
            self._rests_until = max(self._rests_until, self._begun[0] + _WITHIN)
        return True

    @property
    def rests(self) -> float:
        """Seconds for which it should not be begun anew where that can wait."""
        return max(self._rests_until - time.perf_counter(), 0.0)

    def go_on(self) -> None:
        """Writes down from here on, where the last refault has written; where that cannot be, nobody goes on
        from what that wrote. Raises OSError where that would be."""
        if not self.begin() and self._journal is not None:
            self._journal.give_up_left()

    def end(self) -> None:
        """Nothing is written down any more, and what was is of no use."""
        self.on = False
        if self._journal is not None:
            self._journal.end()

    def leave(self) -> bool:
        """What is written down is for the next refault, which begins where this one ends: nothing is sent or
        received any more. False where nothing was."""
        if not (self.on and self.begin() and self._journal is not None):
            return False
        self.on, self._left = False, True
        self._journal.leave()
        return True

    def _fail(self, error: Exception) -> None:
        was, self.on = self.on, False
        if self._journal is not None:
            self._journal.give_up()
        log.warning(
            "%s: cannot write down what clients do: %s; the end of refault disconnects them",
            self._name,
            error,
            extra=repeats((self._name, "clients' journal"), repr(error)),
        )
        if was:
            self._failed()

    def note(self, kind: Kind, who: int, data: bytes = b"") -> None:
        """Something befalls the core, right after this call."""
        if self.on:
            assert self._journal is not None  # noqa: S101 - it is on
            try:
                self._journal.append(kind, who, data)
            except NoRoomError as error:
                self._fail(error)

    def tell(self, kind: Kind, what: object) -> None:
        """The same of what refault itself does."""
        if self.on:
            try:
                data = msgspec.msgpack.encode(what)
            except (OverflowError, TypeError, msgspec.MsgspecError) as error:  # an integer of over 64 bits
                self._fail(error)
            else:
                self.note(kind, 0, data)

    def receive(self, sock: socket.socket, who: int, most: int, *, takes: bool) -> tuple[bytes, int]:
        """Without waiting: bytes, none at the end, and the first descriptor that came along, or -1. Raises
        OSError. Nothing else is half done."""
        if self.on:
            assert self._journal is not None  # noqa: S101 - it is on
            try:
                received = self._journal.receive(sock, who, most, takes=takes)
                if received is None and self.begin():
                    received = self._journal.receive(sock, who, most, takes=takes)
            except NoRoomError as error:
                self._fail(error)
            else:
                if received is not None:
                    data, fd = received
                    if fd >= 0:
                        self._peeked[fd] = sock, who, len(data), trio.Event()
                    return received
        self._still_ours()
        if not takes:
            return sock.recv(most, _RECEIVE), -1
        data, ancillary, _, _ = sock.recvmsg(most, ONE_FD, _RECEIVE)
        return data, passed_descriptor(ancillary)

    async def taken(self, sock: socket.socket, within: float) -> bool:
        """Whether QEMU has the descriptor that was received last, or it was closed, within so many seconds. A
        kill does not lose it before; and no more is to be received there."""
        for each, _, _, event in list(self._peeked.values()):
            if each is sock:
                with trio.move_on_after(within):
                    await event.wait()
                return event.is_set()
        return True

    def consume(self, sock: socket.socket) -> None:
        """More is to be received there, though QEMU has not the last descriptor: a kill now loses it."""
        for fd, (each, *_) in list(self._peeked.items()):
            if each is sock:
                self._consume(fd)

    def close(self, fd: int) -> None:
        """Closes a descriptor that was received."""
        os.close(fd)
        self._consume(fd)

    def _consume(self, fd: int) -> None:
        if (peeked := self._peeked.pop(fd, None)) is None:
            return
        sock, who, count, event = peeked
        event.set()
        if sock.fileno() < 0 or self._left:
            return
        if self.on:
            assert self._journal is not None  # noqa: S101 - it is on
            try:
                self._journal.consume(sock, who, count)
            except NoRoomError as error:
                self._fail(error)
            else:
                return
        with contextlib.suppress(OSError):
            sock.recv(count, _RECEIVE)

    def peeked(self, fd: int) -> int:
        """The number of the client in whose socket a descriptor is yet, or 0."""
        return self._peeked[fd][1] if fd in self._peeked else 0

    def peeked_bytes(self, sock: socket.socket) -> int:
        """How many bytes are in a client's socket that were received already."""
        return next((count for each, _, count, _ in self._peeked.values() if each is sock), 0)

    def recovered(self, fd: int, sock: socket.socket, who: int, count: int) -> None:
        """A descriptor that an earlier refault had received and not consumed."""
        self._peeked[fd] = sock, who, count, trio.Event()

    def send(self, sock: socket.socket, who: int, data: bytes | memoryview, fd: int = -1) -> int:
        """Without waiting; the number of bytes. Raises OSError."""
        if self.on:
            assert self._journal is not None  # noqa: S101 - it is on
            try:
                return self._journal.send(sock, who, data, fd)
            except NoRoomError as error:
                self._fail(error)
        self._still_ours()
        if fd >= 0:
            return send_with(sock, data, [fd], _SEND)
        return sock.send(data, _SEND)

    def _still_ours(self) -> None:
        if self._left:
            raise OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN))
