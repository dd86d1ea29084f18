"""Has QEMU hold our end of a local leg which not even a kill of refault may end (near/kept_ends.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refault.daemon.near.kept_ends import KeptEnds

if TYPE_CHECKING:
    from refault.daemon.migration import Migration
    from refault.daemon.relayed.channels import Channels


class Guard:
    """Of the newest channel of one relayed migration.

    Should the leg of a source end in its last moments, it would run its guest again (migration/legs.py).
    Refault holds it; but a kill of refault would end it, unless QEMU holds our end as well.
    """

    def __init__(self, migration: Migration, channels: Channels, kept: KeptEnds) -> None:
        self._migration = migration
        self._channels = channels
        self._kept = kept
        self._started = 0
        """The channel whose end QEMU was asked to hold."""
        self._giving = False
        """Whether it is being asked."""

    def start(self, *, again: bool = False) -> None:
        """Asks QEMU once for each channel, or `again`, without waiting for it."""
        channel = self._channels.channel
        if (again or self._started != channel) and not self._giving:
            self._started = channel
            self._giving = True
            self._migration.vm.start_soon(self.give)

    async def give(self) -> None:
        """Gives QEMU our ends, and takes them back where the channel has meanwhile come to its end."""
        try:
            if self._kept.main is None or self._kept.by_qemu:
                return
            channel = self._channels.channel
            await self._kept.give(self._migration.remember)
            if not self._migration.under_way or self._channels.over(channel):
                await self._kept.let_go()
                self._migration.remember()
        finally:
            self._giving = False
