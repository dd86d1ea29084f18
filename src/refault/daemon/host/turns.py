"""How much of the event loop one VM's clients, or its QEMU, may have: who floods waits, and nobody else."""

from __future__ import annotations

import math
import time

import trio

SHARE = 0.5
"""Of the loop's time. A process that never sleeps also waits for a core on a busy host (sched(7))."""
SHARE_BESIDE_OTHERS = 0.025
"""Of the same, while other VMs have turns too."""
AT_WORK = 0.1
"""Seconds for which a VM counts as one that has turns."""
BURST = 0.006
"""Seconds of the loop that may be had at once: some thirty commands."""
LONGEST_WAIT = 0.5
"""Seconds, whatever was had: who comes and goes begins with a turn, and who stays is not to pay for it."""
COMING = 0.0004
"""Seconds of the loop that a client takes who comes and goes again, in tasks that are no turn of his."""


class _Latest:
    """The VM that had the latest turn, and when the latest one of any other was."""

    def __init__(self) -> None:
        self.thread_time = 0.0
        """What the loop had used when it ended."""
        self._vm = ""
        self._at = self._other_at = -math.inf

    def note(self, vm: str, now: float) -> bool:
        """`vm` has a turn. Whether others have any."""
        if vm != self._vm:
            self._vm, self._other_at = vm, self._at
        self._at = now
        return now - self._other_at < AT_WORK


_clock = time.perf_counter
_latest = trio.lowlevel.RunVar[_Latest]("refault.turns")


class Turns:
    """Of one VM's clients together, or of its QEMU.

    turn = turns.begin()
    ...                         # one batch of messages
    await turns.end(turn, more=...)
    """

    def __init__(self, vm: str) -> None:
        self._vm = vm
        self._had = 0.0
        """Seconds, less what has been granted since."""
        self._at = -math.inf
        self._latest: _Latest | None = None
        """This run's."""

    @staticmethod
    def begin() -> float:
        """A turn begins."""
        return _clock()

    async def end(self, turn: float, *, more: bool) -> None:
        """It is over: returns when the next may begin. Who has `more` at hand lets the others go first."""
        pause = self._took(turn)
        if pause > 0:
            await trio.sleep(pause)
        elif more:
            await trio.lowlevel.checkpoint()

    async def go_on(self, turn: float) -> float:
        """In the midst of what is not to wait, whatever it takes, the others have their turn: returns when it
        goes on, as `begin` does."""
        self._took(turn)
        await trio.lowlevel.checkpoint()
        return self.begin()

    async def ready(self) -> None:
        """Returns when the next turn may begin, after one that was not ended."""
        await trio.sleep(self._spend(0.0, self._latest or self._find_latest()))

    async def come(self) -> None:
        """Returns when one more client may be served."""
        pause = self._spend(COMING, self._latest or self._find_latest())
        await trio.sleep(pause)

    def _find_latest(self) -> _Latest:
        try:
            self._latest = _latest.get()
        except LookupError:
            _latest.set(_Latest())
            self._latest = _latest.get()
        return self._latest

    def _took(self, turn: float) -> float:
        """Seconds until the next turn may begin after this one.

        It took no longer than by the clock, nor more than the loop has used since the last one, which is less
        where the loop has waited for a core. To ask that at its beginning, too, would cost a system call.
        """
        took, latest, used = _clock() - turn, self._latest or self._find_latest(), time.thread_time()
        took, latest.thread_time = min(took, used - latest.thread_time), used
        return self._spend(took, latest)

    def _spend(self, seconds: float, latest: _Latest) -> float:
        """Seconds until the next turn may begin."""
        now = trio.current_time()
        share = SHARE_BESIDE_OTHERS if latest.note(self._vm, now) else SHARE
        had = max(self._had - share * (now - self._at), 0.0) + seconds
        self._had = min(had, BURST + share * LONGEST_WAIT)
        self._at = now
        return max(self._had - BURST, 0.0) / share
