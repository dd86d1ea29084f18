"""The relay of one migration and its channels: joins the legs, and hears what the pump tells."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Callable

import trio

from refault.channel.relay import Lane, LegState, Relay, RelayView, SessionEnd, SessionState
from refault.channel.tracker import Kept
from refault.daemon.host.repeats import repeats
from refault.daemon.known.course import Course
from refault.daemon.monitor.monitor import MonitorLost, QmpError
from refault.daemon.near.handed_leg import can_be_taken
from refault.daemon.near.kept_ends import KeptEnds
from refault.daemon.near.local import LocalLeg, has_ended, take_back
from refault.daemon.record.session_file import HandedChannel
from refault.daemon.relayed.closing import Closing
from refault.daemon.relayed.guard import Guard
from refault.daemon.relayed.handover import HandOver
from refault.daemon.relayed.qemu_word import ASKED_EVERY, QemuWord
from refault.migration.legs import SENT_ALL, UNTIL_LOADED, Rule, may_close, waits_for_pong
from refault.migration.phase import Passed, Phase, Role, Told, in_doubt, phase_of
from refault.migration.recovery import AttemptFailed, Event, State
from refault.migration.versions import abilities

log = logging.getLogger("refault.migration")

REPLAY_DOUBT_SECONDS = 2.0
"""Two losses so soon after a replay, and the next recovery goes without: the replay may have caused them."""
_BEFORE_ARRIVAL = (None, "setup", "wait-unplug", "active", "pre-switchover", "device", "postcopy-device")
DELIVERY_LOOK, LONGEST_DELIVERY_LOOK = 0.05, 1.0
STALL_LOOK = 0.25
"""Seconds between looks at a handshake that may stand still for many; its end is heard of by other ways."""
HEARS_WITHIN = 50.0
"""Seconds for which the end of refault waits until a source that cannot be told has heard of its guest's
arrival: less than app.STOP_PATIENCE."""


class Channels:
    """Of one migration that is relayed. `channel` counts them from 1; 0 is none yet."""

    def __init__(self, course: Course, relay: Relay) -> None:
        self.relay = relay
        self._course = course
        self.ended = 0
        """The channel whose end has been dealt with."""
        self._doubtful_losses = 0
        """Losses in a row that came right after a replay."""
        self.changed = trio.Event()
        """Set whenever the pump told of something, and replaced."""
        self.kept = KeptEnds(course.vm.monitor)
        self.word = QemuWord(course, relay)
        self.closing = Closing(course, relay, self.kept)
        self.guard = Guard(course, self.kept, self.over)
        self.handover = HandOver(course, relay, self.kept, self.guard, self.closing)
        self.held: str | None = None
        """Why a local leg is held open though its other side is lost."""
        self._held_by: Rule | None = None
        self._lost: Callable[[RelayView, Passed], None] = lambda *_: None
        self._stops_since = math.inf
        """When refault began to end while a source heard its destination."""
        self.session = SessionEnd.NO
        """Which end of a session the newest channel may become."""
        self.session_id = bytes(16)
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
        self._scope = trio.CancelScope()

    @property
    def channel(self) -> int:
        """The number of the newest channel."""
        return self._course.channel

    @property
    def phase(self) -> Phase:
        """The phase, as far as it is known."""
        course = self._course
        told = Told(
            course.status,
            self.relay.runs_told,
            never_postcopy=course.never_postcopy,
            much_left=self.word.much_left(ASKED_EVERY),
            sent_all=self.word.sent_all,
        )
        return phase_of(self.relay.passed(), course.role, told)

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
                self._course.name,
            )
        self.kept.begin(local.socket)
        self._course.joins(recovered=recovered)
        if not recovered:
            self.knows_first = True
        self.session = self._session(recovered=recovered)
        self.session_id = _session_id()
        view = self.relay.look()
        self._returned_before, self._replayed_before = view.return_bytes, view.replayed
        self.relay.attach(
            local.detach(),
            far.detach(),
            recovered=recovered,
            may_replay=may_replay,
            lanes=self._course.lanes.count,
            session=self.session,
            session_id=self.session_id,
            encrypted=self._course.vm.encrypted,
        )
        self._course.joined()
        if not recovered:
            self._course.remember()  # that its arrival is awaited
        self.closing.begin(self.channel, local.peer_inode)
        if local.kept is not None:  # from here QEMU is to see an end, be it by a kill of refault
            self._course.vm.start_soon(take_back, self._course.vm.monitor, local.kept)

    def go_on(self, local: LocalLeg, left: tuple[HandedChannel, bytes] | None) -> bool:
        """Goes on with the leg, and with what the refault before has `left` of its channel; with None, or
        where that is not to be believed, as with a channel whose far side is lost. Whether it does."""
        self.kept.begin(local.socket)
        descriptor = local.detach()
        goes_on = left is not None and self._goes_on_with(descriptor, left)
        if not goes_on:
            self.relay.go_on(descriptor, None, recovered=False)
        self._goes_on(local.peer_inode, goes_on=goes_on)
        return goes_on

    def deliver(self, left: tuple[HandedChannel, bytes]) -> bool:
        """The same of a channel that QEMU has ended: what it said last is to reach the other host."""
        delivers = self._goes_on_with(-1, left)
        if delivers:
            self._goes_on(0, goes_on=True)
        return delivers

    def _goes_on_with(self, descriptor: int, left: tuple[HandedChannel, bytes]) -> bool:
        """Whether what is left is to be believed; `descriptor` is the pump's then."""
        course, (about, pump) = self._course, left
        if not self.relay.go_on(descriptor, pump, recovered=about.recovered):
            return False
        self.session = SessionEnd.DIALS if course.role is Role.SOURCE else SessionEnd.ANSWERS
        self.session_id = about.session
        course.goes_on(
            session=about.session,
            guest_stopped=about.guest_stopped,
            stopped_by_switchover=about.stopped_by_switchover,
            never_postcopy=about.never_postcopy,
            laid=about.laid,
        )
        if about.runs_told:
            self.relay.guest_runs()
        return True

    def _goes_on(self, peer_inode: int, *, goes_on: bool) -> None:
        course = self._course
        course.joins(recovered=False)
        course.joined()
        self.closing.begin(self.channel, peer_inode)
        self.answered()
        course.vm.start_soon(self._have_let_go, self.channel, goes_on)

    async def _have_let_go(self, channel: int, goes_on: bool) -> None:
        """QEMU is to see an end of the leg again, be it by a kill of refault, unless it must not: a source in
        its last moments, for which one in postcopy is taken until it has said how much is left."""
        course = self._course
        while not self.over(channel) and (self._may_complete or not goes_on):
            with trio.move_on_after(ASKED_EVERY):
                await self.changed.wait()
        await take_back(course.vm.monitor, *course.kept_before)
        course.kept_no_more()

    def _session(self, *, recovered: bool) -> SessionEnd:
        """A channel may become a session where it has a return path, as each that recovers. On those it is
        offered only to a source that has had a session: there is no more to be found out about who that
        is. Under TLS it is offered before QEMU says anything on the return path, so there must be one by what
        this end's QEMU was told."""
        course = self._course
        if not course.vm.session_allowed or (course.vm.encrypted and course.lanes.count):
            return SessionEnd.NO
        if course.role is Role.DESTINATION:
            first = course.return_path or not course.vm.encrypted
            return SessionEnd.ANSWERS if (course.session if recovered else first) else SessionEnd.NO
        return SessionEnd.DIALS if recovered or course.return_path else SessionEnd.NO

    def check_room(self) -> None:
        """Raises AttemptFailed where no further channel can be joined: the one before must stay."""
        if self.relay.closed:
            raise AttemptFailed("the relay has ended")
        cost = self.cost_of_stopping()
        if self.channel and cost is not None and not cost[0]:
            raise AttemptFailed(f"the channel before is still held: {cost[1]}")

    def add_lane(
        self, channel: int, local: socket.socket, far: trio.socket.SocketType | None, number: int = 1
    ) -> None:
        """Gives the pump a further connection of `channel`; of one that is gone, both ends are closed.
        `number`: which lane of a session it may be, 0 for none; `far` None: it begins as that."""
        if channel == self.channel:
            self.kept.add(local)
        kind = Lane.PREEMPT if self._course.lanes.preempt else Lane.MULTIFD
        try:
            far_fd = far.detach() if far is not None else None
            self.relay.add_lane(channel, kind, local.detach(), far_fd, number=number)
        except OSError as error:  # QEMU sees no end of it before the channel's, for that is kept
            log.error("%s: a further connection cannot be joined: %s", self._course.name, error)
            self.lose(channel, error)

    def no_more_lanes(self, channel: int) -> None:
        """A source's QEMU opens no more connections of `channel`: the end of its leg waits for none."""
        if not self.relay.closed:
            self.relay.no_more_lanes(channel)

    def lose(self, channel: int, error: OSError) -> None:
        """A connection of `channel` cannot be had: the far side of all is lost."""
        self.relay.lose(channel, error.errno or errno.ECONNREFUSED)

    def lives(self, channel: int) -> bool:
        """Whether `channel` is the one in use, and not lost."""
        if self.relay.closed or channel != self.channel or channel == self.ended:
            return False
        view = self.relay.look()
        return view.channel < channel or not (view.local.lost or view.far.lost)

    def over(self, channel: int) -> bool:
        """Whether the end of `channel` has been dealt with, or there is none to deal with any more."""
        return channel <= self.ended or channel < self.channel or self.relay.closed

    # ---- what becomes of a lost one ----

    def lost_to(self, lost: Callable[[RelayView, Passed], None]) -> None:
        """Who deals with what the newest channel has lost, if anything, until its end has been dealt with."""
        self._lost = lost

    @property
    def held_until_loaded(self) -> bool:
        """Whether a leg is held by that rule."""
        return self.held is not None and self._held_by is UNTIL_LOADED

    @property
    def held_for_word(self) -> bool:
        """Whether a leg is held on which a source waits for its destination's word."""
        return self.held is not None and self._held_by in (UNTIL_LOADED, SENT_ALL)

    @property
    def in_doubt(self) -> bool:
        """Whether the source's guest may or may not have arrived."""
        if self.held_until_loaded and not self.has_arrived:
            return True
        if not self.awaits_arrival:
            return False
        course = self._course
        return (course.awaited_before and course.postcopy_began) or in_doubt(self.relay.passed())

    @property
    def awaits_arrival(self) -> bool:
        """Whether a source, seen from the migration's beginning, has yet to hear of its guest's arrival."""
        if self._course.role is not Role.SOURCE or self.has_arrived or self.relay.closed:
            return False
        return self._course.awaited_before or (self.knows_first and not self.unread)

    async def guard_switchover(self) -> None:
        """To be told before a source switches to postcopy. Has QEMU hold our end until one since 10.2 has
        heard of its guest's arrival: did a kill of refault end its leg before, it would run the guest again.
        The next refault takes it on.
        """
        course, main = self._course, self.kept.main
        wanted = course.role is Role.SOURCE and abilities(course.vm.version).waits_for_arrival
        if not wanted or main is None or self.relay.closed or course.lanes.count or course.vm.encrypted:
            return
        if not course.vm.state_file.usable(course.vm.qemu_pid) or not can_be_taken(course.vm.qemu_pid):
            return  # nobody could end it then
        self.handover.leaves(main)
        course.vm.start_soon(self._let_go_when_arrived, self.channel)
        await self.guard.give()

    async def _let_go_when_arrived(self, channel: int) -> None:
        while not self.over(channel) and self._course.status in _BEFORE_ARRIVAL:
            with trio.move_on_after(ASKED_EVERY):
                await self.changed.wait()
        if channel != self.channel:
            return
        if not self._completes():
            await self.kept.let_go()
        self.handover.leaves(None)

    @property
    def ended_without(self) -> bool:
        """Whether the destination has ended and never had the guest, by its refault's word."""
        view = self.relay.session()
        return view is not None and view.broke_there and view.channel == self.channel

    def may_close(self, phase: Phase, status: str | None) -> tuple[bool, Rule]:
        """Whether the leg may be closed in `phase`, QEMU's word being `status`, and the rule for that."""
        course = self._course
        without = course.role is Role.SOURCE and not course.postcopy_began and self.ended_without
        return may_close(phase, course.role, course.vm.version, status, ended_without=without)

    def dealt_with(self) -> None:
        """The end of the newest channel is."""
        self.ended = self.channel

    def hold(self, phase: Phase, rule: Rule) -> bool:
        """Holds the leg open, whose far side was lost in `phase`; whether that is news."""
        if self.held is not None and self._held_by is rule:
            return False
        self.held = f"{phase}: {rule.effect}"
        self._held_by = rule
        return True

    def hold_no_more(self) -> None:
        """Nothing is lost any more."""
        self.held = None

    def close_leg(self, phase: Phase) -> None:
        """Closes the leg, whose far side was lost in `phase`, as soon as its QEMU survives it."""
        self.held = None
        self.dealt_with()
        if self.kept.names:  # it was held before, and QEMU is to see the end
            self._course.vm.start_soon(self.kept.let_go)
        self.closing.close(phase)

    async def end(self, channel: int) -> None:
        """Closes a channel that is not to be recovered, its return path first where QEMU is seen to take
        note."""
        self.ended = channel
        self.held = None
        await self.kept.let_go()
        await self.closing.close_return_path_first(channel)

    def abandon(self, channel: int) -> None:
        """Closes a channel that this QEMU did not take, or that it pauses again on."""
        self.ended = channel
        self.held = None
        self.closing.close_now(channel)

    @property
    def delivers(self) -> bool:
        """Whether a precopy's end is still with us though its source has sent all.

        Without a return path that is `completed` by then, and nobody sends it again.
        """
        course = self._course
        if self.relay.closed or course.postcopy_began or course.status in ("failed", "cancelled"):
            return False
        view, passed = self.relay.look(), self.relay.passed()
        if passed.packaged_begun or passed.resumed or view.local is not LegState.OPEN or self.held:
            return False
        if course.role is Role.SOURCE:
            return view.far is LegState.OPEN and self.kept.main is not None and has_ended(self.kept.main)
        return view.far is LegState.ENDED or passed.ended

    @property
    def tells(self) -> bool:
        """Whether a session is about to tell the source what became of its destination's QEMU. That is soon
        known, and what cannot be told is given up (session_waits.py)."""
        view = self.relay.session()
        return view is not None and view.word_due and view.state is not SessionState.OVER

    async def delivered(self) -> None:
        """Waits until what a QEMU that has ended had sent is on its way, and the other host has seen the end.

        Nobody would send it again: so for as long as the other host takes it.
        """
        pause = DELIVERY_LOOK
        while not self.relay.closed and (self.relay.look().far is LegState.OPEN or self._session_goes_on):
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_DELIVERY_LOOK)

    @property
    def _session_goes_on(self) -> bool:
        """Whether a session has something to deliver yet, for which it has a patience of its own."""
        view = self.relay.session()
        return view is not None and view.state in (SessionState.CARRIED, SessionState.BETWEEN)

    @property
    def _session_is_lost(self) -> bool:
        """Whether a lane of a session has no connection now."""
        return any(view.state is SessionState.BETWEEN for view in self.relay.sessions())

    def answered(self) -> None:
        """QEMU has answered the command that named the newest channel."""
        self.word.answered(self.channel)

    async def handshake_stalls(self, patience: float) -> bool:
        """Waits for the end of the handshake. True when no byte has moved for `patience` seconds.

        The received bitmaps of a large guest take their time, so it may last as long as something moves. A
        session that waits for its next connection has a patience of its own.
        """
        moved = -1
        deadline = 0.0
        going_on = (State.OPEN, State.HANDSHAKE, State.GIVEN_UP)
        while self._course.policy.state in going_on and not self.relay.closed:
            if self.channel == self.ended:
                return False
            passed = self.relay.look().passed_bytes
            if passed != moved or self._session_is_lost:
                moved = passed
                deadline = trio.current_time() + patience
            if trio.current_time() > deadline:
                return True
            await trio.sleep(STALL_LOOK)
        return False

    async def may_end_handshake(self) -> bool:
        """Whether QEMU pauses again where the channel is closed now that its handshake stands still."""
        if abilities(self._course.vm.version).pauses_again_in_handshake:
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
                self._watchful_look()
                while not relay.closed and relay.stale:
                    await trio.sleep(0.001)
                    self._watchful_look()

    def _watchful_look(self) -> None:
        try:
            self.look()
        except Exception as error:  # what comes next must be heard all the same
            log.exception(
                "%s: internal error in what the channel tells",
                self._course.name,
                extra=repeats((self._course.name, "look"), repr(error)),
            )

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
        answers = passed.resumed and view.return_bytes > self._returned_before
        if not self.has_arrived and (passed.running or answers):
            self.has_arrived = True
            self._course.remember()
        if self.channel == self.ended:
            return  # its end has been dealt with
        if passed.running:
            self._course.postcopy_begins()
        self._tell_not_kept()
        self._tell_page_cut()
        self.word.tell_pump()
        if self._completes():
            self.guard.start()
        recovered = passed.resumed and passed.resume_acknowledged and not (view.local.lost or view.far.lost)
        if recovered and self._course.paused_channel != self.channel:
            self._course.feed(Event.RESUME_ACKNOWLEDGED)
        self._lost(view, passed)

    @property
    def _may_complete(self) -> bool:
        """Whether a source may be in its last moments, by all that is known."""
        if self._course.role is not Role.SOURCE:
            return False
        unasked = self.unread and self._course.had_session and self.word.last is None
        return unasked or self.phase is Phase.COMPLETING

    def _completes(self) -> bool:
        """Whether a source is known to be in its last moments; `phase` is careful where it is not known."""
        if self._course.role is not Role.SOURCE or self.phase is not Phase.COMPLETING:
            return False
        if not self.unread:
            return self.relay.passed().ended  # only then would QEMU take our end (word.py)
        word = self.word.last
        if word is None or word.sent_all:  # in precopy that alone is a completion
            return word is not None
        return word.status == "postcopy-active" and word.remaining <= word.threshold

    def _tell_page_cut(self) -> None:
        if self._told_cut != self.channel and self.relay.host_page_cut:
            self._told_cut = self.channel
            log.info(
                "%s: the source goes on in the midst of a huge page that it was sending at the loss; the"
                " destination will refuse that: expecting one more pause",
                self._course.name,
                extra=self._course.repeats("page cut"),
            )

    def _tell_not_kept(self) -> None:
        if self.relay.kept is Kept.PART and not self._told_part:
            self._told_part = True
            self._course.vm.state_file.pages.no_room()

    # ---- the end ----

    def cost_of_stopping(self) -> tuple[bool, str] | None:
        """Whether QEMU survives a close of its leg now, and what it does then; None where none is open."""
        course = self._course
        if self.relay.closed or course.gone or self.relay.look().local is not LegState.OPEN:
            return None
        if self.handover.done:
            return None
        allowed, rule = self.may_close(self.phase, course.status)
        return allowed, rule.effect

    async def prepare_to_stop(self, *, restarts: bool = False) -> bool:
        """Has QEMU keep our ends of legs that may not be closed, and of one that the next refault goes on
        with. False where it did not take them.

        It then waits for whoever comes after us.
        """
        if self.delivers:
            return False
        if restarts and await self.handover.prepare():
            return True
        await self.closing.preempt_thread_awake()
        waits = await self._waits_for_pong()
        if waits and self.unread:
            # Nothing can be said to it. It hears its destination, if that lives; and we may be killed first.
            self._stops_since = min(self._stops_since, trio.current_time())
            await self.guard.give()
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
            await self.guard.give()
            return self.kept.by_qemu
        if cost is not None and self.kept.names:  # it might not end before, and now QEMU is to see its end
            await self.kept.let_go()
            self._course.remember()
        return True

    async def _waits_for_pong(self) -> bool:
        """Whether a source waits for PONG 0x42."""
        course = self._course
        # Of what cannot be read the phase is a guess, and the more careful one.
        leaves = not self.relay.closed and (self.unread or self.phase in (Phase.SWITCHOVER, Phase.POSTCOPY))
        if course.role is not Role.SOURCE or not leaves:
            return False
        with contextlib.suppress(QmpError, MonitorLost, trio.TooSlowError):
            events = course.events
            status = (await self.word.ask()).status  # without the `events` capability the last word is old
            waits = waits_for_pong(course.role, status)
            if waits or waits_for_pong(course.role, course.status):
                course.on_answer(status, events=events)
            return waits and not self.relay.closed
        return waits_for_pong(course.role, course.status) and not self.relay.closed

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


def _session_id() -> bytes:
    """16 bytes that are four values of PONGs, none of them QEMU's (cext/link.c)."""
    return b"".join((secrets.randbits(31) | 1 << 31).to_bytes(4, "big") for _ in range(4))


def _age(monotonic_ns: int) -> float:
    return max(0.0, (time.monotonic_ns() - monotonic_ns) / 1e9) if monotonic_ns else 0.0
