"""The daemon's end."""

from __future__ import annotations

from typing import Any, cast

import pytest
import trio
import trio.testing

from refault.daemon import app
from refault.daemon.app import EXTENSION, Publisher, _until_stopping_is_safe
from refault.daemon.host.own_needs import Troubles
from refault.daemon.telling.snapshot import VmStatus

from .pictures import IDLE


class SlowVm:
    """One whose QEMU takes long over each of the descriptors that it is to hold."""

    name = "vm"
    may_stop = True

    async def prepare_to_stop(self) -> bool:
        await trio.sleep(40)
        return True


class Manager:
    def __init__(self) -> None:
        self.until = 0.0
        self.late = False

    def extend_timeout(self, seconds: float) -> None:
        self.late = self.late or (self.until > 0 and trio.current_time() > self.until)
        self.until = trio.current_time() + seconds


async def test_the_manager_is_asked_for_time_as_long_as_stopping_takes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    manager = Manager()
    await _until_stopping_is_safe(SlowVm(), manager)  # type: ignore[arg-type]
    assert trio.current_time() == 40
    assert not manager.late
    assert manager.until > 40 + EXTENSION / 2


def test_a_picture_that_cannot_be_made_leaves_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = False

    def picture(_: object) -> VmStatus:
        if fails:
            raise KeyError("of ours")
        return IDLE

    monkeypatch.setattr(app, "picture", picture)
    publisher = Publisher([cast(Any, None)], Troubles())
    fails = True
    assert [each.name for each in publisher.publish().vms] == [IDLE.name]
    assert publisher.status() is publisher.publish()
