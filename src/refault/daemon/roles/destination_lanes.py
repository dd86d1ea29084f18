"""A destination's channel with lanes: the connections that came from the other host are given to QEMU in its
order, both or none.

QEMU up to 7.2 starts when all are there, and a half-made attempt kills it at the next one: nothing is
connected to it before all have come. Later ones start on the main connection, and the source opens its
preempt channel only when it needs it: the pump holds back what must not come before that (cext/relay.h).
"""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from uuid import UUID

import trio

from refault.channel.relay import SessionState
from refault.daemon.far.connection import detached, peek
from refault.daemon.far.listen import FIRST_BYTES_TIMEOUT
from refault.daemon.far.waiting_room import WaitingRoom
from refault.daemon.kernel.tcp import alive, is_whole
from refault.daemon.kernel.unix_diag import peer_inode_now
from refault.daemon.known.course import Course
from refault.daemon.monitor.monitor import MonitorLost, QmpError
from refault.daemon.near.local import LocalLeg
from refault.daemon.near.local_unix import QemuListens
from refault.daemon.relayed.channels import Channels
from refault.migration.messages import MULTIFD_INIT_BYTES, MultifdInit, multifd_init
from refault.migration.phase import Phase
from refault.migration.versions import abilities

log = logging.getLogger("refault.migration")

ALL_WITHIN = 10.0
"""How long the other connections of a channel may be behind its main one, and each behind the one before."""
OTHER_HOST_AFTER = 0.5
"""How long a further connection is expected from the main one's host, after the one before, until one from
elsewhere is taken: a peer may have several addresses, but whoever is there may be anybody's."""
_LOOK = 0.1


@dataclass(frozen=True)
class Main:
    """The main connection of a channel, and when it came from where."""

    connection: trio.socket.SocketType
    number: int
    peer: str
    recovered: bool


@dataclass(frozen=True)
class _Multifd:
    """A multifd channel that waits."""

    connection: trio.socket.SocketType
    said: MultifdInit
    number: int
    peer: str
    taken: trio.Event

    def may_belong_to(self, main: Main) -> bool:
        """Whether it is there; a small guest's source may have sent all and closed it by now."""
        if self.taken.is_set():
            return False
        return alive(self.connection) or (self.number > main.number and is_whole(self.connection))


@dataclass(frozen=True)
class _Given:
    """The channel that QEMU has been given."""

    channels: Channels
    number: int
    main: Main


@dataclass(frozen=True)
class Gathered:
    """The connections of a channel, ready to be given to QEMU. `late`: the preempt channel comes later."""

    main: Main
    others: list[trio.socket.SocketType]
    late: bool

    def close(self) -> None:
        """Turns them away, but for the main one."""
        for other in self.others:
            other.close()


class Gathering:
    """Brings together the connections of one migration's channels: by what they say, and where they say
    nothing by when they came, for a peer may have several addresses."""

    def __init__(self, course: Course, room: WaitingRoom) -> None:
        self._course = course
        self._room = room
        self._mains: list[Main] = []
        """Those that wait for their further connections."""
        self._multifd: list[_Multifd] = []
        self._came = trio.Event()
        """Set when a multifd channel has said which it is, and replaced."""
        self._uuid: bytes | None = None
        """Our VM's; None while it is not known."""
        self._given: _Given | None = None
        """The channel with which QEMU has begun the migration."""

    async def offer_multifd(self, connection: trio.socket.SocketType) -> None:
        """A multifd channel has come: it waits until it is taken, or breaks, but not for ever alone."""
        arrival = self._room.arrival_of(connection)
        with trio.move_on_after(FIRST_BYTES_TIMEOUT):
            said = multifd_init(await peek(connection, MULTIFD_INIT_BYTES))
            if said is None:
                log.warning(
                    "%s: closed a connection from %s that is no multifd channel",
                    self._course.name,
                    arrival.peer,
                )
                return
            channel = _Multifd(connection, said, arrival.number, arrival.peer, trio.Event())
            if self._uuid is None:
                await self._ask_uuid()
            self._multifd.append(channel)
            self._came.set()
            self._came = trio.Event()
            try:
                while not channel.taken.is_set() and is_whole(connection):
                    if self._given is not None and self._is_one_more(channel, self._given.main):
                        self._end_given(self._given)
                        return
                    with trio.move_on_after(_LOOK):
                        await channel.taken.wait()
            finally:
                self._multifd.remove(channel)

    async def offer_preempt(self, connection: trio.socket.SocketType) -> None:
        """A preempt channel that is in use already: as a multifd channel, but not for longer than a main one
        waits for it."""
        arrival = self._room.arrival_of(connection)
        arrival.speaks(frames=True)
        self._room.tell()
        with trio.move_on_after(ALL_WITHIN):
            # Nothing tells of the peer's end.
            while arrival.taken is None and is_whole(connection):  # noqa: ASYNC110
                await trio.sleep(_LOOK)
        if arrival.taken is not None:
            arrival.hand(connection)

    async def gather(self, connection: trio.socket.SocketType, *, recovered: bool) -> Gathered | None:
        """Waits for what belongs to a main connection that has come. None where it did not come."""
        course = self._course
        vm = self._course.vm
        main = self.main_of(connection, recovered=recovered)
        late = course.lanes.preempt and abilities(vm.version).preempt_comes_late
        gathered = Gathered(main, [], late=late)
        if late or await self._gather(gathered.others, main):
            return gathered
        return None

    async def reach(self, door: QemuListens) -> LocalLeg:
        """A connection to QEMU, which must not see it end before it has been joined. Raises OSError where it
        does not listen."""
        with trio.CancelScope(shield=True):
            local = await self._course.vm.sockets.connect(door.path)
        return LocalLeg(door.path, local, peer_inode_now(local))

    async def connect(
        self, channels: Channels, door: QemuListens, gathered: Gathered, *, recovered: bool
    ) -> None:
        """Joins a channel with lanes. Raises AttemptFailed where the channel before must stay, OSError where
        QEMU does not listen.
        """
        course = self._course
        vm = self._course.vm
        channels.check_room()
        sockets = vm.sockets
        main = gathered.main
        with trio.CancelScope(shield=True):
            local = await sockets.connect(door.path)
            leg = LocalLeg(door.path, local, peer_inode_now(local))
            channels.join(leg, main.connection, recovered=recovered)
            channel = channels.channel
            if not recovered:
                self.given(channels, main)
            if course.lanes.preempt and not gathered.late:
                channels.closing.gives_preempt(channel)
            for number, other in enumerate(gathered.others, 1):  # multifd's in the order of their own
                channels.add_lane(channel, await sockets.connect(door.path), other, number)
        if gathered.late:
            vm.start_soon(self._bring_preempt, channels, channel, door, main)

    def given(self, channels: Channels, main: Main) -> None:
        """QEMU has been given the channel that begins the migration, with this main connection."""
        self._given = _Given(channels, channels.channel, main)

    def main_of(self, connection: trio.socket.SocketType, *, recovered: bool) -> Main:
        """A main connection that has come."""
        arrival = self._room.arrival_of(connection)
        return Main(connection, arrival.number, arrival.peer, recovered)

    def are_too_many(self, main: Main) -> bool:
        """Whether a multifd channel of this migration's has come that its QEMU would take no page from."""
        if not any(self._is_one_more(channel, main) for channel in self._multifd):
            return False
        log.error("%s: closed a channel from %s: %s", self._course.name, main.peer, self._too_many)
        return True

    def _is_one_more(self, channel: _Multifd, main: Main) -> bool:
        ours = channel.said.uuid == self._uuid and channel.peer == main.peer
        return ours and channel.may_belong_to(main) and channel.said.number >= self._course.lanes.multifd

    @property
    def _too_many(self) -> str:
        return (
            f"the source has more multifd channels than this QEMU, which takes {self._course.lanes.multifd},"
            " and what they carry would be lost; let multifd and multifd-channels be the same at both QEMUs"
        )

    def _end_given(self, given: _Given) -> None:
        """As QEMU, which fails at a channel that it does not expect (migration/multifd.c,
        multifd_recv_initial_packet)."""
        if given.channels.lives(given.number) and given.channels.phase is Phase.PRECOPY:
            log.error("%s: ending the migration: %s", self._course.name, self._too_many)
            given.channels.lose(given.number, OSError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED)))

    async def _gather(self, others: list[trio.socket.SocketType], main: Main) -> bool:
        lanes = self._course.lanes
        if lanes.multifd:
            await self._ask_uuid()
        began = last = trio.current_time()
        came = 0
        self._mains.append(main)
        try:
            while len(others) < lanes.count:
                before, came = came, len(others) or len(self._found(main))
                if came > before:
                    last = trio.current_time()
                if not main.recovered and self.are_too_many(main):
                    return False
                if self._is_void(main) or trio.current_time() > last + ALL_WITHIN:
                    log.warning(
                        "%s: closed a channel from %s: of its %d further connections %d came",
                        self._course.name, main.peer, lanes.count, came,
                    )  # fmt: skip
                    return False
                changed = self._came if lanes.multifd else self._room.changed
                if lanes.multifd:
                    others += self._take_multifd(main, last)
                else:
                    # A source that has gone has closed all: its QEMU is to see that, as it would by itself.
                    gone = not main.recovered and not alive(main.connection)
                    others += await self._take_preempt(main, began, ended=gone)
                if len(others) < lanes.count:
                    with trio.move_on_after(_LOOK):
                        await changed.wait()
        finally:
            self._mains.remove(main)
        return True

    def _is_void(self, main: Main) -> bool:
        """Whether it broke, or its peer has begun anew. That it has ended tells nothing: the source of a
        small guest may have sent all."""
        anew = any(other.peer == main.peer and other.number > main.number for other in self._mains)
        return anew or not is_whole(main.connection)

    async def _ask_uuid(self) -> None:
        try:
            told = (await self._course.vm.query("query-uuid")).get("UUID")
            self._uuid = UUID(str(told)).bytes
        except (QmpError, MonitorLost, trio.TooSlowError, ValueError):
            self._uuid = None

    def _found(self, main: Main) -> dict[int, _Multifd]:
        """The multifd channels of our VM by their numbers. Those of a host from which another main connection
        came are that one's; where one is there twice it is that of the same host, and then the newest."""
        others = {other.peer for other in self._mains if other is not main} - {main.peer}
        ours = [
            channel
            for channel in self._multifd
            if self._uuid in (None, channel.said.uuid)
            and channel.peer not in others
            and channel.may_belong_to(main)
        ]
        ours.sort(key=lambda channel: (channel.peer == main.peer, channel.number))
        return {channel.said.number: channel for channel in ours}

    def _take_multifd(self, main: Main, since: float) -> list[trio.socket.SocketType]:
        """All that are needed, or none; `since`: when the last of them came."""
        found = self._found(main)
        wanted = range(self._course.lanes.multifd)
        if not found.keys() >= set(wanted):
            return []
        chosen = [found[number] for number in wanted]
        elsewhere = any(channel.peer != main.peer for channel in chosen)
        if elsewhere and trio.current_time() < since + OTHER_HOST_AFTER:
            return []
        for channel in chosen:
            channel.taken.set()
        return [detached(channel.connection) for channel in chosen]

    async def _take_preempt(
        self, main: Main, since: float, *, ended: bool = False
    ) -> list[trio.socket.SocketType]:
        arrival = self._room.preempt_after(main.number, main.peer, ended=ended)
        if arrival is None and trio.current_time() > since + OTHER_HOST_AFTER:
            arrival = self._room.preempt_after(main.number, ended=ended)
        return [await self._room.take(arrival)] if arrival is not None else []

    async def _bring_preempt(self, channels: Channels, channel: int, door: QemuListens, main: Main) -> None:
        """Brings QEMU its preempt channel when the source is about to need it.

        It says nothing for long, so that anybody may be it: where the main one is a session, who comes for
        the next lane of that is it.
        """
        since: float | None = None
        with self._room.patient(main.number, main.peer):
            while channels.lives(channel):
                if not channels.relay.look().waiting:
                    await channels.changed.wait()
                    continue
                since = since or trio.current_time()
                found: list[trio.socket.SocketType | None] = []
                changed = channels.changed
                if _is_carried(channels, 1):
                    found = [None]
                elif not _is_carried(channels, 0):
                    changed = self._room.changed
                    found += await self._take_preempt(main, since)
                for connection in found:
                    if not channels.lives(channel):  # QEMU would take it for a main one
                        if connection is not None:
                            connection.close()
                        return
                    channels.closing.gives_preempt(channel)
                    with trio.CancelScope(shield=True):
                        local = await self._course.vm.sockets.connect(door.path)
                        channels.add_lane(channel, local, connection)
                    return
                with trio.move_on_after(_LOOK):
                    await changed.wait()


def _is_carried(channels: Channels, lane: int) -> bool:
    """Whether the lane is one of a session that has begun."""
    view = channels.relay.session(lane)
    return view is not None and view.state in (SessionState.CARRIED, SessionState.BETWEEN)
