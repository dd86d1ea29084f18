"""Carries a lane's frames over one connection, as long as that lasts.

What waits unsent in the kernel stays small (TCP_NOTSENT_LOWAT), so that an acknowledgement, or a byte that
somebody waits for, is not behind much; reading never stops, for there is always room for what was promised.
"""

from __future__ import annotations

import errno
import math
import os
import socket
from collections.abc import Awaitable, Callable

import trio

from refault.daemon.far.lane import LaneEnd
from refault.daemon.kernel.tcp import is_silent, show_gone
from refault.session.stream import Wrong

SILENT_AFTER = 5
"""Seconds: longer than TCP needs to get a few lost segments through, and a false alarm costs one redial."""
ACKNOWLEDGE_AFTER = 0.01
"""Seconds after which what was written is acknowledged, little as it may be."""
_SILENCE = f"the other refault was silent for {SILENT_AFTER} s"
PART_TIMEOUT = 1.0
_LOOK = 1.0
_UNSENT = 64 << 10
_TCP_NOTSENT_LOWAT = 25
_SCRATCH = memoryview(bytearray(256 << 10))
"""What one read takes; it is the stream's before anything else is read."""


def prepare(sock: socket.socket) -> None:
    """Sets up a connection of a session, TCP."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _UNSENT)
    show_gone(sock, SILENT_AFTER)


async def carry(sock: socket.socket, end: LaneEnd) -> str:
    """Sends and receives until the connection is lost, or all is over and said. The reason, for people."""
    reasons: list[str] = []
    async with trio.open_nursery() as nursery:

        async def part(task: Callable[[socket.socket, LaneEnd], Awaitable[str]]) -> None:
            reasons.append(await task(sock, end))
            nursery.cancel_scope.cancel()

        for task in (_send, _receive, _watch):
            nursery.start_soon(part, task)
    return reasons[0]


async def part(sock: socket.socket) -> None:
    """Ends a connection on which all is said, so that the peer gets all of it: a close with bytes unread
    would be a reset."""
    try:
        sock.shutdown(socket.SHUT_WR)
        with trio.move_on_after(PART_TIMEOUT):
            while True:
                await trio.lowlevel.wait_readable(sock)
                if not sock.recv_into(_SCRATCH):
                    return
    except OSError:
        return


async def _send(sock: socket.socket, end: LaneEnd) -> str:
    stream = end.stream
    acknowledge_at = math.inf
    while True:
        pieces = stream.next()
        if pieces:
            try:
                stream.sent(sock.sendmsg(pieces, (), socket.MSG_NOSIGNAL))
            except BlockingIOError:
                await trio.lowlevel.wait_writable(sock)
            except OSError as error:
                return _why(error)
            else:
                await trio.lowlevel.checkpoint()
            continue
        if end.over.is_set():
            return "all is over"
        facts = stream.facts()
        if facts.told == facts.here.written:
            acknowledge_at = math.inf
        else:
            acknowledge_at = min(acknowledge_at, trio.current_time() + ACKNOWLEDGE_AFTER)
        with trio.move_on_at(acknowledge_at) as scope:
            await end.to_far.wait()
        if scope.cancelled_caught:
            stream.acknowledge()
            acknowledge_at = math.inf


async def _receive(sock: socket.socket, end: LaneEnd) -> str:
    while True:
        try:
            length = sock.recv_into(_SCRATCH)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
            continue
        except OSError as error:
            return _why(error)
        if not length:
            return "the other refault closed it"
        try:
            end.stream.take(_SCRATCH[:length])
        except Wrong as error:
            return f"the other refault is not to be believed: {error}"
        end.heard()
        await trio.lowlevel.checkpoint()


async def _watch(sock: socket.socket, end: LaneEnd) -> str:
    while not is_silent(sock, SILENT_AFTER):  # noqa: ASYNC110 - the kernel tells nobody
        await trio.sleep(_LOOK)
    return _SILENCE


def is_silence(reason: str) -> bool:
    """Whether a connection was lost by nothing that came; the kernel may have been the first to say so."""
    return reason in (_SILENCE, os.strerror(errno.ETIMEDOUT))


def _why(error: OSError) -> str:
    return error.strerror or os.strerror(error.errno or 0)
