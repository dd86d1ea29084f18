"""Who waits for a migration to begin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from refault.daemon.known.counters import Counters
from refault.daemon.known.course import Course
from refault.daemon.known.patience import Patience
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
