"""A pause that refault recovers, kept from the clients that asked for that: the rules, without I/O.

From `postcopy-paused` on, the MIGRATION events of a recovery are withheld, up to the `postcopy-active` that
ends it, and `query-migrate` says `postcopy-active`. What ends it otherwise tells them of the pause: the last
status withheld goes first. A pause of which they were told is told to its end.

QEMU says that it has paused by an event, where its `events` capability is on, and in the reply to
`query-migrate`, to whomever. The two overtake each other, for events come from the migration's thread
(migration/migration.c, migrate_set_state): a reply may be older than the event before it. So a pause that
only a reply tells of is supposed, until an event or the next reply says more; its time runs from the event.

A destination of 5.2 and 7.2 tells of `setup` as it takes `migrate-recover`, and is paused all the same
(qmp_migrate_recover): it is withheld, and not what a client is told at the end.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

import msgspec

PAUSED = frozenset({"postcopy-paused", "postcopy-recover-setup", "postcopy-recover"})
ACTIVE = "postcopy-active"


class State(enum.Enum):
    """What QEMU has said of a pause, and who knows."""

    CLEAR = "there is none"
    SUPPOSED = "a reply has told of one, and no event yet; it is kept from clients"
    HIDDEN = "an event has told of one; it is kept from clients"
    TOLD = "there is one, and they know"


_PAUSED = (State.SUPPOSED, State.HIDDEN)
"""Asked for with each message."""


class Input(enum.Enum):
    """What can happen to it."""

    PAUSED = "an event of `PAUSED`, and refault recovers"
    PAUSED_NOT_OURS = "an event of `PAUSED`, and refault does not"
    SETUP = "an event: setup"
    ACTIVE = "an event: postcopy-active"
    OTHER = "an event: any other status"
    READ_PAUSED = "a reply with a status of `PAUSED`, and refault recovers"
    READ_PAUSED_NOT_OURS = "a reply with a status of `PAUSED`, and refault does not"
    READ_ACTIVE = "a reply: postcopy-active"
    READ_RECOVERED = "a reply: postcopy-active, of a QEMU that sends no events"
    READ_OTHER = "a reply: any other status"
    TELL = "it is to be told now"


class Do(enum.Enum):
    """What becomes of it, for those from whom pauses are kept."""

    DELIVER = "they get it"
    WITHHOLD = "they do not"
    TELL = "they get the last status withheld, and then it"


S, In, D = State, Input, Do

TABLE: dict[tuple[State, Input], tuple[State, Do]] = {
    (S.CLEAR, In.PAUSED): (S.HIDDEN, D.WITHHOLD),
    (S.CLEAR, In.PAUSED_NOT_OURS): (S.TOLD, D.DELIVER),
    (S.CLEAR, In.READ_PAUSED): (S.SUPPOSED, D.WITHHOLD),
    (S.CLEAR, In.READ_PAUSED_NOT_OURS): (S.TOLD, D.DELIVER),
    (S.SUPPOSED, In.PAUSED): (S.HIDDEN, D.WITHHOLD),
    (S.SUPPOSED, In.SETUP): (S.SUPPOSED, D.WITHHOLD),
    (S.SUPPOSED, In.ACTIVE): (S.CLEAR, D.WITHHOLD),
    (S.SUPPOSED, In.READ_ACTIVE): (S.CLEAR, D.DELIVER),
    (S.SUPPOSED, In.READ_RECOVERED): (S.CLEAR, D.DELIVER),
    (S.HIDDEN, In.PAUSED): (S.HIDDEN, D.WITHHOLD),
    (S.HIDDEN, In.SETUP): (S.HIDDEN, D.WITHHOLD),
    (S.HIDDEN, In.ACTIVE): (S.CLEAR, D.WITHHOLD),
    (S.TOLD, In.ACTIVE): (S.CLEAR, D.DELIVER),
    (S.TOLD, In.READ_RECOVERED): (S.CLEAR, D.DELIVER),
    (S.TOLD, In.OTHER): (S.CLEAR, D.DELIVER),
    (S.TOLD, In.READ_OTHER): (S.CLEAR, D.DELIVER),
}
"""An input without a row changes nothing and is delivered."""

for _state in (S.SUPPOSED, S.HIDDEN):
    TABLE[_state, In.OTHER] = (S.CLEAR, D.TELL)
    TABLE[_state, In.READ_OTHER] = (S.CLEAR, D.TELL)
    TABLE[_state, In.TELL] = (S.TOLD, D.TELL)


class Word(enum.IntEnum):
    """What refault says about pauses; the numbers are the journal's."""

    MAY = 1
    """It would recover one."""
    MAY_NOT = 2
    """It would not: a client does, or nobody."""
    TELL = 3
    """The one that there is is told; the next need not be."""
    OVER = 4
    """It is told to those who wanted it hidden for so many seconds."""
    BEGAN = 5
    """When it was hidden first, by the host's monotonic clock, in seconds."""


class Verdict(NamedTuple):
    """What becomes of a message for those from whom pauses are kept."""

    withhold: bool = False
    first: bytes = b""
    """What is told before it; empty for nothing."""
    over: frozenset[float] = frozenset()
    """For how long those wanted it hidden whom neither concerns, for they were told."""
    only: float | None = None
    """For how long those wanted it hidden whom alone it concerns; None: all others."""

    def concerns(self, seconds: float | None) -> bool:
        """Whether it holds for who wants pauses hidden for so long; None or 0: not at all."""
        return bool(seconds) and seconds not in self.over and self.only in (None, seconds)


NOTHING = Verdict()


class Hiding:
    """Of one QEMU. `line` is an event as clients get it."""

    def __init__(self) -> None:
        self.state = State.CLEAR
        self.may: bool | None = None
        """Whether refault would recover a pause; None: it has not said."""
        self.withheld = b""
        """The last event of `PAUSED`, if it is not told."""
        self.over: frozenset[float] = frozenset()
        """For how long those wanted it hidden who were told."""
        self.began: float | None = None
        """As `Word.BEGAN` has it; None while there is none that is hidden, or nobody has said."""
        self.events = False
        """Whether this QEMU has sent MIGRATION events."""

    @property
    def hidden(self) -> bool:
        """Whether there is a pause that is kept from clients."""
        return self.state in _PAUSED

    def hides_from(self, seconds: float | None) -> bool:
        """Whether it is kept from those who want it hidden for so long."""
        return self.hidden and bool(seconds) and seconds not in self.over

    def goes_on_from(self, earlier: Hiding) -> None:
        """It is in the place of `earlier`: whether refault would recover a pause it has said already."""
        self.may = earlier.may

    def event(self, status: object, line: bytes) -> Verdict:
        """A MIGRATION event."""
        supposed = self.events and self.state is State.SUPPOSED
        self.events = True
        if status in PAUSED:
            if supposed:  # that may have been the pause before
                self.over, self.began = frozenset(), None
            verdict = self._take(Input.PAUSED if self.may else Input.PAUSED_NOT_OURS)
            if self.hidden:
                self.withheld = line
            return verdict
        if status == ACTIVE:
            return self._take(Input.ACTIVE)
        return self._take(Input.SETUP if status == "setup" else Input.OTHER)

    def read(self, status: object) -> Verdict:
        """The status in a reply to `query-migrate`; None: there is none."""
        if status is None:
            return NOTHING
        if status in PAUSED:
            if self.may is None:
                return NOTHING
            return self._take(Input.READ_PAUSED if self.may else Input.READ_PAUSED_NOT_OURS)
        if status == ACTIVE:
            return self._take(Input.READ_ACTIVE if self.events else Input.READ_RECOVERED)
        return self._take(Input.READ_OTHER)

    def says(self, word: Word, value: float) -> Verdict:
        """What refault says; `value` as the word has it."""
        match word:
            case Word.MAY:
                self.may = True
            case Word.MAY_NOT:
                self.may = False
                return self._take(Input.TELL)
            case Word.TELL:
                return self._take(Input.TELL)
            case Word.BEGAN:
                self.began = value if self.hidden else None
            case Word.OVER if self.hides_from(value):
                self.over |= {value}
                return Verdict(first=self.withheld, only=value)
        return NOTHING

    def lost(self) -> Verdict:
        """QEMU has gone, and whatever it was at."""
        verdict = self._take(Input.TELL)
        self.state = State.CLEAR
        self.events = False
        return verdict

    def shown(self, reply: bytes) -> bytes:
        """What `query-migrate` says instead, to who is not to know: the status, and no other byte."""
        for match in _STATUS.finditer(reply):
            changed = b"%s%s%s" % (reply[: match.start(1)], ACTIVE.encode(), reply[match.end(1) :])
            if status_of(changed) == ACTIVE:
                return changed
        return reply

    def _take(self, taken: Input) -> Verdict:
        was, over, withheld = self.state, self.over, self.withheld
        self.state, do = TABLE.get((was, taken), (was, Do.DELIVER))
        if not self.hidden:
            self.withheld, self.over, self.began = b"", frozenset(), None
        return Verdict(do is Do.WITHHOLD, withheld if do is Do.TELL else b"", over)


# A quotation mark within a string has a backslash before it, so that this is a member's name and its value.
_STATUS = re.compile(rb'"status"\s*:\s*"(postcopy-paused|postcopy-recover-setup|postcopy-recover)"')


class _Returned(msgspec.Struct):
    status: object = None


class _Reply(msgspec.Struct):
    returned: _Returned | msgspec.UnsetType = msgspec.field(default=msgspec.UNSET, name="return")


def status_of(reply: bytes) -> str | None:
    """The status that a reply to `query-migrate` has; None: it has none."""
    try:
        returned = msgspec.json.decode(reply, type=_Reply).returned
    except msgspec.DecodeError:
        return None
    if isinstance(returned, _Returned) and isinstance(returned.status, str):
        return returned.status
    return None
