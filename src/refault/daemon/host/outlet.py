"""Lines for a reader who may stand still: a stopped journal, a pipe or a terminal that nobody reads.

    who logs ──put──▶ bounded memory ──▶ a thread, which may block ──▶ the descriptor

Nobody but that thread ever waits for the reader. What there is no room for is dropped, counted, and told of
at that place in the log as soon as somebody reads it again.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

MOST_BYTES = 1 << 20
"""What waits for the reader: some ten thousand lines."""
_FULL = 0.05
"""Seconds until one that took nothing is tried again."""
_GAP = b""
"""Stands where lines were dropped."""


class Outlet:
    """Hands lines to `write`, which says how many bytes it took, may wait, and raises OSError where it takes
    none. `tell` makes the line that says how many were dropped."""

    def __init__(self, write: Callable[[bytes], int], tell: Callable[[int], bytes]) -> None:
        self.dropped = 0
        """Lines that nobody will read, since the start."""
        self._take = write
        self._tell = tell
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        """Of those that wait, and of the one that is being written."""
        self._untold = 0
        """Dropped, and not told of yet."""
        self._changed = threading.Condition()  # of an RLock: what is logged within `put` does not lock up
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def put(self, line: bytes) -> None:
        """Takes a line, which ends with its newline, or drops it; from any thread, without waiting."""
        with self._changed:
            if self._bytes + len(line) > MOST_BYTES:
                self._drop()
                return
            if self._untold and _GAP not in self._waiting:
                self._waiting.append(_GAP)
            self._waiting.append(line)
            self._bytes += len(line)
            self._changed.notify_all()

    def flush(self, seconds: float) -> None:
        """Waits until all is written, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._bytes == 0, seconds)

    def _drop(self) -> None:
        self.dropped += 1
        self._untold += 1

    def _run(self) -> None:
        torn = False
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                line, untold = self._waiting.popleft(), self._untold
            text = line if line != _GAP else self._tell(untold)
            written = self._write(b"\n" * torn + text)
            whole = written == len(text) + torn
            torn = not whole if written else torn
            with self._changed:
                if whole and line == _GAP:
                    self._untold -= untold
                elif not whole and line != _GAP:
                    self._drop()
                if whole and self._untold and not self._waiting:
                    self._waiting.append(_GAP)
                self._bytes -= len(line)
                self._changed.notify_all()

    def _write(self, line: bytes) -> int:
        """How many bytes of it could be written: all, unless the disk is full, say, or the reader gone."""
        written = 0
        while written < len(line):
            try:
                written += self._take(line[written:])
            except BlockingIOError:  # a socket's own deadline (log.py), or a descriptor that does not block
                time.sleep(_FULL)
            except OSError:
                break
        return written
