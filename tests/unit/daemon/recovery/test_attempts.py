"""When the driver of the policy begins an attempt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from refault.daemon.known.counters import Counters
from refault.daemon.known.course import Course
from refault.daemon.known.patience import Patience
from refault.daemon.recovery.attempts import Attempts
from refault.migration.phase import Role
from refault.migration.recovery import Event, NotPausedYet, Pace, Recovery


class Lost:
    """The procedure of a migration, which notes when an attempt came."""

    def __init__(self, nursery: trio.Nursery, poll: float) -> None:
        vm = SimpleNamespace(
            name="vm",
            patience=Patience(),
            alternatives=(),
            counters=Counters(),
            start_soon=nursery.start_soon,
        )
        self.course = Course(cast(Any, vm), Role.SOURCE, None)
        self.course.policy = Recovery(Pace(poll=poll, last_poll=poll), jitter=lambda: 0.0)
        self.attempts: list[bool] = []
        self.came = trio.Event()
        Attempts(self.course, cast(Any, self), lambda: None, lambda: None)
        self.course.feed(Event.STARTED)

    async def attempt(self) -> None:
        self.attempts.append(self.course.pause_told.is_set())
        self.came.set()
        raise NotPausedYet


async def test_it_begins_as_soon_as_qemu_says_that_it_has_paused(nursery: trio.Nursery) -> None:
    migration = Lost(nursery, poll=60)
    migration.course.feed(Event.CHANNEL_LOST)
    await trio.testing.wait_all_tasks_blocked()
    assert migration.attempts == []
    migration.course.pause_told.set()
    with trio.fail_after(10):
        await migration.came.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert migration.attempts == [True]  # the next look waits for its time


async def test_it_looks_after_a_while_where_qemu_says_nothing(nursery: trio.Nursery) -> None:
    migration = Lost(nursery, poll=0.001)
    migration.course.feed(Event.CHANNEL_LOST)
    with trio.fail_after(10):
        await migration.came.wait()
    assert not migration.course.pause_told.is_set()
