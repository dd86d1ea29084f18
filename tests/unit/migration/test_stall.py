"""A migration that moves at all is never taken for one that stands still."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from refault.migration.stall import StallDetector

AFTER = 15.0


def test_standing_still_is_told_once_in_each_period() -> None:
    detector = StallDetector(AFTER)
    told = [now for now in range(50) if detector.stalls(now, "same", work_left=True)]
    assert told == [15, 31, 47]


@given(
    st.lists(
        st.tuples(st.floats(0.01, AFTER / 2), st.integers(0, 2), st.booleans()), min_size=1, max_size=200
    )
)
def test_what_moves_or_has_nothing_left_is_never_told(looks: list[tuple[float, int, bool]]) -> None:
    """Told only where every look of the last period, and one before it, saw the same and work left."""
    detector = StallDetector(AFTER)
    now = 0.0
    same_since: float | None = None
    last: int | None = None
    for pause, progress, work_left in looks:
        now += pause
        if not work_left:
            same_since = None
        elif same_since is None or progress != last:
            same_since = now
        last = progress
        told = detector.stalls(now, progress, work_left=work_left)
        if told:
            assert same_since is not None
            assert now - same_since >= AFTER
            same_since = None


@given(st.lists(st.floats(0.01, AFTER * 0.99), min_size=1, max_size=100))
def test_progress_within_each_period_is_enough(pauses: list[float]) -> None:
    detector = StallDetector(AFTER)
    now = 0.0
    for moved, pause in enumerate(pauses):
        now += pause
        assert not detector.stalls(now, moved, work_left=True)
