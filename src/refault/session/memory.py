"""The memory that all rings together may have, and how much of it one lane takes."""

from __future__ import annotations

TOTAL = 256 << 20
"""Bytes, of all sessions of a daemon."""
FIRST = 64 << 10
"""Bytes of a ring at first, and so of the room that is promised; each is doubled while it is found full."""
LARGEST = 16 << 20
_KEPT = 4
"""One part in so many is kept for those who come, and have little."""


class Memory:
    """What is left of `total` bytes."""

    def __init__(self, total: int = TOTAL) -> None:
        self._total = total
        self._left = total

    @property
    def most_lanes(self) -> int:
        """How many lanes there can be, with nothing but their first rings."""
        return self._total // (2 * FIRST)

    def begin(self) -> bool:
        """Takes a lane's first two rings; False where they are not to be had."""
        if self._left < 2 * FIRST:
            return False
        self._left -= 2 * FIRST
        return True

    def end(self, size: int) -> None:
        """Gives back the rings of a lane that is over, `size` bytes together."""
        self._left += size

    def double(self, size: int) -> bool:
        """Takes as much as a ring of `size` has; False where it is large enough, or there is too little
        left for the old one and the new at once."""
        if size >= LARGEST or self._left - 2 * size < self._total // _KEPT:
            return False
        self._left -= size
        return True
