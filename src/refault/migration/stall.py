"""Whether a migration without a relay stands still: its channel may be silent, and nobody says so for long.

A migration that is slow or limited still moves, however little, and any movement is enough here.
"""

from __future__ import annotations

from collections.abc import Hashable


class StallDetector:
    """Fed with what is seen of one QEMU and when. Times are in seconds, of a clock that never goes back."""

    def __init__(self, stall_after: float) -> None:
        self._stall_after = stall_after
        self._progress: Hashable = None
        self._since: float | None = None

    def stalls(self, now: float, progress: Hashable, *, work_left: bool) -> bool:
        """Whether nothing has moved for `stall_after` seconds though there was work left all the while.

        `progress`: whatever changes when the migration moves. After True it counts from the beginning.
        """
        if not work_left or self._since is None or progress != self._progress:
            self._progress = progress
            self._since = now if work_left else None
            return False
        if now - self._since < self._stall_after:
            return False
        self._since = None
        return True
