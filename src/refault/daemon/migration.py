"""Drives one VM's migration: carries out what the recovery policy asks for, and tells it what happens.

The policy (migration/recovery.py) decides; the roles (source.py, destination.py) know the commands of an
attempt; this file holds what both share: timers, QEMU's status, the relay's signals, the table of when a leg
may be closed.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec
import trio

from refault.channel.relay import RUN_SECONDS, LegState, Relay, RelayView
from refault.daemon.local import LocalLeg, give_back
from refault.daemon.monitor import MonitorLost, QmpError
from refault.daemon.state_file import MigrationRecord, StateFile, process_started
from refault.migration.endpoint import Endpoint, Inet, parse_uri
from refault.migration.legs import may_close
from refault.migration.phase import Phase, Role, phase_of
from refault.migration.recovery import Action, Event, Recovery, State
from refault.migration.relayable import enabled_capabilities, why_not, why_not_recoverable

if TYPE_CHECKING:
    from refault.daemon.monitor import Monitor

log = logging.getLogger("refault.migration")

QUERY_TIMEOUT = 5.0
STATUS_INTERVAL = 1.0
STATUS_INTERVAL_UNRELAYED = 0.1
"""Without a relay and without the `events` capability a loss is only seen by asking."""
COMPLETION_INTERVAL = 0.05
REPLAY_DOUBT_NS = 2 * 10**9
"""Two losses so soon after a replay, and the next recovery goes without (DESIGN, 5)."""

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


class AttemptFailed(Exception):  # noqa: N818 - it says what happened
    """An attempt did not succeed; the text says why, for the operator."""


class NotPausedYet(Exception):  # noqa: N818 - it is no error
    """QEMU has not paused yet; ask again soon."""


class RoleProcedure(Protocol):
    """What the source and the destination do differently."""

    role: Role

    async def attempt(self) -> None:
        """Issues the recovery commands. Raises AttemptFailed or NotPausedYet."""

    async def settle(self) -> None:
        """After QEMU is active again: readies what the next recovery needs."""

    async def prepare_to_stop(self) -> bool:
        """Makes our end harmless to QEMU; False where that could not be done."""

    async def clean_up(self) -> None:
        """The migration has ended: frees addresses and descriptors."""


@dataclass
class Counters:
    """What is counted over the daemon's life, and the last recovery's seconds."""

    losses: int = 0
    attempts: int = 0
    recoveries: int = 0
    last_seconds: float | None = None
    last_error: str | None = None
    doubtful_losses: int = 0
    """Losses in a row that came right after a replay."""


class Migration:
    """One VM's migration, from the command that sets it up until it has ended; then the next."""

    def __init__(
        self,
        name: str,
        monitor: Monitor,
        *,
        relay_allowed: bool,
        recover_uris: Sequence[str],
        state_file: StateFile,
    ) -> None:
        self.name = name
        self.monitor = monitor
        self.relay_allowed = relay_allowed
        self.counters = Counters()
        self.policy = Recovery(jitter=random.random)
        self.status: str | None = None
        self.procedure: RoleProcedure | None = None
        self.endpoint: Endpoint | None = None
        self.relay: Relay | None = None
        self.relay_reason: str | None = "no migration yet"
        self.held: str | None = None
        self.channel = 0
        self.bytes_before = (0, 0)
        """What the relays of earlier migrations passed, forward and back."""
        self._alternatives = [parse_uri(uri) for uri in recover_uris]
        self._tries = 0
        self._state_file = state_file
        self._nursery: trio.Nursery | None = None
        self._attempt_scope: trio.CancelScope | None = None
        self._timer_scope: trio.CancelScope | None = None
        self._relay_scope: trio.CancelScope | None = None
        self._wake_poller = trio.Event()
        self._postcopy_began = False
        self._lost_at: float | None = None
        self._settled_channel = 0
        self._ended_channel = 0
        self._duplicate: socket.socket | None = None
        self._kept_by_qemu = False
        self._not_given: list[socket.socket] = []
        """Ends that QEMU did not take back: they stay open for as long as refault runs."""
        self._told_foreign = False
        self.qemu_pid: int | None = None
        """The process behind the monitor, also while the monitor is lost; None where it is not known."""
        self._attempting = trio.Lock()

    # ---- what the rest of the daemon calls ----

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                self.start_soon(self._poll_status)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._say_what_stopping_costs()
            if self.relay is not None:
                self.relay.close(keep_local=self._kept_by_qemu)
                self.relay = None
            self._hold(None)

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version; the oldest, and so the most careful, while it is not known."""
        return self.monitor.qemu.version_triple if self.monitor.qemu else (0, 0, 0)

    @property
    def role(self) -> Role | None:
        """The role in the current migration."""
        return self.procedure.role if self.procedure else None

    @property
    def qemu_lives(self) -> bool:
        """Whether QEMU may still look at what it was given."""
        return self.monitor.qemu is not None or process_started(self.qemu_pid) is not None

    @property
    def under_way(self) -> bool:
        """Whether there is a migration that has not ended."""
        return self.policy.state not in (State.IDLE, State.ENDED)

    @property
    def phase(self) -> Phase:
        """The phase, as far as it is known."""
        if self.relay is None:
            return Phase.POSTCOPY if self._postcopy_began else Phase.PRECOPY
        return phase_of(self.relay.passed(), self.status)

    async def query(self, command: str) -> Mapping[str, object]:
        """One of refault's own in-band queries; the empty mapping where QEMU does not answer with one."""
        reply = await self.monitor.execute(command, timeout=QUERY_TIMEOUT)
        return reply if isinstance(reply, Mapping) else {}

    async def judge(self, endpoint: Endpoint | None) -> str | None:
        """Why the relay cannot carry a migration to `endpoint`; None where it can.

        Warns of what QEMU could not recover.
        """
        capabilities = enabled_capabilities(
            await self.monitor.execute("query-migrate-capabilities", timeout=QUERY_TIMEOUT)
        )
        hopeless = why_not_recoverable(capabilities)
        if hopeless:
            log.warning(
                "%s: QEMU cannot recover this migration once postcopy has begun: %s", self.name, hopeless
            )
        if not self.relay_allowed:
            return "switched off (--relay off)"
        parameters = await self.query("query-migrate-parameters")
        info = self.monitor.qemu
        is_unix = info is not None and info.pid is not None
        return why_not(endpoint, capabilities, parameters, monitor_is_unix=is_unix)

    async def begin(self, procedure: RoleProcedure, endpoint: Endpoint | None, reason: str | None) -> None:
        """A migration is being set up: forgets the one before. `reason`: why it is not relayed, or None."""
        self._cancel_timer()
        self._cancel_attempt()
        if self.procedure is not None:
            await self.procedure.clean_up()
        self._drop_relay()
        self.procedure = procedure
        self.endpoint = endpoint
        self.relay_reason = reason
        self.held = None
        self.status = None
        self._postcopy_began = False
        self._lost_at = None
        self._told_foreign = False
        self._tries = 0
        self.channel = self._settled_channel = self._ended_channel = 0
        self.counters.doubtful_losses = 0
        if self.policy.state is not State.IDLE:
            self.policy = Recovery(jitter=random.random)
        if reason is None:
            self._start_relay(procedure.role)
            log.info(
                "%s: relaying as the %s, %s", self.name, procedure.role, endpoint.uri if endpoint else ""
            )
        else:
            log.info("%s: not relayed: %s; recovery runs over QMP alone", self.name, reason)

    def accepted(self) -> None:
        """QEMU took the command that sets the migration up."""
        info = self.monitor.qemu
        if self.procedure is not None and self.endpoint is not None:
            pid = info.pid if info else None
            self._state_file.save(
                MigrationRecord(
                    role=self.procedure.role,
                    uri=self.endpoint.uri,
                    relayed=self.relay is not None,
                    qemu_pid=pid,
                    qemu_started=process_started(pid),
                )
            )
        self.feed(Event.STARTED)

    def refused(self) -> None:
        """The command that would have set it up did not come to that."""
        self._drop_relay()
        self.relay_reason = "no migration yet"
        self._spawn_clean_up()

    async def handshake_stalls(self, patience: float) -> bool:
        """Waits for the end of the handshake. True when no byte has moved for `patience` seconds.

        The received bitmaps of a large guest take their time, so it may last as long as something moves.
        """
        moved = -1
        deadline = 0.0
        while self.policy.state in (State.OPEN, State.HANDSHAKE) and self.relay is not None:
            view = self.relay.look()
            if view.forward_bytes + view.return_bytes != moved:
                moved = view.forward_bytes + view.return_bytes
                deadline = trio.current_time() + patience
            if trio.current_time() > deadline:
                return True
            await trio.sleep(0.05)
        return False

    def record(self) -> MigrationRecord | None:
        """What the state file says of a migration of this QEMU."""
        info = self.monitor.qemu
        return self._state_file.load(info.pid if info else None)

    def start_soon(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        """Runs a task for as long as this VM is served. Its failure is logged, and nothing else is lost."""
        if self._nursery is not None:
            self._nursery.start_soon(self._guarded, task, *args)

    async def _guarded(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        try:
            await task(*args)
        except Exception:
            log.exception("%s: internal error in %s", self.name, task.__qualname__)

    def join(self, local: LocalLeg, far: trio.socket.SocketType, *, recovered: bool) -> None:
        """Gives both legs to the pump as the next channel.

        Raises AttemptFailed where the one before must stay.
        """
        if self.relay is None:
            raise AttemptFailed("the relay has ended")
        cost = self.cost_of_stopping()
        if self.channel and cost is not None and not cost[0]:
            raise AttemptFailed(f"the channel before is still held: {cost[1]}")
        may_replay = self.counters.doubtful_losses < 2
        if recovered and not may_replay:
            log.warning(
                "%s: recovering without replay: the channel was lost twice right after one", self.name
            )
        self._hold(local.socket.dup())
        self.relay.attach(local.detach(), far.detach(), recovered=recovered, may_replay=may_replay)
        self.channel += 1

    def _hold(self, duplicate: socket.socket | None) -> None:
        """Keeps a duplicate of our end of the local leg, so that QEMU can be given it when we must stop."""
        if self._duplicate is not None:
            self._duplicate.close()
        self._duplicate = duplicate

    async def prepare_to_stop(self) -> bool:
        """Makes our end harmless, where it would kill or double a guest. False where that could not be done.

        QEMU gets our end of each such leg as a descriptor of its own, which it never uses: with both ends in
        its hands it sees no end of file, and waits, paused or in its handshake, for whoever comes after us.
        """
        safe = True
        cost = self.cost_of_stopping()
        if cost is not None and not cost[0] and self._duplicate is not None:
            safe = self._kept_by_qemu = await give_back(self.monitor, self._duplicate)
        if self.procedure is not None and self.under_way:
            safe = await self.procedure.prepare_to_stop() and safe
        ends, self._not_given = self._not_given, []
        for end in ends:
            safe = await self.let_go(end) and safe
        return safe

    async def let_go(self, end: socket.socket) -> bool:
        """Closes our end of a pair on which QEMU may listen, once QEMU holds both; False if it stays open."""
        if not self.qemu_lives or await give_back(self.monitor, end):
            end.close()
            return True
        self._not_given.append(end)
        return False

    def abandon(self, channel: int) -> None:
        """Closes a channel that this QEMU did not take, or that it pauses again on."""
        self._ended_channel = channel
        if self.relay is not None:
            self.relay.close_channel(channel)

    def next_endpoint(self) -> Endpoint | None:
        """Where to try: the address of the lost channel, then the alternatives in order, then again."""
        choices = [self.endpoint, *self._alternatives]
        choice = choices[self._tries % len(choices)]
        self._tries += 1
        return choice

    # ---- what happens ----

    def on_status(self, status: str) -> None:
        """A MIGRATION event's word, or query-migrate's."""
        if status != self.status:
            log.info("%s: migration is %s", self.name, status)
        self.status = status
        if status in _POSTCOPY:
            self._postcopy_began = True
        if status == "failed":
            after = self._postcopy_began and self.role is Role.SOURCE
            self.feed(Event.FAILED_AFTER_POSTCOPY if after else Event.FAILED)
        elif status in _STATUS_EVENTS:
            self.feed(_STATUS_EVENTS[status])

    def feed(self, event: Event) -> None:
        """Hands an event to the policy and carries out what it asks for."""
        before = self.policy.state
        for action in self.policy.handle(event):
            self._carry_out(action)
        if self.policy.state is not before:
            log.debug("%s: %s: %s -> %s", self.name, event.name, before.value, self.policy.state.value)
        if self.policy.state is State.RUNNING and self.channel != self._settled_channel and self.procedure:
            self._settled_channel = self.channel
            self.start_soon(self._settle)

    def _carry_out(self, action: Action) -> None:
        match action:
            case Action.COUNT_LOSS:
                self._count_loss()
            case Action.COUNT_RECOVERY:
                self._count_recovery()
            case Action.ATTEMPT:
                self._cancel_timer()
                self._attempt_scope = trio.CancelScope()
                self.start_soon(self._attempt, self._attempt_scope)
            case Action.CANCEL_ATTEMPT:
                self._cancel_attempt()
            case Action.TIMER_POLL | Action.TIMER_BACKOFF | Action.TIMER_CLIENT:
                self._cancel_timer()
                self._timer_scope = trio.CancelScope()
                self.start_soon(self._timer, self._timer_scope, self.policy.delay(action))
            case Action.RESET_BACKOFF:
                self._tries = 0
            case Action.CLEAN_UP:
                self._cancel_timer()
                self._spawn_clean_up()
            case Action.STOP_GUEST:
                self.start_soon(self._stop_guest)

    def _count_loss(self) -> None:
        self.counters.losses += 1
        self._lost_at = trio.current_time()
        replayed_ns = 0
        if self.relay is not None:
            view = self.relay.look()
            self._lost_at -= _age(view.lost_ns)
            replayed_ns = view.last_replay_ns
        recent = replayed_ns != 0 and _age(replayed_ns) * 1e9 < REPLAY_DOUBT_NS
        self.counters.doubtful_losses = self.counters.doubtful_losses + 1 if recent else 0
        log.warning(
            "%s: the migration channel is lost (loss %d); recovering", self.name, self.counters.losses
        )

    def _count_recovery(self) -> None:
        self.counters.recoveries += 1
        self.counters.last_error = None
        self.held = None
        if self._lost_at is not None:
            self.counters.last_seconds = trio.current_time() - self._lost_at
            log.info("%s: recovered in %.3f s", self.name, self.counters.last_seconds)

    async def _settle(self) -> None:
        if self.procedure is None:
            return
        try:
            await self.procedure.settle()
        except (QmpError, MonitorLost, trio.TooSlowError, OSError) as error:
            log.warning("%s: could not ready the next recovery: %s", self.name, words(error))

    async def _timer(self, scope: trio.CancelScope, seconds: float) -> None:
        with scope:
            await trio.sleep(seconds)
            self._timer_scope = None
            self.feed(Event.TIMER)

    def _cancel_attempt(self) -> None:
        if self._attempt_scope is not None:
            self._attempt_scope.cancel()
            self._attempt_scope = None

    def _cancel_timer(self) -> None:
        if self._timer_scope is not None:
            self._timer_scope.cancel()
            self._timer_scope = None

    async def _attempt(self, scope: trio.CancelScope) -> None:
        outcome = None
        with scope:
            # One cancelled while QEMU had its command ends first: never two at once.
            async with self._attempting:
                outcome = await self._try()
        if self._attempt_scope is scope:
            self._attempt_scope = None
        if outcome is not None and not scope.cancel_called:
            self.feed(outcome)

    async def _try(self) -> Event | None:
        if self.procedure is None:
            return None
        try:
            await self.procedure.attempt()
        except NotPausedYet:
            return Event.NOT_YET
        except Exception as error:
            expected = (AttemptFailed, QmpError, MonitorLost, trio.TooSlowError, OSError)
            if not isinstance(error, expected):
                log.exception("%s: internal error in a recovery attempt", self.name)
            self.counters.last_error = words(error)
            log.warning(
                "%s: recovery attempt %d failed: %s; trying again",
                self.name,
                self.counters.attempts,
                self.counters.last_error,
            )
            return Event.ATTEMPT_FAILED
        return None

    async def attempt_over(self) -> None:
        """Waits until an attempt that was cancelled has ended: QEMU may have had its command already."""
        async with self._attempting:
            pass

    async def issued(self) -> None:
        """QEMU took the attempt's command. Raises trio.Cancelled if the attempt was cancelled meanwhile."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self.feed(Event.ISSUED)

    async def _stop_guest(self) -> None:
        log.error(
            "%s: ALERT: the source migration failed after postcopy began; stopping its guest, which may"
            " run at the destination: look at the destination, then quit this QEMU",
            self.name,
        )
        try:
            await self.monitor.execute("stop", timeout=QUERY_TIMEOUT)
        except (QmpError, MonitorLost, trio.TooSlowError) as error:
            log.error(
                "%s: ALERT: could not stop the source's guest: %s; stop it by hand", self.name, words(error)
            )

    # ---- QEMU's status, asked for ----

    def look_soon(self) -> None:
        """Asks QEMU for its status now, not only at the next interval."""
        self._wake_poller.set()

    async def _poll_status(self) -> None:
        while True:
            with trio.move_on_after(self._poll_interval()):
                await self._wake_poller.wait()
            self._wake_poller = trio.Event()
            if not self.under_way or self.monitor.qemu is None:
                continue
            if self.relay is not None:
                self._relay_changed(self.relay)
            asked_in = self.policy.state
            try:
                status = (await self.query("query-migrate")).get("status")
            except (QmpError, MonitorLost, trio.TooSlowError):
                continue  # a destination's main thread may be stuck on a missing page: that tells nothing
            # An answer to a question from before a transition tells of the time before it.
            if isinstance(status, str) and self.policy.state is asked_in:
                try:
                    self.on_status(status)
                except Exception:
                    log.exception("%s: internal error on status %s", self.name, status)

    def _poll_interval(self) -> float:
        if self.relay is None:
            return STATUS_INTERVAL_UNRELAYED if self.under_way else STATUS_INTERVAL
        return COMPLETION_INTERVAL if self.phase is Phase.DONE and self.under_way else STATUS_INTERVAL

    # ---- the relay's signals ----

    def _start_relay(self, role: Role) -> None:
        self.relay = Relay(role)
        self._relay_scope = trio.CancelScope()
        self.start_soon(self._watch_relay, self._relay_scope, self.relay)

    def _drop_relay(self) -> None:
        if self._relay_scope is not None:
            self._relay_scope.cancel()
            self._relay_scope = None
        if self.relay is not None:
            view = self.relay.look()
            forward, backward = self.bytes_before
            self.bytes_before = (forward + view.forward_bytes, backward + view.return_bytes)
            self.relay.close()
            self.relay = None

    async def _watch_relay(self, scope: trio.CancelScope, relay: Relay) -> None:
        with scope:
            while not relay.closed:
                await trio.lowlevel.wait_readable(relay.notify_fd)
                if relay.closed:
                    return
                os.eventfd_read(relay.notify_fd)
                self._relay_changed(relay)
                while not relay.closed and relay.stale:
                    await trio.sleep(0.001)
                    self._relay_changed(relay)

    def _relay_changed(self, relay: Relay) -> None:
        view = relay.look()
        if view.channel != self.channel or self.channel == self._ended_channel:
            return  # the pump has not come to the newest channel yet, or its end has been dealt with
        passed = relay.passed()
        if passed.running:
            self._postcopy_began = True
        self._tell_foreign_pages(relay)
        if passed.resumed and passed.resume_acknowledged and not (view.local.lost or view.far.lost):
            self.feed(Event.RESUME_ACKNOWLEDGED)
        if view.local.lost:
            self._local_ended(view)
        elif view.far.lost:
            self._far_lost(relay, view)

    def _tell_foreign_pages(self, relay: Relay) -> None:
        if relay.foreign_pages() and not self._told_foreign:
            self._told_foreign = True
            log.error(
                "%s: ALERT: the destination says it has pages that were never sent to it: is %s another VM's"
                " address? Look at both guests before you trust them",
                self.name,
                self.endpoint.uri if self.endpoint else "the address",
            )

    def _local_ended(self, view: RelayView) -> None:
        phase = self.phase
        self._ended_channel = self.channel
        self._hold(None)
        self.look_soon()
        if phase is not Phase.DONE:
            log.info("%s: QEMU ended the channel in %s (%s)", self.name, phase, view.local_loss())
        if phase in (Phase.SWITCHOVER, Phase.POSTCOPY, Phase.RECOVERY_HANDSHAKE):
            self.feed(Event.CHANNEL_LOST)

    def _far_lost(self, relay: Relay, view: RelayView) -> None:
        if self.role is None:
            return
        phase = self.phase
        allowed, rule = may_close(phase, self.role, self.version)
        if allowed:
            if phase is not Phase.DONE:
                log.warning("%s: far leg %s in %s: closing QEMU's: %s",
                            self.name, view.far_loss(), phase, rule.effect)  # fmt: skip
            self.held = None
            self._ended_channel = self.channel
            relay.close_channel(self.channel)
            self.look_soon()
            if phase in (Phase.SWITCHOVER, Phase.POSTCOPY, Phase.RECOVERY_HANDSHAKE):
                self.feed(Event.CHANNEL_LOST)
        elif self.held is None:
            self.held = f"{phase}: {rule.effect}"
            log.error(
                "%s: ALERT: far leg %s in %s: holding QEMU's leg open, for if it closed: %s. What to do: %s",
                self.name,
                view.far_loss(),
                phase,
                rule.effect,
                rule.advice,
            )
            self.feed(Event.LEG_HELD)
            self.start_soon(self._look_again, relay)

    async def _look_again(self, relay: Relay) -> None:
        """A hold may end by time alone: a destination that was about to run surely does a second later."""
        await trio.sleep(RUN_SECONDS * 1.1)
        if not relay.closed:
            self._relay_changed(relay)

    # ---- the end ----

    def _spawn_clean_up(self) -> None:
        try:
            self._state_file.remove()
            if self.relay is not None:
                self.relay.complete()
        except OSError as error:
            log.warning("%s: could not clear the ended migration: %s", self.name, error)
        if self.relay is None or self.relay.look().local is not LegState.OPEN:
            self._hold(None)
        if self.procedure is not None:
            self.start_soon(self._clean_up, self.procedure)

    async def _clean_up(self, procedure: RoleProcedure) -> None:
        try:
            await procedure.clean_up()
        except (QmpError, MonitorLost, trio.TooSlowError, OSError) as error:
            log.warning("%s: could not take back what was laid with QEMU: %s", self.name, words(error))

    def _say_what_stopping_costs(self) -> None:
        cost = self.cost_of_stopping()
        if cost is not None:
            log.warning("%s: stopping closes the channel in %s: %s", self.name, self.phase, cost[1])

    def cost_of_stopping(self) -> tuple[bool, str] | None:
        """Whether QEMU survives a close of its leg now, and what it does then; None where none is open."""
        if self.relay is None or self.role is None or self.relay.look().local is not LegState.OPEN:
            return None
        allowed, rule = may_close(self.phase, self.role, self.version)
        return allowed, rule.effect


def inet_of(endpoint: Endpoint | None) -> Inet:
    """The endpoint as one that can be dialled. Raises AttemptFailed where refault cannot."""
    if not isinstance(endpoint, Inet):
        raise AttemptFailed(f"the relay cannot dial {endpoint.uri if endpoint else 'no address'}")
    return endpoint


def is_error(reply: bytes) -> bool:
    """Whether a reply object is an error."""
    return b'"error"' in reply and "error" in msgspec.json.decode(reply)


def _age(monotonic_ns: int) -> float:
    return max(0.0, (time.monotonic_ns() - monotonic_ns) / 1e9) if monotonic_ns else 0.0


def words(error: BaseException) -> str:
    """An error as the operator reads it."""
    if isinstance(error, trio.TooSlowError):
        return "QEMU did not answer in time"
    if isinstance(error, MonitorLost):
        return "the monitor was lost"
    return str(error)
