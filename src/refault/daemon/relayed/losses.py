"""A lost channel: in which phase, and is QEMU's leg closed, or held?

far leg lost ──▶ phase (migration/phase.py) ──▶ may it be closed? (migration/legs.py) ──▶ close, or hold
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from refault.channel.relay import RUN_SECONDS, LegState, RelayView
from refault.daemon.monitor.monitor import MonitorLost, QmpError
from refault.daemon.recovery.doubt import in_doubt, tell_doubt
from refault.daemon.relayed.qemu_word import ASKED_EVERY
from refault.migration.legs import UNTIL_LOADED, WAITS_FOR_PONG, Rule, may_close, waits_for_pong
from refault.migration.phase import Passed, Phase, Role, cannot_have_left
from refault.migration.recovery import Event, State
from refault.migration.versions import abilities
from refault.migration.word import LOOK_AGAIN, Word, phase_after_loss

if TYPE_CHECKING:
    from refault.daemon.migration import Migration
    from refault.daemon.relayed.channels import Channels

log = logging.getLogger("refault.migration")

SIPS = 2
"""How often a source that cannot be read is let write on, each time for more than an iteration of QEMU's."""
_LOSABLE = (Phase.SWITCHOVER, Phase.POSTCOPY, Phase.RECOVERY_HANDSHAKE)
"""The phases in which a lost channel is one to recover."""


class Losses:
    """Of the channels of one relayed migration."""

    def __init__(self, migration: Migration, channels: Channels) -> None:
        self.held: str | None = None
        """Why a local leg is held open though its other side is lost."""
        self._held_by: Rule | None = None
        self._migration = migration
        self._channels = channels
        self._asking = 0
        """The lost channel whose phase QEMU is asked for."""
        self._told_foreign: set[str] = set()
        """The addresses of which it was said that they are another VM's."""

    @property
    def held_until_loaded(self) -> bool:
        """Whether a leg is held by that rule."""
        return self.held is not None and self._held_by is UNTIL_LOADED

    def look(self, view: RelayView, passed: Passed) -> None:
        """Deals with what the newest channel has lost, if anything, until its end has been dealt with."""
        if view.local.lost:
            self._local_lost(view)
        elif view.far.lost:
            if view.far is LegState.REFUSED:
                self._tell_foreign()
            if self._may_reclaim(passed):
                self._channels.ended = self._channels.channel
                self._migration.feed(Event.CANNOT_HAVE_LEFT)
            else:
                self._far_lost(view)

    def _local_lost(self, view: RelayView) -> None:
        phase = self._channels.phase
        self._channels.ended = self._channels.channel
        self._channels.kept.drop()
        self._migration.look_soon()
        if phase is not Phase.DONE:
            log.info("%s: QEMU ended the channel in %s (%s)", self._migration.name, phase, view.local_loss(),
                     extra=self._migration.attempts.repeats("QEMU ended", phase))  # fmt: skip
        if phase in _LOSABLE:
            self._recoverable()

    def _recoverable(self) -> None:
        self._migration.feed(Event.CHANNEL_LOST)
        if self._channels.channel == 1 and in_doubt(self._migration):
            self._migration.vm.start_soon(tell_doubt, self._migration)

    def _may_reclaim(self, passed: Passed) -> bool:
        migration = self._migration
        able = migration.role is Role.SOURCE and abilities(migration.vm.version).fails_when_told
        return able and migration.policy.state is State.RUNNING and cannot_have_left(passed)

    def _far_lost(self, view: RelayView) -> None:
        channels = self._channels
        if self._must_ask():
            if self._asking != channels.channel:
                self._asking = channels.channel
                self._migration.vm.start_soon(self._ask_phase, channels.channel)
        else:
            self._judge(view, channels.phase)

    def _must_ask(self) -> bool:
        """Whether QEMU must say what phase it is, for what has passed does not."""
        channels = self._channels
        if self._migration.role is Role.DESTINATION:
            return channels.unread and channels.phase not in (Phase.POSTCOPY, Phase.DONE)
        if channels.phase is Phase.SWITCHOVER and not channels.unread:
            return channels.relay.passed().packaged_passed  # before that it cannot complete
        return channels.unread or channels.phase is Phase.POSTCOPY

    async def _ask_phase(self, channel: int) -> None:
        """Has QEMU say in what phase a channel was lost, until its leg is closed."""
        channels = self._channels
        role = self._migration.role
        if await channels.word.in_tls_handshake(channel) and channel == channels.channel:
            resumed = channels.relay.passed().resumed
            self._judge(channels.relay.look(), Phase.POSTCOPY if resumed else Phase.PRECOPY)
            return
        before: Word | None = None
        sips = 0
        while not channels.over(channel):
            now: Word | None = None
            phase: Phase | None = None
            try:
                now = await channels.word.ask()
            except trio.TooSlowError:
                phase = channels.word.unanswered(channels.phase)
            except (QmpError, MonitorLost):
                pass
            if channels.over(channel):
                return
            if now is not None and waits_for_pong(role, now.status):
                self._migration.on_status(WAITS_FOR_PONG)
                unread = channels.unread  # into TLS nothing can be said
                if not unread or sips < SIPS:
                    sips += unread
                    await channels.closing.bring_on(channel, say=not unread)
                    before = None
                    continue
            if now is not None:
                never = self._migration.never_postcopy
                phase = phase_after_loss(channels.relay.passed(), role, before, now, never_postcopy=never)
            if phase is not None:
                status = now.status if now is not None else self._migration.status
                self._judge(channels.relay.look(), phase, status)
            if self.held_until_loaded:
                channels.guard.start(again=True)  # QEMU may not have answered
            before = now
            await trio.sleep(LOOK_AGAIN if self.held is None else ASKED_EVERY)

    def _judge(self, view: RelayView, phase: Phase, status: str | None = None) -> None:
        migration, channels = self._migration, self._channels
        allowed, rule = may_close(phase, migration.role, migration.vm.version, status)
        if allowed:
            if phase is not Phase.DONE:
                log.warning("%s: far leg %s in %s: closing QEMU's: %s",
                            migration.name, view.far_loss(), phase, rule.effect,
                            extra=migration.attempts.repeats("far leg", view.far_loss(), phase))  # fmt: skip
            self.held = None
            channels.ended = channels.channel
            if channels.kept.names:  # it was held before, and QEMU is to see the end
                migration.vm.start_soon(channels.kept.let_go)
            channels.closing.close(phase)
            migration.look_soon()
            if phase in _LOSABLE:
                self._recoverable()
        elif self.held is None or self._held_by is not rule:
            self.held = f"{phase}: {rule.effect}"
            self._held_by = rule
            log.error(
                "%s: ALERT: far leg %s in %s: holding QEMU's leg open, for if it closed: %s. What to do: %s",
                migration.name,
                view.far_loss(),
                phase,
                rule.effect,
                rule.advice,
                extra=migration.attempts.repeats("held", rule.effect),
            )
            migration.feed(Event.LEG_HELD)
            migration.vm.start_soon(self._look_again)

    async def _look_again(self) -> None:
        """A hold may end by time alone: a destination that was about to run surely does a second later."""
        await trio.sleep(RUN_SECONDS * 1.1)
        if not self._channels.relay.closed:
            self._channels.look()

    def _tell_foreign(self) -> None:
        """The pump has cut the channel before RESUME: another VM's destination answered (replay.h)."""
        migration = self._migration
        where = migration.addresses.last
        address = where.uri if where is not None else "the address"
        migration.counters.last_error = f"{address} answers for another VM"
        if address not in self._told_foreign:
            self._told_foreign.add(address)
            log.error(
                "%s: ALERT: %s answers for another VM: it has pages that were never sent to it, or lacks some"
                " that this VM's has. The channel was cut before it could be resumed. What to do: put the"
                " network or the address right; from QEMU 8.2 on refault goes on trying. If it is this VM's"
                " destination for sure, restart this refault: a new one has not seen the whole stream and"
                " does not judge",
                migration.name,
                address,
            )
