"""Where QEMUs' sockets are looked for."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, cast

import pytest
import trio

from refault.daemon import finder as finder_module
from refault.daemon.finder import Finder, _directories
from refault.daemon.fleet import Fleet
from refault.daemon.monitor.address import Address
from refault.daemon.options import VmOptions


def test_a_directory_that_may_not_be_looked_at_counts_as_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    stat = os.stat

    def refused(path: object, *args: object, **kwargs: object) -> os.stat_result:
        if str(path).endswith("/b"):
            raise PermissionError("not here")
        return stat(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", refused)
    assert list(_directories(f"{tmp_path}/*/x.real")) == [str(tmp_path), f"{tmp_path}/a"]


class OneWatch:
    def __init__(self, path: Path) -> None:
        self.pattern = str(path)

    def matches(self, path: str) -> bool:
        return path == self.pattern

    def vm(self, path: str) -> VmOptions:
        at = Address(f"{path}.clients", server=True)
        return VmOptions(name="a", qemu=Address(path), listen=(at,), state_dir=Path(f"{path}.d"))


async def test_a_socket_that_changes_before_its_vm_is_fronted_is_found_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finder_module, "GONE_AFTER", 0.01)
    path, wants = tmp_path / "a.real", list[int]()
    send, vms = trio.open_memory_channel[int](100)

    class NothingIsFronted:
        members: ClassVar[dict[str, object]] = {}

        async def want(self, sources: Mapping[str, Sequence[VmOptions]]) -> None:
            send.send_nowait(sum(map(len, sources.values())))

    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.bind(str(path))
        async with trio.open_nursery() as nursery:
            finder = Finder(OneWatch(path), cast(Fleet, NothingIsFronted()))
            await nursery.start(finder.run)
            path.chmod(0o600)
            await trio.sleep(0.05)
            assert vms.statistics().current_buffer_used == 1
            second.bind(str(tmp_path / "b"))
            (tmp_path / "b").rename(path)  # made anew
            with trio.fail_after(10):
                for _ in range(3):
                    wants.append(await vms.receive())
            nursery.cancel_scope.cancel()
    assert wants == [1, 0, 1]
