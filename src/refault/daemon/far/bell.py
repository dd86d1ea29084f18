"""Wakes one task that has run out of things to do."""

from __future__ import annotations

import trio


class Bell:
    """Who waits for it goes on when it is rung; one that was rung before is not waited for."""

    def __init__(self) -> None:
        self._rung = trio.Event()

    def ring(self) -> None:
        """There is something to do."""
        self._rung.set()

    async def wait(self) -> None:
        """Until it is rung; then it can be waited for again."""
        await self._rung.wait()
        self._rung = trio.Event()
