"""`refault status` against real control sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
from tests.unit.daemon.pictures import BUSY, IDLE, PICTURE

from refault.cli.daemons import NO_ANSWER, NO_DAEMON, NO_QEMU, NOT_PERMITTED
from refault.cli.main import main
from refault.cli.status import render
from refault.daemon.host.paths import short_name
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.address_text import parse_address
from refault.daemon.monitor.front import Front
from refault.daemon.telling.control import serve_control
from refault.daemon.telling.picture import _listener
from refault.daemon.telling.snapshot import Status, decode


def _same(status: Status) -> Status:
    return status


@asynccontextmanager
async def daemons(directory: Path, **statuses: Status) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for name, status in statuses.items():
            path = directory / f"{name}.control"
            await nursery.start(serve_control, Address(str(path)), partial(_same, status))
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
        assert await refault("status", "--json", "--control", str(runtime / "one.control")) == NO_QEMU
        assert await refault("status", "--json", f"--control=unix:{runtime / 'one.control'}") == NO_QEMU
    told = capsys.readouterr().out.splitlines(keepends=True)
    assert [decode(line.encode()) for line in told] == [PICTURE, PICTURE]


async def test_without_control_all_daemons_are_asked(
    runtime: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with daemons(runtime, a=Status(vms=(BUSY,)), b=Status(vms=(IDLE,))):
        assert await refault("status", "--json") == NO_QEMU
        assert decode(capsys.readouterr().out.encode()) == Status(vms=(BUSY, IDLE))
        assert await refault("status") == NO_QEMU
        assert capsys.readouterr().out == render(PICTURE, 80)


async def test_instances_of_the_unit_are_found(runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runtime / "vm1").mkdir()
    async with daemons(runtime / "vm1", vm1=Status(vms=(BUSY,))), daemons(runtime, b=Status(vms=(IDLE,))):
        assert await refault("status", "--json") == NO_QEMU
    assert {vm.name for vm in decode(capsys.readouterr().out.encode()).vms} == {"vm1", "vm2"}


async def test_one_dead_daemon_hides_no_other(runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runtime / "dead.control").touch()
    async with daemons(runtime, live=PICTURE):
        assert await refault("status") == NO_DAEMON
    told = capsys.readouterr()
    assert "vm1" in told.out
    assert told.err.count("\n") == 1
    assert "dead.control" in told.err


@pytest.mark.parametrize("arguments", [["status"], ["status", "--control", "/nowhere/x.control"]])
def test_no_daemon_is_one_line_and_its_status(
    runtime: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == NO_DAEMON
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("refault: no daemon ")
    assert told.err.count("\n") == 1


async def test_a_vm_is_found_by_its_name_whatever_its_sockets_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as directory:  # tmp_path has too long a name
        monkeypatch.setenv("RUNTIME_DIRECTORY", directory)
        await _find_by_name(Path(directory), capsys)


async def _find_by_name(runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "n" * 64
    vm = msgspec.structs.replace(BUSY, name=long)
    (runtime / "dead.control").touch()  # another's: no news
    (runtime / long).mkdir()
    own = runtime / long / short_name(runtime / long, long, "")
    async with daemons(runtime, a=PICTURE), daemons(own.parent, **{own.name: Status(vms=(vm,))}):
        for name, status in (("vm1", 0), ("vm2", NO_QEMU), (long, 0)):
            assert await refault("status", name, "--json") == status
            assert [vm.name for vm in decode(capsys.readouterr().out.encode()).vms] == [name]
        assert await refault("status", "vm1", "--control", str(runtime / "a.control")) == 0
        capsys.readouterr()
        assert await refault("status", "vm3", "--control", str(runtime / "a.control")) == NO_DAEMON
        assert "a.control has no VM vm3" in capsys.readouterr().err
        async with daemons(runtime, z=Status(troubles=("vm3: not fronted: why", "vm4: not fronted"))):
            assert await refault("status", "vm3") == NO_DAEMON
            assert capsys.readouterr().err == "refault: vm3: not fronted: why\n"
        (runtime / "dead.control").unlink()
        assert await refault("status", "vm3") == NO_DAEMON
        assert capsys.readouterr().err.startswith("refault: no daemon has a VM vm3; is `refault run` running")


def test_that_there_is_no_vm_is_told() -> None:
    assert render(Status(), 80) == "no VM\n"


def test_who_does_not_answer_is_told_from_who_is_not_there(
    runtime: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refault.cli.daemons._ANSWER_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as stopped, socket.socket(socket.AF_UNIX) as first:
        stopped.bind(str(runtime / "vm1.control"))
        stopped.listen(0)
        assert main(["status", "vm1"]) == NO_ANSWER
        first.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # its queue is full now
            first.connect(str(runtime / "vm1.control"))
        assert main(["status"]) == NO_ANSWER
    assert capsys.readouterr().err.count("gave no answer in 0.2 s: it is stopped, or hangs") == 2
    assert main(["status", "vm1"]) == NO_DAEMON


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_who_may_not_ask_is_told_so(runtime: Path) -> None:
    code = (
        "import os, sys; from refault.cli.main import main; import refault.cli.status, trio;"
        "os.setgid(65534); os.setuid(65534); sys.exit(main(sys.argv[1:]))"
    )

    def status(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-c", code, "status", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        return done.returncode, done.stderr

    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNTIME_DIRECTORY", directory)
        os.chmod(directory, 0o755)
        with socket.socket(socket.AF_UNIX) as daemon:
            daemon.bind(f"{directory}/vm1.control")
            daemon.listen()
            os.chmod(f"{directory}/vm1.control", 0o600)
            for arguments in ((), ("vm1",), ("--control", f"{directory}/vm1.control")):
                assert status(*arguments) == (
                    NOT_PERMITTED,
                    f"refault: {directory}/vm1.control: Permission denied; be root or the daemon's user\n",
                )
        os.chmod(directory, 0o700)
        assert status() == (
            NOT_PERMITTED,
            f"refault: {directory} may not be looked into: Permission denied; be root\n",
        )


def test_what_refault_itself_lacks_is_told() -> None:
    text = render(Status(troubles=("vm1: metrics: no port",), log_lines_dropped=7), 80)
    assert text.splitlines() == [
        "TROUBLE      vm1: metrics: no port",
        "",
        "7 lines of the log are lost: not read, or a full disk",
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("", ""),
        (",read-only=on,audit=on", "; read-only; audit"),
        (",hide-pause=30", "; pauses hidden for 30 s"),
        (",hide-pause=0", ""),
        (",deny=quit,deny=device_add", "; denied device_add, quit"),
        (",mode=0660,owner=root,group=4294967290", "; mode 0660; owner root; group 4294967290"),
        (
            ",allow-user=root,allow-user=4294967290,allow-group=root",
            "; mode 0666; allowed users root, 4294967290; allowed groups root",
        ),
    ],
)
def test_who_may_speak_where_and_what(options: str, told: str) -> None:
    front = Front("vm", parse_address(f"unix:/run/x{options}", server=True), take)
    listeners = (_listener(front),)
    words = " ".join(render(Status(vms=(msgspec.structs.replace(IDLE, listeners=listeners),)), 200).split())
    assert f"listens NOT at unix:/run/x: there is no QEMU{told} clients" in words


async def take(sock: socket.socket) -> None:
    sock.close()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_fit_the_terminal_and_tell_every_fact(width: int) -> None:
    text = render(Status(vms=(BUSY,)), width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert "connected, QEMU" in words
    for value in (*msgspec.structs.astuple(BUSY.qemu)[1:], *msgspec.structs.astuple(BUSY.migration)[:-1]):
        assert str(value) in words
    for phrase in (
        "listens unix:/run/front",
        "listens NOT at unix:/run/vm/front: its directory does not exist",
        "2 connected, 7 in all; 31 commands, 12 events; 1 dropped",
        f"hidden since {time.strftime('%H:%M:%S', time.localtime(1.7e9))} its pause, from clients",
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
