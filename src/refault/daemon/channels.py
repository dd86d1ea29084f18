"""The relay of one migration and its channels: joins the legs, hears what the pump tells, and holds a leg
that may not be closed.

    far leg lost ──▶ phase (migration/phase.py) ──▶ may it be closed? (migration/legs.py) ──▶ close, or hold
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import socket
import time
from typing import TYPE_CHECKING

import trio

from refault.channel.relay import RUN_SECONDS, Lane, LegState, Relay, RelayView
from refault.channel.tracker import Kept
from refault.daemon.closing import Closing
from refault.daemon.doubt import in_doubt, tell_doubt
from refault.daemon.kept_ends import KeptEnds
from refault.daemon.local import LocalLeg, take_back
from refault.daemon.monitor import MonitorLost, QmpError
from refault.daemon.qemu_word import ASKED_EVERY, QemuWord
from refault.migration.legs import UNTIL_LOADED, WAITS_FOR_PONG, Rule, may_close, waits_for_pong
from refault.migration.phase import Passed, Phase, Role, Told, cannot_have_left, phase_of
from refault.migration.recovery import Event, State
from refault.migration.versions import abilities
from refault.migration.word import LOOK_AGAIN, Word, phase_after_loss

if TYPE_CHECKING:
    from refault.daemon.migration import Migration

log = logging.getLogger("refault.migration")

REPLAY_DOUBT_SECONDS = 2.0
"""Two losses so soon after a replay, and the next recovery goes without (DESIGN, 5)."""
STALL_LOOK = 0.25
"""Seconds between looks at a handshake that may stand still for many; its end is heard of by other ways."""
HEARS_WITHIN = 50.0
"""Seconds for which the end of refault waits until a source that cannot be told has heard of its guest's
arrival: less than app.STOP_PATIENCE."""
SIPS = 2
"""How often a source that cannot be read is let write on, each time for more than an iteration of QEMU's."""
_LOSABLE = (Phase.SWITCHOVER, Phase.POSTCOPY, Phase.RECOVERY_HANDSHAKE)
"""The phases in which a lost channel is one to recover."""


class AttemptFailed(Exception):  # noqa: N818 - it says what happened
    """An attempt did not succeed; the text says why, for the operator."""


class Channels:
    """Of one migration that is relayed. `channel` counts them from 1; 0 is none yet."""

    def __init__(self, migration: Migration, relay: Relay) -> None:
        self.relay = relay
        self.channel = 0
        self.held: str | None = None
        """Why a local leg is held open though its other side is lost."""
        self._held_by: Rule | None = None
        self._migration = migration
        self._ended = 0
        """The channel whose end has been dealt with."""
        self._doubtful_losses = 0
        """Losses in a row that came right after a replay."""
        self.changed = trio.Event()
        """Set whenever the pump told of something, and replaced."""
        self.kept = KeptEnds(migration.vm.monitor)
        self.word = QemuWord(migration, relay)
        self.closing = Closing(migration, relay, self.kept)
        self._guarded = 0
        """The channel whose end QEMU was asked to hold, because a kill of refault must not end it."""
        self._giving = False
        """Whether it is being asked."""
        self._stops_since = math.inf
        """When refault began to end while a source heard its destination."""
        self._told_foreign: set[str] = set()
        """The addresses of which it was said that they are another VM's."""
        self.knows_first = False
        """Whether this refault has seen the migration from its beginning."""
        self.has_arrived = False
        """Whether the destination is known to have had the guest, all device state loaded."""
        self._returned_before = 0
        """Bytes on the return path before this channel."""
        self._replayed_before = 0
        """Requests that were replayed before this channel."""
        self._told_part = False
        self._told_cut = 0
        """The channel of which that was said."""
        self._asking = 0
        """The lost channel whose phase QEMU is asked for."""
        self._scope = trio.CancelScope()

    @property
    def phase(self) -> Phase:
        """The phase, as far as it is known."""
        migration = self._migration
        told = Told(migration.status, self.relay.runs_told, self.word.much_left(ASKED_EVERY))
        return phase_of(self.relay.passed(), migration.role, told)

    @property
    def held_until_loaded(self) -> bool:
        """Whether it is held by that rule."""
        return self.held is not None and self._held_by is UNTIL_LOADED

    @property
    def unread(self) -> bool:
        """Whether bytes pass that cannot be read, so that QEMU must tell how far it is."""
        return self.word.wanted

    def join(self, local: LocalLeg, far: trio.socket.SocketType, *, recovered: bool) -> None:
        """Gives both legs to the pump as the next channel.

        Raises AttemptFailed where the one before must stay.
        """
        self.check_room()
        may_replay = self._doubtful_losses < 2
        if recovered and not may_replay:
            log.warning(
                "%s: recovering without replay: the channel was lost twice right after one",
                self._migration.name,
            )
        self.kept.begin(local.socket)
        self._migration.pause_told = trio.Event()
        if recovered:
            self._migration.status = "postcopy-paused"  # or this would not be; an older word tells nothing
        else:
            self.knows_first = True
        view = self.relay.look()
        self._returned_before, self._replayed_before = view.return_bytes, view.replayed
        self.relay.attach(
            local.detach(),
            far.detach(),
            recovered=recovered,
            may_replay=may_replay,
            lanes=self._migration.lanes.count,
        )
        self.channel += 1
        self.closing.begin(self.channel, local.peer_inode)
        if local.kept is not None:  # from here QEMU is to see an end, be it by a kill of refault
            self._migration.vm.start_soon(take_back, self._migration.vm.monitor, local.kept)

    def check_room(self) -> None:
        """Raises AttemptFailed where no further channel can be joined: the one before must stay."""
        if self.relay.closed:
            raise AttemptFailed("the relay has ended")
        cost = self.cost_of_stopping()
        if self.channel and cost is not None and not cost[0]:
            raise AttemptFailed(f"the channel before is still held: {cost[1]}")

    def add_lane(self, channel: int, local: socket.socket, far: trio.socket.SocketType) -> None:
        """Gives the pump a further connection of `channel`; of one that is gone, both ends are closed."""
        if channel == self.channel:
            self.kept.add(local)
        kind = Lane.PREEMPT if self._migration.lanes.preempt else Lane.MULTIFD
        self.relay.add_lane(channel, kind, local.detach(), far.detach())

    def lose(self, channel: int, error: OSError) -> None:
        """A connection of `channel` cannot be had: the far side of all is lost."""
        self.relay.lose(channel, error.errno or errno.ECONNREFUSED)

    def lives(self, channel: int) -> bool:
        """Whether `channel` is the one in use, and not lost."""
        if self.relay.closed or channel != self.channel or channel == self._ended:
            return False
        view = self.relay.look()
        return view.channel < channel or not (view.local.lost or view.far.lost)

    async def end(self, channel: int) -> None:
        """Closes a channel that is not to be recovered, its return path first where QEMU is seen to take
        note."""
        self._ended = channel
        self.held = None
        await self.kept.let_go()
        await self.closing.close_return_path_first(channel)

    def abandon(self, channel: int) -> None:
        """Closes a channel that this QEMU did not take, or that it pauses again on."""
        self._ended = channel
        self.held = None
        self.closing.close_now(channel)

    def answered(self) -> None:
        """QEMU has answered the command that named the newest channel."""
        self.word.answered(self.channel)

    async def handshake_stalls(self, patience: float) -> bool:
        """Waits for the end of the handshake. True when no byte has moved for `patience` seconds.

        The received bitmaps of a large guest take their time, so it may last as long as something moves.
        """
        moved = -1
        deadline = 0.0
        going_on = (State.OPEN, State.HANDSHAKE, State.GIVEN_UP)
        while self._migration.policy.state in going_on and not self.relay.closed:
            if self.channel == self._ended:
                return False
            passed = self.relay.look().passed_bytes
            if passed != moved:
                moved = passed
                deadline = trio.current_time() + patience
            if trio.current_time() > deadline:
                return True
            await trio.sleep(STALL_LOOK)
        return False

    async def may_end_handshake(self) -> bool:
        """Whether QEMU pauses again where the channel is closed now that its handshake stands still."""
        if abilities(self._migration.vm.version).pauses_again_in_handshake:
            return True
        if not self.unread:
            return False
        # Under TLS another handshake goes before it, and in that one QEMU is paused.
        before = self.relay.look().passed_bytes
        try:
            word = await self.word.ask()
        except (QmpError, MonitorLost, trio.TooSlowError):
            return False
        return self.relay.look().passed_bytes == before and word.status == "postcopy-paused"

    def count_loss(self) -> float:
        """Notes a loss; how many seconds ago the pump saw it."""
        view = self.relay.look()
        if view.last_replay_ns == 0 or _age(view.last_replay_ns) >= REPLAY_DOUBT_SECONDS:
            self._doubtful_losses = 0
        elif view.replayed > self._replayed_before:  # else it was another channel's, and is counted there
            self._doubtful_losses += 1
        return _age(view.lost_ns)

    # ---- the pump's signals ----

    async def watch(self) -> None:
        """Deals with what the pump tells, until the relay is closed."""
        relay = self.relay
        with self._scope:
            while not relay.closed:
                await trio.lowlevel.wait_readable(relay.notify_fd)
                if relay.closed:
                    return
                os.eventfd_read(relay.notify_fd)
                self.look()
                while not relay.closed and relay.stale:
                    await trio.sleep(0.001)
                    self.look()

    def look(self) -> None:
        """Deals with what the pump told last."""
        self.changed.set()
        self.changed = trio.Event()
        view = self.relay.look()
        if view.channel != self.channel:
            return  # the pump has not come to the newest channel yet
        self.closing.look()
        passed = self.relay.passed()
        # A destination that answers a recovery has paused, and that it does only once it runs.
        self.has_arrived |= passed.running or (passed.resumed and view.return_bytes > self._returned_before)
        if self.channel == self._ended:
            return  # its end has been dealt with
        if passed.running:
            self._migration.postcopy_began = True
        self._tell_not_kept()
        self._tell_page_cut()
        self.word.tell_pump()
        if self._completes():
            self._guard()
        recovered = passed.resumed and passed.resume_acknowledged and not (view.local.lost or view.far.lost)
        if recovered and self._migration.attempts.paused_channel != self.channel:
            self._migration.feed(Event.RESUME_ACKNOWLEDGED)
        if view.local.lost:
            self._local_ended(view)
        elif view.far.lost:
            if view.far is LegState.REFUSED:
                self._tell_foreign()
            if self._may_reclaim(passed):
                self._ended = self.channel
                self._migration.feed(Event.CANNOT_HAVE_LEFT)
            else:
                self._far_lost(view)

    def _may_reclaim(self, passed: Passed) -> bool:
        migration = self._migration
        able = migration.role is Role.SOURCE and abilities(migration.vm.version).fails_when_told
        return able and migration.policy.state is State.RUNNING and cannot_have_left(passed)

    def _completes(self) -> bool:
        """Whether a source is known to be in its last moments; `phase` is careful where it is not known."""
        if self._migration.role is not Role.SOURCE or self.phase is not Phase.COMPLETING:
            return False
        if not self.unread:
            return self.relay.passed().ended  # only then would QEMU take our end (word.py)
        word = self.word.last
        return word is not None and word.status == "postcopy-active" and word.remaining <= word.threshold

    def _guard(self, *, again: bool = False) -> None:
        """Should the source's leg end now, it would run its guest again (legs.py).

        Refault holds it; but a kill of refault would end it, unless QEMU holds our end as well.
        """
        if (again or self._guarded != self.channel) and not self._giving:
            self._guarded = self.channel
            self._giving = True
            self._migration.vm.start_soon(self._have_qemu_keep)

    async def _have_qemu_keep(self) -> None:
        try:
            if self.kept.main is None or self.kept.by_qemu:
                return
            channel = self.channel
            await self.kept.give(self._migration.remember)
            if not self._migration.under_way or channel <= self._ended or self.relay.closed:
                await self.kept.let_go()
                self._migration.remember()
        finally:
            self._giving = False

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

    def _tell_page_cut(self) -> None:
        if self._told_cut != self.channel and self.relay.host_page_cut:
            self._told_cut = self.channel
            log.info(
                "%s: the source goes on in the midst of a huge page that it was sending at the loss; the"
                " destination will refuse that: expecting one more pause",
                self._migration.name,
                extra=self._migration.attempts.repeats("page cut"),
            )

    def _tell_not_kept(self) -> None:
        if self.relay.kept is Kept.PART and not self._told_part:
            self._told_part = True
            log.warning(
                "%s: no room for more page requests in the state file: a restart will not know all of them",
                self._migration.name,
            )

    def _local_ended(self, view: RelayView) -> None:
        phase = self.phase
        self._ended = self.channel
        self.kept.drop()
        self._migration.look_soon()
        if phase is not Phase.DONE:
            log.info("%s: QEMU ended the channel in %s (%s)", self._migration.name, phase, view.local_loss(),
                     extra=self._migration.attempts.repeats("QEMU ended", phase))  # fmt: skip
        if phase in _LOSABLE:
            self._recoverable_loss()

    def _recoverable_loss(self) -> None:
        self._migration.feed(Event.CHANNEL_LOST)
        if self.channel == 1 and in_doubt(self._migration):
            self._migration.vm.start_soon(tell_doubt, self._migration)

    def _far_lost(self, view: RelayView) -> None:
        if self._must_ask():
            if self._asking != self.channel:
                self._asking = self.channel
                self._migration.vm.start_soon(self._ask_phase, self.channel)
        else:
            self._judge_loss(view, self.phase)

    def _must_ask(self) -> bool:
        """Whether QEMU must say what phase it is, for what has passed does not."""
        if self._migration.role is Role.DESTINATION:
            return self.unread and self.phase is not Phase.POSTCOPY
        if self.phase is Phase.SWITCHOVER and not self.unread:
            return self.relay.passed().packaged_passed  # before that it cannot complete
        return self.unread or self.phase is Phase.POSTCOPY

    async def _ask_phase(self, channel: int) -> None:
        """Has QEMU say in what phase a channel was lost, until its leg is closed."""
        role = self._migration.role
        if await self.word.in_tls_handshake(channel) and channel == self.channel:
            resumed = self.relay.passed().resumed
            self._judge_loss(self.relay.look(), Phase.POSTCOPY if resumed else Phase.PRECOPY)
            return
        before: Word | None = None
        sips = 0
        while self.channel == channel and self._ended != channel and not self.relay.closed:
            now: Word | None = None
            phase: Phase | None = None
            try:
                now = await self.word.ask()
            except trio.TooSlowError:
                phase = self.word.unanswered(self.phase)
            except (QmpError, MonitorLost):
                pass
            if self.channel != channel or self._ended == channel or self.relay.closed:
                return
            if now is not None and waits_for_pong(role, now.status):
                self._migration.on_status(WAITS_FOR_PONG)
                unread = self.unread  # into TLS nothing can be said
                if not unread or sips < SIPS:
                    sips += unread
                    await self.closing.bring_on(channel, say=not unread)
                    before = None
                    continue
            if now is not None:
                phase = phase_after_loss(self.relay.passed(), role, before, now)
            if phase is not None:
                status = now.status if now is not None else self._migration.status
                self._judge_loss(self.relay.look(), phase, status)
            if self.held_until_loaded:
                self._guard(again=True)  # QEMU may not have answered
            before = now
            await trio.sleep(LOOK_AGAIN if self.held is None else ASKED_EVERY)

    def _judge_loss(self, view: RelayView, phase: Phase, status: str | None = None) -> None:
        migration = self._migration
        allowed, rule = may_close(phase, migration.role, migration.vm.version, status)
        if allowed:
            if phase is not Phase.DONE:
                log.warning("%s: far leg %s in %s: closing QEMU's: %s",
                            migration.name, view.far_loss(), phase, rule.effect,
                            extra=migration.attempts.repeats("far leg", view.far_loss(), phase))  # fmt: skip
            self.held = None
            self._ended = self.channel
            if self.kept.names:  # it was held before, and QEMU is to see the end
                migration.vm.start_soon(self.kept.let_go)
            self.closing.close(phase)
            migration.look_soon()
            if phase in _LOSABLE:
                self._recoverable_loss()
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
        if not self.relay.closed:
            self.look()

    # ---- the end ----

    def cost_of_stopping(self) -> tuple[bool, str] | None:
        """Whether QEMU survives a close of its leg now, and what it does then; None where none is open."""
        if self.relay.closed or self.relay.look().local is not LegState.OPEN:
            return None
        migration = self._migration
        allowed, rule = may_close(self.phase, migration.role, migration.vm.version, migration.status)
        return allowed, rule.effect

    async def prepare_to_stop(self) -> bool:
        """Has QEMU keep our ends of legs that may not be closed. False where it did not take them.

        It then waits for whoever comes after us.
        """
        await self.closing.preempt_thread_awake()
        waits = await self._waits_for_pong()
        if waits and self.unread:
            # Nothing can be said to it. It hears its destination, if that lives; and we may be killed first.
            self._stops_since = min(self._stops_since, trio.current_time())
            await self._have_qemu_keep()
            lives = self.lives(self.channel)
            if lives and trio.current_time() - self._stops_since < HEARS_WITHIN:
                return False
        elif waits:
            # As after a loss. QEMU may stand in the midst of a write, and takes note of nothing before.
            channel = self.channel  # an attempt may have made the next one soon
            self.lose(channel, OSError(errno.ECANCELED, "refault ends"))
            # Nothing tells of all three.
            while self.held is None and channel == self.channel and self.cost_of_stopping() is not None:  # noqa: ASYNC110
                await trio.sleep(STALL_LOOK)
        cost = self.cost_of_stopping()
        if cost is not None and not cost[0] and self.kept.main is not None:
            await self._have_qemu_keep()
            return self.kept.by_qemu
        if cost is not None and self.kept.names:  # it might not end before, and now QEMU is to see its end
            await self.kept.let_go()
            self._migration.remember()
        return True

    async def _waits_for_pong(self) -> bool:
        """Whether a source waits for PONG 0x42."""
        migration = self._migration
        # Of what cannot be read the phase is a guess, and the more careful one.
        leaves = not self.relay.closed and (self.unread or self.phase in (Phase.SWITCHOVER, Phase.POSTCOPY))
        if migration.role is not Role.SOURCE or not leaves:
            return False
        with contextlib.suppress(QmpError, MonitorLost, trio.TooSlowError):
            status = (await self.word.ask()).status  # without the `events` capability the last word is old
            waits = waits_for_pong(migration.role, status)
            if status is not None and (waits or waits_for_pong(migration.role, migration.status)):
                migration.on_status(status)
            return waits and not self.relay.closed
        return waits_for_pong(migration.role, migration.status) and not self.relay.closed

    def completed(self) -> None:
        """The migration has ended: nothing is outstanding any more, and a leg that has ended is not kept."""
        self.relay.complete()
        if self.relay.look().local is not LegState.OPEN:
            self.kept.drop()

    def close(self) -> tuple[int, int]:
        """Ends the relay; the bytes that passed it, forward and back."""
        self._scope.cancel()
        self.changed.set()
        self.closing.end()
        view = self.relay.look()
        cost = self.cost_of_stopping()
        self.relay.close(keep_local=cost is not None and not cost[0])
        self.kept.drop()
        return view.forward_bytes, view.return_bytes


def _age(monotonic_ns: int) -> float:
    return max(0.0, (time.monotonic_ns() - monotonic_ns) / 1e9) if monotonic_ns else 0.0
