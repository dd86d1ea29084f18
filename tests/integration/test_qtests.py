"""What stands between QEMU's own migration-test and its QEMU, with a real QEMU and in libqtest's place."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import trio
from tests.integration.qmp_tools import Client, directory
from tests.qtests.__main__ import complaints, through_refault

from refault.lab.qemu import DEFAULT_BINARY

REFAULT = Path(__file__).parents[2] / ".venv/bin/refault"


def runs(pid: int, program: str) -> bool:
    return os.path.samefile(f"/proc/{pid}/exe", program)


@pytest.mark.qemu
async def test_refault_is_between_and_ends_with_a_qemu_that_is_the_process_started() -> None:
    qemu = shutil.which(DEFAULT_BINARY)
    assert qemu is not None
    with directory() as where, trio.fail_after(60):
        environment = {**os.environ, **through_refault(where, qemu, REFAULT)}
        with trio.socket.socket(trio.socket.AF_UNIX) as listener:
            await listener.bind(str(where / "qtest.qmp"))
            listener.listen(1)
            command = f"{environment['QTEST_QEMU_BINARY']} -machine none -nodefaults -display none -S"
            command += f" -chardev socket,path={where}/qtest.qmp,id=char0 -mon chardev=char0,mode=control"
            process = await trio.lowlevel.open_process(["sh", "-c", f"exec {command}"], env=environment)
            sock, _ = await listener.accept()
        async with trio.SocketStream(sock) as stream:
            client = Client(stream)
            assert "QMP" in await client.receive()
            await client.negotiate()
            vm = where / f"vm-{process.pid}"
            while not re.search(rf"connected to QEMU \S+, pid {process.pid} ", (vm / "log").read_text()):
                await trio.sleep(0.01)
            assert runs(process.pid, qemu)
            process.kill()
            assert await client.line() == b""
        assert await process.wait() == -9
        while not (vm / "status").exists() or not (vm / "status").read_text():
            await trio.sleep(0.01)
        assert complaints((vm / "log").read_text(), vm / "status") == []
