"""QEMU makes the descriptors that it is passed blocking, and with them ours of the same open file
(io/channel-socket.c, qio_channel_socket_copy_fds). A wake-up for nothing must not stop the loop then."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from refault.daemon.monitor.monitor import Address, Monitor

pytestmark = pytest.mark.timeout(10)

GREETING = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}
}


@asynccontextmanager
async def served(tmp_path: Path) -> AsyncIterator[Path]:
    """A monitor over a QEMU that answers all with nothing; where its clients come."""

    async def qemu(stream: trio.SocketStream) -> None:
        await stream.send_all(json.dumps(GREETING).encode() + b"\n")
        async for data in stream:
            for command in data.decode().replace("}{", "}\n{").splitlines():
                reply = {"return": {}, "id": json.loads(command)["id"]}
                await stream.send_all(json.dumps(reply).encode() + b"\n")

    with trio.socket.socket(trio.socket.AF_UNIX) as sock:
        await sock.bind(str(tmp_path / "qemu"))
        sock.listen()
        monitor = Monitor(
            "vm", Address(str(tmp_path / "qemu")), [Address(str(tmp_path / "front"), server=True)]
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, qemu, [trio.SocketListener(sock)])
            await nursery.start(monitor.run)
            yield tmp_path / "front"
            nursery.cancel_scope.cancel()


async def test_wake_ups_for_nothing_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each socket of refault's that is waited for is blocking, and half of its wake-ups are for nothing."""
    wait = trio.lowlevel.wait_readable
    spurious: set[int] = set()

    async def wait_readable(sock: Any) -> None:
        os.set_blocking(sock.fileno(), True)
        if sock.fileno() not in spurious:
            spurious.add(sock.fileno())
            await trio.lowlevel.checkpoint()
            return
        spurious.discard(sock.fileno())
        await wait(sock)

    async with served(tmp_path) as front:
        monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
        for _ in range(2):
            async with await trio.open_unix_socket(str(front)) as client:
                received = b""
                for name in ("qmp_capabilities", "query-status", "query-status"):
                    await client.send_all(b'{"execute": "%s", "id": "x"}' % name.encode())
                    with trio.fail_after(9):
                        while b'"x"' not in received:
                            received += await client.receive_some()
                    received = b""
