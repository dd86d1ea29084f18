"""How much of the event loop one VM's clients, or its QEMU, may have: who floods waits, and nobody else."""

from __future__ import annotations

import math
import time

import trio

SHARE = 0.25
"""Of the loop's time. A process that never sleeps also waits for a core on a busy host (sched(7))."""
BURST = 0.003
"""Seconds of the loop that may be had at once."""
LONGEST_WAIT = 0.5
"""Seconds, whatever was had: who comes and goes begins with a turn, and who stays is not to pay for it."""


class Turns:
    """Of one VM's clients together, or of its QEMU.

    turn = turns.begin()
    ...                         # one batch of messages
    await turns.end(turn, more=...)
    """

    def __init__(self) -> None:
        self._had = 0.0
        """Seconds, less what has been granted since."""
        self._at = -math.inf

    @staticmethod
    def begin() -> float:
        """A turn begins."""
        return time.thread_time()

    async def end(self, turn: float, *, more: bool) -> None:
        """It is over: returns when the next may begin. Who has `more` at hand lets the others go first."""
        now = trio.current_time()
        had = max(self._had - SHARE * (now - self._at), 0.0) + time.thread_time() - turn
        self._had = min(had, BURST + SHARE * LONGEST_WAIT)
        self._at = now
        if self._had > BURST:
            await trio.sleep((self._had - BURST) / SHARE)
        elif more:
            await trio.lowlevel.checkpoint()
