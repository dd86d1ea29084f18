"""Waits for what the refaults say, for they may learn it after the client that QEMU answers."""

from __future__ import annotations

from collections.abc import Callable

import trio

from refault.daemon.telling.snapshot import VmStatus
from refault.lab.driver import RefaultDriver

STILL = 0.5
"""Seconds for which nothing passes before nothing more is expected to."""


async def told(
    driver: RefaultDriver, holds: Callable[[list[VmStatus]], object], seconds: float = 20.0
) -> list[VmStatus]:
    """What they say as soon as it ``holds``. Raises AssertionError, with what they say, after ``seconds``."""
    statuses: list[VmStatus] = []
    with trio.move_on_after(seconds):
        while not holds(statuses := await driver.statuses()):
            await trio.sleep(0.02)
        return statuses
    raise AssertionError(f"not within {seconds} s: {statuses}")


async def recovered(driver: RefaultDriver, times: int, seconds: float = 20.0) -> list[VmStatus]:
    """Waits until both say that they have recovered so many losses, and no more."""
    return await told(driver, lambda vms: [vm.recovery.recoveries for vm in vms] == [times] * 2, seconds)


async def nothing_moves(driver: RefaultDriver, seconds: float = 20.0) -> None:
    """Waits until the source's QEMU sends nothing more, for nobody takes it. Raises trio.TooSlowError."""
    moved, since = -1, trio.current_time()
    with trio.fail_after(seconds):
        while trio.current_time() < since + STILL:
            now = (await driver.statuses())[0].channel.bytes_forward
            if now != moved:
                moved, since = now, trio.current_time()
            await trio.sleep(0.02)
