"""When a migration without a relay is paused because it stands still."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from refault.daemon.known.patience import Patience
from refault.daemon.recovery import stall_watch
from refault.migration.phase import Role

AFTER = 15.0


@pytest.mark.parametrize(("version", "paused_at"), [((10, 0, 0), [15, 45, 105]), ((7, 2, 0), [])])
async def test_a_handshake_that_does_not_end_is_paused_where_qemu_survives_it(
    autojump_clock: trio.testing.MockClock, version: tuple[int, int, int], paused_at: list[int]
) -> None:
    """On a silent network nobody else ends it. It is given twice as much each time, for it may be long."""
    paused: list[float] = []
    began = trio.current_time()

    async def execute(command: str, **_: object) -> object:
        assert command == "migrate-pause"
        paused.append(trio.current_time() - began)
        return {}

    migration = SimpleNamespace(
        name="vm",
        role=Role.SOURCE,
        status="postcopy-recover",
        under_way=True,
        until_under_way=trio.lowlevel.checkpoint,
        repeats=lambda *_: {},
        vm=SimpleNamespace(
            version=version, patience=Patience(stall_after=AFTER), monitor=SimpleNamespace(execute=execute)
        ),
    )
    with trio.move_on_after(8 * AFTER):
        await stall_watch.watch(cast(Any, migration))
    assert paused == pytest.approx(paused_at, rel=0.15)
