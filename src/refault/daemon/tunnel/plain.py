"""The plain side of a tunnel: one connection of somebody's, whose bytes, ends and resets are passed on."""

from __future__ import annotations

import contextlib
import math
import select
import socket
import struct

import trio

from refault.daemon.far.bell import Bell
from refault.daemon.far.lane import LaneEnd
from refault.session.course import Event

_PIECE = 256 << 10
"""Bytes of one read or write: others are waiting too."""
_LOOK = 0.25
"""Seconds until a connection of which poll(2) tells nothing is asked again whether it broke."""
_AT_ONCE = struct.pack("ii", 1, 0)
"""struct linger: a close that is a reset."""

_THROWN_AWAY = memoryview(bytearray(64 << 10))


def break_off(sock: socket.socket) -> None:
    """Closes a connection by a reset; a unix socket knows none."""
    if sock.fileno() >= 0 and sock.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    sock.close()


class Plain:
    """A connected socket, this object's from now on, and the end of the lane by which it is relayed."""

    def __init__(self, sock: socket.socket, end: LaneEnd) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._end = end
        self._stream = end.stream
        self._is_unix = sock.family == socket.AF_UNIX
        self._room = Bell()
        self._came = Bell()
        self._scope = trio.CancelScope()
        self._in_order = False

    async def run(self) -> None:
        """Passes on until the connection is closed, or reset: that is how it ends by any way but `close`."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read)
                    nursery.start_soon(self._write)
        finally:
            if self._in_order:
                self._sock.close()
            else:
                break_off(self._sock)

    # what the lane says (refault.daemon.far.lane.Local)

    def wake(self) -> None:
        """There may be bytes to take, or room for what is to be said."""
        self._room.ring()
        self._came.ring()

    def close(self) -> None:
        """All is said and taken: `run` closes the connection and ends."""
        self._in_order = True
        self._scope.cancel()

    def reset(self) -> None:
        """What is taken at once is given; a unix socket knows no reset, and is closed."""
        with contextlib.suppress(OSError):  # it takes no more now, or broke itself
            while data := self._stream.unwritten():
                self._stream.wrote(self._sock.send(data, socket.MSG_NOSIGNAL))
        self._in_order = False
        self._scope.cancel()

    def say_no_more(self) -> None:
        """Nobody takes what comes from here any more: over a unix socket that can be told."""
        if self._is_unix:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RD)

    # tasks

    async def _read(self) -> None:
        stream, sock, end = self._stream, self._sock, self._end
        while True:
            space = stream.space()
            if not len(space):
                if stream.facts().finished:
                    break
                if not end.grow():
                    await self._until(self._room)
                continue
            try:
                length = sock.recv_into(space, min(len(space), _PIECE))
            except BlockingIOError:
                await trio.lowlevel.wait_readable(sock)
                continue
            except OSError:
                end.tell(Event.BROKE_HERE)
                return
            if length:
                stream.put(length)
            else:
                stream.finish()
            end.said()
            await trio.lowlevel.checkpoint()
        ended = False
        while not ended:  # what nobody takes is thrown away: a close with bytes unread would be a reset
            try:
                ended = not sock.recv_into(_THROWN_AWAY)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(sock)
                continue
            except OSError:
                end.tell(Event.BROKE_HERE)
                return
            await trio.lowlevel.checkpoint()
        while True:  # until the other direction has ended too
            await self._until(self._room)

    async def _until(self, bell: Bell) -> None:
        """Until it is rung, or after a moment; a connection that broke meanwhile is one that broke."""
        with trio.move_on_after(_LOOK):
            await bell.wait()
        poll = select.poll()
        poll.register(self._sock, 0)
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            self._end.tell(Event.BROKE_HERE)

    async def _write(self) -> None:
        stream, sock, end = self._stream, self._sock, self._end
        while True:
            data = stream.unwritten()
            if len(data):
                try:
                    length = sock.send(memoryview(data)[:_PIECE], socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    # A unix socket that is full does not tell that its peer takes no more (man 2 shutdown).
                    with trio.move_on_after(_LOOK if self._is_unix else math.inf):
                        await trio.lowlevel.wait_writable(sock)
                    continue
                except OSError as error:
                    if isinstance(error, BrokenPipeError) and self._is_unix:
                        stream.stop()  # it may yet say something
                        end.said()
                        continue
                    end.tell(Event.BROKE_HERE)
                    return
                stream.wrote(length)
                end.said()
                await trio.lowlevel.checkpoint()
            elif stream.facts().at_fin:
                with contextlib.suppress(OSError):  # it broke, which reading shows
                    sock.shutdown(socket.SHUT_WR)
                stream.wrote_fin()
                end.said()
            else:
                await self._came.wait()
