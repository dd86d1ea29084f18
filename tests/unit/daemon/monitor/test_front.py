"""Where clients come, when that cannot be had or changes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from refault.daemon.monitor.address import Address
from refault.daemon.monitor.first_client import FirstClient
from refault.daemon.monitor.front import Front
from refault.daemon.monitor.listener import ListenError
from refault.daemon.monitor.monitor import Monitor
from refault.daemon.monitor.presence import Presence, Qemu


async def take(sock: socket.socket) -> None:
    sock.close()


async def test_a_port_that_need_not_be_had_at_once_is_told_and_comes_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("refault.daemon.monitor.front.LOOK", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        front = Front("vm", Address(None, host="127.0.0.1", port=taken.getsockname()[1], server=True), take)
        with pytest.raises(ListenError):
            await front.prepare()
        await front.prepare(must=False)
        assert front.trouble is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(front.run)
            await front.settled.wait()
            assert not front.listening
            taken.close()
            with trio.fail_after(10):
                while not front.listening:
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()


async def test_listeners_that_change_while_the_monitor_does_not_run_are_the_next_runs(tmp_path: Path) -> None:
    old, new = (Address(str(tmp_path / name), server=True) for name in ("old", "new"))
    monitor = Monitor("vm", Address(str(tmp_path / "qemu")), [old])
    presence = monitor.presence
    await monitor.listen_at([new])
    monitor.renew()
    assert (monitor.clients_come_to, monitor.presence) == ([new], presence)


async def test_a_wait_that_is_taken_back_is_waited_for_no_more(tmp_path: Path) -> None:
    at, presence = Address(str(tmp_path / "a"), server=True, wait=True), Presence()
    first = FirstClient("vm", Address(str(tmp_path / "qemu")), [at], presence, over=False)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.wait)
            await presence.until(lambda qemu: qemu is Qemu.WAITING)
            first.listen_at([])


async def test_a_wait_that_comes_later_is_not_for_the_qemu_that_has_gone_on(tmp_path: Path) -> None:
    at = Address(str(tmp_path / "a"), server=True, wait=True)
    with socket.socket(socket.AF_UNIX) as qemu:
        qemu.bind(str(tmp_path / "qemu"))
        qemu.listen()
        first = FirstClient("vm", Address(str(tmp_path / "qemu")), [], Presence(), over=False)
        first.connected()
        first.listen_at([at])
        assert not first.holds
        with trio.fail_after(10):
            await first.wait()
