"""The fence, and how a lane ends."""

from __future__ import annotations

import itertools

import pytest

from refault.session.course import TABLE, Action, Course, Event, Role, State
from refault.session.memory import FIRST, LARGEST, Memory
from refault.session.table import Lane, Table
from refault.session.wire import Code, Flag, Kind, Message

ID, OTHER_ID = b"i" * 16, b"o" * 16


def _hello(attempt: int, *, session: bytes = ID, lane: int = 0, new: bool = True) -> Message:
    return Message(Kind.HELLO, session, lane, attempt, flags=Flag.NEW if new else Flag(0))


def _begun(table: Table[str], lane: int = 0, attempt: int = 1, *, proven: bool = False) -> Lane[str]:
    verdict = table.judge(_hello(attempt, lane=lane), proven=proven)
    assert verdict.code is Code.OK
    assert verdict.lane is not None
    assert verdict.lane.owner is None
    verdict.lane.owner = f"lane {lane}"
    return verdict.lane


def test_a_stale_hello_is_told_the_highest_attempt() -> None:
    table: Table[str] = Table(10)
    _begun(table, attempt=5)
    for attempt in (0, 1, 5):
        verdict = table.judge(_hello(attempt, new=False), proven=False)
        assert (verdict.code, verdict.attempt, verdict.lane) == (Code.STALE, 5, None)
    verdict = table.judge(_hello(6, new=False), proven=False)
    assert verdict.code is Code.OK
    assert verdict.lane is not None
    assert verdict.lane.owner == "lane 0"


def test_a_lost_welcome_is_asked_for_again() -> None:
    table: Table[str] = Table(10)
    lane = _begun(table)
    assert table.judge(_hello(2), proven=False).lane is lane


def test_a_session_that_nobody_knows_begins_only_with_its_first_hello() -> None:
    """After a restart of this end, or at the wrong host: two sessions crossed between four."""
    here, there = Table[str](10), Table[str](10)
    _begun(here)
    assert there.judge(_hello(2, new=False), proven=False).code is Code.UNKNOWN
    assert here.judge(_hello(2, session=OTHER_ID, new=False), proven=False).code is Code.UNKNOWN
    assert here.judge(_hello(2, new=False), proven=False).code is Code.OK


def test_a_late_hello_of_a_session_that_is_over_begins_nothing() -> None:
    table: Table[str] = Table(1)
    _begun(table)
    assert table.judge(_hello(1, session=OTHER_ID), proven=False).code is Code.AGAIN  # no room
    table.close(ID, 0)
    for attempt in (1, 2, 100):
        assert table.judge(_hello(attempt), proven=False).code is Code.GONE
    assert table.judge(_hello(1, session=OTHER_ID), proven=False).code is Code.OK


def test_lanes_begin_when_the_first_has() -> None:
    table: Table[str] = Table(10, lanes=3)
    assert table.judge(_hello(1, lane=1), proven=False).code is Code.AGAIN
    _begun(table)
    table.close(ID, 1)  # at this end it is over before the other has come for it
    _begun(table, lane=2)
    assert table.judge(_hello(1, lane=1, new=False), proven=False).code is Code.UNKNOWN
    _begun(table, lane=1)
    assert table.judge(_hello(1, lane=3), proven=False).code is Code.UNKNOWN
    table.close(ID, 1)
    assert table.judge(_hello(9, lane=1), proven=False).code is Code.GONE
    assert table.judge(_hello(9, lane=2), proven=False).code is Code.OK
    table.close(ID, 0)
    table.close(ID, 2)
    assert len(table) == 0
    table.close(ID, 2)


def test_a_lane_that_has_not_come_yet_may_though_the_others_are_over() -> None:
    """Its connection of before the discovery may have something that the session is to deliver."""
    table: Table[str] = Table(10, lanes=2)
    _begun(table)
    table.close(ID, 0, taken=77)
    assert table.judge(_hello(2), proven=False).taken == 77
    _begun(table, lane=1)
    table.close(ID, 1)
    assert len(table) == 0


def test_a_session_that_was_proven_once_is_so_always() -> None:
    table: Table[str] = Table(10)
    _begun(table, proven=True)
    assert table.judge(_hello(2), proven=False).code is Code.KEY
    assert table.judge(_hello(2), proven=True).code is Code.OK


def test_a_session_for_which_there_is_no_memory_may_come_again() -> None:
    table: Table[str] = Table(10)
    assert table.judge(_hello(1), proven=False).code is Code.OK
    table.withdraw(ID)
    assert table.judge(_hello(2), proven=False).code is Code.OK


@pytest.mark.parametrize("role", Role)
def test_every_course_comes_to_its_end(role: Role) -> None:
    """Whatever happened before: out of patience, nothing is left to be waited for."""
    for events in itertools.product(Event, repeat=3):
        course = Course(role)
        actions = [action for event in (*events, Event.IMPATIENT) for action in course.take(event)]
        assert course.state is State.OVER, events
        told = [each for each in actions if each in (Action.CLOSE_LOCAL, Action.RESET_LOCAL)]
        assert len(told) == 1, (events, actions)
    assert all((state, Event.IMPATIENT) in TABLE[role] for state in {s for s, _ in TABLE[role]})


def test_whoever_dials_waits_to_be_told() -> None:
    dials, answers = Course(Role.DIALS), Course(Role.ANSWERS)
    assert dials.take(Event.DONE) == (Action.CLOSE_LOCAL,)
    assert answers.take(Event.DONE) == (Action.CLOSE_LOCAL, Action.SEND_END)
    assert [dials.state, answers.state] == [State.COMPLETE, State.OVER]
    assert dials.take(Event.FORGOTTEN) == ()
    assert dials.state == State.OVER


def test_memory_keeps_some_for_who_comes_next() -> None:
    memory = Memory(16 * FIRST)
    assert memory.most_lanes == 8
    assert memory.begin()
    size = FIRST
    while memory.double(size):
        size *= 2
    assert size == 4 * FIRST  # while one is doubled the old one is there too
    came = 0
    while memory.begin():
        came += 1
    assert came == 5
    memory.end(size + FIRST)
    assert memory.begin()
    assert not Memory(1 << 40).double(LARGEST)


def test_a_session_that_is_not_let_in_takes_no_place() -> None:
    """Its owner would be nobody, who never closes it; and attempt 0 is as good as another."""
    table: Table[str] = Table(1)
    assert table.judge(_hello((1 << 32) - 1), proven=False).code is Code.GONE
    assert len(table) == 0
    _begun(table, attempt=0)
    assert table.judge(_hello((1 << 32) - 1, new=False), proven=False).code is Code.GONE
    assert table.judge(_hello(1, new=False), proven=False).code is Code.OK


def test_who_comes_after_the_end_hears_how_far_its_stream_was_taken() -> None:
    table: Table[str] = Table(10, lanes=2)
    _begun(table)
    _begun(table, lane=1)
    table.close(ID, 0, taken=77)
    assert table.judge(_hello(2), proven=False).taken == 77
    table.close(ID, 1)
    assert [table.judge(_hello(2, lane=lane), proven=False).taken for lane in (0, 1, 2)] == [77, 0, 0]
