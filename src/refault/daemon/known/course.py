"""What is known of one migration: what it is, QEMU's word, and where the recovery stands.

Whoever acts on it reads it here, and changes it by the calls here alone. What is to be done about an event is
the policy's, and its driver's (`drive`).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable

import trio

from refault.daemon.host.repeats import repeats
from refault.daemon.known.counters import Counters
from refault.daemon.known.vm_state import VmState
from refault.migration.addresses import Addresses
from refault.migration.endpoint import Endpoint
from refault.migration.legs import RULES, UNTIL_LOADED, Rule, waits_for_pong
from refault.migration.phase import Phase, Role
from refault.migration.recovery import RECOVERS, Action, Event, Pace, Recovery, State
from refault.migration.relayable import NO_LANES, Lanes

log = logging.getLogger("refault.migration")

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


class Course:
    """Of one migration of `vm`, in `role`; `remember` writes down for the next refault what it is to know."""

    def __init__(
        self,
        vm: VmState,
        role: Role,
        endpoint: Endpoint | None,
        lanes: Lanes = NO_LANES,
        *,
        remember: Callable[[], None] = lambda: None,
    ) -> None:
        self.vm = vm
        self.name = vm.name
        self.role = role
        """Which of the two QEMUs is ours."""
        self.addresses = Addresses(endpoint, vm.alternatives)
        self.lanes = lanes
        self.remember = remember
        pace = Pace(client=vm.patience.client_wait, give_up=vm.patience.give_up_after)
        self.policy = Recovery(pace, jitter=random.random)
        self.relayed = False
        """Whether a relay carries it."""
        self.channel = 0
        """The number of the relayed channel, from 1; 0 for none."""
        self.paused_channel = 0
        """The one that a client paused last."""
        self.status: str | None = None
        """QEMU's word."""
        self.events = 0
        """How often it came with an event."""
        self.pause_told = trio.Event()
        """Set when QEMU has said that it paused, since the last channel was made."""
        self.postcopy_began = False
        self.never_postcopy = False
        """Of a destination: whether it is known not to switch to postcopy."""
        self.kept_before: tuple[str, ...] = ()
        """The names of our ends that QEMU holds since an earlier refault."""
        self.awaited_before = False
        """Whether a source had yet to hear of its guest's arrival when an earlier refault ended."""
        self.leg_before: tuple[int, bytes] | None = None
        """By which the one is found that is the leg of a channel that goes on (near/handed_leg.py)."""
        self.stopped_by_switchover = False
        """Whether the guest ran until QEMU before 10.0 stopped it for postcopy; it does not run it again."""
        self.guest_stopped = False
        """Whether a source's guest has been stopped since it began, by QEMU for the switchover or by a
        client."""
        self.return_path = False
        """Whether the next channel has one from its beginning, by what QEMU at this end has switched on."""
        self.client_pauses = False
        """Whether a client's `migrate-pause` is on its way: the loss that comes is what it asks for."""
        self.session: bytes | None = None
        """The id of the last session that a channel of it became."""
        self.gone = False
        """Whether its QEMU has ended: nothing of it is told any more."""
        self._drive: Callable[[tuple[Action, ...]], None] = lambda _: None
        self._say_of_pauses: Callable[[bool | None, str], None] = lambda *_: None
        self._look = trio.Event()
        self._starts = trio.Event()

    @property
    def counters(self) -> Counters:
        """What is counted of the VM."""
        return self.vm.counters

    @property
    def under_way(self) -> bool:
        """Whether it was accepted and has not ended."""
        return self.policy.state not in (State.IDLE, State.ENDED)

    @property
    def had_session(self) -> bool:
        """Whether a channel of it became a session, here or with an earlier refault."""
        return self.session is not None or self.leg_before is not None

    @property
    def kept_until_loaded(self) -> bool:
        """Whether QEMU holds the leg, since an earlier refault, on which a source waits for its guest's
        arrival."""
        return self.kept_by is UNTIL_LOADED

    @property
    def kept_by(self) -> Rule | None:
        """The rule by which QEMU holds a source's leg since an earlier refault; None where it does not."""
        if self.role is not Role.SOURCE or not self.kept_before:
            return None
        if waits_for_pong(self.role, self.status):
            return UNTIL_LOADED
        # Of a channel that goes on it is held in any phase, and let go when that is known.
        completes = self.status == "postcopy-active" and self.leg_before is None
        return RULES[Phase.COMPLETING, Role.SOURCE] if completes else None

    # ---- the policy ----

    def driven_by(self, drive: Callable[[tuple[Action, ...]], None]) -> None:
        """Who carries out what the policy asks for."""
        self._drive = drive

    def pauses_told_by(self, say: Callable[[bool | None, str], None]) -> None:
        """Who is told whether refault would recover a pause, so that some clients need not know of it, and
        why not; None: they are told of the one that there is."""
        self._say_of_pauses = say

    def feed(self, event: Event) -> None:
        """Hands an event to the recovery policy, and has carried out what it asks for."""
        before = self.policy.state
        lost = event in (Event.CHANNEL_LOST, Event.PAUSED) and before is State.RUNNING
        if lost and self.client_pauses:
            self.client_pauses = False
            event = Event.CLIENT_PAUSED
        if event is Event.CLIENT_PAUSED and before is not State.YIELDED:
            self.paused_channel = self.channel
        self._drive(self.policy.handle(event))
        if self.policy.state is State.HELD and before is not State.HELD:
            self._say_of_pauses(None, self.policy.state.value)
        self._say_who_recovers()
        if self.under_way:
            self._starts.set()
        if self.policy.state is not before:
            log.debug("%s: %s: %s -> %s", self.name, event.name, before.value, self.policy.state.value)

    def _say_who_recovers(self) -> None:
        """Of a pause that refault recovers some clients do not want to know."""
        state = self.policy.state
        if state is State.IDLE:
            return
        if self.client_pauses:
            self._say_of_pauses(False, "a client pauses the migration")
        elif not self.addresses.known:
            self._say_of_pauses(False, "the address of the lost channel is not known")
        else:
            self._say_of_pauses(state in RECOVERS, state.value)

    async def until_under_way(self) -> None:
        """Returns while it is under way; before and after there is nothing to ask for again and again."""
        while not self.under_way:
            if self._starts.is_set():  # else somebody waits for that one
                self._starts = trio.Event()
            await self._starts.wait()

    def repeats(self, subject: str, *what: Hashable) -> dict[str, object]:
        """`extra` of a line that may come again and again for the same loss; without one each is said."""
        if self.policy.state in (State.IDLE, State.RUNNING, State.ENDED):
            return {}
        return repeats((self.name, subject), (self.counters.losses, *what))

    def client_pauses_it(self) -> None:
        """A client's `migrate-pause` goes to QEMU."""
        self.client_pauses = True
        self._say_who_recovers()

    def client_paused(self) -> bool:
        """That is answered, or never will be; whether the loss that it asked for is yet to come."""
        to_come, self.client_pauses = self.client_pauses, False
        self._say_who_recovers()
        return to_come

    # ---- what it is ----

    def meets(
        self,
        *,
        postcopy: bool,
        awaited: bool,
        stopped_by_switchover: bool,
        kept: tuple[str, ...],
        further: tuple[Endpoint, ...],
        session: bytes | None,
        leg: tuple[int, bytes] | None,
    ) -> None:
        """What an earlier refault wrote of it."""
        self.leg_before = leg
        self.postcopy_began = postcopy
        self.awaited_before = awaited
        self.stopped_by_switchover = stopped_by_switchover
        self.session = session
        self.kept_before = kept
        for endpoint in further:
            self.addresses.add(endpoint)

    def goes_on(
        self,
        *,
        session: bytes,
        guest_stopped: bool,
        stopped_by_switchover: bool,
        never_postcopy: bool,
        laid: tuple[str, ...],
    ) -> None:
        """What an earlier refault knew of a channel that it left to this one."""
        self.session = session
        self.kept_before += laid
        self.guest_stopped = guest_stopped
        self.stopped_by_switchover = stopped_by_switchover
        self.never_postcopy = never_postcopy

    def kept_no_more(self) -> None:
        """QEMU has been told to let go of our ends that it held since an earlier refault."""
        self.kept_before = ()
        self.leg_before = None
        self.remember()

    def has(self, lanes: Lanes) -> None:
        """The lanes that its channels have."""
        self.lanes = lanes

    def will_have_return_path(self, will: bool) -> None:
        """What QEMU at this end has switched on: whether the next channel has one from its beginning."""
        self.return_path = will

    def switches_never(self, never: bool) -> None:
        """A destination's settings when its channel begins: whether it does not switch to postcopy."""
        self.never_postcopy = never

    def postcopy_begins(self) -> None:
        """The guest runs at the destination, or is about to."""
        self.postcopy_began = True

    def is_relayed(self, relayed: bool) -> None:
        """A relay carries it from here on, or none does."""
        self.relayed = relayed
        self.channel = 0

    def joins(self, *, recovered: bool) -> None:
        """A channel is about to be joined: what QEMU said before tells nothing of it."""
        self.pause_told = trio.Event()
        if recovered:
            self.status = "postcopy-paused"  # or it would not be

    def joined(self) -> None:
        """It is."""
        self.channel += 1

    def session_began(self, session: bytes) -> None:
        """Its channel has become a session of that id."""
        self.session = session
        self.counters.session_began()
        self.remember()

    def session_resumed(self, seconds: float) -> None:
        """It goes on with another connection, so long after the loss of the last."""
        self.counters.session_resumed(seconds)

    def qemu_ended(self) -> None:
        """Nobody is left to recover it."""
        self.gone = True
        self.feed(Event.QEMU_GONE)
        self.counters.fail(None)
        self.status = None

    # ---- QEMU's word ----

    def on_status(self, status: str) -> None:
        """QEMU's word, from wherever."""
        if status != self.status:
            log.info("%s: migration is %s", self.name, status, extra=self.repeats(status))
        self.status = status
        if status == "postcopy-paused":
            self.pause_told.set()
        elif self.pause_told.is_set():
            self.pause_told = trio.Event()
        if status in _POSTCOPY and not self.postcopy_began:
            self.postcopy_begins()
            self.remember()
        if status == "failed":
            reclaimed = self.policy.state is State.RECLAIMING
            after = self.postcopy_began and self.role is Role.SOURCE and not reclaimed
            self.feed(Event.FAILED_AFTER_POSTCOPY if after else Event.FAILED)
        elif status == "postcopy-active" and not self.relayed:
            self.feed(Event.ACTIVE_UNRELAYED)
        elif status in _STATUS_EVENTS:
            self.feed(_STATUS_EVENTS[status])

    def on_event(self, status: str) -> None:
        """A MIGRATION event's word."""
        self.events += 1
        self.on_status(status)

    def on_answer(self, status: object, *, events: int) -> None:
        """query-migrate's word, asked for when there had been so many `events`. One that came meanwhile is
        newer, or as new: an answer is handed on a turn of the loop after it came."""
        if isinstance(status, str) and events == self.events:
            self.on_status(status)

    def is_found(self, status: str) -> None:
        """What an attempt found QEMU at; of that nothing follows but for the attempt."""
        self.status = status

    def on_stop(self) -> None:
        """A STOP event: this QEMU ran its guest and has stopped it. Before 10.0 postcopy-active comes first
        (migration/migration.c, postcopy_start)."""
        self.guest_stopped = True
        if self.status == "postcopy-active" and self.role is Role.SOURCE:
            self.stopped_by_switchover = True
            self.remember()

    def on_resume(self) -> None:
        """A RESUME event: this QEMU runs its guest."""
        self.guest_stopped = False

    def look_soon(self) -> None:
        """Has QEMU asked for its status now, not only at the next interval."""
        self._look.set()

    async def look_wanted(self, seconds: float) -> None:
        """Returns when QEMU is to be asked, after so many seconds at the latest."""
        with trio.move_on_after(seconds):
            await self._look.wait()
        self._look = trio.Event()
