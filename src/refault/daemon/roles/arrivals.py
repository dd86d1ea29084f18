"""Who comes to a destination's addresses, and which channel its QEMU is given: the one that begins the
migration, or the newest of those that recover it."""

from __future__ import annotations

import logging

import trio

from refault.channel.relay import SessionEnd
from refault.daemon.far import listen, ping, session_answered
from refault.daemon.far.announce import Ends, announce
from refault.daemon.far.connection import peek
from refault.daemon.far.session import Around
from refault.daemon.far.session_answered import SessionAnswered
from refault.daemon.far.waiting_room import WaitingRoom
from refault.daemon.host.repeats import repeats
from refault.daemon.kernel.tcp import alive, keep_alive
from refault.daemon.migration import Migration
from refault.daemon.monitor.monitor import MonitorLost, QmpError
from refault.daemon.near.doors import Door, Doors
from refault.daemon.near.local import LocalLeg, reach
from refault.daemon.near.local_unix import QemuListens
from refault.daemon.relayed.channels import Channels
from refault.daemon.relayed.session_waits import SessionWaits
from refault.daemon.roles.destination_lanes import Gathered, Gathering
from refault.migration.messages import Kind, classify
from refault.migration.phase import Role
from refault.migration.recovery import AttemptFailed, Event, State
from refault.migration.relayable import has_return_path, lanes_of
from refault.migration.relayable import why_not as why_not_relayed

log = logging.getLogger("refault.migration")

FIRST_COMMAND_TIMEOUT = 5.0
STALL_TIMEOUT = 20.0
"""How long a handshake may stand still: longer than at the source, which begins anew then."""
REACH_TIMEOUT = 5.0
IN_FLIGHT = 0.4
"""What a source sent before it gave its channel up has arrived so long after its next connection."""
LIVES_AFTER = 3.0
"""A channel that is still there so long after `dead_after` since another came for it has shown that it lives
(cext/leg.c)."""


class Arrivals:
    """Of one migration, whose QEMU is reached by `doors`; `room` has all who came."""

    def __init__(self, migration: Migration, doors: Doors, room: WaitingRoom) -> None:
        self._migration = migration
        self._course = migration.course
        self._vm = migration.course.vm
        self._doors = doors
        self._gathering = Gathering(self._course, room)
        self._line: list[trio.socket.SocketType] = []
        """Recovered channels that QEMU does not wait for yet."""
        self._ends: Ends | None = None
        """Of the newest channel."""
        self.session: SessionAnswered | None = None
        """What the newest channel may have become."""
        self._listens_at: str | None = None
        """Where QEMU listens by its command line, until it has been connected to."""

    def qemu_listens_at(self, path: str) -> None:
        """QEMU listens at unix:`path` by its command line, and is connected to when a migration begins."""
        self._listens_at = path

    def announce(self) -> bool:
        """Has the source find us as soon as it can; whether that was done."""
        return self._ends is not None and announce(self._ends)

    async def offer(self, connection: trio.socket.SocketType, kind: Kind) -> None:
        """One has come whose first bytes are there (`FarListener.serve`)."""
        if kind is Kind.SESSION:
            await session_answered.receive(connection, self.session, self._course.session, self._course.name)
            return
        begins = self._begins
        if begins:
            await self._learn()
        encrypted = self._vm.encrypted
        if encrypted is not (kind is Kind.ENCRYPTED):
            log.warning(
                "%s: closed a connection that begins with %s: tls-creds is %s here",
                self._course.name,
                kind.value,
                "set" if encrypted else "not set",
            )
        elif encrypted and self._course.lanes.count:
            log.warning("%s: closed a connection: TLS on more than one is not relayed", self._course.name)
        elif encrypted:
            # Nothing can be read, so what it is follows from what is waited for.
            if begins:
                await self._begin(connection)
            else:
                await self._wait_in_line(connection)
        elif kind is Kind.MULTIFD:
            await self._gathering.offer_multifd(connection)
        elif kind is Kind.FRAME:
            if self._course.lanes.preempt:
                await self._gathering.offer_preempt(connection)
        elif kind is Kind.FRESH:
            await self._begin(connection)
        elif kind is Kind.PING and not await self._answer(connection):
            log.info("%s: a source that asked whether we are ready went away", self._course.name)
        elif not await self._is_ours(connection):
            log.warning("%s: closed a connection that recovers another VM, or none", self._course.name)
        else:
            await self._wait_in_line(connection)

    async def _answer(self, connection: trio.socket.SocketType) -> bool:
        """Tells a source that asks (ping.py) when our QEMU waits for it; True if a recovered channel follows.

        One that is told nothing in the end has not been resumed, and asks again.
        """
        self._end_lost_session()
        with trio.move_on_after(listen.FIRST_BYTES_TIMEOUT):
            while self._doors.open is None and alive(connection):
                with trio.move_on_after(0.5):  # the peer may go while we wait for our own QEMU
                    await self._doors.wanted.wait()
        if self._doors.open is None or not await ping.answer(connection):
            return False
        with trio.move_on_after(listen.FIRST_BYTES_TIMEOUT):
            return classify(await peek(connection)) is Kind.RESUMED
        return False

    def _end_lost_session(self) -> None:
        """A source that recovers has given up the session, or its refault knows nothing of it any more."""
        if self.session is not None and self.session.is_lost:
            self.session.give_up()

    async def _begin(self, connection: trio.socket.SocketType) -> None:
        migration = self._migration
        course = self._course
        if migration.channels is None or not self._begins:
            self._tell_under_way()
            return
        gathered = None
        if course.lanes.count and isinstance(self._doors.first, QemuListens):
            gathered = await self._gathering.gather(connection, recovered=False)
            if gathered is None:
                return
            if self._doors.first is None:  # another source was faster
                gathered.close()
                self._tell_under_way()
                return
        main = self._gathering.main_of(connection, recovered=False)
        if gathered is None and self._gathering.are_too_many(main):
            return
        door = self._doors.pass_first()
        if door is None:
            door = await self._reach_listener()
        if door is None:
            return
        before = course.channel
        try:
            if isinstance(door, QemuListens) and gathered is None:
                door = await self._gathering.reach(door)
            await self._join(migration.channels, door, connection, gathered, recovered=False)
        except (AttemptFailed, OSError):
            self._doors.not_passed(self._as_it_was(door, before), recovered=False)
            raise
        if gathered is None:
            self._gathering.given(migration.channels, main)

    @property
    def _begins(self) -> bool:
        """Whether QEMU waits for the migration to begin."""
        return self._doors.first is not None or self._listens_at is not None

    def _tell_under_way(self) -> None:
        log.warning("%s: closed a connection that begins a migration: one is under way", self._course.name)

    async def _learn(self) -> None:
        """What the client has set since its `migrate-incoming`: QEMU counts its connections when the first
        one comes."""
        migration = self._migration
        course = self._course
        try:
            capabilities, parameters = await self._vm.ask_settings()
        except (QmpError, MonitorLost, trio.TooSlowError):
            return
        course.will_have_return_path(has_return_path(capabilities))
        course.switches_never(not capabilities & {"postcopy-ram", "dirty-bitmaps"})
        lanes = lanes_of(capabilities, parameters)
        vm = self._vm
        reason = why_not_relayed(
            migration.endpoint,
            capabilities,
            parameters,
            role=Role.DESTINATION,
            version=vm.version,
            process_is_seen=True,
        )
        if reason is not None and self._listens_at is None:
            log.warning("%s: it begins through the relay all the same, though %s: switched on after"
                        " migrate-incoming", course.name, reason,
                        extra=repeats((course.name, "switched on"), reason))  # fmt: skip
        if lanes != course.lanes:
            course.has(lanes)
            course.remember()
        if self._doors.learn(lanes=lanes.count > 0):
            vm.start_soon(self._doors.give_up_deposits if lanes.count else self._doors.lay)

    async def _reach_listener(self) -> LocalLeg | None:
        """The leg to a QEMU that listens by its command line; None where it cannot be had."""
        migration = self._migration
        course = self._course
        vm = self._vm
        path, self._listens_at = self._listens_at, None
        if path is None:
            return None
        # Its client may have set since what the relay cannot carry.
        reason, lanes = await vm.judge(migration.endpoint, Role.DESTINATION)
        if reason is None and lanes.count:
            reason = "it has more than one connection"
        if reason is not None:
            log.error(
                "%s: closed a connection that begins a migration, for the relay cannot carry it: %s. Let QEMU"
                " listen at an address of its own for that one",
                course.name,
                reason,
            )
        else:
            try:
                return await reach(path, vm.qemu_pid, REACH_TIMEOUT)
            except OSError as error:
                log.error("%s: QEMU cannot be reached for the migration: %s", course.name, error)
        self._listens_at = path
        return None

    async def _wait_in_line(self, connection: trio.socket.SocketType) -> None:
        """Until QEMU waits for it, it goes away, or the channel that it would replace has shown its life.

        The last to come is the first to be taken: its peer had most reason to come.
        """
        migration = self._migration
        course = self._course
        vm = self._vm
        keep_alive(connection, 1)
        self._line.append(connection)
        came = trio.current_time()
        lives_after = vm.patience.dead_after + LIVES_AFTER
        arrived_before: int | None = None
        try:
            while alive(connection):
                self._end_lost_session()
                if (
                    self._line[-1] is connection
                    and migration.channels is not None
                    and (door := self._doors.pass_open()) is not None
                ):
                    before = course.channel
                    gathered = None
                    try:
                        if isinstance(door, QemuListens):
                            gathered = await self._gathering.gather(connection, recovered=True)
                            if gathered is None:
                                self._doors.taken(door)
                                return
                        await self._join(migration.channels, door, connection, gathered, recovered=True)
                    except (AttemptFailed, OSError):
                        self._doors.not_passed(self._as_it_was(door, before), recovered=True)
                        raise
                    vm.start_soon(self._watch_handshake, migration.channels)
                    return
                if migration.channels is not None and course.policy.state is State.RUNNING:
                    waited = trio.current_time() - came
                    arrived = migration.channels.relay.look().forward_bytes
                    if waited > lives_after or (arrived_before is not None and arrived > arrived_before):
                        log.warning("%s: closed a connection that recovers what is not lost", course.name)
                        return
                    if waited > IN_FLIGHT:
                        arrived_before = arrived
                with trio.move_on_after(0.5):  # the peer may go while we wait for our own QEMU
                    await self._doors.wanted.wait()
        finally:
            self._line.remove(connection)
        log.info("%s: a recovered channel went away before QEMU was ready for it", course.name)

    async def _join(
        self,
        channels: Channels,
        door: Door,
        connection: trio.socket.SocketType,
        gathered: Gathered | None,
        *,
        recovered: bool,
    ) -> None:
        """Gives QEMU a channel."""
        before = channels.channel
        self._ends = Ends.of(connection)
        if isinstance(door, QemuListens) and gathered is not None:
            await self._gathering.connect(channels, door, gathered, recovered=recovered)
        elif isinstance(door, LocalLeg) and not self._course.lanes.count:
            channels.join(door, connection, recovered=recovered)
        else:
            raise AttemptFailed("QEMU has one descriptor, and more than one connection was switched on since")
        if channels.channel > before and channels.session is not SessionEnd.NO:
            self._keep_session(channels)

    def goes_on(self, channels: Channels) -> None:
        """The newest channel is a session that an earlier refault has left to this one."""
        self._keep_session(channels, goes_on=True)

    def _keep_session(self, channels: Channels, *, goes_on: bool = False) -> None:
        course = self._course
        waits = SessionWaits(course, channels)
        around = Around(course.name, channels.relay, lambda: channels.changed, waits, course)
        self.session = SessionAnswered(around, channels.session_id, lanes=course.lanes.count)
        if goes_on:
            self.session.goes_on()
        self._vm.start_soon(self.session.run, channels.channel)

    def _as_it_was(self, door: Door, before: int) -> Door | None:
        """A door through which nobody came after all; None where a part of a channel did, `before` being the
        last one, or QEMU's leg went with it."""
        gone = isinstance(door, LocalLeg) and door.socket.fileno() < 0
        return None if gone or self._course.channel != before else door

    async def _is_ours(self, connection: trio.socket.SocketType) -> bool:
        """Whether a recovered channel asks for all our RAM blocks; for any where ours are not known."""
        channels = self._migration.channels
        known = {block.name for block in channels.relay.blocks()} if channels is not None else set()
        with trio.move_on_after(FIRST_COMMAND_TIMEOUT):
            return await listen.asks_for(connection, known)
        return False

    async def _watch_handshake(self, channels: Channels) -> None:
        course = self._course
        channel = channels.channel
        if not await channels.handshake_stalls(STALL_TIMEOUT) or channels.channel != channel:
            return
        if await channels.may_end_handshake():
            log.warning("%s: no end of the recovery handshake in %g s", course.name, STALL_TIMEOUT)
            channels.abandon(channel)
            course.feed(Event.CHANNEL_LOST)
