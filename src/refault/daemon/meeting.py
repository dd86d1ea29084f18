"""Takes over a migration that no client's command set up here: what a QEMU that is met is at, and what its
command line or `human-monitor-command` began. One that is paused is a lost channel like any other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping

import msgspec
import trio

from refault.daemon.host.repeats import repeats
from refault.daemon.known.vm_state import QUERY_TIMEOUT, VmState
from refault.daemon.monitor.monitor import MonitorLost, QemuInfo, QmpError, words
from refault.daemon.near.handed_leg import take
from refault.daemon.record.session_file import NO_LEG
from refault.daemon.record.state_file import MigrationRecord
from refault.daemon.recovery.doubt import hold_again, tell_still_held
from refault.daemon.roles.destination import Destination
from refault.daemon.roles.source import Source
from refault.daemon.succession import Succession
from refault.migration.endpoint import Inet, parse_uri
from refault.migration.legs import SENT_ALL
from refault.migration.phase import ENDS_PRECOPY, Role
from refault.migration.recovery import AttemptFailed, Event
from refault.migration.relayable import NO_LANES, Lanes
from refault.migration.versions import abilities

log = logging.getLogger("refault.vm")

_BEFORE_POSTCOPY = frozenset({"setup", "wait-unplug", "active", "pre-switchover", "device"})
_UNDER_WAY = _BEFORE_POSTCOPY | frozenset(
    {
        "postcopy-device",
        "postcopy-active",
        "postcopy-paused",
        "postcopy-recover-setup",
        "postcopy-recover",
    }
)
PAUSE = 0.05
LONGEST_PAUSE = 2.0
MAY_HAVE_SENT_ALL = (
    "it does not pause, so it may have sent all: look at the destination; if its migration is completed, quit"
    " this QEMU, which must not run again"
)
MAY_NOT_TAKE = (
    "its QEMU holds the channel's leg since an earlier refault, and this one may not take it out of that"
    " process: restart refault with CAP_SYS_PTRACE and pidfd_getfd allowed, as in its unit, or in postcopy"
    " say migrate-pause to this QEMU, which is then recovered"
)


class _MayNotTakeError(AttemptFailed):
    """Its leg may not be taken out of QEMU's process."""


class Meeting:
    """Of one VM. `incoming`: where a destination is found, and the path at which its QEMU listens, where the
    operator has said so."""

    def __init__(
        self, state: VmState, succession: Succession, incoming: Callable[[], tuple[Inet, str] | None]
    ) -> None:
        self._state = state
        self._succession = succession
        self._incoming = incoming

    def status_told(self, status: object) -> None:
        """A MIGRATION event, which may be of a migration that is not known."""
        succession, info = self._succession, self._state.monitor.qemu
        set_up = succession.pending is not None or succession.under_way
        if info is not None and status in _UNDER_WAY - {"setup"} and not set_up:
            self._state.start_soon(self.meet, info)

    async def goes_on(self) -> bool:
        """Whether a QEMU whose process is not known is at our migration: a new one is at none."""
        try:
            status = (await self._state.query("query-migrate")).get("status")
        except QmpError:
            return False  # it has its machine yet to make (--preconfig)
        except trio.TooSlowError:
            return True  # a destination's main thread is stuck on a missing page; a new one's is not
        return status not in (None, "none", "setup")

    async def meet(self, info: QemuInfo) -> None:
        """Takes over what this QEMU is at, if it is at anything; while it is there."""
        state, pause = self._state, PAUSE
        while state.monitor.qemu is info and not self._succession.under_way:
            try:
                await self._take_over(patient=pause < LONGEST_PAUSE / 4)
                if not self._succession.under_way:
                    await state.owed.put_back()
                return
            except MonitorLost:
                pass  # who is connected to next is met then
            except trio.TooSlowError:
                log.warning(
                    "%s: QEMU does not answer yet whether a migration is under way; asking again",
                    state.name,
                    extra=repeats((state.name, "take over"), (info, "busy")),
                )
            except (QmpError, OSError, AttemptFailed) as error:
                log.error(
                    "%s: cannot take over the migration that is under way: %s; trying again",
                    state.name,
                    words(error),
                    extra=repeats((state.name, "take over"), (info, words(error))),
                )
            await trio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _take_over(self, *, patient: bool) -> None:
        succession = self._succession
        async with succession.one_at_a_time:
            await succession.answered()
            if not succession.under_way:
                await self._take_over_what_is_met(patient=patient)

    async def _go_on(self) -> bool:
        """Goes on with a channel that the refault before has left to this one, or ends it as its phase
        allows; whether there is one. QEMU is asked nothing: it may wait for what only its relay brings."""
        state = self._state
        info = state.monitor.qemu
        if info is None or info.pid is None:
            return False  # nothing is left with a process that is not known, and QEMU would be asked for it
        record = await state.record()
        if record is None or not isinstance(endpoint := parse_uri(record.uri), Inet):
            return False
        if record.leg is None:
            return await self._deliver(record, endpoint)
        try:
            end = take(record.qemu_pid, record.qemu_started, record.leg)
        except PermissionError:
            raise _MayNotTakeError(MAY_NOT_TAKE) from None
        if end is None:
            return False
        left = state.state_file.session.take(record.generation, record.leg[1], record.handed)
        role = Source if record.role is Role.SOURCE else Destination
        try:
            migration = await self._succession.replace(role, endpoint, None, NO_LANES, record)
        except BaseException:
            end.close()  # QEMU holds it, and it is ended then
            raise
        migration.go_on(end, left)
        return True

    async def _deliver(self, record: MigrationRecord, endpoint: Inet) -> bool:
        """Delivers what a destination that has completed said last; whether there is such, left to this
        one."""
        session, which = self._state.state_file.session, (record.generation, NO_LEG, record.handed)
        if record.role is not Role.DESTINATION or session.look(*which) is None:
            return False
        # An error here leaves it for the next attempt.
        migration = await self._succession.replace(Destination, endpoint, None, NO_LANES, record)
        left = session.take(*which)
        if left is None or not migration.deliver(left):
            migration.refused()
            return False
        return True

    async def _take_over_what_is_met(self, *, patient: bool) -> None:
        state = self._state
        kept_from_us: _MayNotTakeError | None = None
        try:
            if await self._go_on():
                return
        except _MayNotTakeError as error:
            kept_from_us = error
        try:
            reply = await state.query("query-migrate")
        except QmpError:
            # With --preconfig the machine is yet to be made, and qemu-storage-daemon has none: neither has a
            # migration, and one that comes later is seen to begin.
            return
        status = reply.get("status")
        if status in (None, "none", "setup") and await self._listens(reply):
            return
        if kept_from_us is not None and status in _UNDER_WAY - {"postcopy-paused"}:
            raise kept_from_us
        record = await state.record()
        # A source that has failed meanwhile may run the guest a second time.
        failed = status in ("failing", "failed") and record is not None and record.role is Role.SOURCE
        if not isinstance(status, str) or (status not in _UNDER_WAY and not failed):
            return
        if record is not None and status in _BEFORE_POSTCOPY:
            may_have_sent_all = record.role is Role.SOURCE and status in ENDS_PRECOPY
            if record.kept and may_have_sent_all:
                tell_still_held(state.name, SENT_ALL)
            # Postcopy has not begun: if that is on record it was an earlier one's.
            kept = record.kept if may_have_sent_all else ()
            record = msgspec.structs.replace(record, postcopy=False, kept=kept)
        is_source = record.role is Role.SOURCE if record else "ram" in reply
        endpoint = parse_uri(record.uri) if record else None
        if not is_source and status in ("setup", "active"):
            return  # it listens somewhere that refault was not told of
        relayed = record is not None and record.relayed and isinstance(endpoint, Inet)
        # QEMU holds both ends of such a leg from QEMU_VM_EOF on (guard.py): it sees none, and does not pause.
        held = is_source and record is not None and record.kept and record.leg is None
        if relayed and status in self._about_to_pause and not (held and status == "postcopy-active"):
            # Its channel ended with the refault that carried it; QEMU will notice in a moment, unless it
            # still holds our end of its leg (local.Deposits).
            if not patient and not is_source:
                await state.monitor.execute("migrate-pause", oob=True, timeout=QUERY_TIMEOUT)
            raise AttemptFailed(MAY_HAVE_SENT_ALL if is_source and not patient else "it has not paused yet")
        log.info("%s: met a migration that is %s", state.name, status)
        taken_over = relayed and (failed or status == "postcopy-paused")
        reason = None if taken_over else "it was under way before refault"
        role = Source if is_source else Destination
        if reason is None:
            await state.ask_encrypted()
        lanes = Lanes(preempt=record is not None and record.preempt)
        migration = await self._succession.replace(role, endpoint, reason, lanes, record)
        if isinstance(migration.procedure, Destination) and reason is None and endpoint is not None:
            await migration.procedure.adopt(endpoint)
        migration.say_how()
        migration.course.feed(Event.STARTED)
        migration.course.on_status(status)
        if migration.channels is not None and migration.channels.in_doubt:
            migration.course.feed(Event.IN_DOUBT)
        if (rule := migration.course.kept_by) is not None:
            hold_again(migration.course, rule)

    async def _listens(self, query_migrate: Mapping[str, object]) -> bool:
        """Serves a QEMU that waits for a migration where its command line says, if an option says it too."""
        state = self._state
        try:
            status = (await state.query("query-status")).get("status")
        except QmpError:
            return False  # who cannot tell does not wait for one
        if status != "inmigrate":
            return False
        if (incoming := self._incoming()) is not None:
            endpoint, path = incoming
            migration = await self._succession.replace(Destination, endpoint, None, NO_LANES)
            if isinstance(migration.procedure, Destination):
                await migration.procedure.serve(path)
            return True
        match query_migrate.get("socket-address"):
            case [{"type": "inet"}, *_]:
                log.warning(
                    "%s: QEMU itself listens for a migration, and any connection there can end it: start it"
                    " with -incoming defer and give the address to migrate-incoming, or see --incoming",
                    state.name,
                )
        return False

    @property
    def _about_to_pause(self) -> Collection[str]:
        """What a QEMU says that is about to see that its channel has ended."""
        again = abilities(self._state.version).pauses_again_in_handshake
        return ("postcopy-active", *(("postcopy-recover-setup", "postcopy-recover") if again else ()))
