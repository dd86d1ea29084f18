"""A lost channel: in which phase, and is QEMU's leg closed, or held?

far leg lost ──▶ phase (migration/phase.py) ──▶ may it be closed? (migration/legs.py) ──▶ close, or hold
"""

from __future__ import annotations

import logging

import trio

from refault.channel.relay import RUN_SECONDS, LegState, RelayView
from refault.daemon.known.course import Course
from refault.daemon.monitor.monitor import MonitorLost, QmpError
from refault.daemon.relayed.channels import Channels
from refault.daemon.relayed.qemu_word import ASKED_EVERY
from refault.migration.legs import waits_for_pong
from refault.migration.phase import ENDS_PRECOPY, Passed, Phase, Role, cannot_have_left
from refault.migration.recovery import Event, State
from refault.migration.versions import abilities
from refault.migration.word import LOOK_AGAIN, Word, phase_after_loss

log = logging.getLogger("refault.migration")

SIPS = 2
"""How often a source that cannot be read is let write on, each time for more than an iteration of QEMU's."""
COMPLETES_WITHIN = 1.0
"""A destination that has all ends its channel, and a source that cannot be read says so soon after that."""
_LOSABLE = (Phase.SWITCHOVER, Phase.POSTCOPY, Phase.RECOVERY_HANDSHAKE)
"""The phases in which a lost channel is one to recover."""


class Losses:
    """Of the channels of one relayed migration."""

    def __init__(self, course: Course, channels: Channels) -> None:
        self._course = course
        self._channels = channels
        channels.lost_to(self._look)
        self._asking = 0
        """The lost channel whose phase QEMU is asked for."""
        self._told_foreign: set[str] = set()
        """The addresses of which it was said that they are another VM's."""

    def _look(self, view: RelayView, passed: Passed) -> None:
        if view.local.lost:
            self._local_lost(view)
        elif view.far.lost:
            if view.far is LegState.REFUSED:
                self._tell_foreign()
            if self._may_reclaim(passed):
                self._channels.dealt_with()
                self._course.feed(Event.CANNOT_HAVE_LEFT)
            else:
                self._far_lost(view)

    def _local_lost(self, view: RelayView) -> None:
        phase = self._channels.phase
        self._channels.dealt_with()
        self._channels.kept.drop()
        self._course.look_soon()
        if phase is not Phase.DONE:
            log.info("%s: QEMU ended the channel in %s (%s)", self._course.name, phase, view.local_loss(),
                     extra=self._course.repeats("QEMU ended", phase))  # fmt: skip
        if phase in _LOSABLE:
            self._recoverable()

    def _recoverable(self) -> None:
        self._course.feed(Event.CHANNEL_LOST)
        if self._channels.channel == 1 and self._channels.in_doubt:
            self._course.feed(Event.IN_DOUBT)

    def _may_reclaim(self, passed: Passed) -> bool:
        course = self._course
        able = course.role is Role.SOURCE and abilities(course.vm.version).fails_when_told
        return able and course.policy.state is State.RUNNING and cannot_have_left(passed)

    def _far_lost(self, view: RelayView) -> None:
        channels = self._channels
        if self._must_ask():
            if self._asking != channels.channel:
                self._asking = channels.channel
                self._course.vm.start_soon(self._ask_phase, channels.channel)
        else:
            self._judge(view, channels.phase)

    def _must_ask(self) -> bool:
        """Whether QEMU must say what phase it is, for what has passed does not."""
        channels = self._channels
        if self._course.role is Role.DESTINATION:
            return channels.unread and channels.phase not in (Phase.POSTCOPY, Phase.DONE)
        if channels.phase is Phase.SWITCHOVER and not channels.unread:
            return channels.relay.passed().packaged_passed  # before that it cannot complete
        return channels.unread or channels.phase is Phase.POSTCOPY

    async def _ask_phase(self, channel: int) -> None:
        """Has QEMU say in what phase a channel was lost, until its leg is closed."""
        channels = self._channels
        role = self._course.role
        if await channels.word.in_tls_handshake(channel) and channel == channels.channel:
            resumed = channels.relay.passed().resumed
            self._judge(channels.relay.look(), Phase.POSTCOPY if resumed else Phase.PRECOPY)
            return
        before: Word | None = None
        sips = 0
        completes_until = trio.current_time() + COMPLETES_WITHIN
        while not channels.over(channel):
            now: Word | None = None
            phase: Phase | None = None
            events = self._course.events
            try:
                now = await channels.word.ask()
            except trio.TooSlowError:
                phase = channels.word.unanswered(channels.phase, writes=channels.kept.unread)
            except (QmpError, MonitorLost):
                pass
            if channels.over(channel):
                return
            if now is not None and waits_for_pong(role, now.status):
                self._course.on_answer(now.status, events=events)
                unread = channels.unread and self._course.vm.encrypted  # into TLS nothing can be said
                if not unread or sips < SIPS:
                    sips += unread
                    await channels.closing.bring_on(channel, say=not unread)
                    before = None
                    continue
            if now is not None:
                never = self._course.never_postcopy
                phase = phase_after_loss(channels.relay.passed(), role, before, now, never_postcopy=never)
            says_so = channels.unread and not channels.ended_without and trio.current_time() < completes_until
            if phase is Phase.COMPLETING and says_so:
                phase = None
            if phase is not None:
                status = now.status if now is not None else self._course.status
                self._judge(channels.relay.look(), phase, status)
            if channels.held_for_word:
                channels.guard.start(again=True)  # QEMU may not have answered
            before = now
            await trio.sleep(LOOK_AGAIN if channels.held is None else ASKED_EVERY)

    def _judge(self, view: RelayView, phase: Phase, status: str | None = None) -> None:
        course, channels = self._course, self._channels
        if course.postcopy_began and status in ENDS_PRECOPY:
            status = None  # it is an old one
        allowed, rule = channels.may_close(phase, status)
        if allowed:
            if phase is not Phase.DONE:
                log.warning("%s: far leg %s in %s: closing QEMU's: %s",
                            course.name, view.far_loss(), phase, rule.effect,
                            extra=course.repeats("far leg", view.far_loss(), phase))  # fmt: skip
            channels.close_leg(phase)
            course.look_soon()
            if phase in _LOSABLE:
                self._recoverable()
        elif channels.hold(phase, rule):
            log.error(
                "%s: ALERT: far leg %s in %s: holding QEMU's leg open, for if it closed: %s. What to do: %s",
                course.name,
                view.far_loss(),
                phase,
                rule.effect,
                rule.advice,
                extra=course.repeats("held", rule.effect),
            )
            course.feed(Event.LEG_HELD)
            course.vm.start_soon(self._look_again)

    async def _look_again(self) -> None:
        """A hold may end by time alone: a destination that was about to run surely does a second later."""
        await trio.sleep(RUN_SECONDS * 1.1)
        if not self._channels.relay.closed:
            self._channels.look()

    def _tell_foreign(self) -> None:
        """The pump has cut the channel before RESUME: another VM's destination answered (replay.h)."""
        course = self._course
        where = course.addresses.last
        address = where.uri if where is not None else "the address"
        course.counters.fail(f"{address} answers for another VM")
        if address not in self._told_foreign:
            self._told_foreign.add(address)
            log.error(
                "%s: ALERT: %s answers for another VM: it has pages that were never sent to it, or lacks some"
                " that this VM's has. The channel was cut before it could be resumed. What to do: put the"
                " network or the address right; from QEMU 8.2 on refault goes on trying. If it is this VM's"
                " destination for sure, restart this refault: a new one has not seen the whole stream and"
                " does not judge",
                course.name,
                address,
            )
