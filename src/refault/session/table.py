"""The sessions that an end answers for, and the fence: which HELLO takes the place of which connection.

In this order, and nothing is closed before: the id, compared in a time that says nothing about it; whether a
session that was begun with a key is asked for with one; the lane; the attempt. The caller then closes the
lane's old connection with whatever is unread there, reads off its positions, and says WELCOME.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from refault.session.wire import Code, Flag, Message

MOST_LANES = 1 << 16
_FARTHEST = 1 << 24
"""An attempt so far above the highest is nobody's: it would leave who dials none to come."""
REMEMBERED = 4096
"""Sessions that are over: a HELLO of theirs that comes late begins nothing."""

Owner = TypeVar("Owner")


@dataclass
class Lane(Generic[Owner]):
    """One lane of a session, with whom it belongs to."""

    number: int
    owner: Owner | None = None
    highest: int = -1
    """The highest attempt that was let in; none yet."""
    is_over: bool = False
    taken: int = 0
    """Of one that is over: how far the stream of who dials was taken, if it ended in order."""

    def belongs_to(self, owner: Owner) -> None:
        """It has an owner from here on."""
        self.owner = owner


@dataclass
class _Session(Generic[Owner]):
    id: bytes
    proven: bool
    lanes: dict[int, Lane[Owner]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict(Generic[Owner]):
    """What is to be answered; with `Code.OK` also which lane is meant, which has no owner if it is new."""

    code: Code
    attempt: int
    lane: Lane[Owner] | None = None
    taken: int = 0
    """With `Code.GONE`: how far the stream of who dials was taken; 0 where the lane did not end in order."""


class Table(Generic[Owner]):
    """All sessions of an end. `most` bounds them; `lanes` those of one session."""

    def __init__(self, most: int, lanes: int = 1) -> None:
        self._most = most
        self._most_lanes = min(lanes, MOST_LANES)
        self._secret = secrets.token_bytes(32)
        self._sessions: dict[bytes, _Session[Owner]] = {}
        self._over: OrderedDict[bytes, dict[int, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def judge(self, hello: Message, *, proven: bool) -> Verdict[Owner]:
        """What becomes of a HELLO that was believed; `proven`: it came with a proof of the key."""
        slot = self._slot(hello.session)
        session = self._sessions.get(slot)
        if session is None or not hmac.compare_digest(session.id, hello.session):
            if slot in self._over:
                return Verdict(Code.GONE, hello.attempt, taken=self._over[slot].get(hello.lane, 0))
            return self._begin(slot, hello, proven)
        if session.proven and not proven:
            return Verdict(Code.KEY, hello.attempt)
        lane = session.lanes.get(hello.lane)
        if lane is None:
            return self._further_lane(session, hello)
        if lane.is_over:
            return Verdict(Code.GONE, hello.attempt, taken=lane.taken)
        return self._admit(lane, hello)

    def resume(self, session: bytes) -> None:
        """A session of one lane that another process has answered for: it need not begin. Any attempt is the
        highest."""
        begun: _Session[Owner] = _Session(session, proven=False)
        begun.lanes[0] = Lane(0)
        self._sessions[self._slot(session)] = begun

    def withdraw(self, session: bytes) -> None:
        """A session that could not begin after all: it may come again."""
        self._sessions.pop(self._slot(session), None)

    def close(self, session: bytes, number: int, taken: int = 0) -> None:
        """A lane is over; the session is, when all of its lanes are, those too that have not come yet.
        `taken` as `Lane.taken`."""
        slot = self._slot(session)
        known = self._sessions.get(slot)
        if known is None:
            return
        lane = known.lanes.get(number)
        if lane is None:
            return  # it never came
        lane.is_over, lane.owner, lane.taken = True, None, taken
        if len(known.lanes) == self._most_lanes and all(each.is_over for each in known.lanes.values()):
            del self._sessions[slot]
            self._over[slot] = {each.number: each.taken for each in known.lanes.values()}
            if len(self._over) > REMEMBERED:
                self._over.popitem(last=False)

    def _slot(self, session: bytes) -> bytes:
        """Where a session stands: nobody outside can choose ids that stand near each other."""
        return hashlib.blake2b(session, key=self._secret, digest_size=16).digest()

    def _begin(self, slot: bytes, hello: Message, proven: bool) -> Verdict[Owner]:
        if not hello.flags & Flag.NEW or hello.lane >= self._most_lanes:
            return Verdict(Code.UNKNOWN, hello.attempt)
        if hello.lane > 0 or len(self._sessions) >= self._most:
            return Verdict(Code.AGAIN, hello.attempt)
        session: _Session[Owner] = _Session(hello.session, proven)
        verdict = self._further_lane(session, hello)
        if verdict.code is Code.OK:  # else nobody would ever close it
            self._sessions[slot] = session
        return verdict

    def _further_lane(self, session: _Session[Owner], hello: Message) -> Verdict[Owner]:
        if not hello.flags & Flag.NEW or hello.lane >= self._most_lanes:
            return Verdict(Code.UNKNOWN, hello.attempt)
        lane: Lane[Owner] = Lane(hello.lane)
        verdict = self._admit(lane, hello)
        if verdict.code is Code.OK:
            session.lanes[hello.lane] = lane
        return verdict

    @staticmethod
    def _admit(lane: Lane[Owner], hello: Message) -> Verdict[Owner]:
        if hello.attempt <= lane.highest:
            return Verdict(Code.STALE, lane.highest)
        if hello.attempt > lane.highest + _FARTHEST:
            return Verdict(Code.GONE, hello.attempt)
        lane.highest = hello.attempt
        return Verdict(Code.OK, hello.attempt, lane)
