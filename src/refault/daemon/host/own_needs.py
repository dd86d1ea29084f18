"""What refault needs beside QEMU and its clients: a place for state, the control socket, the metrics' port.

None of it is worth a VM that nobody guards: what cannot be had is told, in the log and in the status, and
tried again.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from refault.daemon.host.errors import operator_errors
from refault.daemon.host.repeats import repeats

log = logging.getLogger("refault")

RETRY = (0.5, 10.0)
"""Seconds: the first and the longest pause between two tries."""


class Troubles:
    """What cannot be had now, and why."""

    def __init__(self) -> None:
        self._why: dict[str, str] = {}

    def tell(self) -> tuple[str, ...]:
        """A line for each."""
        return tuple(self._why.values())

    def add(self, need: str, text: str) -> None:
        """What is not as it should be."""
        self._why[need] = text

    def over(self, need: str) -> None:
        """It is, or nobody wants it any more."""
        self._why.pop(need, None)

    async def keep(
        self,
        need: str,
        serve: Callable[..., Awaitable[object]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Runs `serve`, which says with its task status that it has what it needs, again and again until
        cancelled. Started when it has, or could not have it.

        `need` is what the lines begin with: the VM's name, and what it is.
        """
        delay, longest = RETRY
        told = False
        while True:
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(serve)
                    if self._why.pop(need, None) is not None:
                        log.info("%s: there again", need)
                    delay = RETRY[0]
                    if not told:
                        told = True
                        task_status.started()
            except Exception as error:
                expected = operator_errors(error)
                why = "; ".join(map(str, expected)) if expected else f"internal error: {error!r}"
                self.add(need, f"{need}: {why}")
                log.error(
                    "%s: %s; trying again",
                    need,
                    why,
                    exc_info=None if expected else error,
                    extra=repeats(need, why),
                )
            if not told:
                told = True
                task_status.started()
            await trio.sleep(delay)
            delay = min(2 * delay, longest)
