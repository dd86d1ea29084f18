"""sd_notify: what a service manager receives."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import trio
import trio.testing

from refault.daemon.host.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A service manager's socket and its $NOTIFY_SOCKET."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@refault-test-{uuid4()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        receiver.settimeout(20)
        yield receiver, name


def test_each_notice_is_one_datagram(manager: tuple[socket.socket, str]) -> None:
    receiver, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.ready("waiting for QEMU")
    notifier.extend_timeout(1.5)
    notifier.stopping("two\nlines\nREADY=1")
    assert [receiver.recv(4096) for _ in range(3)] == [
        b"READY=1\nSTATUS=waiting for QEMU",
        b"EXTEND_TIMEOUT_USEC=1500000",
        b"STOPPING=1\nSTATUS=two lines READY=1",
    ]


def test_a_reload_begins_with_the_time_of_the_manager_s_clock(manager: tuple[socket.socket, str]) -> None:
    receiver, name = manager
    before = time.monotonic_ns() // 1000
    Notifier({"NOTIFY_SOCKET": name}).reloading()
    said, when = receiver.recv(4096).decode().splitlines()
    assert said == "RELOADING=1"
    assert before <= int(when.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


@pytest.mark.parametrize(
    ("pid", "told"), [(os.getpid(), 4), (1, 0), (None, 4)], ids=["ours", "another", "nobody"]
)
async def test_the_watchdog_hears_twice_in_its_time(
    manager: tuple[socket.socket, str], pid: int | None, told: int, autojump_clock: trio.testing.MockClock
) -> None:
    receiver, name = manager
    receiver.setblocking(False)
    ours = {} if pid is None else {"WATCHDOG_PID": str(pid)}
    notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "30000000", **ours})
    with trio.move_on_after(50):
        await notifier.keep_watchdog()
    for _ in range(told):
        assert receiver.recv(4096) == b"WATCHDOG=1"
    with pytest.raises(BlockingIOError):
        receiver.recv(4096)


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_nothing_is_said_where_nobody_asked(environment: dict[str, str]) -> None:
    Notifier(environment).ready("")


def test_a_manager_that_is_gone_is_logged_and_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("")
    assert "cannot notify" in caplog.text


def test_a_manager_that_does_not_read_does_not_block(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        for _ in range(10_000):
            notifier.ready("x" * 1000)
