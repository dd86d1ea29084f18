"""When the driver of the policy begins an attempt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from refault.daemon.known.counters import Counters
from refault.daemon.known.course import Course
from refault.daemon.known.patience import Patience
from refault.daemon.monitor.monitor import MonitorLost
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
        self.fails = trio.Event()
        self.ends_with: Exception = NotPausedYet()
        self.came = trio.Event()
        Attempts(self.course, cast(Any, self), lambda: None, lambda: None)
        self.course.feed(Event.STARTED)

    async def attempt(self) -> None:
        self.attempts.append(self.course.pause_told.is_set())
        self.came.set()
        with trio.CancelScope(shield=True):
            await self.fails.wait()
        raise self.ends_with


async def test_it_begins_as_soon_as_qemu_says_that_it_has_paused(nursery: trio.Nursery) -> None:
    migration = Lost(nursery, poll=60)
    migration.fails.set()
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
    migration.fails.set()
    migration.course.feed(Event.CHANNEL_LOST)
    with trio.fail_after(10):
        await migration.came.wait()
    assert not migration.course.pause_told.is_set()


async def test_an_attempt_that_fails_as_its_qemu_ends_leaves_no_error(nursery: trio.Nursery) -> None:
    migration = Lost(nursery, poll=0.001)
    migration.ends_with = MonitorLost("the monitor was lost")
    migration.course.feed(Event.CHANNEL_LOST)
    with trio.fail_after(10):
        await migration.came.wait()
    migration.course.qemu_ended()
    migration.fails.set()
    await trio.testing.wait_all_tasks_blocked()
    assert migration.course.counters.last_error is None


async def test_one_that_fails_while_it_is_wanted_is_told_of(nursery: trio.Nursery) -> None:
    migration = Lost(nursery, poll=0.001)
    migration.ends_with = MonitorLost("the monitor was lost")
    migration.fails.set()
    migration.course.feed(Event.CHANNEL_LOST)
    with trio.fail_after(10):
        await migration.came.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert migration.course.counters.last_error == "the monitor was lost"
