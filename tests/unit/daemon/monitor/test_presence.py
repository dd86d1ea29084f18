"""What those see who wait for a change of whether a QEMU is there."""

from __future__ import annotations

import trio
import trio.testing

from refault.daemon.monitor.presence import Presence, Qemu


async def test_a_change_that_is_undone_at_once_is_seen() -> None:
    """A client has QEMU looked for, which is found away before the one who waits has run."""
    presence = Presence()
    presence.set(Qemu.AWAY)
    seen: list[Qemu] = []

    async def wait() -> None:
        await presence.change()
        seen.append(presence.qemu)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(presence.pause, 5)
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        presence.seek()
        assert presence.qemu is Qemu.DIALLED
        presence.set(Qemu.AWAY)
    assert seen == [Qemu.AWAY]
