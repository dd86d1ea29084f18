"""Two `refault run` and two real QEMUs: what is recovered, what is not without the engine, and restarts."""

from __future__ import annotations

import struct
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from tests.integration.waiting import recovered, told

from refault.lab import bare
from refault.lab.channel import Channel, Loss, free_port, start_channel
from refault.lab.driver import RefaultDriver, refault_driver
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.process import started
from refault.lab.qemu import DEFAULT_BINARY, Pair, PairOptions, start_pair

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

GUEST = Guest(vcpus=4, log_pages=11, tick_ns=4_000_000)
"""It takes eight seconds to ask for all of its memory, in which the losses are to fall."""
REFAULT = [sys.executable, "-m", "refault"]
WITHOUT_ENGINE = """
import sys
from refault.migration import recovery
for key, (state, actions) in recovery.TABLE.items():
    recovery.TABLE[key] = (state, tuple(a for a in actions if a is not recovery.Action.ATTEMPT))
from refault.cli.main import main
sys.exit(main())
"""


@asynccontextmanager
async def fronted(
    directory: Path,
    command: Sequence[str] = REFAULT,
    binary: str = DEFAULT_BINARY,
    options: Sequence[str] = (),
) -> AsyncIterator[tuple[Pair, Channel, RefaultDriver]]:
    """A pair of QEMUs with a refault in front of each, both with these options, and clients at those."""
    async with (
        start_pair(GUEST, directory, PairOptions(binary, binary)) as pair,
        start_channel(directory, free_port()) as channel,
        refault_driver(pair, channel, directory, command=command, options=(options, options)) as driver,
    ):
        yield pair, channel, driver


async def begin_postcopy(pair: Pair, channel: Channel, driver: RefaultDriver) -> None:
    """Until the clients have heard of it, and so has who is at QEMU's own monitors."""
    await bare.start_postcopy(driver.source, driver.destination, channel, bandwidth=1 << 20)
    await bare.heard_of_postcopy(pair.source.qmp, pair.destination.qmp)


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


async def memory_is_right(pair: Pair, driver: RefaultDriver) -> None:
    await pair.destination.wait_progress()
    await bare.finish(driver.source)
    verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
    assert verdict.right, verdict


async def test_without_the_engine_the_loss_stays(tmp_path: Path) -> None:
    async with fronted(tmp_path, [sys.executable, "-c", WITHOUT_ENGINE]) as (pair, channel, driver):
        await begin_postcopy(pair, channel, driver)
        await channel.lose(Loss.CLOSE)
        await told(driver, lambda vms: {vm.migration.status for vm in vms} == {"postcopy-paused"})
        await trio.sleep(2)
        assert await bare.migration_status(pair.source.qmp) == "postcopy-paused"
        statuses = await driver.statuses()
        assert {vm.migration.status for vm in statuses} == {"postcopy-paused"}
        assert [(vm.recovery.losses, vm.recovery.recoveries) for vm in statuses] == [(1, 0), (1, 0)]


async def test_the_status_tells_the_whole_story(tmp_path: Path) -> None:
    async with fronted(tmp_path) as (pair, channel, driver):
        await begin_postcopy(pair, channel, driver)
        for number, loss in enumerate(Loss, 1):
            await trio.sleep(0.2)
            await channel.lose(loss)
            await recovered(driver, number)
        source, destination = await driver.statuses()
        assert (source.migration.role, destination.migration.role) == ("source", "destination")
        for vm, qemu in ((source, pair.source), (destination, pair.destination)):
            assert vm.qemu.pid == qemu.pid
            assert vm.qemu.version is not None
            assert vm.clients.connected == 1
            assert (vm.migration.relay, vm.migration.phase) == ("tracking", "postcopy")
            assert (vm.recovery.losses, vm.recovery.recoveries) == (3, 3)
            assert vm.recovery.last_seconds is not None
            assert 0 < vm.recovery.last_seconds < 20
            assert vm.pages.requested == vm.pages.arrived + vm.pages.outstanding > 0
            assert vm.pages.blocks[0].name == "pc.ram"
            assert vm.latency_seconds.count > 0
            assert vm.channel.bytes_forward > vm.channel.bytes_return > 0
        await memory_is_right(pair, driver)
        ended = [("completed", 0)] * 2
        await told(driver, lambda vms: [(vm.migration.status, vm.pages.outstanding) for vm in vms] == ended)


def recv_bitmap(block: bytes) -> bytes:
    return struct.pack(">BHHB", 8, 10, 1 + len(block), len(block)) + block


STRANGERS = [
    b"",
    b"GET / HTTP/1.0\r\n\r\n",
    b"QEVM\x00\x00\x00\x03",
    recv_bitmap(b"")[:4],
    recv_bitmap(b"another.ram"),
]


async def test_strangers_at_a_paused_destination_harm_nothing(tmp_path: Path) -> None:
    async with fronted(tmp_path) as (pair, channel, driver):
        await begin_postcopy(pair, channel, driver)
        source = driver.processes[0]
        command = command_of(source.pid)
        since = len(pair.destination.qmp.events)
        source.kill()
        with trio.fail_after(40):
            await pair.destination.qmp.wait_migration("postcopy-paused", since=since)
        port = int(channel.target_uri.rpartition(":")[2])
        for stranger in STRANGERS:
            for reset in (False, True):
                connection = await trio.open_tcp_stream("127.0.0.1", port)
                if stranger:
                    await connection.send_all(stranger)
                if reset:
                    linger = struct.pack("ii", 1, 0)
                    connection.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, linger)
                await connection.aclose()
                await trio.sleep(0.02)
        since = len(pair.destination.qmp.events)
        with started("refault again", command, tmp_path / "again.log"):
            with trio.fail_after(40):
                await pair.destination.qmp.wait_migration("postcopy-active", since=since)
            await pair.destination.wait_progress()
            await bare.finish(pair.source.qmp)
            verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
            assert verdict.right, verdict


async def test_a_lost_precopy_leaves_the_guest_at_the_source_and_the_next_migration_works(
    tmp_path: Path,
) -> None:
    async with fronted(tmp_path) as (pair, channel, driver):
        source = driver.source
        await bare.set_capabilities(source, *bare.CAPABILITIES)
        await source.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
        await bare.set_capabilities(driver.destination, *bare.CAPABILITIES)
        await driver.destination.execute("migrate-incoming", {"uri": channel.target_uri})
        await channel.wait_open()
        await source.execute("migrate", {"uri": channel.uri})
        await bare.wait_status(source, "active")
        await channel.lose(Loss.RESET)
        with trio.fail_after(20):
            await bare.wait_status(source, "failed")
        assert (await source.execute("query-status"))["running"]
        await pair.source.wait_progress()


async def test_a_migration_to_nowhere_fails_and_harms_nothing(tmp_path: Path) -> None:
    async with fronted(tmp_path) as (pair, _, driver):
        await driver.source.execute("migrate", {"uri": f"tcp:127.0.0.1:{free_port()}"})
        with trio.fail_after(20):
            answer = await bare.wait_status(driver.source, "failed")
        assert "Connection refused" in answer["error-desc"]
        assert (await driver.source.execute("query-status"))["running"]
        await pair.source.wait_progress()


async def test_what_the_client_asks_back_is_the_address_it_asked_for(tmp_path: Path) -> None:
    async with fronted(tmp_path) as (_, _, driver):
        await driver.destination.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
        [address] = (await driver.destination.execute("query-migrate"))["socket-address"]
        assert (address["type"], address["host"]) == ("inet", "127.0.0.1")
        assert int(address["port"]) > 0


@pytest.mark.parametrize("side", [0, 1], ids=["source", "destination"])
async def test_a_killed_refault_finds_the_lost_channel_and_recovers_it(tmp_path: Path, side: int) -> None:
    async with fronted(tmp_path) as (pair, channel, driver):
        await begin_postcopy(pair, channel, driver)
        monitors = pair.source.qmp, pair.destination.qmp
        since = [len(qmp.events) for qmp in monitors]
        process = driver.processes[side]
        command = command_of(process.pid)
        process.kill()
        with started("refault again", command, tmp_path / "again.log"):
            with trio.fail_after(40):
                for qmp, seen in zip(monitors, since, strict=True):
                    await qmp.wait_migration("postcopy-active", since=seen)
            await pair.destination.wait_progress()
            await bare.finish(pair.source.qmp)
            verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
            assert verdict.right, verdict
