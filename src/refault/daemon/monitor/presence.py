"""Whether a QEMU is there, as clients are to see it: upstream.py knows, clients.py acts on it."""

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
        self._sought: trio.Event | None = None

    def set(self, qemu: Qemu) -> None:
        """Wakes those who wait, where it is another one."""
        if qemu is not self.qemu:
            self.qemu = qemu
            changed, self._changed = self._changed, trio.Event()
            changed.set()

    async def pause(self, seconds: float) -> None:
        """Between two looks for a QEMU that was not there: returns at once when it is sought."""
        self._sought = trio.Event()
        try:
            with trio.move_on_after(seconds):
                await self._sought.wait()
        finally:
            self._sought = None

    def seek(self) -> None:
        """A client has come: a QEMU that was not there may have come right before, and is looked for now."""
        if self._sought is not None and self.qemu is Qemu.AWAY:
            self._sought.set()
            self.set(Qemu.DIALLED)

    async def until(self, condition: Callable[[Qemu], bool]) -> None:
        """Waits until `condition` holds for the state. One that holds only for a moment may be missed."""
        while not condition(self.qemu):
            await self._changed.wait()

    async def change(self) -> None:
        """Waits for the next change, also one that the next undoes before the waiter has run."""
        await self._changed.wait()
