"""What is kept of losses, and what `refault events` makes of it."""

from __future__ import annotations

import time

import pytest

from refault.daemon.known.counters import RECOVERY_BOUNDS, Counters
from refault.migration.phase import Role


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def test_a_loss_has_its_attempts_its_error_and_its_end(clock: list[float]) -> None:
    counters = Counters()
    counters.lose(Role.SOURCE, 0.5)
    counters.attempt()
    counters.fail("no route")
    counters.attempt()
    clock[0] = 1002.0
    counters.recover(2.5)
    (loss,) = counters.recent
    assert (loss.number, loss.lost_at, loss.attempts, loss.error) == (1, 999.5, 2, "no route")
    assert (loss.over_at, loss.seconds, loss.given_up_at) == (1002.0, 2.5, None)
    counters.attempt()
    counters.fail("later")
    counters.give_up()
    counters.over()
    assert (loss.attempts, loss.error, loss.given_up_at, loss.over_at) == (2, "no route", None, 1002.0)


def test_a_loss_that_is_not_recovered_ends_with_its_migration_or_the_next(clock: list[float]) -> None:
    counters = Counters()
    counters.lose(Role.DESTINATION, 0)
    counters.give_up()
    clock[0] = 1005.0
    counters.over()
    counters.lose(Role.DESTINATION, 0)
    clock[0] = 1007.0
    counters.lose(Role.DESTINATION, 0)
    first, second, third = counters.recent
    assert (first.given_up_at, first.over_at, first.seconds) == (1000.0, 1005.0, None)
    assert (second.over_at, third.over_at) == (1007.0, None)
    assert len({loss.id for loss in counters.recent}) == 3


def test_recoveries_are_counted_by_how_long_they_took() -> None:
    counters = Counters()
    for seconds in (RECOVERY_BOUNDS[0], RECOVERY_BOUNDS[0] + 0.001, 1e6):
        counters.recover(seconds)
    counts = counters.durations.counts
    assert (counts[0], counts[1], counts[-1], sum(counts)) == (1, 1, 1, 3)
    assert counters.recoveries == 3


def test_only_the_last_losses_are_kept() -> None:
    counters = Counters()
    for _ in range(100):
        counters.lose(Role.SOURCE, 0)
    assert [loss.number for loss in counters.recent] == list(range(69, 101))
