"""QEMU makes the descriptors that it is passed blocking, and with them ours of the same open file
(io/channel-socket.c, qio_channel_socket_copy_fds). A wake-up for nothing must not stop the loop then."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from refault.daemon.monitor.monitor import Address, Monitor

pytestmark = pytest.mark.timeout(30)
KEPT = pytest.mark.parametrize("kept", [False, True], ids=["not kept", "kept"])

GREETING = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}
}
LARGE = 4_000_000
"""Bytes, more than sockets hold."""


class Qemu:
    """Answers all with nothing, and what is said to be large with much; while it `reads`."""

    def __init__(self) -> None:
        self.reads = trio.Event()
        self.reads.set()

    async def serve(self, stream: trio.SocketStream) -> None:
        """One connection."""
        await stream.send_all(json.dumps(GREETING).encode() + b"\n")
        decoder, text = json.JSONDecoder(), ""
        while True:
            await self.reads.wait()
            data = await stream.receive_some()
            if not data:
                return
            text += data.decode()
            while text.endswith("}"):
                command, end = decoder.raw_decode(text)
                text = text[end:].lstrip()
                told = LARGE * "-" if command["execute"] == "large" else {}
                await stream.send_all(json.dumps({"return": told, "id": command["id"]}).encode() + b"\n")


@asynccontextmanager
async def served(tmp_path: Path, *, kept: bool) -> AsyncIterator[tuple[Qemu, Path]]:
    """A monitor over a QEMU, and where its clients come. `kept`: what they say is written down."""
    qemu = Qemu()
    with trio.socket.socket(trio.socket.AF_UNIX) as sock:
        await sock.bind(str(tmp_path / "qemu"))
        sock.listen()
        monitor = Monitor(
            "vm",
            Address(str(tmp_path / "qemu")),
            [Address(str(tmp_path / "front"), server=True)],
            journal=tmp_path / "vm.clients" if kept else None,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, qemu.serve, [trio.SocketListener(sock)])
            await nursery.start(monitor.run)
            with trio.fail_after(20):
                while monitor.kept[0] != kept:
                    await trio.sleep(0.001)
            yield qemu, tmp_path / "front"
            nursery.cancel_scope.cancel()


def spurious(wait: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """Each socket of refault's that is waited for is blocking, and half of its wake-ups are for nothing."""
    woken: set[int] = set()

    async def waits(sock: Any) -> None:
        if isinstance(sock, int):  # inotify's
            await wait(sock)
            return
        os.set_blocking(sock.fileno(), True)
        if sock.fileno() not in woken:
            woken.add(sock.fileno())
            await trio.lowlevel.checkpoint()
            return
        woken.discard(sock.fileno())
        await wait(sock)

    return waits


async def says(client: trio.SocketStream, *names: str) -> None:
    """Each is answered, before the next is said."""
    for name in names:
        await client.send_all(b'{"execute": "%s", "id": "x"}' % name.encode())
        await answered(client)


async def answered(client: trio.SocketStream) -> int:
    """How many bytes there are up to the end of the reply."""
    received = b""
    with trio.fail_after(20):
        while b'"x"' not in received:
            data = await client.receive_some()
            assert data
            received += data
    return len(received)


@KEPT
async def test_wake_ups_for_nothing_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, kept: bool
) -> None:
    async with served(tmp_path, kept=kept) as (_, front):
        monkeypatch.setattr(trio.lowlevel, "wait_readable", spurious(trio.lowlevel.wait_readable))
        for _ in range(2):
            async with await trio.open_unix_socket(str(front)) as client:
                await says(client, "qmp_capabilities", "query-status", "query-status")


@KEPT
async def test_nor_do_they_where_nobody_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, kept: bool
) -> None:
    """A client, and then QEMU, that leaves unread what is for it: others are served."""
    async with served(tmp_path, kept=kept) as (qemu, front):
        for name in ("wait_readable", "wait_writable"):
            monkeypatch.setattr(trio.lowlevel, name, spurious(getattr(trio.lowlevel, name)))
        async with await trio.open_unix_socket(str(front)) as late:
            await says(late, "qmp_capabilities")
            await late.send_all(b'{"execute": "large", "id": "x"}')
            async with await trio.open_unix_socket(str(front)) as other:
                await says(other, "qmp_capabilities", "query-status", "query-status")
            assert await answered(late) > LARGE
            qemu.reads = trio.Event()
            large = b'{"execute": "much", "id": "x", "arguments": {"a": "%s"}}' % (LARGE * b"-")
            await late.send_all(large)
            async with await trio.open_unix_socket(str(front)) as other:
                await says(other, "qmp_capabilities")
                await other.send_all(b'{"execute": "query-status", "id": "x"}')
                qemu.reads.set()
                await answered(other)
            await answered(late)
