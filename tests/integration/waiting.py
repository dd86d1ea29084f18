"""Waits for what the refaults say, for they may learn it after the client that QEMU answers."""

from __future__ import annotations

from collections.abc import Callable

import trio

from refault.daemon.kernel.process import sockets_of
from refault.daemon.kernel.unix_diag import unix_sockets
from refault.daemon.telling.snapshot import VmStatus
from refault.lab.driver import RefaultDriver

STILL = 1.0
"""Seconds for which nothing passes before nothing more is expected to."""


async def told(
    driver: RefaultDriver, holds: Callable[[list[VmStatus]], object], seconds: float = 40.0
) -> list[VmStatus]:
    """What both say as soon as it ``holds``. Raises AssertionError, with what they say, after ``seconds``."""
    statuses: list[VmStatus] = []
    with trio.move_on_after(seconds):
        while len(statuses := await driver.statuses()) < len(driver.controls) or not holds(statuses):
            await trio.sleep(0.02)
        return statuses
    raise AssertionError(f"not within {seconds} s: {statuses}")


async def recovered(driver: RefaultDriver, times: int, seconds: float = 40.0) -> list[VmStatus]:
    """Waits until both say that they have recovered so many losses, and no more."""
    return await told(driver, lambda vms: [vm.recovery.recoveries for vm in vms] == [times] * 2, seconds)


async def nothing_moves(driver: RefaultDriver, seconds: float = 40.0) -> None:
    """Waits until the source's QEMU sends nothing more, for nobody takes it. Raises trio.TooSlowError."""
    moved, since = -1, trio.current_time()
    with trio.fail_after(seconds):
        while trio.current_time() < since + STILL:
            now = (await driver.statuses())[0].channel.bytes_forward
            if now != moved:
                moved, since = now, trio.current_time()
            await trio.sleep(0.02)


async def held_by_qemu(qemu: int, refault: int, seconds: float = 40.0) -> None:
    """Waits until the process of a QEMU has refault's end of a local leg too, as it may have its clients'
    connections, whose other ends are the clients', and its monitor's, where QEMU listened. Raises
    trio.TooSlowError."""
    with trio.fail_after(seconds):
        while True:
            qemus = sockets_of(qemu)
            shared = qemus.keys() & sockets_of(refault).keys()
            sockets = list(unix_sockets())
            legs = qemus.keys() & {each.inode for each in sockets if not each.name}
            if [each for each in sockets if each.inode in shared and each.peer in legs]:
                return
            await trio.sleep(0.02)
