"""What QEMU is passed, and when the next refault need know of it no more."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from refault.daemon.monitor import upstream
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.listener import ListenError
from refault.daemon.monitor.monitor import Monitor

VERSION = b'{"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}'
GREETING = b'{"QMP": {"version": %s, "capabilities": ["oob"]}}\r\n' % VERSION


class Qemu:
    """Takes one client at a time; is this very process, which has all that it is passed."""

    def __init__(self, path: Path) -> None:
        self.may_greet, self.may_close = trio.Event(), trio.Event()
        self.refuses = -1
        """Which getfd, from 0."""
        self.asked: list[str] = []
        self.has: dict[str, int] = {}
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(1)
        self._listening.setblocking(False)

    async def run(self) -> None:
        with self._listening:
            while True:
                await self._take()

    async def _take(self) -> None:
        await trio.lowlevel.wait_readable(self._listening)
        sock, _ = self._listening.accept()
        try:
            with sock:
                sock.setblocking(False)
                await self._serve(sock)
        finally:
            for fd in self.has.values():
                os.close(fd)
            self.has.clear()

    async def _serve(self, sock: socket.socket) -> None:
        await self.may_greet.wait()
        with contextlib.suppress(BrokenPipeError):  # who came has given up
            sock.send(GREETING)
        decoder, text = json.JSONDecoder(), ""
        fds: list[int] = []
        while True:
            await trio.lowlevel.wait_readable(sock)
            data, came, _, _ = socket.recv_fds(sock, 65536, 1)
            if not data:
                return
            fds += came
            text = (text + data.decode()).lstrip()
            while text:
                command, end = decoder.raw_decode(text)
                text = text[end:].lstrip()
                sock.send(
                    json.dumps({**await self._do(command, fds), "id": command["id"]}).encode() + b"\r\n"
                )

    async def _do(self, command: dict[str, dict[str, str]], fds: list[int]) -> dict[str, object]:
        name = str(command["execute"])
        self.asked.append(name)
        if name == "getfd":
            fd = fds.pop()
            if self.asked.count(name) - 1 == self.refuses:
                os.close(fd)
                return {"error": {"class": "GenericError", "desc": "it has enough"}}
            self.has[command["arguments"]["fdname"]] = fd
        elif name == "closefd":
            await self.may_close.wait()
            fd = self.has.pop(command["arguments"]["fdname"], -1)
            if fd < 0:
                return {"error": {"class": "GenericError", "desc": "there is none"}}
            os.close(fd)
        return {"return": {}}


@asynccontextmanager
async def qemu_at(path: Path, **is_: object) -> AsyncIterator[Qemu]:
    qemu = Qemu(path)
    vars(qemu).update(is_)
    if "may_greet" not in is_:
        qemu.may_greet.set()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qemu.run)
            yield qemu
            nursery.cancel_scope.cancel()


async def until(look: Callable[[], bool]) -> None:
    while not look():
        await trio.sleep(0.001)


def monitor(directory: Path, *fronts: str) -> Monitor:
    listen = [Address(str(directory / front), server=True) for front in fronts]
    return Monitor("vm", Address(str(directory / "qemu")), listen, journal=directory / "vm.clients")


async def kept(made: Monitor) -> None:
    await until(lambda: made.kept[0])


async def test_a_client_waits_for_a_qemu_that_greets_late(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = monitor(tmp_path, "front")
    async with qemu_at(tmp_path / "qemu", may_greet=trio.Event()) as qemu, trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await until((tmp_path / "front").exists)
        async with await trio.open_unix_socket(str(tmp_path / "front")) as client:
            await until(lambda: made.clients == 1)
            qemu.may_greet.set()
            assert b"QMP" in await client.receive_some()
        await kept(made)
        nursery.cancel_scope.cancel()
    assert "internal error" not in caplog.text


async def test_what_qemu_has_is_known_until_it_has_it_no_more(tmp_path: Path) -> None:
    """It takes our end of its monitor, and nothing else."""
    made = monitor(tmp_path, "front")
    async with qemu_at(tmp_path / "qemu", refuses=1) as qemu, trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await until(lambda: "closefd" in qemu.asked)
        assert made.kept == (False, "it has enough")
        assert len(qemu.has) == 1
        assert (tmp_path / "vm.clients").exists()
        qemu.may_close.set()
        await until(lambda: not (tmp_path / "vm.clients").exists())
        assert not qemu.has
        nursery.cancel_scope.cancel()


async def test_who_lets_go_waits_until_qemu_has(tmp_path: Path) -> None:
    made = monitor(tmp_path, "front")
    async with qemu_at(tmp_path / "qemu") as qemu, trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await kept(made)
        nursery.start_soon(made.let_go)
        await until(lambda: "closefd" in qemu.asked)
        assert len(qemu.has) == 5
        assert (tmp_path / "vm.clients").exists()
        qemu.may_close.set()
        await until(lambda: not (tmp_path / "vm.clients").exists())
        assert not qemu.has
        nursery.cancel_scope.cancel()


async def test_a_start_that_fails_leaves_clients_to_the_next(tmp_path: Path) -> None:
    async with qemu_at(tmp_path / "qemu"):
        first = monitor(tmp_path, "front")
        async with trio.open_nursery() as nursery:
            await nursery.start(first.run)
            await kept(first)
            client = await trio.open_unix_socket(str(tmp_path / "front"))
            assert b"QMP" in await client.receive_some()
            first.hand_over()
            nursery.cancel_scope.cancel()
        with socket.socket(socket.AF_UNIX) as taken:
            taken.bind(str(tmp_path / "taken"))
            taken.listen()
            with pytest.raises(ListenError):
                await monitor(tmp_path, "front", "taken").run()
        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(monitor(tmp_path, "front").run)
            await client.send_all(b'{"execute": "qmp_capabilities"}')
            assert await client.receive_some() == b'{"return": {}}\r\n'
            nursery.cancel_scope.cancel()


async def test_what_qemu_comes_to_hold_behind_the_end_of_refault_is_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It had been told to, and had not read that when the next one looked."""
    monkeypatch.setattr(upstream, "_GREETING_TIMEOUT", 0.2)
    async with qemu_at(tmp_path / "qemu") as qemu:
        first = monitor(tmp_path, "front")
        unread, qemus = socket.socketpair()
        with unread, qemus:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first.run)
                await kept(first)
                journal = (tmp_path / "vm.clients").read_bytes()
                socket.send_fds(unread, [b"getfd"], list(qemu.has.values())[:1])
                first.hand_over()
                nursery.cancel_scope.cancel()
            for fd in qemu.has.values():
                os.close(fd)
            qemu.has.clear()
            (tmp_path / "vm.clients").write_bytes(journal)
            second = monitor(tmp_path, "front")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(second.run)
                await until(lambda: "cannot go on" in caplog.text)
                _, [read], _, _ = socket.recv_fds(qemus, 5, 1)
                await kept(second)
                os.close(read)
                nursery.cancel_scope.cancel()
