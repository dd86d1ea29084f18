"""`refault status` against real control sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
from tests.unit.daemon.pictures import BUSY, IDLE, PICTURE

from refault.cli.main import main
from refault.cli.status import render
from refault.daemon.control import serve_control
from refault.daemon.snapshot import Status, decode


def _same(status: Status) -> Status:
    return status


@asynccontextmanager
async def daemons(directory: Path, **statuses: Status) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for name, status in statuses.items():
            path = directory / f"{name}.control"
            await nursery.start(serve_control, path, partial(_same, status))
        yield
        nursery.cancel_scope.cancel()


async def refault(*arguments: str) -> int:
    return await trio.to_thread.run_sync(main, arguments)


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


async def test_json_of_one_daemon_is_its_document(runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with daemons(runtime, one=PICTURE):
        assert await refault("status", "--json", "--control", str(runtime / "one.control")) == 0
    assert decode(capsys.readouterr().out.encode()) == PICTURE


async def test_without_control_all_daemons_are_asked(
    runtime: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with daemons(runtime, a=Status(vms=(BUSY,)), b=Status(vms=(IDLE,))):
        assert await refault("status", "--json") == 0
        assert decode(capsys.readouterr().out.encode()) == Status(vms=(BUSY, IDLE))
        assert await refault("status") == 0
        assert capsys.readouterr().out == render(PICTURE, 80)


async def test_instances_of_the_unit_are_found(runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runtime / "vm1").mkdir()
    async with daemons(runtime / "vm1", vm1=Status(vms=(BUSY,))), daemons(runtime, b=Status(vms=(IDLE,))):
        assert await refault("status", "--json") == 0
    assert {vm.name for vm in decode(capsys.readouterr().out.encode()).vms} == {"vm1", "vm2"}


async def test_one_dead_daemon_hides_no_other(runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runtime / "dead.control").touch()
    async with daemons(runtime, live=PICTURE):
        assert await refault("status") == 1
    told = capsys.readouterr()
    assert "vm1" in told.out
    assert told.err.count("\n") == 1
    assert "dead.control" in told.err


@pytest.mark.parametrize("arguments", [["status"], ["status", "--control", "/nowhere/x.control"]])
def test_no_daemon_is_one_line_and_status_1(
    runtime: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("refault: no daemon ")
    assert told.err.count("\n") == 1


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_fit_the_terminal_and_tell_every_fact(width: int) -> None:
    text = render(Status(vms=(BUSY,)), width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert "connected, QEMU" in words
    for value in (*msgspec.structs.astuple(BUSY.qemu)[1:], *msgspec.structs.astuple(BUSY.migration)):
        assert str(value) in words
    for phrase in (
        "listens unix:/run/front",
        "listens NOT at unix:/run/vm/front: its directory does not exist",
        "2 connected, 7 in all; 31 commands, 12 events; 1 dropped",
        "HELD the recovery handshake is under way",
        "GIVEN UP no further attempt for this loss",
        "941.9 MiB forward, 4.22 KiB return path",
        "4 losses, 6 attempts, 3 recoveries, the last in 0.012 s; last error: QEMU said no",
        "p50 0.002 s, p99 0.031 s, max 1.25 s, of 110 answered requests",
        "repeats 5 requests repeated by QEMU itself",
        "pc.ram (1 GiB of 4 KiB) 119 110 3 9",
        "all 120 110 3 10 14",
    ):
        assert phrase in words


def test_what_others_named_cannot_steer_the_terminal() -> None:
    vm = msgspec.structs.replace(IDLE, name="vm\x1b[2J\n")
    text = render(Status(vms=(vm,)), 80)
    assert text.startswith("vm?[2J?\n")
