"""Which migration is a VM's, and how another takes its place.

A client's command sets one up, which is pending until QEMU has answered: where QEMU refuses, the one before
stands as it was. What nobody set up here (meeting.py) takes the place at once.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import trio

from refault.daemon.known.vm_state import VmState
from refault.daemon.migration import MakesRole, Migration, RoleProcedure
from refault.daemon.monitor.monitor import (
    Answer,
    Forward,
    MonitorLost,
    QemuInfo,
    QmpError,
    WatchedCommand,
)
from refault.daemon.near.given import given_in
from refault.daemon.record.state_file import MigrationRecord
from refault.daemon.roles.destination import Destination
from refault.daemon.roles.source import Source
from refault.migration.endpoint import Endpoint, endpoint_of
from refault.migration.relayable import Lanes
from refault.qmp.replies import is_error

log = logging.getLogger("refault.vm")


class Succession:
    """The migrations of one VM, one after the other."""

    def __init__(self, state: VmState) -> None:
        self._state = state
        self.migration: Migration | None = None
        """The one under way, or the last; None before the first."""
        self.pending: Migration | None = None
        """One whose command QEMU has yet to answer: it takes the last one's place once QEMU has taken it."""
        self.one_at_a_time = trio.Lock()
        """Held while a migration is set up, or taken over."""

    @property
    def under_way(self) -> bool:
        """Whether the migration is, to all that is known."""
        return self.migration is not None and self.migration.course.under_way

    @property
    def procedure(self) -> RoleProcedure | None:
        """What its role does; None where its QEMU has ended."""
        return (
            self.migration.procedure
            if self.migration is not None and not self.migration.course.gone
            else None
        )

    async def set_up(
        self, role: type[Source] | type[Destination], command: WatchedCommand
    ) -> Forward | Answer:
        """A client's command that begins a migration. Raises MonitorLost."""
        state = self._state
        info = state.monitor.qemu
        async with self.one_at_a_time:
            await self.answered()
            self._must_be(info)
            if await self._busy():
                return Forward()
            endpoint, given = endpoint_of(command.arguments), None
            if role is Source and (given := given_in(state.monitor, command)) is not None:
                given.close()  # the role takes it
                endpoint = given.endpoint
            reason, lanes = await state.judge(endpoint, role.role, given=given is not None)
            if given is not None and reason is None and lanes.count:
                reason = "beside a descriptor QEMU opens no further connection"
            await state.ask_threads()
            if role is Destination and isinstance(self.procedure, Destination):
                await self._retire_last()  # it may stand at the address
            migration = self.pending = self._new(role, endpoint, lanes)
            try:
                try:
                    migration.begin(reason)
                except OSError as error:
                    migration.begin(f"no relay could be made: {error}")
                verdict = await migration.procedure.set_up(command)
                self._must_be(info)
            except BaseException:
                self.drop_pending()
                raise
            return self._settle(migration, verdict)

    def _settle(self, migration: Migration, verdict: Forward | Answer) -> Forward | Answer:
        """Has QEMU's answer, which may be there already, decide whether the pending migration is one."""
        if isinstance(verdict, Answer):
            self.pending = None
            if verdict.error is None:
                self._install(migration)
            return verdict
        heard = verdict.on_reply

        def settle(reply: bytes) -> bytes:
            if self.pending is migration:
                self.pending = None
                if is_error(reply):
                    log.info("%s: QEMU refuses the command", self._state.name)
                else:
                    self._install(migration)
            return heard(reply) if heard is not None else reply

        return replace(verdict, on_reply=settle)

    def _install(self, migration: Migration) -> None:
        """QEMU has taken the command that sets `migration` up."""
        last, self.migration = self.migration, migration
        if last is not None:
            last.gives_way()
            self._state.start_soon(last.retire)

    def drop_pending(self) -> None:
        """QEMU will not answer its command."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.refused()

    def _must_be(self, info: QemuInfo | None) -> None:
        """Raises MonitorLost where a command that came for `info` goes to no QEMU any more."""
        if self._state.monitor.qemu is not info:
            raise MonitorLost(f"{self._state.name}: QEMU went away while a command waited")

    async def answered(self) -> None:
        """Waits while QEMU has the command that sets a migration up, so that it is not under way yet."""
        if self.pending is not None:
            await self.pending.settled.wait()

    async def replace(
        self,
        role: MakesRole,
        endpoint: Endpoint | None,
        reason: str | None,
        lanes: Lanes,
        met: MigrationRecord | None = None,
    ) -> Migration:
        """A new migration in the last one's place; `reason` and `met` as for `Migration.begin`."""
        await self._retire_last()
        await self._state.ask_threads()
        self.migration = self._new(role, endpoint, lanes)
        self.migration.settled.set()
        self.migration.begin(reason, met)
        return self.migration

    def _new(self, role: MakesRole, endpoint: Endpoint | None, lanes: Lanes) -> Migration:
        migration = Migration(self._state, role, endpoint, lanes)
        migration.course.pauses_told_by(self._state.monitor.hide_pauses)
        return migration

    async def _retire_last(self) -> None:
        if self.migration is not None:
            await self.migration.retire()

    async def _busy(self) -> bool:
        """Whether a migration is under way, so that QEMU will refuse another and ours must not be touched."""
        if not self.under_way:
            return False
        try:
            status = (await self._state.query("query-migrate")).get("status")
        except (QmpError, MonitorLost, trio.TooSlowError):
            return True
        if status in (None, "none"):  # a destination before 8.0 says nothing while it waits
            return isinstance(self.procedure, Destination)
        return status not in ("completed", "failed", "cancelled")

    def hand_over(self) -> None:
        """The next refault goes on with the channel, where it can."""
        if self.migration is not None:
            self.migration.hand_over()

    def end(self) -> None:
        """The VM is served no more."""
        if self.pending is not None:
            self.pending.close()
        if self.migration is not None:
            self.migration.say_what_stopping_costs()
            self.migration.close()
