"""A migration over a connection that the client has passed to QEMU, as libvirt makes them up to 10.2."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio
from tests.integration.qemus import BINARIES, OTHERS_NIGHTLY
from tests.integration.test_addresses import active_again, fronted, lose, memory_is_right, set_up, to_postcopy
from tests.integration.waiting import told

from refault.daemon.kernel.process import sockets_of
from refault.lab import bare
from refault.lab.channel import free_port
from refault.lab.driver import REFAULT
from refault.lab.qemu import PairOptions
from refault.lab.qmp_client import QmpClient, QmpError

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]


async def pass_connection(qmp: QmpClient, uri: str) -> int:
    """Gives QEMU a connection as libvirt does, by the name `migrate`; its inode."""
    _, host, port = uri.split(":")
    with socket.create_connection((host, int(port))) as sock:
        await qmp.execute("getfd", {"fdname": "migrate"}, fds=[sock.fileno()])
        return os.fstat(sock.fileno()).st_ino


def holds(pid: int, inode: int) -> bool:
    return inode in sockets_of(pid)


async def lets_go(pid: int, inode: int) -> None:
    with trio.fail_after(20):
        while holds(pid, inode):
            await trio.sleep(0.01)


@pytest.mark.parametrize("binary", BINARIES)
async def test_it_is_relayed_and_recovered(tmp_path: Path, binary: str) -> None:
    async with fronted(tmp_path, PairOptions(binary, binary)) as (pair, channel, driver):
        await set_up(driver)
        answers = []
        for qmp in (driver.source, pair.source.qmp):
            with pytest.raises(QmpError) as refused:
                await qmp.execute("migrate", {"uri": "fd:migrate"})
            answers.append(refused.value.args)
        assert answers[0] == answers[1]
        await driver.destination.execute("migrate-incoming", {"uri": channel.target_uri})
        await channel.wait_open()
        inode = await pass_connection(driver.source, channel.uri)
        assert holds(pair.source.pid, inode)
        await driver.source.execute("migrate", {"uri": "fd:migrate"})
        await to_postcopy(driver)
        await lets_go(pair.source.pid, inode)
        source, _ = await driver.statuses()
        assert source.migration.relay == "tracking"
        await lose(channel, driver)
        await by_hand_as_libvirt(driver.source, driver.destination)
        await active_again(driver, 0)
        await told(driver, lambda vms: [vm.migration.relay for vm in vms] == ["tracking"] * 2)
        await memory_is_right(pair, driver)


async def by_hand_as_libvirt(source: QmpClient, destination: QmpClient) -> None:
    """domjobabort --postcopy, then migrate --postcopy-resume of virsh: in-band, and at another port."""
    since = len(destination.events)
    await source.execute("migrate-pause", oob=True)
    with trio.fail_after(60):
        await bare.wait_status(source, "postcopy-paused")
        await destination.wait_migration("postcopy-paused", since=since)
        uri = f"tcp:127.0.0.1:{free_port()}"
        await destination.execute("migrate-recover", {"uri": uri})
        await pass_connection(source, uri)
        since = len(destination.events)
        await source.execute("migrate", {"uri": "fd:migrate", "resume": True})
        await destination.wait_migration("postcopy-active", since=since)


HANGS_ONCE = """
import os, sys, trio
from refault.cli.main import main
from refault.daemon.known.owed import Owed
mark, close = sys.argv.pop(1), Owed.close

async def hang_once(self, name):
    if os.path.exists(mark):
        return await close(self, name)
    open(mark, "x").close()
    await trio.sleep_forever()

Owed.close = hang_once
sys.exit(main())
"""


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
async def test_one_that_qemu_holds_yet_when_refault_is_killed_is_closed_by_the_next(
    tmp_path: Path, binary: str
) -> None:
    """Else the destination would not hear of the loss."""
    mark = tmp_path / "about to close"
    command = [REFAULT[0], "-c", HANGS_ONCE, str(mark)]
    async with fronted(tmp_path, PairOptions(binary, binary), command=command) as (pair, channel, driver):
        await set_up(driver)
        await driver.destination.execute("migrate-incoming", {"uri": channel.target_uri})
        await channel.wait_open()
        inode = await pass_connection(driver.source, channel.uri)
        await driver.source.execute("migrate", {"uri": "fd:migrate"})
        await to_postcopy(driver)
        with trio.fail_after(20):
            while not mark.exists():
                await trio.sleep(0.01)
        assert holds(pair.source.pid, inode)
        since = len(driver.destination.events)
        driver.processes[0].kill()
        driver.start_again(0)
        await driver.connect_again(0)
        await active_again(driver, since)
        await lets_go(pair.source.pid, inode)
        await memory_is_right(pair, driver)
    assert not [name for name in os.listdir(tmp_path / "source.state") if name.endswith(".json")]


async def test_a_pipe_passes_untouched(tmp_path: Path) -> None:
    """virsh save, and migrate --tunnelled."""
    binary = BINARIES[0]
    async with fronted(tmp_path, PairOptions(binary, binary)) as (_, _, driver):
        reads, writes = os.pipe()
        await driver.source.execute("getfd", {"fdname": "migrate"}, fds=[writes])
        os.close(writes)
        await driver.source.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30})
        await driver.source.execute("migrate", {"uri": "fd:migrate"})
        async with await trio.open_file(reads, "rb") as saved:
            stream = await saved.read()
        assert stream.startswith(b"QEVM")
        await bare.wait_status(driver.source, "completed")
