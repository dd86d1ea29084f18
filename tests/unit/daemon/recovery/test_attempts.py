"""When the driver of the policy begins an attempt."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from refault.daemon.known.patience import Patience
from refault.daemon.recovery.attempts import Attempts
from refault.migration.recovery import Event, NotPausedYet, Pace, Recovery


@dataclass
class Lost:
    """The parts of a migration that the driver needs; its procedure notes when an attempt came."""

    vm: Any
    name: str = "vm"
    channel: int = 0
    channels: None = None
    pause_told: trio.Event = field(default_factory=trio.Event)
    attempts: list[bool] = field(default_factory=list)
    counters: Any = field(default_factory=lambda: SimpleNamespace(losses=0))
    addresses: Any = field(default_factory=lambda: SimpleNamespace(recovered=lambda: None))
    came: trio.Event = field(default_factory=trio.Event)

    @property
    def procedure(self) -> Lost:
        return self

    async def attempt(self) -> None:
        self.attempts.append(self.pause_told.is_set())
        self.came.set()
        raise NotPausedYet


def driver(migration: Lost, poll: float) -> Attempts:
    attempts = Attempts(cast(Any, migration))
    attempts.policy = Recovery(Pace(poll=poll, last_poll=poll), jitter=lambda: 0.0)
    attempts.feed(Event.STARTED)
    return attempts


def lost(nursery: trio.Nursery) -> Lost:
    return Lost(SimpleNamespace(patience=Patience(), start_soon=nursery.start_soon))


async def test_it_begins_as_soon_as_qemu_says_that_it_has_paused(nursery: trio.Nursery) -> None:
    migration = lost(nursery)
    driver(migration, poll=60).feed(Event.CHANNEL_LOST)
    await trio.testing.wait_all_tasks_blocked()
    assert migration.attempts == []
    migration.pause_told.set()
    with trio.fail_after(10):
        await migration.came.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert migration.attempts == [True]  # the next look waits for its time


async def test_it_looks_after_a_while_where_qemu_says_nothing(nursery: trio.Nursery) -> None:
    migration = lost(nursery)
    driver(migration, poll=0.001).feed(Event.CHANNEL_LOST)
    with trio.fail_after(10):
        await migration.came.wait()
    assert not migration.pause_told.is_set()
