"""Carries out what the recovery policy asks for: attempts, one at a time, and the timers between them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import trio

from refault.daemon.host import subjects
from refault.daemon.known.course import Course
from refault.daemon.known.vm_state import QUERY_TIMEOUT
from refault.daemon.monitor.monitor import MonitorLost, QmpError, words
from refault.daemon.recovery.doubt import tell_doubt
from refault.daemon.recovery.reclaim import reclaim, say_as_told, say_cannot_have_left
from refault.daemon.relayed.channels import Channels
from refault.migration.recovery import Action, AttemptFailed, Event, NotPausedYet, State

log = logging.getLogger("refault.migration")


class Procedure(Protocol):
    """What a role does in a recovery."""

    async def attempt(self) -> None:
        """Issues the recovery commands. Raises AttemptFailed or NotPausedYet."""

    def path_changed(self) -> bool:
        """A link, an address or a route of this host has changed; whether that served a recovery."""

    async def settle(self) -> None:
        """After QEMU is active again: readies what the next recovery needs."""


class Attempts:
    """The recovery of one migration, driven by its policy. `channels` gives those of its relay, if it has
    one; `ended` clears what stood ready for it."""

    def __init__(
        self,
        course: Course,
        procedure: Procedure,
        channels: Callable[[], Channels | None],
        ended: Callable[[], None],
    ) -> None:
        self._course = course
        self._procedure = procedure
        self._channels = channels
        self._ended = ended
        self._scope: trio.CancelScope | None = None
        self._timers: dict[Event, trio.CancelScope] = {}
        self._one_at_a_time = trio.Lock()
        self._lost_at: float | None = None
        self._attempt_began = 0.0
        self._settled_channel = 0
        course.driven_by(self._drive)

    def _drive(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            self._carry_out(action)
        channel = self._course.channel
        if self._course.policy.state is State.RUNNING and channel != self._settled_channel:
            self._settled_channel = channel
            self._course.vm.start_soon(self._settle)

    def _carry_out(self, action: Action) -> None:
        match action:
            case Action.COUNT_LOSS:
                self._count_loss()
            case Action.COUNT_RECOVERY:
                self._count_recovery()
            case Action.ATTEMPT:
                self._cancel_timer(Event.TIMER)
                self._attempt_began = trio.current_time()
                self._scope = trio.CancelScope()
                self._course.vm.start_soon(self._attempt, self._scope)
            case Action.CANCEL_ATTEMPT:
                self._cancel_attempt()
            case Action.TIMER_POLL:
                self._start_timer(Event.TIMER, self._course.policy.delay(action), self._course.pause_told)
            case Action.TIMER_BACKOFF | Action.TIMER_CLIENT:
                delay = self._course.policy.delay(action)
                if action is Action.TIMER_BACKOFF:
                    delay = max(self._course.policy.pace.first_backoff, delay - self._since_attempt())
                self._start_timer(Event.TIMER, delay)
            case Action.TIMER_GIVE_UP:
                self._start_timer(Event.OUT_OF_PATIENCE, self._course.policy.delay(action))
            case Action.GIVE_UP:
                self._cancel_timers()
                self._tell_given_up()
            case Action.RESET_BACKOFF:
                subjects.recovering(self._course.name, None)
                self._course.addresses.recovered()
            case Action.CLEAN_UP:
                self._cancel_timers()
                self._course.counters.over()
                self._ended()
            case Action.RECLAIM | Action.RECLAIM_AS_TOLD:
                say = say_as_told if action is Action.RECLAIM_AS_TOLD else say_cannot_have_left
                say(self._course.name)
                self._course.vm.start_soon(reclaim, self._course, self._channels, self.over)
            case Action.TELL_DOUBT:
                self._course.vm.start_soon(tell_doubt, self._course, self._channels)
            case Action.STOP_GUEST:
                self._course.vm.start_soon(self._stop_guest)

    def _since_attempt(self) -> float:
        """Back-off paces the beginnings: after an attempt that itself took long the next begins at once."""
        return trio.current_time() - self._attempt_began

    def _count_loss(self) -> None:
        course = self._course
        channels = self._channels()
        ago = 0.0 if channels is None else channels.count_loss()
        self._lost_at = trio.current_time() - ago
        loss = course.counters.lose(course.role, ago)
        subjects.recovering(course.name, loss.id)
        log.warning(
            "%s: the migration channel is lost (loss %d); recovering", course.name, course.counters.losses
        )

    def _count_recovery(self) -> None:
        seconds = trio.current_time() - self._lost_at if self._lost_at is not None else None
        self._course.counters.recover(seconds)
        if (channels := self._channels()) is not None:
            channels.hold_no_more()
        if seconds is not None:
            log.info("%s: recovered in %.3f s", self._course.name, seconds)

    def _tell_given_up(self) -> None:
        course = self._course
        course.counters.give_up()
        log.error(
            "%s: ALERT: gave up after %g s (--give-up-after): no further attempt is made for this loss. Last"
            " error: %s. What to do: keep both QEMUs running, the guest is split between them; put right what"
            " the error names, then recover by hand (docs/running.md), or restart this refault, which begins"
            " anew",
            course.name,
            self._course.policy.pace.give_up,
            course.counters.last_error or "none, the other host did not come",
        )

    async def _settle(self) -> None:
        try:
            await self._procedure.settle()
        except (QmpError, MonitorLost, trio.TooSlowError, OSError) as error:
            log.warning("%s: could not ready the next recovery: %s", self._course.name, words(error))

    def _start_timer(self, event: Event, seconds: float, sooner: trio.Event | None = None) -> None:
        """Feeds `event` after so many seconds, or as soon as `sooner` is set, if it is not set already."""
        self._cancel_timer(event)
        scope = self._timers[event] = trio.CancelScope()
        if sooner is None or sooner.is_set():
            sooner = trio.Event()
        self._course.vm.start_soon(self._timer, event, scope, seconds, sooner)

    async def _timer(self, event: Event, scope: trio.CancelScope, seconds: float, sooner: trio.Event) -> None:
        with scope:
            with trio.move_on_after(seconds):
                await sooner.wait()
            if self._timers.get(event) is scope:  # else it was cancelled as it ran out
                del self._timers[event]
                self._course.feed(event)

    def path_changed(self) -> bool:
        """A path to the other host may be there again; False where none is waited for."""
        waits = self._course.policy.state is State.WAITING
        self._course.feed(Event.PATH_CHANGED)
        return self._procedure.path_changed() or waits

    def cancel(self) -> None:
        """Ends the attempt under way and the wait for the next one."""
        self._cancel_attempt()
        self._cancel_timers()

    def _cancel_attempt(self) -> None:
        if self._scope is not None:
            self._scope.cancel()
            self._scope = None

    def _cancel_timer(self, event: Event) -> None:
        scope = self._timers.pop(event, None)
        if scope is not None:
            scope.cancel()

    def _cancel_timers(self) -> None:
        for event in list(self._timers):
            self._cancel_timer(event)

    async def _attempt(self, scope: trio.CancelScope) -> None:
        outcome = None
        with scope:
            # One cancelled while QEMU had its command ends first: never two at once.
            async with self._one_at_a_time:
                outcome = await self._try(scope)
        if self._scope is scope:
            self._scope = None
        if outcome is not None and not scope.cancel_called:
            self._course.feed(outcome)

    async def _try(self, scope: trio.CancelScope) -> Event | None:
        course = self._course
        try:
            await self._procedure.attempt()
        except NotPausedYet:
            return Event.NOT_YET
        except Exception as error:
            expected = (AttemptFailed, QmpError, MonitorLost, trio.TooSlowError, OSError)
            if not isinstance(error, expected):
                log.exception("%s: internal error in a recovery attempt", course.name)
            elif scope.cancel_called:
                return None  # QEMU or the migration has ended: who looks now is not told of it
            course.counters.fail(words(error))
            last = self._course.policy.state is State.GIVEN_UP
            log.warning(
                "%s: recovery attempt %d failed: %s; %s",
                course.name,
                course.counters.attempts,
                course.counters.last_error,
                "it was the last" if last else "trying again",
                extra=course.repeats("attempt failed", course.counters.last_error, last),
            )
            return Event.ATTEMPT_FAILED
        return None

    async def over(self) -> None:
        """Waits until an attempt that was cancelled has ended: QEMU may have had its command already."""
        async with self._one_at_a_time:
            pass

    async def issued(self) -> None:
        """QEMU took the attempt's command. Raises trio.Cancelled if the attempt was cancelled meanwhile."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._course.feed(Event.ISSUED)

    async def _stop_guest(self) -> None:
        course = self._course
        log.error(
            "%s: ALERT: the source migration failed after postcopy began; stopping its guest, which may"
            " run at the destination. What to do: look at the destination. If its migration is completed,"
            " quit this QEMU. If it waits for the guest (query-status: inmigrate), end it; then, or if it had"
            " ended without having run the guest, `cont` this one. If it is postcopy-paused it cannot get the"
            " rest of its memory any more: the guest here is whole, and as old as the switchover",
            course.name,
        )
        try:
            await course.vm.monitor.execute("stop", timeout=QUERY_TIMEOUT)
        except (QmpError, MonitorLost, trio.TooSlowError) as error:
            log.error(
                "%s: ALERT: could not stop the source's guest: %s; stop it by hand",
                course.name,
                words(error),
            )
