"""For how long a lane may be without a connection, over many that come to nothing."""

from __future__ import annotations

from collections.abc import Iterator

import trio

from refault.daemon.far.carry import SILENT_AFTER
from refault.daemon.far.connection import growing_pauses
from refault.session.stream import Stream

_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5


class Patience:
    """What is left of it. All of it is back when a connection was of use, not when there is one: one that is
    lost as soon as it is there is none."""

    def __init__(self, seconds: float, stream: Stream) -> None:
        self._seconds = seconds
        self._stream = stream
        self._at = (0, 0)
        self._began = 0.0
        self._pauses = _pauses()
        self.left = seconds
        self.is_fresh = True
        """No connection has come to nothing since the last that was of use."""

    def waited(self, seconds: float) -> None:
        """There was no connection for so long."""
        self.left = max(self.left - seconds, 0.0)

    def connected(self) -> None:
        """There is a connection."""
        self._began = trio.current_time()
        self._at = self._position()

    def lost(self) -> None:
        """It is lost: it was of use where a position has moved, or where it stayed."""
        stayed = trio.current_time() - self._began >= SILENT_AFTER
        self.is_fresh = stayed or self._position() != self._at
        if self.is_fresh:
            self.left = self._seconds
            self._pauses = _pauses()

    def pause(self) -> float:
        """Seconds until the next attempt."""
        return next(self._pauses)

    def _position(self) -> tuple[int, int]:
        facts = self._stream.facts()
        return facts.here.received, facts.acknowledged


def _pauses() -> Iterator[float]:
    yield 0.0
    yield from growing_pauses(_FIRST_PAUSE, _LONGEST_PAUSE)
