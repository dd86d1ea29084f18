"""Has QEMU hold our end of a local leg which not even a kill of refault may end (near/kept_ends.py)."""

from __future__ import annotations

from collections.abc import Callable

from refault.daemon.known.course import Course
from refault.daemon.near.kept_ends import KeptEnds


class Guard:
    """Of the newest channel of one relayed migration; `over` tells whether the end of one is dealt with.

    Should the leg of a source end in its last moments, it would run its guest again (migration/legs.py).
    Refault holds it; but a kill of refault would end it, unless QEMU holds our end as well.
    """

    def __init__(self, course: Course, kept: KeptEnds, over: Callable[[int], bool]) -> None:
        self._course = course
        self._kept = kept
        self._over = over
        self._started = 0
        """The channel whose end QEMU was asked to hold."""
        self._giving = False
        """Whether it is being asked."""

    def start(self, *, again: bool = False) -> None:
        """Asks QEMU once for each channel, or `again`, without waiting for it."""
        channel = self._course.channel
        if (again or self._started != channel) and not self._giving:
            self._started = channel
            self._giving = True
            self._course.vm.start_soon(self.give)

    async def give(self) -> None:
        """Gives QEMU our ends, and takes them back where the channel has meanwhile come to its end."""
        try:
            if self._kept.main is None or self._kept.by_qemu:
                return
            channel = self._course.channel
            await self._kept.give(self._course.remember)
            if not self._course.under_way or self._over(channel):
                await self._kept.let_go()
                self._course.remember()
        finally:
            self._giving = False
