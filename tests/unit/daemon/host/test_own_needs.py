"""What cannot be had is told and tried again, over real sockets."""

from __future__ import annotations

import logging
import os
import socket
from functools import partial
from pathlib import Path

import pytest
import trio
from tests.unit.daemon.pictures import PICTURE

from refault.daemon.host import own_needs
from refault.daemon.host.own_needs import Troubles
from refault.daemon.monitor.address import Address
from refault.daemon.telling.control import query, serve_control
from refault.daemon.telling.metrics import serve_metrics


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_needs, "RETRY", (0.01, 0.02))


async def until(troubles: Troubles, count: int) -> tuple[str, ...]:
    with trio.fail_after(10):
        while len(troubles.tell()) != count:
            await trio.sleep(0.01)
    return troubles.tell()


async def test_a_port_that_is_taken_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    troubles = Troubles()
    async with trio.open_nursery() as nursery:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            metrics = partial(serve_metrics, Address(None, "127.0.0.1", port, server=True), lambda: PICTURE)
            await nursery.start(troubles.keep, "vm1: metrics", metrics)
            [told] = troubles.tell()
            assert told.startswith(f"vm1: metrics: cannot serve metrics on 127.0.0.1:{port}: something")
        await until(troubles, 0)
        (await trio.open_tcp_stream("127.0.0.1", port)).socket.close()
        nursery.cancel_scope.cancel()
    assert "vm1: metrics: there again" in caplog.text


async def test_a_control_socket_is_made_when_it_can_be_and_made_again(tmp_path: Path) -> None:
    path = tmp_path / "run" / "vm1.control"
    troubles = Troubles()
    async with trio.open_nursery() as nursery:
        serve = partial(serve_control, Address(str(path)), lambda: PICTURE)
        await nursery.start(troubles.keep, "vm1: control socket", serve)
        assert "directory does not exist" in troubles.tell()[0]
        path.parent.mkdir()
        await until(troubles, 0)
        before = os.lstat(path).st_ino
        path.rename(path.with_name("old"))  # else the inode could be used again at once
        with trio.fail_after(10):
            while not path.exists() or troubles.tell():
                await trio.sleep(0.01)
        assert os.lstat(path).st_ino != before
        assert await trio.to_thread.run_sync(query, path, 5.0) == PICTURE
        nursery.cancel_scope.cancel()
    assert not path.exists()


async def test_a_bug_in_one_ends_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    tries = 0

    async def serve(*, task_status: trio.TaskStatus[None]) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise KeyError("bug")
        task_status.started()
        if tries == 2:
            raise ValueError("another, later")
        await trio.sleep_forever()

    troubles = Troubles()
    async with trio.open_nursery() as nursery:
        await nursery.start(troubles.keep, "vm1: x", serve)
        with trio.fail_after(10):
            while tries < 3:
                await trio.sleep(0.01)
        assert await until(troubles, 0) == ()
        nursery.cancel_scope.cancel()
    assert caplog.text.count("vm1: x: internal error: ") == 2
    assert "ValueError: another, later" in caplog.text
