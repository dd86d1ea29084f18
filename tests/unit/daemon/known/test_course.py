"""Who waits for a migration to begin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from refault.daemon.known.counters import Counters
from refault.daemon.known.course import Course
from refault.daemon.known.patience import Patience
from refault.migration.endpoint import Endpoint, Inet, Other
from refault.migration.phase import Role
from refault.migration.recovery import Event


async def test_all_who_wait_until_it_is_under_way_are_woken(nursery: trio.Nursery) -> None:
    vm = SimpleNamespace(name="vm", patience=Patience(), alternatives=(), counters=Counters())
    course = Course(cast(Any, vm), Role.SOURCE, None)
    woken: list[int] = []

    async def wait(number: int) -> None:
        await course.until_under_way()
        woken.append(number)

    for event in (Event.STARTED, Event.COMPLETED, Event.STARTED):
        if not course.under_way:
            for number in range(2):
                nursery.start_soon(wait, number)
        await trio.testing.wait_all_tasks_blocked()
        course.feed(event)
    await trio.testing.wait_all_tasks_blocked()
    assert sorted(woken) == [0, 0, 1, 1]


def test_whether_a_pause_is_refaults_to_recover_is_told_before_it_comes() -> None:
    vm = SimpleNamespace(name="vm", patience=Patience(), alternatives=(), counters=Counters())
    course = Course(cast(Any, vm), Role.SOURCE, Inet("h", 1))
    told: list[bool | None] = []
    course.pauses_told_by(lambda may, _: told.append(may))

    def after(*events: Event) -> bool | None:
        for event in events:
            course.feed(event)
        return told[-1]

    assert told == []
    assert after(Event.STARTED) is True
    course.client_pauses_it()
    assert told[-1] is False, "before QEMU has the command"
    assert course.client_paused()
    assert told[-1] is True, "QEMU has refused it"
    assert after(Event.PAUSED, Event.ISSUED, Event.RECOVERING, Event.ACTIVE) is True
    assert after(Event.CHANNEL_LOST, Event.OUT_OF_PATIENCE) is False
    assert after(Event.ACTIVE) is True
    assert after(Event.PAUSED, Event.CLIENT_RECOVERS) is False
    assert after(Event.ACTIVE) is True
    before = len(told)
    assert after(Event.LEG_HELD) is True
    assert told[before:] == [None, True], "of the one that there is they hear"
    assert after(Event.CHANNEL_LOST) is True
    course.client_pauses_it()
    assert after(Event.CLIENT_PAUSED) is False
    assert after(Event.QEMU_GONE) is False


def test_a_pause_whose_recovery_has_no_address_is_nobodys_secret() -> None:
    cases: list[tuple[Endpoint | None, bool]] = [(None, False), (Other("fd:x"), False), (Inet("h", 1), True)]
    for endpoint, may in cases:
        vm = SimpleNamespace(name="vm", patience=Patience(), alternatives=(), counters=Counters())
        course = Course(cast(Any, vm), Role.SOURCE, endpoint)
        told: list[bool | None] = []
        course.pauses_told_by(lambda may, _, told=told: told.append(may))  # type: ignore[misc]
        course.feed(Event.STARTED)
        assert told == [may]


def test_an_answer_that_an_event_has_overtaken_is_not_believed() -> None:
    vm = SimpleNamespace(name="vm", patience=Patience(), alternatives=(), counters=Counters())
    course = Course(cast(Any, vm), Role.SOURCE, None)
    asked_at = course.events
    course.on_event("active")
    course.on_answer("setup", events=asked_at)
    assert course.status == "active"
    course.on_answer("device", events=course.events)
    assert course.status == "device"
    course.on_answer(None, events=course.events)
    assert course.status == "device", "that is no status"
