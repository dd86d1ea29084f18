"""Waits for the very thing that is asserted, as long as that may take on a busy machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 30.0


def until(
    look: Callable[[], T], tell: Callable[[], object], *, seconds: float = PATIENCE, pause: float = 0.001
) -> T:
    """Looks until there is something to see, and returns it. Raises AssertionError with what `tell` says."""
    end = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < end, tell()
        time.sleep(pause)
    return seen


def descriptors_and_threads() -> tuple[int, int]:
    """How many this process has."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def until_nothing_is_left(before: tuple[int, int]) -> None:
    """Until there are no more: a pump's thread ends, and closes, behind who stops it."""

    def nothing_is() -> bool:
        descriptors, threads = descriptors_and_threads()
        return descriptors == before[0] and threads <= before[1]

    until(nothing_is, lambda: (descriptors_and_threads(), before))
