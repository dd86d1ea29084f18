"""QMP servers that cannot be asked for a migration: served like any other, without a false alarm."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
from tests.integration.qemus import ALL_BINARIES
from tests.integration.qmp_tools import Client, directory, negotiated, qemu_process

from refault.daemon.kernel.unix_diag import listens
from refault.daemon.known.vm_state import VmState
from refault.daemon.monitor.address import Address
from refault.daemon.options import VmOptions
from refault.daemon.telling.picture import picture
from refault.daemon.vm import Vm

pytestmark = pytest.mark.qemu

PRECONFIG = ["-preconfig", "-machine", "pc,accel=tcg", "-m", "16"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[str]:
    """refault's own queries that have been answered."""
    caplog.set_level(logging.INFO)
    answered: list[str] = []
    query = VmState.query

    async def counted(self: VmState, command: str) -> object:
        try:
            return await query(self, command)
        finally:
            answered.append(command)

    monkeypatch.setattr(VmState, "query", counted)
    return answered


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.01)


@asynccontextmanager
async def fronted(path: Path, name: str) -> AsyncIterator[Vm]:
    """refault in this process, before the QMP server at `path`/NAME, for clients of `path`/NAME.front."""
    qemu = Address(str(path / name))
    vm = Vm(
        VmOptions(
            name=name,
            qemu=qemu,
            listen=(Address(str(path / f"{name}.front"), server=True),),
            state_dir=path,
        )
    )
    await until(lambda: listens(qemu.sun_path))
    async with trio.open_nursery() as nursery:
        await nursery.start(vm.run)
        yield vm
        vm.ends_soon()
        nursery.cancel_scope.cancel()


@contextmanager
def storage_daemon(path: Path) -> Iterator[None]:
    socket_ = f"socket,id=m,path={path}/vm,server=on,wait=off"
    with subprocess.Popen(["qemu-storage-daemon", "--chardev", socket_, "--monitor", "chardev=m"]) as process:
        try:
            yield
        finally:
            process.kill()


async def says(client: Client, *commands: tuple[str, dict[str, object]]) -> Sequence[object]:
    """The replies, errors too."""
    replies = []
    for name, arguments in commands:
        await client.send(json.dumps({"execute": name, "arguments": arguments, "id": name}).encode())
        replies.append(await client.reply(name))
    return replies


COMMANDS: tuple[tuple[str, dict[str, object]], ...] = (
    ("query-migrate", {}),
    ("query-status", {}),
    ("migrate", {"uri": "tcp:127.0.0.1:1"}),
    ("migrate-incoming", {"uri": "tcp:127.0.0.1:1"}),
    ("migrate_cancel", {}),
    ("query-version", {}),
)


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said of a migration that there never was counts too."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno > logging.INFO or "relay" in record.getMessage()
    ]


async def test_qemu_storage_daemon(asked: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with directory() as path, directory() as bare, storage_daemon(path), storage_daemon(bare):
        async with (
            fronted(path, "vm"),
            negotiated(path / "vm.front") as client,
            negotiated(bare / "vm") as direct,
        ):
            await until(lambda: asked)
            assert await says(client, *COMMANDS) == await says(direct, *COMMANDS)
            node = {"driver": "null-co", "node-name": "n"}
            await client.command("blockdev-add", node)
            [block] = await client.command("query-named-block-nodes")
            assert block["node-name"] == "n"
    assert not complaints(caplog)


@pytest.mark.parametrize("qemu", ALL_BINARIES)
async def test_preconfig(qemu: str, asked: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """When it has its machine, what it is told to migrate is watched."""
    with (
        directory() as path,
        qemu_process(f"unix:{path}/vm,server=on,wait=off", qemu=qemu, extra=PRECONFIG),
        qemu_process(f"unix:{path}/bare,server=on,wait=off", qemu=qemu, extra=PRECONFIG),
    ):
        async with (
            fronted(path, "vm") as vm,
            negotiated(path / "vm.front") as client,
            negotiated(path / "bare") as direct,
        ):
            await until(lambda: asked)
            assert await says(client, *COMMANDS) == await says(direct, *COMMANDS)
            assert not complaints(caplog)
            await client.command("x-exit-preconfig")
            await client.command("migrate", {"uri": "exec:cat >/dev/null"})
            await until(lambda: picture(vm).migration.status == "completed")
            assert picture(vm).migration.role == "source"
