"""Keeps a line that says the same again and again from filling the journal."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

FIRST_INTERVAL = 1.0
LONGEST_INTERVAL = 3600.0
"""Seconds until a line that repeats is said again; twice as long each time."""
MOST_SUBJECTS = 4096
"""Remembered; who was not said of for longest is forgotten, and is said of at once the next time."""


def repeats(subject: Hashable, what: Hashable) -> dict[str, object]:
    """`extra` of a line that may repeat: said at once where `what` is not what it was for `subject`."""
    return {"repeats": (subject, what)}


@dataclass
class _Said:
    what: Hashable
    interval: float
    again: float
    unsaid: int = 0


class Sparing(logging.Filter):
    """Passes lines marked with `repeats` at growing intervals, with the number of those it kept back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._said: OrderedDict[Hashable, _Said] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is said now."""
        marked = getattr(record, "repeats", None)
        if marked is None:
            return True
        subject, what = marked
        now = self._clock()
        said = self._said.get(subject)
        if said is None or said.what != what:
            self._said[subject] = _Said(what, FIRST_INTERVAL, now + FIRST_INTERVAL)
            self._said.move_to_end(subject)
            if len(self._said) > MOST_SUBJECTS:
                self._said.popitem(last=False)
            return True
        self._said.move_to_end(subject)
        if now < said.again:
            said.unsaid += 1
            return False
        if said.unsaid:
            more = "more of these since the last one said"
            if record.args and isinstance(record.args, tuple):  # kept: the journal has fields of them
                record.msg = f"{record.msg} (%d {more})"
                record.args = (*record.args, said.unsaid)
            else:
                record.msg = f"{record.getMessage()} ({said.unsaid} {more})"
                record.args = None
        said.unsaid = 0
        said.interval = min(said.interval * 2, LONGEST_INTERVAL)
        said.again = now + said.interval
        return True
