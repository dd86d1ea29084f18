"""A TCP proxy that loses each of its connections after some bytes, until it has lost enough of them.

One thread: a socket that another waits in could not be reset.
"""

from __future__ import annotations

import contextlib
import enum
import random
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

_RESET = struct.pack("ii", 1, 0)
_PIECE = 256 << 10
_LATE = 0.02
"""Seconds by which old bytes are late: the dialling end has come again by then."""


class Loss(enum.Enum):
    """How a connection is lost."""

    RESET = "reset at both ends"
    CLOSE = "closed at both ends, in order"
    LATE = "reset at the dialling end; what it had sent reaches the other end later, and then the end of file"


@dataclass(eq=False)
class _Side:
    """One socket of a connection, and what is on its way out of it."""

    sock: socket.socket
    other: _Side | None = None
    out: bytearray = field(default_factory=bytearray)
    said_all: bool = False
    shut: bool = False

    def reset(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.sock.close()


@dataclass
class _Connection:
    dialling: _Side
    answering: _Side
    left: int | None
    """Bytes until it is lost."""
    kind: Loss

    @property
    def sides(self) -> tuple[_Side, _Side]:
        return self.dialling, self.answering


class BreakingProxy:
    """Forwards to a port of 127.0.0.1, from one that it chooses, while it is entered."""

    def __init__(self, to: int, seed: int, *, losses: int, most: int) -> None:
        """`losses`: how many connections are lost in all; each after at most `most` bytes, many much sooner.
        `to` may be changed, for those that come."""
        self.to = to
        self._random = random.Random(seed)
        self._losses, self._most = losses, most
        self.lost = 0
        self.mute = False
        """Nothing that the answering end says gets through any more, on the connections that there are."""
        self._cuts = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=500)
        self._listening.setblocking(False)
        self.port: int = self._listening.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._late: list[tuple[float, _Side, bytes]] = []
        self._of: dict[socket.socket, tuple[_Connection, _Side]] = {}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> BreakingProxy:
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Nobody reaches anybody over it any more."""
        self._ends.set()
        self._thread.join()

    @property
    def busy(self) -> bool:
        """Whether some are to be lost yet."""
        return self._cuts.is_set() or self.lost < self._losses

    def block(self) -> None:
        """Resets what there is, and whoever comes, until `to` is set again."""
        self.to = 0
        self.lose(0, 1)

    def lose(self, losses: int, most: int) -> None:
        """Resets what there is, and loses so many more."""
        self._most, self._losses = most, self.lost + losses
        self._cuts.set()

    def _run(self) -> None:
        while not self._ends.is_set():
            if self._cuts.is_set():
                self._cuts.clear()
                for connection, side in list(self._of.values()):
                    self._forget(connection)
                    side.reset()
            for key, events in self._selector.select(0.01):
                if key.fileobj is self._listening:
                    self._accept()
                elif key.fileobj in self._of:
                    connection, side = self._of[key.fileobj]
                    if events & selectors.EVENT_WRITE:
                        self._write(connection, side)
                    if events & selectors.EVENT_READ and key.fileobj in self._of:
                        self._read(connection, side)
            now = time.monotonic()
            for each in [each for each in self._late if each[0] <= now]:
                self._late.remove(each)
                with each[1].sock as sock, contextlib.suppress(OSError):
                    sock.send(each[2])
        for connection, _ in list(self._of.values()):
            self._close(connection)
        for _, side, _ in self._late:
            side.sock.close()
        self._selector.close()
        self._listening.close()

    def _accept(self) -> None:
        dialling, _ = self._listening.accept()
        try:
            answering = socket.create_connection(("127.0.0.1", self.to))
        except OSError:
            _Side(dialling).reset()
            return
        left = None
        if self.lost < self._losses:
            most = self._random.choice((140, 400, 10_000, self._most, self._most, self._most))
            left = self._random.randint(1, min(most, self._most))
        connection = _Connection(_Side(dialling), _Side(answering), left, self._random.choice(tuple(Loss)))
        for side, other in (connection.sides, connection.sides[::-1]):
            side.other = other
            side.sock.setblocking(False)
            side.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._of[side.sock] = connection, side
            self._selector.register(side.sock, selectors.EVENT_READ)

    def _want(self, side: _Side) -> None:
        other = side.other
        assert other is not None
        events = selectors.EVENT_WRITE if side.out else 0
        if not side.said_all and not other.out:
            events |= selectors.EVENT_READ
        known = self._selector.get_map().get(side.sock)
        if known is not None:
            self._selector.unregister(side.sock)
        if events:
            self._selector.register(side.sock, events)

    def _read(self, connection: _Connection, side: _Side) -> None:
        other = side.other
        assert other is not None
        if self.mute and side is connection.answering:
            self._selector.unregister(side.sock)
            return
        try:
            data = side.sock.recv(_PIECE)
        except OSError:
            self._close(connection)
            return
        if not data:
            side.said_all = True
            self._shut(connection, other)
            return
        mine = data if connection.left is None else data[: connection.left]
        other.out += mine
        self._write(connection, other)
        if connection.left is not None and side.sock in self._of:
            connection.left -= len(mine)
            if connection.left == 0:
                self._lose(connection, data[len(mine) :] if side is connection.dialling else b"")

    def _write(self, connection: _Connection, side: _Side) -> None:
        try:
            del side.out[: side.sock.send(side.out)]
        except BlockingIOError:
            pass
        except OSError:
            self._close(connection)
            return
        self._shut(connection, side)

    def _shut(self, connection: _Connection, side: _Side) -> None:
        """Ends a direction whose bytes are all through; the connection, when both have."""
        other = side.other
        assert other is not None
        if other.said_all and not side.out and not side.shut:
            side.shut = True
            with contextlib.suppress(OSError):
                side.sock.shutdown(socket.SHUT_WR)
        if side.shut and other.shut:
            self._close(connection)
            return
        self._want(side)
        self._want(other)

    def _lose(self, connection: _Connection, late: bytes) -> None:
        self.lost += 1
        self._forget(connection)
        match connection.kind:
            case Loss.RESET:
                for side in connection.sides:
                    side.reset()
            case Loss.CLOSE:
                for side in connection.sides:
                    with contextlib.suppress(OSError):
                        side.sock.shutdown(socket.SHUT_RDWR)
                    side.sock.close()
            case Loss.LATE:
                connection.dialling.reset()
                self._late.append((time.monotonic() + _LATE, connection.answering, late))

    def _close(self, connection: _Connection) -> None:
        self._forget(connection)
        for side in connection.sides:
            side.sock.close()

    def _forget(self, connection: _Connection) -> None:
        for side in connection.sides:
            if self._of.pop(side.sock, None) is not None and side.sock in self._selector.get_map():
                self._selector.unregister(side.sock)
