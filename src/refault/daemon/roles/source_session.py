"""A source's channel as a session: where the other host is dialled again, and how long that is tried."""

from __future__ import annotations

import socket

import trio

from refault.channel.relay import SessionEnd
from refault.daemon.far.connection import growing_pauses
from refault.daemon.far.dial import outlast
from refault.daemon.far.session import Around
from refault.daemon.far.session_dialled import SessionDialled
from refault.daemon.known.course import Course
from refault.daemon.relayed.channels import Channels
from refault.daemon.relayed.session_waits import SessionWaits
from refault.migration.endpoint import Inet
from refault.migration.messages import MULTIFD_INIT_BYTES, multifd_init

SAYS_WITHIN = 10.0
"""A multifd channel says which it is at once (migration/multifd.c, multifd_send_initial_packet)."""


async def lane_of(channels: Channels, local: socket.socket, *, multifd: bool) -> int:
    """Which lane of a session QEMU's further connection may be; 0 for none.

    Multifd channels come in any order, and their numbers are what both ends have of them.
    """
    if channels.session is SessionEnd.NO or not multifd:
        return 1
    first = b""
    pauses = growing_pauses()
    with trio.move_on_after(SAYS_WITHIN):
        while len(first) < MULTIFD_INIT_BYTES:
            await trio.lowlevel.wait_readable(local)
            try:
                first = local.recv(MULTIFD_INIT_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except OSError:
                break
            if not first:
                break
            if len(first) < MULTIFD_INIT_BYTES:
                await trio.sleep(next(pauses))
    said = multifd_init(first)
    return 1 + said.number if said is not None else 0


def keep_session_soon(
    course: Course, channels: Channels, endpoint: Inet, lane: int = 0, *, goes_on: bool = False
) -> None:
    """Sees to a lane of the newest channel, which has been connected to `endpoint`, where that may become a
    session, or `goes_on` to be one.

    The other refault offers that on the very connection, so it listens where that was made.
    """
    if channels.session is not SessionEnd.NO:
        course.vm.start_soon(_keep, course, channels, endpoint, channels.channel, lane, goes_on)


async def _keep(
    course: Course, channels: Channels, endpoint: Inet, channel: int, lane: int, goes_on: bool
) -> None:
    def addresses() -> list[Inet]:
        others = [each for each in course.addresses.order() if isinstance(each, Inet)]
        return list(dict.fromkeys([endpoint, *others]))

    def leave(connection: trio.socket.SocketType) -> None:
        course.vm.start_soon(outlast, connection)

    waits = SessionWaits(course, channels)
    around = Around(course.name, channels.relay, lambda: channels.changed, waits, course)
    session = SessionDialled(around, addresses, leave, lane)
    if goes_on:
        session.goes_on()
    await session.run(channel)
