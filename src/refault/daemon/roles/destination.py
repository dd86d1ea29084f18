"""The destination's commands: `migrate-incoming`, and `migrate-recover`, out-of-band, after a loss."""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Callable, Mapping

import msgspec
import trio

from refault.daemon.far.addresses import FarAddresses, words_of
from refault.daemon.far.listen import FarListener, why_not
from refault.daemon.far.waiting_room import WaitingRoom
from refault.daemon.host.repeats import repeats
from refault.daemon.migration import Migration
from refault.daemon.monitor.monitor import Answer, Forward, MonitorLost, QmpError, WatchedCommand, words
from refault.daemon.near.doors import Door, Doors
from refault.daemon.roles.arrivals import Arrivals
from refault.migration.addresses import inet_of
from refault.migration.endpoint import (
    Endpoint,
    Inet,
    endpoint_of,
    is_of_no_address,
    with_no_address,
    with_uri,
)
from refault.migration.phase import Role
from refault.migration.recovery import AttemptFailed, Event, NotPausedYet, State
from refault.qmp.replies import is_error

log = logging.getLogger("refault.migration")

RECOVER_TIMEOUT = 5.0
ADDRESS_TIMEOUT = 15.0
"""How long an address is listened at before the next one, or the same again, is tried; longer than a source
tries (source.HANDSHAKE_TIMEOUT)."""
LISTENS_AGAIN = 0.25
"""Seconds until an address that cannot be had is tried again."""
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
        self._arrivals = Arrivals(migration, self._doors, room)
        self._addresses = FarAddresses(
            vm.name,
            course.addresses,
            room,
            self._arrivals.offer,
            start_soon=vm.start_soon,
            repeats=course.repeats,
        )

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
        self._arrivals.qemu_listens_at(path)
        migration.accepted()
        await self._doors.lay()

    async def adopt(self, endpoint: Endpoint) -> None:
        """A migration that was met at start-up: binds its address again. Raises OSError."""
        await self._addresses.bind(inet_of(endpoint))
        self._addresses.bind_alternatives_soon()

    @property
    def laid(self) -> tuple[str, ...]:
        """The names of what QEMU holds for later recoveries."""
        return self._doors.laid

    def takes_leg(self, *, goes_on: bool) -> None:
        """Waits for the source at the migration's address."""
        channels = self._migration.channels
        if goes_on and channels is not None:
            self._arrivals.goes_on(channels)
        self._vm.start_soon(self._listen_again)
        if channels is None or channels.kept.main is not None:  # else QEMU needs no other
            self._doors.takes_over()
            self._vm.start_soon(self._doors.lay)

    @property
    def _delivers(self) -> bool:
        """Whether a session may have something to deliver yet."""
        return self._arrivals.session is not None and not self._arrivals.session.over.is_set()

    async def _listen_again(self) -> None:
        """Until that can be had: nothing else can be done for the migration."""
        course = self._course
        endpoint = inet_of(self._migration.endpoint)
        while course.under_way or self._delivers:
            try:
                await self.adopt(endpoint)
                return
            except OSError as error:
                log.error("%s: cannot listen at %s, where the source comes to go on: %s; trying again",
                          course.name, endpoint.uri, error,
                          extra=repeats((course.name, "listen again"), error.errno))  # fmt: skip
            await trio.sleep(LISTENS_AGAIN)

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
        return lost and self._arrivals.announce()

    async def _tell(self, door: Door) -> None:
        try:
            await self._recover(door.uri)
        except QmpError as error:
            if door is self._doors.doubtful and _TOLD_BEFORE in error.desc:
                self._doors.taken(door)
                return
            self._doors.refused(door)
            raise NotPausedYet if _NOT_PAUSED in error.desc else error from None
        except (MonitorLost, trio.TooSlowError):
            self._doors.doubt(door)
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

    def give_way(self) -> None:
        """Another migration begins: nothing of this one is waited for."""
        if self._arrivals.session is not None:
            self._arrivals.session.give_up()

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
        """Frees the address, once a session has delivered its last words, and takes back from QEMU the
        descriptors that it did not need."""
        if self._arrivals.session is not None:
            await self._arrivals.session.over.wait()
        self._addresses.close()
        await self._doors.close()


def _as_error(reply: bytes, desc: str) -> bytes:
    members = msgspec.json.decode(reply)
    del members["return"]
    return msgspec.json.encode({"error": {"class": "GenericError", "desc": desc}, **members})
