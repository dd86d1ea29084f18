"""One migration of a VM, from the command that sets it up until it has ended.

The policy (migration/recovery.py) decides, `Attempts` carries out what it asks for; `Channels` has the relay;
the roles (source.py, destination.py) know the commands of an attempt; this file holds QEMU's status and what
ties them together.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
from collections.abc import Callable
from typing import Protocol

import msgspec
import trio

from refault.channel.relay import Relay
from refault.daemon.known.course import Course
from refault.daemon.known.vm_state import VmState
from refault.daemon.monitor.monitor import Answer, Forward, MonitorLost, QmpError, WatchedCommand, words
from refault.daemon.near.local import LocalLeg
from refault.daemon.record.session_file import HandedChannel
from refault.daemon.record.state_file import MigrationRecord
from refault.daemon.recovery import stall_watch
from refault.daemon.recovery.attempts import Attempts, Procedure
from refault.daemon.relayed.channels import Channels
from refault.daemon.relayed.losses import Losses
from refault.migration.addresses import GOOD_FOR_ONE
from refault.migration.endpoint import Endpoint, parse_uri
from refault.migration.legs import RULES
from refault.migration.phase import Phase, Role
from refault.migration.recovery import Event
from refault.migration.relayable import NO_LANES, Lanes
from refault.qmp.replies import is_error

log = logging.getLogger("refault.migration")

STATUS_INTERVAL = 1.0
STATUS_INTERVAL_UNRELAYED = 0.1
"""Without a relay and without the `events` capability a loss is only seen by asking; and how far it is, where
the relay cannot read what passes."""
COMPLETION_INTERVAL = 0.05
NO_MIGRATION = "no migration yet"


class RoleProcedure(Procedure, Protocol):
    """What the source and the destination do differently."""

    role: Role

    @property
    def laid(self) -> tuple[str, ...]:
        """The names of descriptors that QEMU holds for later recoveries, and has not been told of."""

    async def set_up(self, command: WatchedCommand) -> Forward | Answer:
        """The client's command that sets the migration up, with what the relay needs made ready."""

    def give_way(self) -> None:
        """Another migration takes this one's place: nothing of this one is waited for."""

    async def prepare_to_stop(self) -> bool:
        """Makes our end harmless to QEMU; False where that could not be done."""

    def takes_leg(self, *, goes_on: bool) -> None:
        """The newest channel is one that an earlier refault has left to this one; whether its session
        `goes_on`, or it is lost."""

    async def clean_up(self) -> None:
        """The migration has ended: frees addresses and descriptors."""


class MakesRole(Protocol):
    """Makes the role of a migration."""

    role: Role

    def __call__(self, migration: Migration) -> RoleProcedure:
        """Of this one."""


class Migration:
    """One migration and its recovery. `procedure` makes its role."""

    def __init__(
        self, vm: VmState, procedure: MakesRole, endpoint: Endpoint | None, lanes: Lanes = NO_LANES
    ) -> None:
        self.course = Course(vm, procedure.role, endpoint, lanes, remember=self._remember)
        self.channels: Channels | None = None
        """The relay and its channels; None where it is not relayed, for `relay_reason`."""
        self.relay_reason: str | None = None
        self.settled = trio.Event()
        """Set once it is under way, or has come to nothing."""
        self.procedure = procedure(self)
        self.attempts = Attempts(self.course, self.procedure, lambda: self.channels, self._ended)
        self._vm = vm
        self._name = vm.name
        self.generation = ""
        """Of all migrations of its QEMU, which one (state_file.MigrationRecord)."""
        self._remembers = False
        """Whether the record is ours to write."""
        self._poller = trio.CancelScope()
        self._stall_watch = trio.CancelScope()

    # ---- what it is ----

    @property
    def endpoint(self) -> Endpoint | None:
        """The address that its command named, or a client's when it recovered by hand; None: not known."""
        return self.course.addresses.first

    @property
    def held_until_loaded(self) -> bool:
        """Whether a source's leg is held that waits for its guest's arrival (legs.UNTIL_LOADED)."""
        if self.channels is not None:
            return self.channels.held_until_loaded
        return self.course.kept_until_loaded

    @property
    def held(self) -> str | None:
        """Why a leg is held whose far side is lost; None where none is."""
        if self.channels is not None:
            return self.channels.held
        rule = self.course.kept_by
        return f"{self.phase}: {rule.effect}" if rule is not None else None

    @property
    def phase(self) -> Phase:
        """The phase, as far as it is known."""
        if self.channels is None:
            if self.course.kept_by is RULES[Phase.COMPLETING, Role.SOURCE]:
                return Phase.COMPLETING
            return Phase.POSTCOPY if self.course.postcopy_began else Phase.PRECOPY
        return self.channels.phase

    # ---- its course ----

    def begin(self, reason: str | None, met: MigrationRecord | None = None) -> None:
        """It is being set up. `reason`: why it is not relayed, or None. `met`: what an earlier refault wrote
        of it.

        Raises OSError where memory, descriptors or threads are short; then nothing has begun.
        """
        if met is not None:
            further = tuple(parse_uri(uri) for uri in met.further)
            self.course.meets(
                postcopy=met.postcopy,
                stopped_by_switchover=met.stopped_by_switchover,
                awaited=met.awaited,
                kept=met.kept,
                further=further,
                session=met.session,
                leg=met.leg,
            )
        if reason is not None:
            self._vm.start_soon(self._poll_status)
            self._unrelayed(reason)
            return
        self._remembers = met is not None
        self.generation = met.generation if met else secrets.token_hex(8)
        record, files = self._record(), self._vm.state_file
        pages, usable = files.pages, files.usable(record.qemu_pid)
        opened = pages.opened(
            record.key(self._name),
            take_over=met is not None,
            former=met.former_key(self._name) if met is not None else b"",
        )
        with opened if usable else contextlib.nullcontext() as state:
            relay = Relay(self.course.role, state=state, dead_after=self._vm.patience.dead_after)
        try:
            pages.tell(relay)
            if relay.passed().packaged_begun:
                self.course.postcopy_begins()
            self.channels = Channels(self.course, relay)
            Losses(self.course, self.channels)
        except BaseException:
            relay.close()
            raise
        self.course.is_relayed(True)
        self._vm.start_soon(self._poll_status)
        self._vm.start_soon(self.channels.watch)

    def go_on(self, end: socket.socket, left: tuple[HandedChannel, bytes] | None) -> None:
        """It was under way, and the refault before has left our `end` of its leg, and this of its channel.

        Raises ValueError where it is not relayed."""
        course, channels = self.course, self.channels
        if channels is None:
            raise ValueError("a migration that is not relayed has no channel")
        course.remember()  # from here on what was left of it is of no use to anybody else, removed or not
        about = left[0] if left is not None else None
        goes_on = channels.go_on(LocalLeg("", end, about.peer_inode if about is not None else 0), left)
        if goes_on:
            log.info("%s: going on with the channel that the refault before had", self._name)
        else:
            log.warning(
                "%s: the refault before left a channel that cannot be gone on with: it counts as lost",
                self._name,
            )
        course.feed(Event.STARTED)
        if about is not None and about.status is not None:
            course.on_status(about.status)
        self.procedure.takes_leg(goes_on=goes_on)
        course.look_soon()

    def deliver(self, left: tuple[HandedChannel, bytes]) -> bool:
        """Its QEMU has completed it, and the refault before has left what that said last. Whether it can be
        delivered. Raises ValueError as `go_on` does."""
        if self.channels is None:
            raise ValueError("a migration that is not relayed has no channel")
        if not self.channels.deliver(left):
            return False
        log.info("%s: going on with the channel that the refault before had: QEMU has completed, which the"
                 " source has yet to hear", self._name)  # fmt: skip
        self.course.feed(Event.STARTED)
        self.procedure.takes_leg(goes_on=True)
        self.course.on_status("completed")
        return True

    async def go_unrelayed(self, reason: str) -> None:
        """What the relay needs could not be had: from here as if it had begun without."""
        await self.procedure.clean_up()
        self._close_channels()
        self._unrelayed(reason)

    async def _watch_for_stalls(self) -> None:
        with self._stall_watch:
            await stall_watch.watch(self.course)

    def _unrelayed(self, reason: str) -> None:
        self._vm.start_soon(self._watch_for_stalls)
        self.relay_reason = reason

    def say_how(self) -> None:
        """Tells the operator whether it is relayed, where it has come to that: QEMU may refuse it yet."""
        if self.channels is not None:
            where = self.endpoint.uri if self.endpoint else ""
            log.info("%s: relaying as the %s, %s", self._name, self.course.role, where)
        else:
            log.info("%s: not relayed: %s; recovery runs over QMP alone", self._name, self.relay_reason)

    def accepted(self) -> None:
        """QEMU took the command that sets the migration up."""
        self.say_how()
        self._remembers = self.endpoint is not None
        self.course.remember()
        self.settled.set()
        self.course.feed(Event.STARTED)

    def _remember(self) -> None:
        """Writes down for the next refault what it is to know, as it is now."""
        if self._remembers:
            self._vm.state_file.save(self._record())

    def _record(self) -> MigrationRecord:
        return MigrationRecord(
            role=self.course.role,
            uri=self.endpoint.uri if self.endpoint else "",
            relayed=self.channels is not None,
            qemu_pid=self._vm.qemu_pid,
            qemu_started=self._vm.qemu_started,
            qemu_threads=self._vm.qemu_threads,
            generation=self.generation,
            preempt=self.course.lanes.preempt,
            postcopy=self.course.postcopy_began,
            stopped_by_switchover=self.course.stopped_by_switchover,
            awaited=self.channels.awaits_arrival if self.channels is not None else self.course.awaited_before,
            further=tuple(endpoint.uri for endpoint in self.course.addresses.added),
            session=self.course.session,
            kept=(*self.course.kept_before, *(self.channels.kept.names if self.channels is not None else ())),
            leg=(self.channels.handover.leg if self.channels is not None else None) or self.course.leg_before,
            handed=self.channels.handover.handed if self.channels is not None else "",
        )

    def refused(self) -> None:
        """The command that would have set it up did not come to that."""
        self.settled.set()
        self._close_channels()
        self.relay_reason = NO_MIGRATION
        self._ended()

    def watch_recovery(self, reply: bytes) -> bytes:
        """To be told what QEMU answers a client's command to recover; gives the same reply."""
        if is_error(reply):
            self.course.feed(Event.ATTEMPT_FAILED)
        return reply

    def watch_move(self, endpoint: Endpoint | None) -> Callable[[bytes], bytes]:
        """What hears QEMU's reply to a client's recovery, unrelayed, at an address that may be another."""
        if endpoint is None or endpoint.uri.startswith(GOOD_FOR_ONE):
            return self.watch_recovery

        def watch(reply: bytes) -> bytes:
            if not is_error(reply):
                self.course.addresses.moved(endpoint)
                self._remembers = True
                self._remember()
            return self.watch_recovery(reply)

        return watch

    def _ended(self) -> None:
        """Clears what stood ready for it. The relay stays, for its counts and for a leg still open."""
        self._remembers = False
        try:
            self._vm.state_file.remove()
            if self.channels is not None:
                self.channels.completed()
        except OSError as error:
            log.warning("%s: could not clear the ended migration: %s", self._name, error)
        self._vm.start_soon(self._clean_up)

    async def _clean_up(self) -> None:
        try:
            await self.procedure.clean_up()
        except (QmpError, MonitorLost, trio.TooSlowError, OSError) as error:
            log.warning("%s: could not take back what was laid with QEMU: %s", self._name, words(error))

    def gives_way(self) -> None:
        """Another one takes its place: from now on the record is that one's."""
        self._remembers = False
        self.attempts.cancel()

    def qemu_ended(self) -> None:
        """Nobody is left to recover it. What QEMU had sent is delivered yet; nothing else of it stays."""
        if self.course.gone:
            return
        self.course.qemu_ended()
        self._poller.cancel()
        self._stall_watch.cancel()
        if self.channels is not None:
            self._vm.start_soon(self._close_when_delivered, self.channels)

    async def _close_when_delivered(self, channels: Channels) -> None:
        await channels.delivered()
        if self.channels is channels:
            self._close_channels()

    async def retire(self) -> None:
        """Another one takes its place."""
        self.gives_way()
        self.procedure.give_way()
        await self.procedure.clean_up()
        self.close()

    def close(self) -> None:
        """Ends all that it still has; what it counted stays with the VM."""
        self.settled.set()
        self._remembers = False
        self.attempts.cancel()
        self._poller.cancel()
        self._stall_watch.cancel()
        self._close_channels()

    def _close_channels(self) -> None:
        if self.channels is not None:
            pages = self.channels.relay.pages()
            self.course.counters.add_pages(
                pages.requested, pages.repeated, pages.arrived + pages.reopened, pages.replayed
            )
            self.course.counters.add_retransmitted(self.channels.relay.retransmitted())
            forward, backward = self.channels.close()
            self.channels = None
            self.course.is_relayed(False)
            self.course.counters.add_bytes(forward, backward)

    # ---- when refault ends ----

    async def prepare_to_stop(self, *, restarts: bool) -> bool:
        """Makes our ends harmless, where they would kill or double a guest; where refault `restarts`, so that
        the next one goes on with the channel, if that can be. False where neither was done."""
        safe = True
        if self.channels is not None:
            safe = await self.channels.prepare_to_stop(restarts=restarts)
        if self.course.under_way:
            safe = await self.procedure.prepare_to_stop() and safe
        return safe

    def hand_over(self) -> None:
        """The next refault goes on with the channel, where it can."""
        channels, state_file = self.channels, self._vm.state_file
        if channels is None:
            return
        delivers = channels.handover.delivers
        if delivers:
            state_file.save(msgspec.structs.replace(self._record(), leg=None))
        cost = self.cost_of_stopping()
        may_close = cost is not None and cost[0]
        channels.handover.hand_over(
            self.generation, delivers=delivers, may_close=may_close, laid=self.procedure.laid
        )
        if delivers and not channels.handover.done:
            state_file.remove()

    def cost_of_stopping(self) -> tuple[bool, str] | None:
        """Whether QEMU survives a close of its leg now, and what it does then; None where none is open."""
        return self.channels.cost_of_stopping() if self.channels is not None else None

    def say_what_stopping_costs(self) -> None:
        """Warns of what the end of refault does to QEMU now."""
        cost = self.cost_of_stopping()
        if cost is not None:
            log.warning("%s: stopping closes the channel in %s: %s", self._name, self.phase, cost[1])

    # ---- QEMU's status ----

    def on_resume(self) -> None:
        """A RESUME event: this QEMU runs its guest."""
        self.course.on_resume()
        if (
            self.channels is not None
            and self.course.role is Role.DESTINATION
            and not self.channels.relay.closed
        ):
            self.channels.relay.guest_runs()
            self.channels.look()

    async def _poll_status(self) -> None:
        with self._poller:
            while True:
                await self.course.until_under_way()
                await self.course.look_wanted(self._poll_interval())
                if self.course.under_way:
                    self._vm.state_file.look()
                if self.course.under_way and self._vm.monitor.qemu is not None:
                    await self._ask_status()

    async def _ask_status(self) -> None:
        if self.channels is not None:
            self.channels.look()
        asked_in, events = self.course.policy.state, self.course.events
        try:
            if self.channels is not None and self.channels.unread:
                status: object = (await self.channels.word.ask()).status
            else:
                status = (await self._vm.query("query-migrate")).get("status")
        except (QmpError, MonitorLost, trio.TooSlowError):
            return  # a destination's main thread may be stuck on a missing page: that tells nothing
        # An answer to a question from before a transition tells of the time before it.
        if self.course.policy.state is asked_in:
            try:
                self.course.on_answer(status, events=events)
            except Exception:
                log.exception("%s: internal error on status %s", self._name, status)

    def _poll_interval(self) -> float:
        if self.channels is None:
            return STATUS_INTERVAL_UNRELAYED if self.course.under_way else STATUS_INTERVAL
        if self.channels.unread and self.course.under_way:
            return STATUS_INTERVAL_UNRELAYED
        return COMPLETION_INTERVAL if self.phase is Phase.DONE and self.course.under_way else STATUS_INTERVAL
