"""A core that is made of what another one saved and wrote down does from then on what that one does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.qmp.course import Course, new_core
from tests.unit.qmp.played import Played

from refault.qmp.journal import Kind, Record, TornError
from refault.qmp.replay import Replay


@given(st.integers(), st.integers(0, 60), st.integers(0, 60), st.booleans())
@settings(max_examples=250, deadline=None)
def test_the_next_core_goes_on_as_the_killed_one(seed: int, until: int, more: int, again: bool) -> None:
    course = Course(seed)
    for _ in range(until):
        course.step()
        if course.chance.random() < 0.05:
            course.first.flush()
            course.first.save()
    following = course.first.next()
    course.first.lose()
    assert following.look() == course.first.look()
    course.sides.append(following)
    course.first.killed = True
    killed = course.first.core
    queued = [request for each in (*killed.internal, *killed.clients.values()) for request in each.queue]
    for request in (*killed.window.pending.values(), *killed.urgent, *queued):
        request.on_reply = None  # a reply that is not changed goes with its id where QEMU has it
    following.save()
    for side in course.sides:
        side.asked.sort(key=lambda request: request.asked)
        side.go_on()
    for _ in range(more):
        course.step()
        assert following.look() == course.first.look()
    if again:
        last = following.next()
        following.lose()
        assert last.look() == following.look()


def test_played_is_for_the_same_core() -> None:
    assert Played().core.ready


@pytest.mark.parametrize("text", [b"", b"\x00", b"\x93\x01\x02\x03"])
def test_nonsense_is_told(text: bytes) -> None:
    with pytest.raises(TornError):
        Replay(new_core([])).run(text, [])


@pytest.mark.parametrize("said", [b'{"return": {"a": ]}}', b'{"retur\x05n": {}}'])
def test_what_no_qemu_says_is_told(said: bytes) -> None:
    """The file was damaged, or the kill came before its connection was given up for it."""
    course = Course(1)
    course.first.save()
    with pytest.raises(TornError):
        Replay(new_core([])).run(course.first.before, [Record(Kind.RECEIVED, 0, len(said), memoryview(said))])
