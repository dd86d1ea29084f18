"""The recovery policy: when an attempt is made, when not, and what is counted.

Rules
- One loss is counted however many signals tell of it: the relay, the MIGRATION event, query-migrate.
- An attempt begins only when none is pending, and it is the attempt that finds out whether QEMU has paused
by now; until then it ends NOT_YET and is made again soon, without growing the delay and without counting.
- There is no giving up, for the guest exists in no third place, unless refault was told to: then the attempt
under way is the last one for this loss. Who recovers it all the same, a client or the other host, is let.
- A client that recovers by hand is right: its command cancels our attempt. A client that paused by hand is
waited for.
- A leg that may not be closed (legs.py) is HELD; it leaves that state when QEMU or more of the stream says
so.

The states and all their transitions stand in `TABLE`; an event that a state has no row for changes nothing.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass


class AttemptFailed(Exception):  # noqa: N818 - it says what happened
    """An attempt did not succeed; the text says why, for the operator."""


class NotPausedYet(Exception):  # noqa: N818 - it is no error
    """QEMU has not paused yet; ask again soon."""


class State(enum.Enum):
    """Where the recovery of one VM's migration stands."""

    IDLE = "idle"
    RUNNING = "running"
    WAITING = "waiting for the next attempt"
    ATTEMPTING = "attempting"
    OPEN = "recovery open: QEMU took the command"
    HANDSHAKE = "in the recovery handshake"
    YIELDED = "left to the client that paused"
    BY_CLIENT = "recovered by a client"
    HELD = "local leg held open"
    RECLAIMING = "taking the guest back from a lost switchover"
    GIVEN_UP = "given up: no further attempt for this loss"
    ENDED = "ended"


RECOVERS = frozenset(
    {State.RUNNING, State.WAITING, State.ATTEMPTING, State.OPEN, State.HANDSHAKE, State.HELD}
)
"""Where a pause that QEMU tells of is refault's to recover, so that clients need not know. A leg that is held
holds up the recovery of what was lost before: of that they hear."""


class Event(enum.Enum):
    """What can happen to it."""

    STARTED = "migrate or migrate-incoming was accepted, or a migration was met at start-up"
    CHANNEL_LOST = "the local leg was closed, by the relay after the far leg was lost or by QEMU"
    LEG_HELD = "the far leg is lost and the local leg may not be closed"
    CANNOT_HAVE_LEFT = "the far leg is lost in the switchover, and the destination cannot have the guest"
    IN_DOUBT = "that loss was in the switchover, and the destination may or may not have the guest"
    TOLD_TO_TAKE_BACK = "the operator says that the destination has ended, and never had the guest"
    PAUSED = "QEMU says postcopy-paused"
    RECOVERING = "QEMU says postcopy-recover or postcopy-recover-setup"
    ACTIVE = "QEMU says postcopy-active"
    ACTIVE_UNRELAYED = "so too, without a relay: nothing but QEMU's pause was the loss, so it is over"
    RESUME_ACKNOWLEDGED = "RESUME_ACK has passed the relay"
    NOT_YET = "the attempt found QEMU not paused yet"
    ISSUED = "QEMU took the attempt's command"
    ATTEMPT_FAILED = "the attempt failed"
    TIMER = "the delay is over"
    OUT_OF_PATIENCE = "the time after which a loss is given up is over"
    PATH_CHANGED = "a link, an address or a route of this host has changed"
    CLIENT_PAUSED = "a client's migrate-pause was accepted"
    CLIENT_RECOVERS = "a client's migrate-recover, or migrate with resume, is on its way"
    COMPLETED = "QEMU says completed"
    FAILED = "QEMU says failed or cancelled, before postcopy began"
    FAILED_AFTER_POSTCOPY = "QEMU says failed, and the guest may run at the destination"
    QEMU_GONE = "QEMU has ended"


class Action(enum.Enum):
    """What the driver is to do."""

    COUNT_LOSS = "a loss"
    COUNT_RECOVERY = "a recovery"
    ATTEMPT = "begin an attempt"
    CANCEL_ATTEMPT = "end the attempt under way"
    TIMER_POLL = "TIMER when QEMU says that it has paused, and after the polling delay"
    TIMER_BACKOFF = "TIMER after the next back-off delay"
    TIMER_CLIENT = "TIMER after the delay that a client is given"
    TIMER_GIVE_UP = "OUT_OF_PATIENCE after the time that was told, if one was; it runs beside the others"
    GIVE_UP = "tell the operator; no timer runs on"
    RESET_BACKOFF = "the next back-off delay is the first again"
    QUICKEN_BACKOFF = "so too, in the middle of a recovery"
    CLEAN_UP = "close listeners, descriptors and the state file"
    RECLAIM = "take the guest back"
    RECLAIM_AS_TOLD = "so too, on the operator's word"
    TELL_DOUBT = "tell the operator if it is not soon over"
    STOP_GUEST = "stop, at once: the guest must not run twice"


S, E, A = State, Event, Action

_LOSS = (A.COUNT_LOSS, A.TIMER_GIVE_UP)
_RECOVERED = (A.COUNT_RECOVERY, A.RESET_BACKOFF, A.CANCEL_ATTEMPT)
_AGAIN = (A.CANCEL_ATTEMPT, A.TIMER_BACKOFF)

TABLE: dict[tuple[State, Event], tuple[State, tuple[Action, ...]]] = {
    (S.IDLE, E.STARTED): (S.RUNNING, (A.RESET_BACKOFF,)),
    (S.ENDED, E.STARTED): (S.RUNNING, (A.RESET_BACKOFF,)),
    (S.RUNNING, E.CHANNEL_LOST): (S.WAITING, (*_LOSS, A.TIMER_POLL)),
    (S.RUNNING, E.PAUSED): (S.ATTEMPTING, (*_LOSS, A.ATTEMPT)),
    (S.RUNNING, E.LEG_HELD): (S.HELD, _LOSS),
    (S.RUNNING, E.CANNOT_HAVE_LEFT): (S.RECLAIMING, (A.COUNT_LOSS, A.RECLAIM)),
    (S.RUNNING, E.CLIENT_PAUSED): (S.YIELDED, (*_LOSS, A.TIMER_CLIENT)),
    (S.WAITING, E.TIMER): (S.ATTEMPTING, (A.ATTEMPT,)),
    (S.WAITING, E.PATH_CHANGED): (S.WAITING, (A.QUICKEN_BACKOFF, A.TIMER_BACKOFF)),
    # An attempt that was given up too early: QEMU took its command all the same.
    (S.WAITING, E.RESUME_ACKNOWLEDGED): (S.RUNNING, _RECOVERED),
    (S.WAITING, E.CLIENT_RECOVERS): (S.BY_CLIENT, (A.TIMER_CLIENT,)),
    (S.WAITING, E.CLIENT_PAUSED): (S.YIELDED, (A.TIMER_CLIENT,)),
    # A status that is older than QEMU's answer to the attempt's command tells nothing: no row for ACTIVE or
    # PAUSED here.
    (S.ATTEMPTING, E.NOT_YET): (S.WAITING, (A.TIMER_POLL,)),
    (S.ATTEMPTING, E.ISSUED): (S.OPEN, ()),
    (S.ATTEMPTING, E.RESUME_ACKNOWLEDGED): (S.RUNNING, _RECOVERED),
    (S.ATTEMPTING, E.ATTEMPT_FAILED): (S.WAITING, (A.TIMER_BACKOFF,)),
    (S.ATTEMPTING, E.CHANNEL_LOST): (S.WAITING, _AGAIN),
    (S.ATTEMPTING, E.LEG_HELD): (S.HELD, (A.CANCEL_ATTEMPT,)),
    (S.ATTEMPTING, E.CLIENT_RECOVERS): (S.BY_CLIENT, (A.CANCEL_ATTEMPT, A.TIMER_CLIENT)),
    (S.ATTEMPTING, E.CLIENT_PAUSED): (S.YIELDED, (A.CANCEL_ATTEMPT, A.TIMER_CLIENT)),
    (S.OPEN, E.RECOVERING): (S.HANDSHAKE, ()),
    (S.OPEN, E.ACTIVE): (S.RUNNING, _RECOVERED),
    (S.OPEN, E.RESUME_ACKNOWLEDGED): (S.RUNNING, _RECOVERED),
    (S.OPEN, E.ATTEMPT_FAILED): (S.WAITING, (A.TIMER_BACKOFF,)),
    (S.OPEN, E.CHANNEL_LOST): (S.WAITING, _AGAIN),
    (S.OPEN, E.LEG_HELD): (S.HELD, (A.CANCEL_ATTEMPT,)),
    (S.OPEN, E.CLIENT_RECOVERS): (S.BY_CLIENT, (A.CANCEL_ATTEMPT, A.TIMER_CLIENT)),
    (S.OPEN, E.CLIENT_PAUSED): (S.YIELDED, (A.CANCEL_ATTEMPT, A.TIMER_CLIENT)),
    (S.HANDSHAKE, E.ACTIVE): (S.RUNNING, _RECOVERED),
    (S.HANDSHAKE, E.RESUME_ACKNOWLEDGED): (S.RUNNING, _RECOVERED),
    (S.HANDSHAKE, E.PAUSED): (S.WAITING, _AGAIN),
    (S.HANDSHAKE, E.ATTEMPT_FAILED): (S.WAITING, (A.TIMER_BACKOFF,)),
    (S.HANDSHAKE, E.CHANNEL_LOST): (S.WAITING, _AGAIN),
    (S.HANDSHAKE, E.LEG_HELD): (S.HELD, (A.CANCEL_ATTEMPT,)),
    (S.HANDSHAKE, E.CLIENT_RECOVERS): (S.BY_CLIENT, (A.CANCEL_ATTEMPT, A.TIMER_CLIENT)),
    (S.YIELDED, E.TIMER): (S.ATTEMPTING, (A.ATTEMPT,)),
    # An attempt that was cancelled when QEMU had its command.
    (S.YIELDED, E.RESUME_ACKNOWLEDGED): (S.RUNNING, _RECOVERED),
    (S.YIELDED, E.CLIENT_RECOVERS): (S.BY_CLIENT, (A.TIMER_CLIENT,)),
    # What the client did came to nothing, whether QEMU told it or not.
    (S.BY_CLIENT, E.TIMER): (S.ATTEMPTING, (A.ATTEMPT,)),
    (S.BY_CLIENT, E.CLIENT_RECOVERS): (S.BY_CLIENT, (A.TIMER_CLIENT,)),
    (S.BY_CLIENT, E.ACTIVE): (S.RUNNING, _RECOVERED),
    (S.BY_CLIENT, E.RESUME_ACKNOWLEDGED): (S.RUNNING, _RECOVERED),
    (S.BY_CLIENT, E.CHANNEL_LOST): (S.YIELDED, (A.TIMER_CLIENT,)),
    (S.BY_CLIENT, E.ATTEMPT_FAILED): (S.YIELDED, (A.TIMER_CLIENT,)),
    (S.BY_CLIENT, E.LEG_HELD): (S.HELD, ()),
    # What QEMU says of its channels meanwhile is refault's own doing; the end is FAILED.
    (S.RECLAIMING, E.LEG_HELD): (S.HELD, ()),
    (S.RECLAIMING, E.ATTEMPT_FAILED): (S.WAITING, (A.TIMER_GIVE_UP, A.TIMER_BACKOFF)),
    # Nothing can be tried while a leg is held, so the time after which a loss is given up begins here.
    (S.HELD, E.CHANNEL_LOST): (S.WAITING, (A.TIMER_GIVE_UP, A.TIMER_POLL)),
    (S.HELD, E.PAUSED): (S.WAITING, (A.TIMER_GIVE_UP, A.TIMER_POLL)),
    (S.HELD, E.TOLD_TO_TAKE_BACK): (S.RECLAIMING, (A.RECLAIM_AS_TOLD,)),
    (S.GIVEN_UP, E.CLIENT_RECOVERS): (S.GIVEN_UP, (A.CANCEL_ATTEMPT,)),
    (S.GIVEN_UP, E.CHANNEL_LOST): (S.GIVEN_UP, (A.CANCEL_ATTEMPT,)),
    (S.GIVEN_UP, E.LEG_HELD): (S.GIVEN_UP, (A.CANCEL_ATTEMPT,)),
    (S.GIVEN_UP, E.ACTIVE): (S.RUNNING, _RECOVERED),
    (S.GIVEN_UP, E.RESUME_ACKNOWLEDGED): (S.RUNNING, _RECOVERED),
}

# Whatever became of refault's own attempts, as where QEMU still waits for the source after one was given up.
for _state in (S.WAITING, S.ATTEMPTING, S.OPEN, S.HANDSHAKE, S.BY_CLIENT, S.GIVEN_UP):
    TABLE[_state, E.ACTIVE_UNRELAYED] = (S.RUNNING, _RECOVERED)

# The attempt under way runs to its end, for QEMU may have its command.
for _state in (S.WAITING, S.ATTEMPTING, S.OPEN, S.HANDSHAKE, S.YIELDED, S.BY_CLIENT):
    TABLE[_state, E.OUT_OF_PATIENCE] = (S.GIVEN_UP, (A.GIVE_UP,))

for _state in (S.WAITING, S.ATTEMPTING, S.OPEN, S.HANDSHAKE, S.YIELDED, S.BY_CLIENT, S.GIVEN_UP):
    TABLE[_state, E.TOLD_TO_TAKE_BACK] = (S.RECLAIMING, (A.CANCEL_ATTEMPT, A.RECLAIM_AS_TOLD))

for _state in set(State) - {S.IDLE, S.ENDED}:
    TABLE[_state, E.IN_DOUBT] = (_state, (A.TELL_DOUBT,))

# Ends hold in every state that has a migration.
for _state in set(State) - {S.IDLE, S.ENDED}:
    TABLE[_state, E.COMPLETED] = (S.ENDED, (A.CANCEL_ATTEMPT, A.CLEAN_UP))
    TABLE[_state, E.FAILED] = (S.ENDED, (A.CANCEL_ATTEMPT, A.CLEAN_UP))
    TABLE[_state, E.FAILED_AFTER_POSTCOPY] = (S.ENDED, (A.STOP_GUEST, A.CANCEL_ATTEMPT, A.CLEAN_UP))
    TABLE[_state, E.QEMU_GONE] = (S.ENDED, (A.CANCEL_ATTEMPT, A.CLEAN_UP))


@dataclass(frozen=True)
class Pace:
    """The delays of the policy, in seconds."""

    poll: float = 0.004
    """Longer than QEMU mostly takes to pause, which it tells: an attempt made too early is in the way."""
    last_poll: float = 0.25
    first_backoff: float = 0.02
    last_backoff: float = 2.0
    client: float = 10.0
    give_up: float = math.inf
    """From a loss until it is given up."""


class Recovery:
    """The policy of one VM: events in, actions out."""

    def __init__(self, pace: Pace | None = None, *, jitter: Callable[[], float]) -> None:
        """`jitter` gives a number in [0, 1) for each delay, so that two hosts do not keep missing each
        other."""
        self.state = State.IDLE
        self.pace = pace or Pace()
        self._jitter = jitter
        self._backoff = self.pace.first_backoff
        self._poll = self.pace.poll

    def handle(self, event: Event) -> tuple[Action, ...]:
        """Takes the transition for `event` and returns what is to be done, in order."""
        state, actions = TABLE.get((self.state, event), (self.state, ()))
        self.state = state
        if Action.RESET_BACKOFF in actions or Action.QUICKEN_BACKOFF in actions:
            self._backoff = self.pace.first_backoff
        if event not in (Event.NOT_YET, Event.TIMER):
            self._poll = self.pace.poll
        return actions

    def delay(self, timer: Action) -> float:
        """The seconds that a TIMER action asks for; each back-off is longer than the one before."""
        if timer is Action.TIMER_POLL:
            now = self._poll
            self._poll = min(now * 1.5, self.pace.last_poll)
            return now
        if timer is Action.TIMER_CLIENT:
            return self.pace.client
        if timer is Action.TIMER_GIVE_UP:
            return self.pace.give_up
        now = self._backoff
        self._backoff = min(now * 2, self.pace.last_backoff)
        return now * (0.75 + 0.5 * self._jitter())
