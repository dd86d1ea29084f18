"""Whether a QEMU is there, as clients are to see it: upstream.py knows, listeners and clients act on it."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

import trio


class Qemu(Enum):
    """What is known of the QEMU behind the monitor."""

    UNKNOWN = auto()
    """It has not been looked for yet."""
    AWAY = auto()
    """Nobody answers: clients find nobody either."""
    WAITING = auto()
    """It may be there; a client is to come before it is connected to (QEMU's wait=on)."""
    DIALLED = auto()
    """It is being connected to."""
    THERE = auto()
    """It has greeted."""


class Presence:
    """The state, and who waits for it to change."""

    def __init__(self) -> None:
        self.qemu = Qemu.UNKNOWN
        self._changed = trio.Event()

    def set(self, qemu: Qemu) -> None:
        """Wakes those who wait, where it is another one."""
        if qemu is not self.qemu:
            self.qemu = qemu
            changed, self._changed = self._changed, trio.Event()
            changed.set()

    async def until(self, condition: Callable[[Qemu], bool]) -> None:
        """Waits until `condition` holds for the state."""
        while not condition(self.qemu):
            await self._changed.wait()
