"""A connection's sending side: what does not go at once waits for a task."""

from __future__ import annotations

import socket
from collections import deque

import trio

from refault.daemon.kept.recorder import Recorder


class Wire:
    """Bytes and descriptors on their way into a socket.

    The writer appends to `backlog` pairs of bytes and a descriptor (-1 for none) that goes with the first of
    them and is the wire's from then on; calls `flush`, and while that leaves something, has one task `drain`.
    """

    __slots__ = ("_recorder", "_resumed", "backlog", "broken", "scope", "sock", "who")

    def __init__(
        self, sock: socket.socket, scope: trio.CancelScope, recorder: Recorder, who: int = 0
    ) -> None:
        self.sock = sock
        self.who = who
        """A client's number; 0 for QEMU."""
        self._recorder = recorder
        self.scope = scope
        """What ends with the connection."""
        self.backlog: deque[tuple[bytes | memoryview, int]] = deque()
        self.broken = False
        """A broken connection takes everything and sends nothing."""
        self._resumed: trio.Event | None = None

    def ends_with(self, scope: trio.CancelScope) -> None:
        """One of an earlier refault: what ends with the connection."""
        self.scope = scope

    def ends_within(self, seconds: float) -> None:
        """What ends with the connection has so long, from now; inf: as long as it takes."""
        self.scope.deadline = trio.current_time() + seconds

    def send_no_more(self) -> None:
        """It takes everything and sends nothing, as a broken connection does."""
        self.broken = True

    def paused(self) -> trio.Event:
        """Set when the client, which is paused, may be read from again."""
        self._resumed = trio.Event()
        return self._resumed

    def resume(self) -> None:
        """The client may be read from again."""
        if self._resumed is not None:
            self._resumed.set()

    def flush(self) -> int:
        """Sends what goes at once; the number of bytes."""
        total, backlog = 0, self.backlog
        while backlog:
            data, fd = backlog[0]
            if fd >= 0:
                sent = self._send_fd(data, fd)
            else:
                try:
                    sent = self._recorder.send(self.sock, self.who, data)
                except BlockingIOError:
                    break
                except OSError:
                    sent = self._break(data)
            total += sent
            if sent == len(data):
                backlog.popleft()
                continue
            if sent:
                backlog[0] = (memoryview(data)[sent:], -1)
            break
        return total

    async def writable(self) -> bool:
        """Waits until more can be sent; False if the socket is closed, or another task waits for it."""
        try:
            await trio.lowlevel.wait_writable(self.sock)
        except (trio.ClosedResourceError, trio.BusyResourceError):
            return False
        return not self.broken

    def discard(self) -> None:
        """Drops what was not sent, and closes its descriptors."""
        for _, fd in self.backlog:
            if fd >= 0:
                self._recorder.close(fd)
        self.backlog.clear()

    def _send_fd(self, data: bytes | memoryview, fd: int) -> int:
        try:
            # Over TCP QEMU says to the client that there is no descriptor.
            passed = fd if self.sock.family == socket.AF_UNIX else -1
            sent = self._recorder.send(self.sock, self.who, data, passed)
        except BlockingIOError:
            return 0
        except OSError:
            sent = self._break(data)
        self._recorder.close(fd)
        return sent

    def _break(self, data: bytes | memoryview) -> int:
        self.broken = True
        self.scope.cancel()
        return len(data)
