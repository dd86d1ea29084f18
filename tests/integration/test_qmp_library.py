"""The qemu.qmp library and its shell, unchanged, against refault."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from qemu.qmp import EventListener, ExecuteError, QMPClient
from tests.integration.qmp_tools import directory, qemu_process, refault, until

pytestmark = pytest.mark.qemu


async def use(path: str, file: Path) -> list[str]:
    """What a manager does: commands, errors, events, descriptors, a second client, quit."""
    events: list[str] = []
    client: Any = QMPClient("test")
    await client.connect(path)
    other: Any = QMPClient("other")
    await other.connect(path)
    listener = EventListener()
    client.register_listener(listener)
    assert (await client.execute("query-version"))["qemu"]["major"] >= 5
    status = await asyncio.gather(*(client.execute("query-status") for _ in range(50)))
    assert all(item["running"] for item in status)
    try:
        await client.execute("no-such-command")
    except ExecuteError as error:
        assert error.error_class == "CommandNotFound"  # noqa: PT017 - asyncio, not pytest.raises' business
    with file.open() as opened:
        client.send_fd_scm(opened.fileno())
        await client.execute("getfd", {"fdname": "x"})
    await client.execute("closefd", {"fdname": "x"})
    await other.execute("stop")
    await other.execute("cont")
    await other.disconnect()
    await client.execute("quit")
    async for event in listener:
        events.append(str(event["event"]))
        if event["event"] == "SHUTDOWN":
            break
    with contextlib.suppress(EOFError):  # the library tells of an end of file that came before: QEMU has quit
        await client.disconnect()
    return events


async def test_library(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with refault(path / "qemu", path / "front") as monitor:
            await until(lambda: monitor.qemu)
            events = await trio.to_thread.run_sync(asyncio.run, use(str(path / "front"), tmp_path / "file"))
    assert events == ["STOP", "RESUME", "SHUTDOWN"]


async def test_shell() -> None:
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with refault(path / "qemu", path / "front") as monitor:
            await until(lambda: monitor.qemu)
            shell = [sys.executable, "-c", "from qemu.qmp.qmp_shell import main; main()", str(path / "front")]
            done = await trio.run_process(
                shell,
                stdin=b"query-status\nquery-version\nno-such-command\n",
                capture_stdout=True,
                stderr=subprocess.STDOUT,
                check=False,
            )
    text = done.stdout.decode()
    assert done.returncode == 0, text
    assert "Connected to QEMU" in text
    assert text.count('"return"') == 2
    assert "The command no-such-command has not been found" in text
