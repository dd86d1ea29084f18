"""What must hold at every moment: no QEMU that has the guest dies, and the guest runs once."""

from __future__ import annotations

import contextlib

import trio

from refault.lab.guest import Progress
from refault.lab.qemu import Pair, Qemu
from refault.lab.qmp_client import QmpClosed, QmpError

_PACE = 0.02


class Watch:
    """Looks at both ends until it is cancelled; ``broken`` says what was seen that must not be."""

    def __init__(self, pair: Pair) -> None:
        self.broken: list[str] = []
        self.looks = 0
        self.handed_over = False
        """Whether the guest has been seen to run at the destination."""
        self._pair = pair
        self._source_last: list[Progress | None] = []

    async def run(self) -> None:
        """Looks, and looks again."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_memory)
            nursery.start_soon(self._watch_states)

    def look_at_processes(self) -> None:
        """Not for a precopy loss: a destination that has no guest may die."""
        for qemu in (self._pair.source, self._pair.destination):
            if qemu.process.status is not None:
                self._say(f"the {qemu.name} QEMU is dead (status {qemu.process.status})")

    async def _watch_memory(self) -> None:
        """The vCPUs' own progress: once one has gone further at the destination, none may at the source."""
        while True:
            there = self._progress(self._pair.destination) if self._resumed() else []
            here = self._progress(self._pair.source)
            if self.handed_over and self._source_last and _further(here, self._source_last):
                self._say(f"the guest runs at the source ({here}) after it ran at the destination ({there})")
            if here:
                self._source_last = here
                if there and _further(there, here):
                    self.handed_over = True
            self.looks += 1
            await trio.sleep(_PACE)

    async def _watch_states(self) -> None:
        """query-status, the destination first: what runs there at one moment runs nowhere else at the next.

        One question at a time: a destination whose main thread waits for a page answers when the page comes.
        """
        while True:
            if await _running(self._pair.destination) and await _running(self._pair.source):
                self._say("query-status says running on both sides")
            await trio.sleep(_PACE)

    def _resumed(self) -> bool:
        """Whether the destination's memory may be read: not before its pages are dropped for postcopy.

        A page that goes between the look whether it is there and the read is made anew by the read, empty,
        and QEMU exits when the source's arrives (UFFDIO_COPY: EEXIST). RAM_DISCARD comes before RUN.
        """
        return any(event.name == "RESUME" for event in self._pair.destination.qmp.events)

    def _progress(self, qemu: Qemu) -> list[Progress | None]:
        with contextlib.suppress(OSError):
            return qemu.progress()
        return []

    def _say(self, text: str) -> None:
        if text not in self.broken and len(self.broken) < 5:
            self.broken.append(text)


def _further(new: list[Progress | None], old: list[Progress | None]) -> bool:
    return any(a is not None and b is not None and a > b for a, b in zip(new, old, strict=False))


async def _running(qemu: Qemu) -> bool | None:
    """None where it has gone."""
    try:
        return bool((await qemu.qmp.execute("query-status", timeout=300))["running"])
    except (QmpError, QmpClosed, trio.TooSlowError):
        return None
