"""How a lane ends, as a table: each end does what the other must hear of, and neither forgets too soon.

Who answers forgets first, for it is there to be asked: whoever dials goes on dialling until it has been told
that all is over (END), or that nobody knows the lane any more. So a lost END costs one more HELLO, and never
a byte.

An event that a state has no row for changes nothing.
"""

from __future__ import annotations

import enum


class Role(enum.Enum):
    """Which end of a session."""

    DIALS = "dials"
    ANSWERS = "answers"


class State(enum.Enum):
    """Where a lane stands at one end."""

    OPEN = "open"
    COMPLETE = "both streams are over, and the other end is to say that it knows"
    RESET_HERE = "the local side broke, and the other end is to hear of it"
    RESET_THERE = "the other end's local side broke, and it is to hear that we know"
    OVER = "over"


class Event(enum.Enum):
    """What can happen to it."""

    DONE = "both streams have ended, ours is acknowledged and the other's is delivered"
    BROKE_HERE = "the local side broke"
    BROKE_THERE = "RESET has come"
    TOLD_END = "END has come"
    FORGOTTEN = "the other end does not know the lane any more"
    IMPATIENT = "there was no connection for longer than the session's patience"


class Action(enum.Enum):
    """What is to be done about it."""

    CLOSE_LOCAL = "close the local connection in order"
    RESET_LOCAL = "give the local side what it takes at once, and break its connection"
    SEND_RESET = "send RESET"
    SEND_END = "send END"


S, E, A, R = State, Event, Action, Role

_BOTH: dict[tuple[State, Event], tuple[State, tuple[Action, ...]]] = {
    (S.OPEN, E.BROKE_HERE): (S.RESET_HERE, (A.RESET_LOCAL, A.SEND_RESET)),
    (S.OPEN, E.TOLD_END): (S.OVER, (A.RESET_LOCAL,)),  # it cannot know what is not so
    (S.OPEN, E.FORGOTTEN): (S.OVER, (A.RESET_LOCAL,)),
    (S.OPEN, E.IMPATIENT): (S.OVER, (A.RESET_LOCAL,)),
    (S.RESET_HERE, E.FORGOTTEN): (S.OVER, ()),
    (S.RESET_HERE, E.IMPATIENT): (S.OVER, ()),
}

TABLE: dict[Role, dict[tuple[State, Event], tuple[State, tuple[Action, ...]]]] = {
    R.DIALS: _BOTH
    | {
        (S.OPEN, E.DONE): (S.COMPLETE, (A.CLOSE_LOCAL,)),
        (S.OPEN, E.BROKE_THERE): (S.RESET_THERE, (A.RESET_LOCAL, A.SEND_END)),
        (S.COMPLETE, E.BROKE_THERE): (S.RESET_THERE, (A.SEND_END,)),
        (S.COMPLETE, E.TOLD_END): (S.OVER, ()),
        (S.COMPLETE, E.FORGOTTEN): (S.OVER, ()),
        (S.COMPLETE, E.IMPATIENT): (S.OVER, ()),
        (S.RESET_HERE, E.BROKE_THERE): (S.RESET_THERE, (A.SEND_END,)),
        (S.RESET_HERE, E.TOLD_END): (S.OVER, ()),
        (S.RESET_THERE, E.TOLD_END): (S.OVER, ()),
        (S.RESET_THERE, E.FORGOTTEN): (S.OVER, ()),
        (S.RESET_THERE, E.IMPATIENT): (S.OVER, ()),
    },
    R.ANSWERS: _BOTH
    | {
        (S.OPEN, E.DONE): (S.OVER, (A.CLOSE_LOCAL, A.SEND_END)),
        (S.OPEN, E.BROKE_THERE): (S.OVER, (A.RESET_LOCAL, A.SEND_END)),
        (S.RESET_HERE, E.BROKE_THERE): (S.OVER, (A.SEND_END,)),
        (S.RESET_HERE, E.TOLD_END): (S.OVER, (A.SEND_END,)),
    },
}


class Course:
    """One lane's state at one end."""

    def __init__(self, role: Role) -> None:
        self._table = TABLE[role]
        self.state = State.OPEN

    def take(self, event: Event) -> tuple[Action, ...]:
        """What is to be done, in order; none where the event changes nothing."""
        self.state, actions = self._table.get((self.state, event), (self.state, ()))
        return actions
