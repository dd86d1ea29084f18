"""A source's channel as QEMU opens it: QEMU connects at a private socket, the main connection first, and each
is completed to the other host before the next is taken.

The first channel of a migration begins with QEMU. It is told of a socket that is shut, so that it checks the
client's command, answers it, and stays in `setup`, as while it dials by itself. Only then the other host is
dialled, as QEMU does it, and QEMU let in; or refused, which it takes as it takes its own failure to connect.

What QEMU has opened, written and closed its own kernel would deliver: it is taken and completed though QEMU
has ended the main connection, the migration, or itself.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections import deque

import trio

from refault.channel.relay import SessionEnd, SessionState
from refault.daemon.far.dial import connect_any, connect_as_qemu, reached
from refault.daemon.kernel.unix_diag import peer_inode_now
from refault.daemon.known.course import Course
from refault.daemon.monitor.monitor import MonitorLost, QmpError
from refault.daemon.near.given import Given
from refault.daemon.near.local import LocalLeg, Pair
from refault.daemon.near.local_unix import Listening
from refault.daemon.near.short_queue import shorten
from refault.daemon.relayed.channels import Channels
from refault.daemon.relayed.qemu_word import BEFORE_STREAM
from refault.daemon.roles.source_session import keep_session_soon, lane_of
from refault.migration.endpoint import Inet
from refault.migration.recovery import AttemptFailed
from refault.migration.relayable import has_return_path, lanes_of

log = logging.getLogger("refault.migration")

QEMU_CONNECTS_WITHIN = 10.0
LANE_TIMEOUT = 10.0
"""How long the other host is dialled for a lane before the channel counts as lost."""
_REDIAL_AFTER = 0.1
_ASKED_EVERY = 0.05
DIAL_ADVICE = "look whether refault runs for this VM on the other host, and at the route and firewall to it"


class Opening:
    """One channel on its way. It owns `connections`, the far ones that were dialled ahead, main first;
    without any the other host is yet to be dialled."""

    def __init__(
        self,
        course: Course,
        channels: Channels,
        near: Listening | Pair,
        endpoint: Inet,
        connections: deque[trio.socket.SocketType],
        *,
        recovered: bool,
        given: Given | None = None,
    ) -> None:
        """`given`: what the client has connected, in place of dialling."""
        self.uri = near.uri
        """What QEMU's `migrate` is given."""
        self.joined = trio.Event()
        """Set once QEMU's main connection is joined to the other host."""
        self.over = trio.Event()
        """Set when no more connections are taken."""
        self.failure: str | None = None
        """Why the other host was not reached, as QEMU would say it."""
        self._course = course
        self._channels = channels
        self._near = near
        self._endpoint = endpoint
        self._connections = connections
        self._recovered = recovered
        self._given = given
        self._scope = trio.CancelScope()
        self._waits = trio.CancelScope()
        """The wait for QEMU's next connection."""
        self._opened = False
        """Whether QEMU is let in."""
        self._has_opened_all = False
        """Whether QEMU opens nothing any more: what it opened is there."""

    def cancel(self) -> None:
        """Takes no more connections; what is joined stays."""
        if not (self._recovered or self._connections or self.joined.is_set() or self.failure):
            where = f"{self._endpoint.host}:{self._endpoint.port}"
            self.failure = f"Failed to connect to '{where}': {os.strerror(errno.ECANCELED)}"
        self._scope.cancel()

    def is_meant(self, error: str) -> bool:
        """Whether QEMU's error is about what it was to connect to."""
        return isinstance(self._near, Pair) or self._near.path in error

    async def clear(self) -> None:
        """Removes what QEMU was to connect to, once what it has opened is completed: the migration is over,
        or the command was not taken."""
        if self._opened:
            self._opens_no_more()
            await self.over.wait()
        else:
            self.cancel()
            self._near.close()
            if self._given is not None:
                self._given.close()

    def _opens_no_more(self) -> None:
        self._has_opened_all = True
        self._waits.cancel()

    async def run(self) -> None:
        """Serves until all connections are there, or the channel is lost."""
        try:
            with self._scope:
                if not self._connections:
                    await self._dial_first()
                self._near.open()
                self._opened = True
                await self._take_main()
        except _NotReached as error:
            self.failure = str(error)
            log.warning("%s: the other host is not reached: %s (%s)", self._course.name, error, DIAL_ADVICE)
        finally:
            if self.failure is not None:
                self._near.refuse()  # the path stays, or QEMU would say that it does not exist
            else:
                self._near.close()
            for connection in self._connections:
                connection.close()
            self.over.set()

    async def _dial_first(self) -> None:
        """QEMU has taken the command. Raises _NotReached."""
        course = self._course
        vm = self._course.vm
        with contextlib.suppress(QmpError, MonitorLost, trio.TooSlowError):
            capabilities, parameters = await vm.ask_settings()  # from here on they stay as they are
            course.has(lanes_of(capabilities, parameters))
            course.will_have_return_path(has_return_path(capabilities))
            course.remember()
        try:
            if (given := self._given) is not None:
                self._given = None
                connection = given.lend()
            else:
                connection = await connect_as_qemu(self._endpoint)
        except OSError as error:
            raise _NotReached(str(error)) from None
        self._connections.append(connection)
        self._endpoint = reached(connection, self._endpoint)

    async def _take_main(self) -> None:
        local = None
        with trio.move_on_after(QEMU_CONNECTS_WITHIN):
            local = await self._next()
        if local is None and self._has_opened_all:
            return
        if local is None:
            log.warning(
                "%s: QEMU was told to migrate but did not connect to %s in %g s: if SELinux or AppArmor"
                " forbids it that, use --relay off",
                self._course.name,
                self._near.path,
                QEMU_CONNECTS_WITHIN,
            )
            return
        leg = LocalLeg(self._near.path, local, peer_inode_now(local))
        if not self._course.lanes.count:
            shorten(self._course.vm.qemu_pid, leg.peer_inode)
        try:
            self._channels.join(leg, self._connections.popleft(), recovered=self._recovered)
        except AttemptFailed as error:
            log.warning("%s: %s", self._course.name, error)
            leg.close()
            return
        self.joined.set()
        channel = self._channels.channel
        keep_session_soon(self._course, self._channels, self._endpoint)
        if not self._recovered:
            self._course.vm.start_soon(self._tell_answered, channel)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, channel)
                for _ in range(self._course.lanes.count):
                    if not await self._take_lane(channel):
                        break
                nursery.cancel_scope.cancel()
        finally:
            self._channels.no_more_lanes(channel)

    async def _next(self) -> socket.socket | None:
        """QEMU's next connection; None where it has opened all."""
        while True:
            if (local := self._near.take()) is not None or self._has_opened_all:
                return local
            with trio.CancelScope() as self._waits:
                return await self._near.accept()

    async def _tell_answered(self, channel: int) -> None:
        """QEMU answered long ago; that it has come through the TLS handshake its status tells, be it of a
        channel that is lost meanwhile."""
        course, channels, vm = self._course, self._channels, self._course.vm
        while vm.encrypted and course.status in BEFORE_STREAM and not channels.over(channel):
            events = course.events
            with contextlib.suppress(QmpError, MonitorLost, trio.TooSlowError):  # it may answer nobody then
                course.on_answer((await vm.query("query-migrate")).get("status"), events=events)
            await trio.sleep(_ASKED_EVERY)
        if not channels.over(channel):
            channels.answered()

    async def _watch(self, channel: int) -> None:
        """Cancels when the channel is lost; once QEMU has ended it only what is there is taken."""
        while self._channels.lives(channel):
            view = self._channels.relay.look()
            if view.channel == channel and view.last_lanes:
                self._opens_no_more()
            await self._channels.changed.wait()
        self.cancel()

    async def _take_lane(self, channel: int) -> bool:
        """Joins QEMU's next connection; False where there are no more. Where the channel is a session it
        begins as a lane of it, which the session's own rules connect."""
        local = await self._next()
        if local is None:
            return False
        try:
            lane = await lane_of(self._channels, local, multifd=self._course.lanes.multifd > 0)
            connection = self._connections.popleft() if self._connections else await self._dial(channel)
        except OSError as error:
            log.warning("%s: no further connection of the channel: %s", self._course.name, error)
            self._channels.lose(channel, error)
            await _until_cancelled_with(local)
        except BaseException:
            local.close()
            raise
        else:
            self._channels.add_lane(channel, local, connection, lane)
            if lane:
                keep_session_soon(self._course, self._channels, self._endpoint, lane)
        return True

    async def _is_session(self, channel: int) -> bool:
        """Whether the channel is a session, once that is known where one has been offered."""
        channels = self._channels
        while channels.session is not SessionEnd.NO and channels.lives(channel):
            view = channels.relay.session()
            if view is None or view.state is not SessionState.OFFERED:
                return view is not None and view.state in (SessionState.CARRIED, SessionState.BETWEEN)
            await channels.changed.wait()
        return False

    async def _dial(self, channel: int) -> trio.socket.SocketType | None:
        """Dials for as long as it makes sense: the main connection of this channel is made already. None
        where that is a session."""
        deadline = trio.current_time() + LANE_TIMEOUT
        while not await self._is_session(channel):
            try:
                return (await connect_any([self._endpoint], deadline - trio.current_time()))[0]
            except OSError:
                if trio.current_time() + _REDIAL_AFTER >= deadline:
                    raise
            await trio.sleep(_REDIAL_AFTER)
        return None


class _NotReached(Exception):  # noqa: N818 - it says what happened
    """The other host could not be dialled."""


async def _until_cancelled_with(local: socket.socket) -> None:
    """Keeps a lane that QEMU opened until the pump has seen the channel lost."""
    with local:
        await trio.sleep_forever()
