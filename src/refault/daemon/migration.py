"""One migration of a VM, from the command that sets it up until it has ended.

The policy (migration/recovery.py) decides, `Attempts` carries out what it asks for; `Channels` has the relay;
the roles (source.py, destination.py) know the commands of an attempt; this file holds QEMU's status and what
ties them together.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable
from typing import Protocol

import trio

from refault.channel.relay import Relay
from refault.daemon.kernel.process import process_started
from refault.daemon.known.vm_state import VmState
from refault.daemon.monitor.monitor import Answer, Forward, MonitorLost, QmpError, WatchedCommand, words
from refault.daemon.record.state_file import MigrationRecord
from refault.daemon.recovery import stall_watch
from refault.daemon.recovery.attempts import Attempts
from refault.daemon.relayed.channels import Channels
from refault.migration.addresses import Addresses
from refault.migration.endpoint import Endpoint, parse_uri
from refault.migration.legs import UNTIL_LOADED, waits_for_pong
from refault.migration.phase import Phase, Role
from refault.migration.recovery import Event, Recovery, State
from refault.migration.relayable import NO_LANES, Lanes
from refault.qmp.replies import is_error

log = logging.getLogger("refault.migration")

STATUS_INTERVAL = 1.0
STATUS_INTERVAL_UNRELAYED = 0.1
"""Without a relay and without the `events` capability a loss is only seen by asking; and how far it is, where
the relay cannot read what passes."""
COMPLETION_INTERVAL = 0.05
NO_MIGRATION = "no migration yet"
_GOOD_FOR_ONE = ("fd:", "[")
"""How addresses begin at which no other channel can be made: a descriptor, `channels` that no URI says."""

_STATUS_EVENTS = {
    "postcopy-paused": Event.PAUSED,
    "postcopy-recover-setup": Event.RECOVERING,
    "postcopy-recover": Event.RECOVERING,
    "postcopy-active": Event.ACTIVE,
    "completed": Event.COMPLETED,
    "cancelled": Event.FAILED,
}
_POSTCOPY = frozenset(
    {"postcopy-device", "postcopy-active", "postcopy-paused", "postcopy-recover-setup", "postcopy-recover"}
)


class RoleProcedure(Protocol):
    """What the source and the destination do differently."""

    role: Role

    async def set_up(self, command: WatchedCommand) -> Forward | Answer:
        """The client's command that sets the migration up, with what the relay needs made ready."""

    async def attempt(self) -> None:
        """Issues the recovery commands. Raises AttemptFailed or NotPausedYet."""

    def path_changed(self) -> bool:
        """A link, an address or a route of this host has changed; whether that served a recovery."""

    async def settle(self) -> None:
        """After QEMU is active again: readies what the next recovery needs."""

    async def prepare_to_stop(self) -> bool:
        """Makes our end harmless to QEMU; False where that could not be done."""

    async def clean_up(self) -> None:
        """The migration has ended: frees addresses and descriptors."""


class Migration:
    """One migration and its recovery. `procedure` makes its role."""

    def __init__(
        self,
        vm: VmState,
        procedure: Callable[[Migration], RoleProcedure],
        endpoint: Endpoint | None,
        lanes: Lanes = NO_LANES,
    ) -> None:
        self.vm = vm
        self.name = vm.name
        self.counters = vm.counters
        self.addresses = Addresses(endpoint, vm.alternatives)
        self.lanes = lanes
        self.channels: Channels | None = None
        """The relay and its channels; None where it is not relayed, for `relay_reason`."""
        self.relay_reason: str | None = None
        self.status: str | None = None
        """QEMU's word."""
        self.pause_told = trio.Event()
        """Set when QEMU has said that it paused, since the last channel was made."""
        self.postcopy_began = False
        self.never_postcopy = False
        """Of a destination: whether it is known not to switch to postcopy."""
        self.kept_before: tuple[str, ...] = ()
        """The names of our ends that QEMU holds since an earlier refault."""
        self.client_pauses = False
        """Whether a client's `migrate-pause` is on its way: the loss that comes is what it asks for."""
        self.stopped_by_switchover = False
        """Whether the guest ran until QEMU before 10.0 stopped it for postcopy; it does not run it again."""
        self.settled = trio.Event()
        """Set once it is under way, or has come to nothing."""
        self.procedure = procedure(self)
        self.attempts = Attempts(self)
        self.gone = False
        """Whether its QEMU has ended: nothing of it is told any more."""
        self._generation = ""
        self._remembers = False
        """Whether the record is ours to write."""
        self._wake_poller = trio.Event()
        self._poller = trio.CancelScope()
        self._stall_watch = trio.CancelScope()

    # ---- what it is ----

    @property
    def endpoint(self) -> Endpoint | None:
        """The address that its command named, or a client's when it recovered by hand; None: not known."""
        return self.addresses.first

    @property
    def role(self) -> Role:
        """Which of the two QEMUs is ours."""
        return self.procedure.role

    @property
    def policy(self) -> Recovery:
        """The recovery policy."""
        return self.attempts.policy

    @property
    def under_way(self) -> bool:
        """Whether it was accepted and has not ended."""
        return self.policy.state not in (State.IDLE, State.ENDED)

    @property
    def held_until_loaded(self) -> bool:
        """Whether a source's leg is held that waits for its guest's arrival (legs.UNTIL_LOADED)."""
        if self.channels is not None:
            return self.channels.losses.held_until_loaded
        return bool(self.kept_before) and waits_for_pong(self.role, self.status)

    @property
    def held(self) -> str | None:
        """Why a leg is held whose far side is lost; None where none is."""
        if self.channels is not None:
            return self.channels.losses.held
        return f"{self.phase}: {UNTIL_LOADED.effect}" if self.held_until_loaded else None

    @property
    def phase(self) -> Phase:
        """The phase, as far as it is known."""
        if self.channels is None:
            return Phase.POSTCOPY if self.postcopy_began else Phase.PRECOPY
        return self.channels.phase

    @property
    def channel(self) -> int:
        """The number of the relayed channel, from 1; 0 for none."""
        return self.channels.channel if self.channels is not None else 0

    # ---- its course ----

    def begin(self, reason: str | None, met: MigrationRecord | None = None) -> None:
        """It is being set up. `reason`: why it is not relayed, or None. `met`: what an earlier refault wrote
        of it.

        Raises OSError where memory, descriptors or threads are short; then nothing has begun.
        """
        if met is not None:
            self.postcopy_began = met.postcopy
            self.kept_before = met.kept
            for uri in met.further:
                self.addresses.add(parse_uri(uri))
        if reason is not None:
            self.vm.start_soon(self._poll_status)
            self._unrelayed(reason)
            return
        self._remembers = met is not None
        self._generation = met.generation if met else secrets.token_hex(8)
        record, files = self._record(), self.vm.state_file
        pages, usable = files.pages, files.usable(record.qemu_pid)
        opened = pages.opened(record.key(self.name), take_over=met is not None)
        with opened if usable else contextlib.nullcontext() as state:
            relay = Relay(self.role, state=state, dead_after=self.vm.patience.dead_after)
        try:
            pages.tell(relay)
            self.postcopy_began |= relay.passed().packaged_begun
            self.channels = Channels(self, relay)
        except BaseException:
            relay.close()
            raise
        self.vm.start_soon(self._poll_status)
        self.vm.start_soon(self.channels.watch)
        where = self.endpoint.uri if self.endpoint else ""
        log.info("%s: relaying as the %s, %s", self.name, self.role, where)

    async def go_unrelayed(self, reason: str) -> None:
        """What the relay needs could not be had: from here as if it had begun without."""
        await self.procedure.clean_up()
        self._close_channels()
        self._unrelayed(reason)

    async def _watch_for_stalls(self) -> None:
        with self._stall_watch:
            await stall_watch.watch(self)

    def _unrelayed(self, reason: str) -> None:
        self.vm.start_soon(self._watch_for_stalls)
        self.relay_reason = reason
        log.info("%s: not relayed: %s; recovery runs over QMP alone", self.name, reason)

    def accepted(self) -> None:
        """QEMU took the command that sets the migration up."""
        self._remembers = self.endpoint is not None
        self.remember()
        self.settled.set()
        self.feed(Event.STARTED)

    def remember(self) -> None:
        """Writes down for the next refault what it is to know, as it is now."""
        if self._remembers:
            self.vm.state_file.save(self._record())

    def _record(self) -> MigrationRecord:
        pid = self.vm.qemu_pid
        return MigrationRecord(
            role=self.role,
            uri=self.endpoint.uri if self.endpoint else "",
            relayed=self.channels is not None,
            qemu_pid=pid,
            qemu_started=process_started(pid),
            qemu_threads=self.vm.qemu_threads,
            generation=self._generation,
            preempt=self.lanes.preempt,
            postcopy=self.postcopy_began,
            further=tuple(endpoint.uri for endpoint in self.addresses.added),
            kept=(*self.kept_before, *(self.channels.kept.names if self.channels is not None else ())),
        )

    def refused(self) -> None:
        """The command that would have set it up did not come to that."""
        self.settled.set()
        self._close_channels()
        self.relay_reason = NO_MIGRATION
        self.ended()

    def watch_recovery(self, reply: bytes) -> bytes:
        """To be told what QEMU answers a client's command to recover; gives the same reply."""
        if is_error(reply):
            self.feed(Event.ATTEMPT_FAILED)
        return reply

    def feed(self, event: Event) -> None:
        """Hands an event to the recovery policy."""
        lost = event in (Event.CHANNEL_LOST, Event.PAUSED) and self.policy.state is State.RUNNING
        if lost and self.client_pauses:
            self.client_pauses = False
            event = Event.CLIENT_PAUSED
        self.attempts.feed(event)

    def watch_move(self, endpoint: Endpoint | None) -> Callable[[bytes], bytes]:
        """What hears QEMU's reply to a client's recovery, unrelayed, at an address that may be another."""
        if endpoint is None or endpoint.uri.startswith(_GOOD_FOR_ONE):
            return self.watch_recovery

        def watch(reply: bytes) -> bytes:
            if not is_error(reply):
                self.addresses.moved(endpoint)
                self._remembers = True
                self.remember()
            return self.watch_recovery(reply)

        return watch

    def ended(self) -> None:
        """Clears what stood ready for it. The relay stays, for its counts and for a leg still open."""
        self._remembers = False
        try:
            self.vm.state_file.remove()
            if self.channels is not None:
                self.channels.completed()
        except OSError as error:
            log.warning("%s: could not clear the ended migration: %s", self.name, error)
        self.vm.start_soon(self._clean_up)

    async def _clean_up(self) -> None:
        try:
            await self.procedure.clean_up()
        except (QmpError, MonitorLost, trio.TooSlowError, OSError) as error:
            log.warning("%s: could not take back what was laid with QEMU: %s", self.name, words(error))

    def gives_way(self) -> None:
        """Another one takes its place: from now on the record is that one's."""
        self._remembers = False
        self.attempts.cancel()

    def qemu_ended(self) -> None:
        """Nobody is left to recover it. What QEMU had sent is delivered yet; nothing else of it stays."""
        if self.gone:
            return
        self.gone = True
        self.feed(Event.QEMU_GONE)
        self.counters.last_error = None
        self.status = None
        self._poller.cancel()
        self._stall_watch.cancel()
        if self.channels is not None:
            self.vm.start_soon(self._close_when_delivered, self.channels)

    async def _close_when_delivered(self, channels: Channels) -> None:
        await channels.delivered()
        if self.channels is channels:
            self._close_channels()

    async def retire(self) -> None:
        """Another one takes its place."""
        self.gives_way()
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
            forward, backward = self.channels.close()
            self.channels = None
            self.counters.bytes_forward += forward
            self.counters.bytes_return += backward

    # ---- when refault ends ----

    async def prepare_to_stop(self) -> bool:
        """Makes our ends harmless, where they would kill or double a guest. False where that was not done."""
        safe = True
        if self.channels is not None:
            safe = await self.channels.prepare_to_stop()
        if self.under_way:
            safe = await self.procedure.prepare_to_stop() and safe
        return safe

    def cost_of_stopping(self) -> tuple[bool, str] | None:
        """Whether QEMU survives a close of its leg now, and what it does then; None where none is open."""
        return self.channels.cost_of_stopping() if self.channels is not None else None

    def say_what_stopping_costs(self) -> None:
        """Warns of what the end of refault does to QEMU now."""
        cost = self.cost_of_stopping()
        if cost is not None:
            log.warning("%s: stopping closes the channel in %s: %s", self.name, self.phase, cost[1])

    # ---- QEMU's status ----

    def on_status(self, status: str) -> None:
        """A MIGRATION event's word, or query-migrate's."""
        if status != self.status:
            extra = self.attempts.repeats(status)
            log.info("%s: migration is %s", self.name, status, extra=extra)
        self.status = status
        if status == "postcopy-paused":
            self.pause_told.set()
        elif self.pause_told.is_set():
            self.pause_told = trio.Event()
        if status in _POSTCOPY and not self.postcopy_began:
            self.postcopy_began = True
            self.remember()
        if status == "failed":
            reclaimed = self.policy.state is State.RECLAIMING
            after = self.postcopy_began and self.role is Role.SOURCE and not reclaimed
            self.feed(Event.FAILED_AFTER_POSTCOPY if after else Event.FAILED)
        elif status == "postcopy-active" and self.channels is None:
            self.feed(Event.ACTIVE_UNRELAYED)
        elif status in _STATUS_EVENTS:
            self.feed(_STATUS_EVENTS[status])

    def on_resume(self) -> None:
        """A RESUME event: this QEMU runs its guest."""
        if self.channels is not None and self.role is Role.DESTINATION and not self.channels.relay.closed:
            self.channels.relay.guest_runs()
            self.channels.look()

    def on_stop(self) -> None:
        """A STOP event: this QEMU ran its guest and has stopped it. Before 10.0 postcopy-active comes first
        (migration/migration.c, postcopy_start)."""
        if self.status == "postcopy-active" and self.role is Role.SOURCE:
            self.stopped_by_switchover = True

    def look_soon(self) -> None:
        """Asks QEMU for its status now, not only at the next interval."""
        self._wake_poller.set()

    async def _poll_status(self) -> None:
        with self._poller:
            while True:
                with trio.move_on_after(self._poll_interval()):
                    await self._wake_poller.wait()
                self._wake_poller = trio.Event()
                if self.under_way:
                    self.vm.state_file.look()
                if self.under_way and self.vm.monitor.qemu is not None:
                    await self._ask_status()

    async def _ask_status(self) -> None:
        if self.channels is not None:
            self.channels.look()
        asked_in = self.policy.state
        try:
            if self.channels is not None and self.channels.unread:
                status: object = (await self.channels.word.ask()).status
            else:
                status = (await self.vm.query("query-migrate")).get("status")
        except (QmpError, MonitorLost, trio.TooSlowError):
            return  # a destination's main thread may be stuck on a missing page: that tells nothing
        # An answer to a question from before a transition tells of the time before it.
        if isinstance(status, str) and self.policy.state is asked_in:
            try:
                self.on_status(status)
            except Exception:
                log.exception("%s: internal error on status %s", self.name, status)

    def _poll_interval(self) -> float:
        if self.channels is None:
            return STATUS_INTERVAL_UNRELAYED if self.under_way else STATUS_INTERVAL
        if self.channels.unread and self.under_way:
            return STATUS_INTERVAL_UNRELAYED
        return COMPLETION_INTERVAL if self.phase is Phase.DONE and self.under_way else STATUS_INTERVAL
