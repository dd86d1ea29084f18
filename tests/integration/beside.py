"""The same ends of a migration twice: as clients of bare QEMUs, and of refaults in front of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from refault.lab import qmp_client
from refault.lab.guest import Guest
from refault.lab.process import Process, started
from refault.lab.qemu import DEFAULT_BINARY, Qemu, start_qemu
from refault.lab.qmp_client import QmpClient

REFAULT = (sys.executable, "-m", "refault")
SMALL = Guest(vcpus=1, log_pages=8, tick_ns=1_000_000)


@dataclass
class End:
    """One end: its QEMU, and a client at the socket that a manager would use."""

    qemu: Qemu
    client: QmpClient
    refault: Process | None
    log: Path


@asynccontextmanager
async def end(
    directory: Path,
    name: str,
    *,
    binary: str = DEFAULT_BINARY,
    incoming: str | None = None,
    relayed: bool = True,
    guest: Guest = SMALL,
    extra: Sequence[str] = (),
    options: Sequence[str] = (),
    command: Sequence[str] = REFAULT,
) -> AsyncIterator[End]:
    """A QEMU, and a refault in front of it where `relayed`."""
    async with contextlib.AsyncExitStack() as stack:
        qemu = await stack.enter_async_context(
            start_qemu(guest, directory, name, binary=binary, incoming=incoming, extra=extra)
        )
        at, refault, log = qemu.monitor, None, directory / f"{name}-refault.log"
        if relayed:
            at, state = str(directory / f"{name}.client"), directory / f"{name}.state"
            state.mkdir(mode=0o700)
            arguments = ["run", "--name", name, "--qemu", qemu.monitor, "--listen", f"unix:{at}"]
            arguments += ["--state-dir", str(state), "--control", str(directory / f"{name}.control")]
            refault = stack.enter_context(started(f"refault ({name})", [*command, *arguments, *options], log))
            with trio.fail_after(30):
                while not await trio.Path(at).exists():
                    refault.must_run()
                    await trio.sleep(0.01)
        client = await stack.enter_async_context(qmp_client.connect(at, name=name))
        yield End(qemu, client, refault, log)
        if refault is not None:
            await refault.stop()


def listens(port: int) -> bool:
    """Whether anybody on this host listens at that TCP port."""
    return any(
        fields[3] == "0A" and fields[1].endswith(f":{port:04X}")
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        for fields in [line.split()]
    )
