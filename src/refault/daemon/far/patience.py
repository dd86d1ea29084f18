"""For how long there has been no connection, over many that come to nothing, and when to dial again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import trio

from refault.daemon.far.carry import SILENT_AFTER
from refault.daemon.far.connection import growing_pauses

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.25
"""Seconds between two attempts. A longer one would be most of a resumption: an attempt that is lost in the
handshake took some ms."""


class Patience:
    """How much of it is spent. All of it is back when a connection was of use, not when there is one: one
    that is lost as soon as it is there is none."""

    def __init__(self, position: Callable[[], object]) -> None:
        """`position` is another whenever anything has moved, on whichever connection."""
        self._position = position
        self._at: object = None
        self._began = 0.0
        self._spent = 0.0
        self._lost_at: float | None = None
        self._pauses = _pauses()
        self.is_fresh = True
        """No connection has come to nothing since the last that was of use."""

    @property
    def spent(self) -> float:
        """Seconds without a connection since the last that was of use."""
        return self._spent + (trio.current_time() - self._lost_at if self._lost_at is not None else 0.0)

    def left_of(self, seconds: float) -> float:
        """What of so many is not spent yet: 0 where more is."""
        return max(0.0, seconds - self.spent)

    def connected(self) -> None:
        """There is a connection, and the other end has told how far it is."""
        if self._lost_at is None:  # nobody has told of the loss of the last
            self.lost()
        self._spent = self.spent
        self._lost_at = None
        if self._position() != self._at:  # by the last one, as only the other end knew
            self._begin()
        self._began, self._at = trio.current_time(), self._position()

    def lost(self, ago: float = 0.0, *, silent: bool = False) -> None:
        """There is none, since so many seconds ago; whether it ended by silence, which is told late. It was
        of use where a position has moved, or where it stayed before that."""
        if self._lost_at is not None:
            return
        self._lost_at = trio.current_time() - ago
        lasted = self._lost_at - self._began
        lived = lasted - (SILENT_AFTER if silent else 0)
        if self._position() != self._at or lived >= SILENT_AFTER:
            self._begin()
        else:
            self.is_fresh = False
            self._spent += lasted if silent else 0.0

    def pause(self) -> float:
        """Seconds until the next attempt."""
        return next(self._pauses)

    def _begin(self) -> None:
        self.is_fresh = True
        self._spent = 0.0
        self._pauses = _pauses()


def _pauses() -> Iterator[float]:
    return growing_pauses(FIRST_PAUSE, LONGEST_PAUSE)
