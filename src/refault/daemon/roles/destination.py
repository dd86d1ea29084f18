"""The destination's commands: `migrate-incoming`, and `migrate-recover`, out-of-band, after a loss."""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Callable, Mapping

import msgspec
import trio

from refault.daemon.far import listen, ping
from refault.daemon.far.addresses import FarAddresses, words_of
from refault.daemon.far.announce import Ends, announce
from refault.daemon.far.connection import peek
from refault.daemon.far.listen import FarListener, why_not
from refault.daemon.far.waiting_room import WaitingRoom
from refault.daemon.host.repeats import repeats
from refault.daemon.kernel.tcp import alive, watch_over
from refault.daemon.migration import Migration
from refault.daemon.monitor.monitor import Answer, Forward, MonitorLost, QmpError, WatchedCommand, words
from refault.daemon.near.doors import Door, Doors
from refault.daemon.near.local import LocalLeg, reach
from refault.daemon.near.local_unix import QemuListens
from refault.daemon.relayed.channels import Channels
from refault.daemon.roles.destination_lanes import Gathered, Gathering
from refault.migration.addresses import inet_of
from refault.migration.endpoint import (
    Endpoint,
    Inet,
    endpoint_of,
    is_of_no_address,
    with_no_address,
    with_uri,
)
from refault.migration.messages import Kind, classify
from refault.migration.phase import Role
from refault.migration.recovery import AttemptFailed, Event, NotPausedYet, State
from refault.migration.relayable import lanes_of
from refault.migration.relayable import why_not as why_not_relayed
from refault.qmp.replies import is_error

log = logging.getLogger("refault.migration")

RECOVER_TIMEOUT = 5.0
FIRST_COMMAND_TIMEOUT = 5.0
STALL_TIMEOUT = 20.0
"""How long a handshake may stand still: longer than at the source, which begins anew then."""
ADDRESS_TIMEOUT = 15.0
"""How long an address is listened at before the next one, or the same again, is tried; longer than a source
tries (source.HANDSHAKE_TIMEOUT)."""
REACH_TIMEOUT = 5.0
IN_FLIGHT = 0.4
"""What a source sent before it gave its channel up has arrived so long after its next connection."""
LIVES_AFTER = 3.0
"""A channel that is still there so long after `dead_after` since another came for it has shown that it lives
(cext/leg.c)."""
_NOT_PAUSED = "postcopy is paused"
_TOLD_BEFORE = "triggered already"
"""Up to 8.1 (migration/migration.c, qmp_migrate_recover): QEMU waits where it was told first."""


class Destination:
    """The role of the QEMU that the guest comes to."""

    role = Role.DESTINATION

    def __init__(self, migration: Migration) -> None:
        self._migration = migration
        self._course = course = migration.course
        self._vm = vm = course.vm
        self._doors = Doors(vm, lanes=course.lanes.count > 0)
        room = WaitingRoom()
        self._addresses = FarAddresses(
            vm.name,
            course.addresses,
            room,
            self._offer,
            start_soon=vm.start_soon,
            repeats=course.repeats,
        )
        self._gathering = Gathering(course, room)
        self._line: list[trio.socket.SocketType] = []
        """Recovered channels that QEMU does not wait for yet."""
        self._ends: Ends | None = None
        """Of the newest channel."""
        self._listens_at: str | None = None
        """Where QEMU listens by its command line, until it has been connected to."""

    # ---- clients' commands ----

    async def set_up(self, command: WatchedCommand) -> Forward | Answer:
        """A client's `migrate-incoming`: refault has the address, QEMU a door of its own. Nobody can connect
        before QEMU has taken the command, and what it refuses it refuses in its own words.
        """
        migration = self._migration
        course = self._course
        vm = self._vm
        if migration.channels is None:
            return Forward(on_reply=self._watch_reply)
        endpoint = inet_of(migration.endpoint)
        listener: FarListener | None = None
        try:
            try:
                listener = await self._addresses.reserve(endpoint)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EPERM):  # QEMU may be allowed to
                    return await self._leave_to_qemu(f"the address cannot be had: {words(error)}")
                return await self._refuse(command, words_of(endpoint, error))
            try:
                uri = await self._doors.make_first()
            except (QmpError, trio.TooSlowError, OSError) as error:
                return await self._leave_to_qemu(f"no local leg could be made: {words(error)}")
            await self._execute(with_uri(command.arguments, uri))
            if listener is not None:
                self._addresses.open(listener)
                course.addresses.moved(listener.endpoint)
        except QmpError as error:
            migration.refused()
            return Answer(error=(error.class_, error.desc))
        except OSError as error:
            migration.refused()
            return Answer(error=("GenericError", why_not(error)))
        except MonitorLost:
            migration.refused()
            raise
        finally:
            self._addresses.give_up(listener)
        migration.accepted()
        self._addresses.bind_alternatives_soon()
        vm.start_soon(self._doors.lay)
        return Answer(value={})

    async def _execute(self, arguments: Mapping[str, object]) -> None:
        """`migrate-incoming`, for as long as QEMU needs. Raises QmpError, MonitorLost."""
        await self._vm.monitor.execute("migrate-incoming", arguments, timeout=math.inf)

    async def _refuse(self, command: WatchedCommand, why: str) -> Answer:
        """An address that cannot be had. What QEMU has against the command besides comes first, as there."""
        self._migration.refused()
        try:
            await self._execute(with_no_address(command.arguments))
        except QmpError as error:
            if not is_of_no_address(error.desc):
                return Answer(error=(error.class_, error.desc))
        return Answer(error=("GenericError", why))

    async def _leave_to_qemu(self, reason: str) -> Forward:
        await self._migration.go_unrelayed(reason)
        return Forward(on_reply=self._watch_reply)

    def _watch_reply(self, reply: bytes) -> bytes:
        if is_error(reply):
            self._migration.refused()
        else:
            self._migration.accepted()
        return reply

    async def serve(self, path: str) -> None:
        """A QEMU that listens at unix:`path` by its command line: refault binds the address that others are
        to know, and connects to QEMU when a migration begins there. Raises OSError.
        """
        migration = self._migration
        course = self._course
        listener = await self._addresses.bind(inet_of(migration.endpoint))
        course.addresses.moved(listener.endpoint)
        self._addresses.bind_alternatives_soon()
        self._listens_at = path
        migration.accepted()
        await self._doors.lay()

    async def adopt(self, endpoint: Endpoint) -> None:
        """A migration that was met at start-up: binds its address again. Raises OSError."""
        await self._addresses.bind(inet_of(endpoint))
        self._addresses.bind_alternatives_soon()

    async def migrate_recover(self, command: WatchedCommand) -> Forward | Answer:
        """A client recovers by hand: our attempt makes way; refault has its address where it is relayed, and
        listens there once QEMU has taken the command."""
        migration = self._migration
        course = self._course
        endpoint = endpoint_of(command.arguments)
        if not course.under_way or endpoint is None or set(command.arguments) != {"uri"}:
            return Forward()  # which QEMU refuses
        log.info("%s: a client recovers the destination by hand", course.name)
        course.feed(Event.CLIENT_RECOVERS)
        await migration.attempts.over()
        if migration.channels is None:
            return Forward(on_reply=migration.watch_move(endpoint))
        if not isinstance(endpoint, Inet):
            return Forward(on_reply=migration.watch_recovery)
        try:
            listener = await self._addresses.reserve(endpoint)
        except OSError as error:
            course.feed(Event.ATTEMPT_FAILED)
            if course.status != "postcopy-paused":
                return Forward()  # which QEMU refuses, whatever the address
            return Answer(error=("GenericError", words_of(endpoint, error)))
        if self._doors.open is not None:  # QEMU waits already, and whoever comes to this address reaches it
            failed = self._recovers_at(listener)
            return Answer(error=("GenericError", failed)) if failed else Answer(value={})
        try:
            door = await self._doors.next()
        except (QmpError, trio.TooSlowError, OSError) as error:
            self._addresses.give_up(listener)
            course.feed(Event.ATTEMPT_FAILED)  # QEMU could not listen there itself: the address is ours
            return Answer(error=("GenericError", f"QEMU takes no descriptor: {words(error)}"))
        self._doors.told(door)

        def watch(reply: bytes) -> bytes:
            if is_error(reply):
                self._doors.refused(door)
                self._addresses.give_up(listener)
                course.feed(Event.ATTEMPT_FAILED)
                return reply
            self._doors.taken(door)
            failed = self._recovers_at(listener)
            return _as_error(reply, failed) if failed else reply

        return Forward(arguments=with_uri(command.arguments, door.uri), on_reply=watch)

    def _recovers_at(self, listener: FarListener | None) -> str | None:
        """Listens at a client's address, and at later recoveries too; why not, where somebody was faster."""
        if listener is None:
            return None
        try:
            self._addresses.open(listener)
        except OSError as error:
            return why_not(error)
        self._course.addresses.add(listener.endpoint)
        self._course.remember()
        return None

    def show_address(self) -> Callable[[bytes], bytes] | None:
        """What makes query-migrate show where refault listens in QEMU's stead; None: QEMU shows its own."""
        shown = self._addresses.shown()
        if not shown:
            return None

        def show(reply: bytes) -> bytes:
            decoded = msgspec.json.decode(reply)
            if not isinstance(decoded.get("return"), dict):
                return reply
            decoded["return"]["socket-address"] = shown
            return msgspec.json.encode(decoded)

        return show

    # ---- the far side ----

    async def _offer(self, connection: trio.socket.SocketType, kind: Kind) -> None:
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
            if begins or self._course.lanes.multifd:
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
        with trio.move_on_after(listen.FIRST_BYTES_TIMEOUT):
            while self._doors.open is None and alive(connection):
                with trio.move_on_after(0.5):  # the peer may go while we wait for our own QEMU
                    await self._doors.wanted.wait()
        if self._doors.open is None or not await ping.answer(connection):
            return False
        with trio.move_on_after(listen.FIRST_BYTES_TIMEOUT):
            return classify(await peek(connection)) is Kind.RESUMED
        return False

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
        door, self._doors.first = self._doors.first, None
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
            self._doors.first = self._as_it_was(door, before)
            raise

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
        course.switches_never(not capabilities & {"postcopy-ram", "dirty-bitmaps"})
        lanes = lanes_of(capabilities, parameters)
        vm = self._vm
        reason = why_not_relayed(
            migration.endpoint,
            capabilities,
            parameters,
            role=self.role,
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
        if self._doors.lanes is not (lanes.count > 0):
            self._doors.lanes = lanes.count > 0
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
        watch_over(connection)
        self._line.append(connection)
        came = trio.current_time()
        lives_after = vm.patience.dead_after + LIVES_AFTER
        arrived_before: int | None = None
        try:
            while alive(connection):
                if (
                    self._doors.open is not None
                    and self._line[-1] is connection
                    and migration.channels is not None
                ):
                    door, self._doors.open = self._doors.open, None
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
                        self._doors.open = self._as_it_was(door, before)
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
        self._ends = Ends.of(connection)
        if isinstance(door, QemuListens) and gathered is not None:
            await self._gathering.connect(channels, door, gathered, recovered=recovered)
        elif isinstance(door, LocalLeg) and not self._course.lanes.count:
            channels.join(door, connection, recovered=recovered)
        else:
            raise AttemptFailed("QEMU has one descriptor, and more than one connection was switched on since")

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

    # ---- recovery ----

    async def attempt(self) -> None:
        """One recovery: `migrate-recover`, and QEMU waits for the source, for as long as need be."""
        migration = self._migration
        vm = self._vm
        if migration.channels is None:
            await self._attempt_unrelayed()
            return
        self._addresses.bind_alternatives_soon()  # what could not be had may be there by now
        if self._doors.open is None:
            door = self._doors.doubtful or await self._doors.next()
            with trio.CancelScope(shield=True):  # once sent it runs, whether or not we wait for the reply
                await self._tell(door)
        await migration.attempts.issued()
        vm.start_soon(self._doors.lay)

    def path_changed(self) -> bool:
        """Whether that served a recovery: the source is to find us as soon as it can."""
        lost = self._course.policy.state in (State.WAITING, State.ATTEMPTING, State.OPEN)
        return lost and self._ends is not None and announce(self._ends)

    async def _tell(self, door: Door) -> None:
        try:
            await self._recover(door.uri)
        except QmpError as error:
            if door is self._doors.doubtful and _TOLD_BEFORE in error.desc:
                self._doors.taken(door)
                return
            self._doors.refused(door)
            raise NotPausedYet if _NOT_PAUSED in error.desc else error from None
        except MonitorLost:
            self._doors.doubt(door)
            raise
        except trio.TooSlowError:
            self._doors.taken(door)  # it may wait there, so the next attempt goes on with this one
            raise
        self._doors.taken(door)

    async def _attempt_unrelayed(self) -> None:
        addresses = self._course.addresses
        if not addresses.order():
            raise AttemptFailed("the address of the lost channel is not known; name one with --recover-uri")
        endpoint = addresses.order()[0]
        addresses.tried(endpoint)
        try:
            await self._recover(endpoint.uri)
        except QmpError as error:
            if _NOT_PAUSED in error.desc:
                raise NotPausedYet from None
            raise
        await self._migration.attempts.issued()
        await trio.sleep(ADDRESS_TIMEOUT)  # a recovery ends this attempt, and so this wait
        if self._course.policy.state is State.OPEN:
            raise AttemptFailed(f"the source did not come to {endpoint.uri} in {ADDRESS_TIMEOUT:g} s")

    async def _recover(self, uri: str) -> None:
        course = self._course
        vm = self._vm
        await vm.monitor.execute("migrate-recover", {"uri": uri}, oob=True, timeout=RECOVER_TIMEOUT)
        course.counters.attempt()
        log.info("%s: recovery attempt %d: QEMU waits for the source (%s)",
                 course.name, course.counters.attempts, uri,
                 extra=course.repeats("attempt", uri))  # fmt: skip

    async def settle(self) -> None:
        """Lays new descriptors in place of those that were used."""
        migration = self._migration
        course = self._course
        if migration.channels is not None and course.policy.state is State.RUNNING:
            await self._doors.refill()

    async def prepare_to_stop(self) -> bool:
        """Gives QEMU our ends of those doors at which it waits; False where it did not take one."""
        return await self._doors.give_back()

    async def clean_up(self) -> None:
        """Frees the address, and takes back from QEMU the descriptors that it did not need."""
        self._addresses.close()
        await self._doors.close()


def _as_error(reply: bytes, desc: str) -> bytes:
    members = msgspec.json.decode(reply)
    del members["return"]
    return msgspec.json.encode({"error": {"class": "GenericError", "desc": desc}, **members})
