"""The daemon's end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.testing
from tests.unit.config.broken import BROKEN, FILES

from refault.config.files import load
from refault.daemon.app import EXTENSION, Publisher, _serve_host, _stop
from refault.daemon.fleet import Fleet
from refault.daemon.host.notify import Notifier
from refault.daemon.host.own_needs import Troubles
from refault.daemon.monitor.address import Address
from refault.daemon.options import Configuration, HostOptions, LogLevel
from refault.daemon.telling.control import query
from refault.daemon.telling.snapshot import VmStatus
from refault.daemon.vm import Vm

from .pictures import IDLE, PICTURE


class SlowVm:
    """One whose QEMU takes long over each of the descriptors that it is to hold."""

    name = "vm"
    may_stop = True
    safe_now = True

    def ends_soon(self) -> None:
        pass

    async def prepare_to_stop(self, *, restarts: bool = False) -> bool:
        await trio.sleep(40)
        return True

    async def let_go_of_clients(self) -> None:
        pass


async def no_signals() -> AsyncIterator[int]:
    await trio.sleep_forever()
    yield 0


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
    vms, scope = [cast(Vm, SlowVm()), cast(Vm, SlowVm())], trio.CancelScope()
    await _stop(lambda: vms, no_signals(), cast(Notifier, manager), scope)
    assert scope.cancel_called
    assert trio.current_time() == 40
    assert not manager.late
    assert manager.until > 40 + EXTENSION / 2


class MovingVm(SlowVm):
    """One that is not safe any more right after it was said to be, once; and fails, once."""

    asked = 0

    async def prepare_to_stop(self, *, restarts: bool = False) -> bool:
        self.asked += 1
        if self.asked == 1:
            raise KeyError("of ours")
        self.safe_now = self.asked > 2
        return True


async def test_all_are_safe_in_the_moment_of_the_end(autojump_clock: trio.testing.MockClock) -> None:
    moving, scope = MovingVm(), trio.CancelScope()
    vms = [cast(Vm, moving)]
    with trio.move_on_after(50):
        await _stop(lambda: vms, no_signals(), cast(Notifier, Manager()), scope)
    assert (moving.asked, scope.cancel_called) == (3, True)


async def test_an_end_is_heard_while_what_is_wanted_first_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = trio.Event()

    async def never(*_: object) -> None:
        asked.set()
        await trio.sleep_forever()

    monkeypatch.setattr(Fleet, "want", never)
    host = HostOptions(control=Address(str(tmp_path / "control"), server=True))
    end, ends = trio.open_memory_channel[int](1)
    _, reloads = trio.open_memory_channel[int](1)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            wanted = Configuration(host=host, vms=())
            nursery.start_soon(_serve_host, wanted, "host", lambda: wanted, reloads, ends, no_signals())
            await asked.wait()
            await end.send(15)


async def test_a_picture_that_cannot_be_made_leaves_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = False

    def told(vm: Vm) -> VmStatus:
        if fails and vm is broken:
            raise KeyError("of ours")
        return IDLE if vm is broken else PICTURE.vms[0]

    monkeypatch.setattr("refault.daemon.app.picture", told)
    broken, other = (cast(Vm, SimpleNamespace(name=name)) for name in (IDLE.name, PICTURE.vms[0].name))
    publisher = Publisher(lambda: [broken, other], Troubles())
    fails = True
    both = (IDLE, PICTURE.vms[0])
    assert publisher.publish().vms == both
    monkeypatch.setattr("refault.daemon.app.SLICE", 1)
    assert len(list(publisher.slices())) == 2
    assert publisher.last.vms == both
    assert (await trio.to_thread.run_sync(publisher.status)).vms == both


async def test_a_reload_that_fails_in_any_way_ends_nothing(tmp_path: Path) -> None:
    host = HostOptions(metrics=None, control=Address(str(tmp_path / "control"), server=True))
    wanted = Configuration(host=host, log_level="info", vms=())
    reload, reloads = trio.open_memory_channel[int](1)
    end, ends = trio.open_memory_channel[int](1)
    reads = 0

    def read() -> Configuration:
        nonlocal reads
        reads += 1
        if reads == 1:
            raise PermissionError("not here")
        if reads == 3:
            trio.from_thread.run_sync(end.send_nowait, 15)
        level = cast(LogLevel, "no level") if reads == 2 else "info"
        return Configuration(host=host, log_level=level, vms=())

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve_host, wanted, "host", read, reloads, ends, no_signals())
            for _ in range(3):
                await reload.send(1)
    assert reads == 3


async def test_no_file_that_is_wrong_changes_anything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the broken configurations, at a reload: a line of the log for each thing, and all as before."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/no/refault")
    control = tmp_path / "control"
    wanted = Configuration(host=HostOptions(control=Address(str(control), server=True)), vms=())
    reload, reloads = trio.open_memory_channel[int](0)
    _, ends = trio.open_memory_channel[int](1)
    broken = [
        (lambda path, text=text: (path / "refault.toml").write_text(text), told) for text, told in BROKEN
    ]
    where = tmp_path / "0"

    async with trio.open_nursery() as nursery:
        read = partial(_load, lambda: where)
        nursery.start_soon(_serve_host, wanted, "host", read, reloads, ends, no_signals())
        await reload.send(1)  # there is nothing yet
        inode = control.stat().st_ino
        for number, (make, told) in enumerate([*broken, *FILES.values()]):
            where = tmp_path / str(number)
            where.mkdir()
            make(where)
            caplog.clear()
            await reload.send(1)
            while not [record for record in caplog.records if record.levelname == "ERROR"]:
                await trio.sleep(0.001)
            [said] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
            assert said.startswith(f"host: the configuration is wrong, so nothing is changed: {where}/")
            assert told in said
            assert said.isprintable()
            assert control.stat().st_ino == inode
        status = await trio.to_thread.run_sync(query, control, 5.0)
        assert (len(status.troubles), status.vms) == (1, ())
        nursery.cancel_scope.cancel()


def _load(where: Callable[[], Path]) -> Configuration:
    return load(where() / "refault.toml")
