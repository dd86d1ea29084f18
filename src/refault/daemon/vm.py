"""One VM: its monitor, its migration, and the picture that both give."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import msgspec
import trio

from refault.daemon.host.repeats import repeats
from refault.daemon.kept.taken import SUFFIX
from refault.daemon.kernel import routes
from refault.daemon.kernel.process import process_started
from refault.daemon.known.vm_state import QUERY_TIMEOUT, VmState
from refault.daemon.migration import MakesRole, Migration, RoleProcedure
from refault.daemon.monitor.monitor import (
    Answer,
    Forward,
    Monitor,
    MonitorLost,
    QemuInfo,
    QmpError,
    WatchedCommand,
    words,
)
from refault.daemon.monitor.presence import Qemu
from refault.daemon.near.given import given_in
from refault.daemon.options import VmOptions
from refault.daemon.record.state_file import MigrationRecord, StateFile
from refault.daemon.record.state_lock import StateLock
from refault.daemon.recovery.doubt import hold_again
from refault.daemon.roles.destination import Destination
from refault.daemon.roles.source import Source
from refault.migration.endpoint import Endpoint, Inet, endpoint_of, parse_uri
from refault.migration.phase import Role
from refault.migration.recovery import AttemptFailed, Event, State
from refault.migration.relayable import NO_LANES, Lanes
from refault.migration.versions import abilities
from refault.qmp.replies import is_error

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


FRONT_PAUSES = (0.1, 30.0)
"""Seconds: the first and the longest pause before a front is made anew that has failed."""
FRONT_LASTS = 60.0
"""Seconds after which a failure is the first again."""
MEET_PAUSE = 0.05
MEET_LONGEST_PAUSE = 2.0
QUIT_PATIENCE = 1.0
QUIT_LOOK = 0.02
SENT_ALL = (
    "it does not pause, so it may have sent all: look at the destination; if its migration is completed, quit"
    " this QEMU, which must not run again"
)


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
                "migrate-pause": self._migrate_pause,
                "migrate_cancel": self._migrate_cancel,
                "query-migrate": self._query_migrate,
            },
            on_event=self._on_event,
            on_connect=self._on_connect,
            on_disconnect=self._on_disconnect,
            gone_on=state_file.of_a_running_qemu(),
            journal=options.state_dir / f"{options.name}{SUFFIX}" if lock is not None and lock.held else None,
        )
        self.migration: Migration | None = None
        """The one under way, or the last; None before the first."""
        self.state = VmState(
            options.name,
            self.monitor,
            relay_allowed=options.relay == "auto",
            session_allowed=options.session == "auto",
            recover_uris=options.recover_uris,
            state_file=state_file,
            patience=options.patience,
        )
        self._ends_soon = False
        """Whether it is about to end: then a lost monitor is no news."""
        self.info: QemuInfo | None = None
        """The QEMU that was connected to last; None before the first, and when it has ended."""
        self._one_set_up = trio.Lock()
        self._pending: Migration | None = None
        """One whose command QEMU has yet to answer: it takes the last one's place once QEMU has taken it."""
        self._shuts_down = False
        """Whether QEMU has said that it ends."""
        self._leaving: str | None = None
        self.internal_errors = 0
        """How often its front was made anew."""
        self.internal_error: str | None = None
        """The last of them."""

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
            if self._pending is not None:
                self._pending.close()
            if self.migration is not None:
                self.migration.say_what_stopping_costs()
                self.migration.close()

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
        channels = self.migration.channels if self.migration is not None else None
        return self.may_stop or (
            channels is not None
            and not channels.delivers
            and (channels.kept.by_qemu or channels.kept.main is None)
        )

    @property
    def may_leave(self) -> bool:
        """Whether nobody need come after: no migration is under way or about to be, and no leg is open that
        has yet something to deliver."""
        return self._pending is None and not self._under_way and self.may_stop

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

    async def prepare_to_stop(self) -> bool:
        """Makes our ends harmless to QEMU. False where that could not be done."""
        safe = self.migration is None or await self.migration.prepare_to_stop()
        return await self.state.let_go_all() and safe

    async def let_go_of_clients(self) -> None:
        """No refault follows: QEMU is to hold no connections for it."""
        await self.monitor.let_go()

    def hand_over(self) -> None:
        """The next refault goes on with its clients from this moment, in which this process ends."""
        self.monitor.hand_over()

    def _path_changed(self) -> bool:
        return self.migration is not None and self.migration.attempts.path_changed()

    # ---- what clients ask for ----

    async def _migrate(self, command: WatchedCommand) -> Forward | Answer:
        if command.arguments.get("resume") is True:
            procedure = self._procedure
            return await procedure.client_resumes(command) if isinstance(procedure, Source) else Forward()
        return await self._set_up(Source, command)

    async def _migrate_incoming(self, command: WatchedCommand) -> Forward | Answer:
        return await self._set_up(Destination, command)

    async def _set_up(
        self, role: type[Source] | type[Destination], command: WatchedCommand
    ) -> Forward | Answer:
        info = self.monitor.qemu
        async with self._one_set_up:
            await self._answered()
            self._must_be(info)
            if await self._busy():
                return Forward()
            endpoint, given = endpoint_of(command.arguments), None
            if role is Source and (given := given_in(self.monitor, command)) is not None:
                given.close()  # the role takes it
                endpoint = given.endpoint
            reason, lanes = await self.state.judge(endpoint, role.role)
            if given is not None and reason is None and lanes.count:
                reason = "beside a descriptor QEMU opens no further connection"
            await self.state.ask_threads()
            if role is Destination and isinstance(self._procedure, Destination):
                await self._retire_last()  # it may stand at the address
            migration = self._pending = self._new(role, endpoint, lanes)
            try:
                try:
                    migration.begin(reason)
                except OSError as error:
                    migration.begin(f"no relay could be made: {error}")
                verdict = await migration.procedure.set_up(command)
                self._must_be(info)
            except BaseException:
                self._drop_pending()
                raise
            return self._settle(migration, verdict)

    def _settle(self, migration: Migration, verdict: Forward | Answer) -> Forward | Answer:
        """Has QEMU's answer, which may be there already, decide whether the pending migration is one."""
        if isinstance(verdict, Answer):
            self._pending = None
            if verdict.error is None:
                self._install(migration)
            return verdict
        heard = verdict.on_reply

        def settle(reply: bytes) -> bytes:
            if self._pending is migration:
                self._pending = None
                if is_error(reply):
                    log.info("%s: QEMU refuses the command", self.name)
                else:
                    self._install(migration)
            return heard(reply) if heard is not None else reply

        return replace(verdict, on_reply=settle)

    def _install(self, migration: Migration) -> None:
        """QEMU has taken the command that sets `migration` up."""
        last, self.migration = self.migration, migration
        if last is not None:
            last.gives_way()
            self.state.start_soon(last.retire)

    def _drop_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.refused()

    def _must_be(self, info: QemuInfo | None) -> None:
        """Raises MonitorLost where a command that came for `info` goes to no QEMU any more."""
        if self.monitor.qemu is not info:
            raise MonitorLost(f"{self.name}: QEMU went away while a command waited")

    async def _answered(self) -> None:
        """Waits while QEMU has the command that sets a migration up, so that it is not under way yet."""
        if self._pending is not None:
            await self._pending.settled.wait()

    async def _replace(
        self,
        role: MakesRole,
        endpoint: Endpoint | None,
        reason: str | None,
        lanes: Lanes,
        met: MigrationRecord | None = None,
    ) -> Migration:
        """A new migration in the last one's place; `reason` and `met` as for `Migration.begin`."""
        await self._retire_last()
        await self.state.ask_threads()
        self.migration = self._new(role, endpoint, lanes)
        self.migration.settled.set()
        self.migration.begin(reason, met)
        return self.migration

    def _new(self, role: MakesRole, endpoint: Endpoint | None, lanes: Lanes) -> Migration:
        migration = Migration(self.state, role, endpoint, lanes)
        migration.course.pauses_told_by(self.monitor.hide_pauses)
        return migration

    async def _retire_last(self) -> None:
        if self.migration is not None:
            await self.migration.retire()

    @property
    def _procedure(self) -> RoleProcedure | None:
        return (
            self.migration.procedure
            if self.migration is not None and not self.migration.course.gone
            else None
        )

    async def _busy(self) -> bool:
        """Whether a migration is under way, so that QEMU will refuse another and ours must not be touched."""
        if not self._under_way:
            return False
        try:
            status = (await self.state.query("query-migrate")).get("status")
        except (QmpError, MonitorLost, trio.TooSlowError):
            return True
        if status in (None, "none"):  # a destination before 8.0 says nothing while it waits
            return isinstance(self._procedure, Destination)
        return status not in ("completed", "failed", "cancelled")

    @property
    def _under_way(self) -> bool:
        return self.migration is not None and self.migration.course.under_way

    async def _migrate_recover(self, command: WatchedCommand) -> Forward | Answer:
        procedure = self._procedure
        if isinstance(procedure, Destination):
            return await procedure.migrate_recover(command)
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
        procedure = self._procedure
        return await procedure.cancel(command) if isinstance(procedure, Source) else Forward()

    async def _query_migrate(self, command: WatchedCommand) -> Forward | Answer:
        procedure = self._procedure
        if isinstance(procedure, Source):
            return Forward(on_reply=procedure.show_failure)
        show = procedure.show_address() if isinstance(procedure, Destination) else None
        return Forward(on_reply=show)

    # ---- what QEMU says ----

    def _on_event(self, name: str, data: Mapping[str, object]) -> None:
        status = data.get("status")
        # A guest may power off and its QEMU stay (-no-shutdown).
        self._shuts_down |= name == "SHUTDOWN" and data.get("guest") is not True
        if name == "MIGRATION":
            self._meet_unseen(status)
            if self._pending is not None:
                return  # what its command did before it was answered
        if self.migration is None or self.migration.course.gone:
            return
        if name == "MIGRATION" and isinstance(status, str):
            self.migration.course.on_status(status)
        elif name == "RESUME":
            self.migration.on_resume()
        if name == "STOP" and self.migration is not None:
            self.migration.course.on_stop()

    def _meet_unseen(self, status: object) -> None:
        """Takes over what no client's command set up here: `-incoming`, or `human-monitor-command`."""
        set_up = self._pending is not None or self._under_way
        info = self.monitor.qemu
        if info is not None and status in _UNDER_WAY - {"setup"} and not set_up:
            self.state.start_soon(self._meet, info)

    async def _on_connect(self, info: QemuInfo) -> None:
        started = process_started(info.pid)
        before = (self.state.qemu_pid, self.state.qemu_started)
        same = self.info is not None and before == (info.pid, started)
        self.info = info
        self._shuts_down = False
        self.state.met(info.pid, started)
        if self.migration is not None and not self.migration.course.gone:
            if same and (info.pid is not None or await self._goes_on()):
                self.migration.course.look_soon()
                if self.migration.course.under_way:
                    return
            else:
                self._forget(self.migration)
        self.state.start_soon(self._meet, info)

    async def _goes_on(self) -> bool:
        """Whether a QEMU whose process is not known is at our migration: a new one is at none."""
        try:
            status = (await self.state.query("query-migrate")).get("status")
        except QmpError:
            return False  # it has its machine yet to make (--preconfig)
        except trio.TooSlowError:
            return True  # a destination's main thread is stuck on a missing page; a new one's is not
        return status not in (None, "none", "setup")

    def _on_disconnect(self) -> None:
        self._drop_pending()  # what QEMU had not answered it never does
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
        started = process_started(pid)
        expected = trio.current_time() + QUIT_PATIENCE
        while started is not None and process_started(pid) == started:
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
        self._forget(migration)

    def _forget(self, migration: Migration | None) -> None:
        """The QEMU of `migration` has ended: what is to be told from now on is the next one's."""
        if migration is not None:
            migration.qemu_ended()
        self.state.start_soon(self._let_go)

    async def _let_go(self) -> None:
        await self.state.let_go_all()

    async def _meet(self, info: QemuInfo) -> None:
        """Takes over a migration that is under way; one that is paused is a lost channel like any other."""
        pause = MEET_PAUSE
        while self.monitor.qemu is info and not self._under_way:
            try:
                await self._take_over(patient=pause < MEET_LONGEST_PAUSE / 4)
                return
            except MonitorLost:
                pass  # who is connected to next is met then
            except (QmpError, trio.TooSlowError, OSError, AttemptFailed) as error:
                log.error(
                    "%s: cannot take over the migration that is under way: %s; trying again",
                    self.name,
                    words(error),
                    extra=repeats((self.name, "take over"), (info, words(error))),
                )
            await trio.sleep(pause)
            pause = min(pause * 2, MEET_LONGEST_PAUSE)

    async def _listens(self, query_migrate: Mapping[str, object]) -> bool:
        """Serves a QEMU that waits for a migration where its command line says, if an option says it too."""
        try:
            status = (await self.state.query("query-status")).get("status")
        except QmpError:
            return False  # who cannot tell does not wait for one
        if status != "inmigrate":
            return False
        if self.options.incoming is not None:
            endpoint, path = self.options.incoming
            migration = await self._replace(Destination, endpoint, None, NO_LANES)
            if isinstance(migration.procedure, Destination):
                await migration.procedure.serve(path)
            return True
        match query_migrate.get("socket-address"):
            case [{"type": "inet"}, *_]:
                log.warning(
                    "%s: QEMU itself listens for a migration, and any connection there can end it: start it"
                    " with -incoming defer and give the address to migrate-incoming, or see --incoming",
                    self.name,
                )
        return False

    async def _take_over(self, *, patient: bool) -> None:
        async with self._one_set_up:
            await self._answered()
            if not self._under_way:
                await self._take_over_what_is_met(patient=patient)

    async def _take_over_what_is_met(self, *, patient: bool) -> None:
        try:
            reply = await self.state.query("query-migrate")
        except QmpError:
            # With --preconfig the machine is yet to be made, and qemu-storage-daemon has none: neither has a
            # migration, and one that comes later is seen to begin.
            return
        status = reply.get("status")
        if status in (None, "none", "setup") and await self._listens(reply):
            return
        record = await self.state.record()
        # A source that has failed meanwhile may run the guest a second time.
        failed = status in ("failing", "failed") and record is not None and record.role is Role.SOURCE
        if not isinstance(status, str) or (status not in _UNDER_WAY and not failed):
            return
        if record is not None and status in _BEFORE_POSTCOPY:
            # Postcopy has not begun: if that is on record it was an earlier one's.
            record = msgspec.structs.replace(record, postcopy=False, kept=())
        is_source = record.role is Role.SOURCE if record else "ram" in reply
        endpoint = parse_uri(record.uri) if record else None
        if not is_source and status in ("setup", "active"):
            return  # it listens somewhere that refault was not told of
        relayed = record is not None and record.relayed and isinstance(endpoint, Inet)
        if relayed and status in self._about_to_pause:
            # Its channel ended with the refault that carried it; QEMU will notice in a moment, unless it
            # still holds our end of its leg (local.Deposits).
            if not patient and not is_source:
                await self.monitor.execute("migrate-pause", oob=True, timeout=QUERY_TIMEOUT)
            raise AttemptFailed(SENT_ALL if is_source and not patient else "it has not paused yet")
        log.info("%s: met a migration that is %s", self.name, status)
        taken_over = relayed and (failed or status == "postcopy-paused")
        reason = None if taken_over else "it was under way before refault"
        role = Source if is_source else Destination
        if reason is None:
            await self.state.ask_encrypted()
        lanes = Lanes(preempt=record is not None and record.preempt)
        migration = await self._replace(role, endpoint, reason, lanes, record)
        if isinstance(migration.procedure, Destination) and reason is None and endpoint is not None:
            await migration.procedure.adopt(endpoint)
        migration.say_how()
        migration.course.feed(Event.STARTED)
        migration.course.on_status(status)
        if migration.held_until_loaded:
            hold_again(migration.course)

    @property
    def _about_to_pause(self) -> Collection[str]:
        """What a QEMU says that is about to see that its channel has ended."""
        again = abilities(self.state.version).pauses_again_in_handshake
        return ("postcopy-active", *(("postcopy-recover-setup", "postcopy-recover") if again else ()))
