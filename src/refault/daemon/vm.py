"""One VM: its front and its migration, what clients ask of it and what its QEMU says."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import trio

from refault.daemon.host.repeats import repeats
from refault.daemon.kept.taken import SUFFIX
from refault.daemon.kernel import routes
from refault.daemon.kernel.process import may_be_same, process_started, still_runs
from refault.daemon.known.vm_state import VmState
from refault.daemon.meeting import Meeting
from refault.daemon.migration import Migration
from refault.daemon.monitor.monitor import Answer, Forward, Monitor, QemuInfo, WatchedCommand
from refault.daemon.monitor.presence import Qemu
from refault.daemon.options import VmOptions
from refault.daemon.record.state_file import StateFile
from refault.daemon.record.state_lock import StateLock
from refault.daemon.relayed.channels import Channels
from refault.daemon.roles.destination import Destination
from refault.daemon.roles.source import Source
from refault.daemon.succession import Succession
from refault.migration.recovery import Event, State
from refault.qmp.replies import is_error

log = logging.getLogger("refault.vm")

FRONT_PAUSES = (0.1, 30.0)
"""Seconds: the first and the longest pause before a front is made anew that has failed."""
FRONT_LASTS = 60.0
"""Seconds after which a failure is the first again."""
QUIT_PATIENCE = 1.0
QUIT_LOOK = 0.02


def _first(error: BaseException) -> BaseException:
    """What a nursery's group is about."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Vm:
    """Serves one QEMU for as long as `run` is not cancelled."""

    def __init__(self, options: VmOptions, lock: StateLock | None = None) -> None:
        self.options = options
        self.name = options.name
        state_file = StateFile(options.state_dir, options.name, lambda: lock is None or lock.held)
        self.monitor = Monitor(
            options.name,
            options.qemu,
            options.listen,
            watch={
                "migrate": self._migrate,
                "migrate-incoming": self._migrate_incoming,
                "migrate-recover": self._migrate_recover,
                "migrate-start-postcopy": self._migrate_start_postcopy,
                "migrate-pause": self._migrate_pause,
                "migrate_cancel": self._migrate_cancel,
                "query-migrate": self._query_migrate,
                "query-migrate-parameters": self._query_migrate_parameters,
                "migrate-set-parameters": self._migrate_set_parameters,
            },
            on_event=self._on_event,
            on_connect=self._on_connect,
            on_disconnect=self._on_disconnect,
            gone_on=state_file.of_a_running_qemu(),
            journal=options.state_dir / f"{options.name}{SUFFIX}" if lock is not None and lock.held else None,
        )
        self.state = VmState(
            options.name,
            self.monitor,
            relay_allowed=options.relay == "auto",
            session_allowed=options.session == "auto",
            recover_uris=options.recover_uris,
            state_file=state_file,
            patience=options.patience,
        )
        self.succession = Succession(self.state)
        self._meeting = Meeting(self.state, self.succession, lambda: self.options.incoming)
        self._ends_soon = False
        """Whether it is about to end: then a lost monitor is no news."""
        self.info: QemuInfo | None = None
        """The QEMU that was connected to last; None before the first, and when it has ended."""
        self._shuts_down = False
        """Whether QEMU has said that it ends."""
        self._leaving: str | None = None
        self.internal_errors = 0
        """How often its front was made anew."""
        self.internal_error: str | None = None
        """The last of them."""

    @property
    def migration(self) -> Migration | None:
        """The one under way, or the last; None before the first."""
        return self.succession.migration

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listens, then serves. Raises what the monitor raises where an address cannot be bound."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.state.run)
                await nursery.start(self._keep_front)
                self.state.start_soon(routes.watch, self._path_changed)
                task_status.started()
        finally:
            self.monitor.presence.set(Qemu.AWAY)  # for who waits for it to change
            self.succession.end()

    async def _keep_front(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves the monitor, anew where that failed once it had begun: the migration, its pump and its legs
        outlive it, and QEMU is met again as after any loss of its monitor."""
        pause, longest = FRONT_PAUSES
        started = False
        while True:
            began: float | None = None
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.monitor.run)
                    if not started:
                        started = True
                        task_status.started()
                    began = trio.current_time()
            except Exception as error:
                if not started:
                    raise
                self.internal_errors += 1
                self.internal_error = repr(_first(error))
                if began is not None and trio.current_time() - began > FRONT_LASTS:
                    pause = FRONT_PAUSES[0]
                log.error(
                    "%s: internal error: clients are disconnected, and served again in %g s; a migration"
                    " goes on",
                    self.name,
                    pause,
                    exc_info=error,
                    extra=repeats((self.name, "front"), self.internal_error),
                )
            await trio.sleep(pause)
            pause = min(2 * pause, longest)
            self.monitor.renew()

    async def change(self, options: VmOptions) -> None:
        """Applies options that `changes_in_place` lets through: the clients stay, and what is for a migration
        is for the next one. Raises ListenError."""
        self.options = options
        self.state.set_options(
            relay_allowed=options.relay == "auto",
            session_allowed=options.session == "auto",
            recover_uris=options.recover_uris,
            patience=options.patience,
        )
        await self.monitor.listen_at([address for address in options.listen if address.server])

    @property
    def may_stop(self) -> bool:
        """Whether the end of refault kills or doubles no guest now."""
        if self.migration is None:
            return True
        channels, cost = self.migration.channels, self.migration.cost_of_stopping()
        return not (channels is not None and channels.delivers) and (cost is None or cost[0])

    @property
    def safe_now(self) -> bool:
        """Whether the end of refault does no harm in this moment, after `prepare_to_stop`."""
        channels = self._channels
        return self.may_stop or (
            channels is not None
            and not channels.delivers
            and (channels.kept.by_qemu or channels.kept.main is None)
        )

    @property
    def may_leave(self) -> bool:
        """Whether nobody need come after: no migration is under way or about to be, and no leg is open that
        has yet something to deliver."""
        if self.succession.pending is not None or self.succession.under_way:
            return False
        return self.may_stop and not (self._channels is not None and self._channels.tells)

    @property
    def _channels(self) -> Channels | None:
        return self.migration.channels if self.migration is not None else None

    @property
    def leaving(self) -> str | None:
        """Why it is about to be fronted no more."""
        return self._leaving

    def leaves(self, why: str | None) -> None:
        """It is about to be fronted no more; None: it stays."""
        self._leaving = why

    def ends_soon(self) -> None:
        """Nobody serves it in a moment."""
        self._ends_soon = True

    async def prepare_to_stop(self, *, restarts: bool = False) -> bool:
        """Makes our ends harmless to QEMU; where refault `restarts`, the next one's where that can be. False
        where it could not be done."""
        safe = self.migration is None or await self.migration.prepare_to_stop(restarts=restarts)
        return await self.state.let_go_all() and safe

    async def let_go_of_clients(self) -> None:
        """No refault follows: QEMU is to hold no connections for it, and be as it was."""
        await self.state.owed.pay_all()
        await self.monitor.let_go()

    def hand_over(self) -> None:
        """The next refault goes on with its clients, and with a channel that is a session, from this moment,
        in which this process ends."""
        self.succession.hand_over()
        self.monitor.hand_over()

    def _path_changed(self) -> bool:
        return self.migration is not None and self.migration.attempts.path_changed()

    # ---- what clients ask for ----

    async def _migrate(self, command: WatchedCommand) -> Forward | Answer:
        if command.arguments.get("resume") is True:
            procedure = self.succession.procedure
            return await procedure.client_resumes(command) if isinstance(procedure, Source) else Forward()
        return await self.succession.set_up(Source, command)

    async def _migrate_incoming(self, command: WatchedCommand) -> Forward | Answer:
        return await self.succession.set_up(Destination, command)

    async def _migrate_recover(self, command: WatchedCommand) -> Forward | Answer:
        procedure = self.succession.procedure
        if isinstance(procedure, Destination):
            return await procedure.migrate_recover(command)
        return Forward()

    async def _migrate_start_postcopy(self, _: WatchedCommand) -> Forward | Answer:
        migration = self.migration
        if migration is not None and migration.channels is not None and not migration.course.gone:
            await migration.channels.guard_switchover()
        return Forward()

    async def _migrate_pause(self, command: WatchedCommand) -> Forward | Answer:
        migration = self.migration
        if migration is None or migration.course.gone:
            return Forward()
        course = migration.course
        course.client_pauses_it()

        def watch(reply: bytes) -> bytes:
            lost_before = not course.client_paused()
            if not is_error(reply):
                log.info("%s: a client paused the migration; waiting for it to recover", self.name)
                course.feed(Event.CLIENT_PAUSED)
            elif lost_before and course.policy.state is State.YIELDED:
                course.feed(Event.TIMER)  # it was none of the client's doing
            return reply

        return Forward(on_reply=watch)

    async def _migrate_cancel(self, command: WatchedCommand) -> Forward | Answer:
        procedure = self.succession.procedure
        return await procedure.cancel(command) if isinstance(procedure, Source) else Forward()

    async def _query_migrate(self, command: WatchedCommand) -> Forward | Answer:
        procedure = self.succession.procedure
        if isinstance(procedure, Source):
            return Forward(on_reply=procedure.show_failure)
        show = procedure.show_address() if isinstance(procedure, Destination) else None
        return Forward(on_reply=show)

    async def _query_migrate_parameters(self, command: WatchedCommand) -> Forward | Answer:
        return Forward(on_reply=self.state.owed.hide)

    async def _migrate_set_parameters(self, command: WatchedCommand) -> Forward | Answer:
        return self.state.owed.set_by_client(command.arguments)

    # ---- what QEMU says ----

    def _on_event(self, name: str, data: Mapping[str, object]) -> None:
        status = data.get("status")
        # A guest may power off and its QEMU stay (-no-shutdown).
        self._shuts_down |= name == "SHUTDOWN" and data.get("guest") is not True
        if name == "MIGRATION":
            self._meeting.status_told(status)
            if self.succession.pending is not None:
                return  # what its command did before it was answered
        if self.migration is None or self.migration.course.gone:
            return
        if name == "MIGRATION" and isinstance(status, str):
            self.migration.course.on_event(status)
        elif name == "RESUME":
            self.migration.on_resume()
        if name == "STOP" and self.migration is not None:
            self.migration.course.on_stop()

    async def _on_connect(self, info: QemuInfo) -> None:
        started = process_started(info.pid)
        before = (self.state.qemu_pid, self.state.qemu_started)
        same = self.info is not None and may_be_same(before, (info.pid, started))
        self.info = info
        self._shuts_down = False
        self.state.met(info.pid, started)
        self.state.start_soon(self.state.owed.pay)
        if self.migration is not None and not self.migration.course.gone:
            if same and (info.pid is not None or await self._meeting.goes_on()):
                self.migration.course.look_soon()
                if self.migration.course.under_way:
                    return
            else:
                self._forget(self.migration)
        self.state.start_soon(self._meeting.meet, info)

    def _on_disconnect(self) -> None:
        self.succession.drop_pending()  # what QEMU had not answered it never does
        if self.migration is not None:
            self.migration.course.client_paused()
        if self._ends_soon:
            return
        self.state.start_soon(self._follow_end, self.migration)

    async def _follow_end(self, migration: Migration | None) -> None:
        """A QEMU that ends closes its monitor first, and the migration ends with the process."""
        pid = self.state.qemu_pid
        if pid is None and not self._shuts_down:
            return  # whoever answers next tells
        started = self.state.qemu_started
        expected = trio.current_time() + QUIT_PATIENCE
        while still_runs(pid, started):
            if self.monitor.qemu is not None:
                return
            if trio.current_time() > expected:
                log.warning(
                    "%s: the monitor was lost, but QEMU (pid %s) still runs; connecting to it again",
                    self.name,
                    pid,
                )
                expected = math.inf
            await trio.sleep(QUIT_LOOK)
        if self.monitor.qemu is None:
            self.info = None
            self.state.owed.over()
        self._forget(migration)

    def _forget(self, migration: Migration | None) -> None:
        """The QEMU of `migration` has ended: what is to be told from now on is the next one's."""
        if migration is not None:
            migration.qemu_ended()
        self.state.start_soon(self._let_go)

    async def _let_go(self) -> None:
        await self.state.let_go_all()
