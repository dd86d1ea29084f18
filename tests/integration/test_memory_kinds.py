"""What memory is made of and how its pages travel: each through the relay, with losses, memory equal."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from refault.lab import bare
from refault.lab.channel import Loss, free_port, start_channel
from refault.lab.driver import refault_driver
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.qemu import PairOptions, start_pair

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(90)]

GUEST = Guest(vcpus=4, log_pages=11, tick_ns=1_000_000)
MIB = 1 << 20
LOW = 24 * MIB
HIGH = 32 * MIB


def nodes(*backends: str) -> list[str]:
    """Two NUMA nodes, which are two RAM blocks; together they hold more than the guest needs."""
    words = ["-m", f"{(LOW + HIGH) // MIB}M"]
    for number, (backend, size) in enumerate(zip(backends, (LOW, HIGH), strict=True)):
        words += ["-object", f"{backend},id=node{number},size={size}"]
        words += ["-numa", f"node,memdev=node{number}"]
    return words


@dataclass(frozen=True)
class Kind:
    """``extra``: QEMU's arguments, ``blocks``: RAM blocks that it declares, of ``page_size`` bytes a page."""

    extra: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ("pc.ram",)
    page_size: int = 4096


KINDS = {
    "two-blocks": Kind(
        tuple(nodes("memory-backend-ram", "memory-backend-memfd")),
        blocks=("node0", "node1"),
    ),
    "xbzrle": Kind(capabilities=("xbzrle",)),
}


@pytest.mark.parametrize("name", ["two-blocks", "xbzrle"])
async def test_with_losses(tmp_path: Path, name: str) -> None:
    await migrate(tmp_path, KINDS[name])


async def migrate(directory: Path, kind: Kind) -> None:
    async with (
        start_pair(GUEST, directory, PairOptions(extra=kind.extra)) as pair,
        start_channel(directory, free_port()) as channel,
        refault_driver(pair, channel, directory) as driver,
    ):
        capabilities = (*bare.CAPABILITIES, *kind.capabilities)
        await bare.start_postcopy(
            driver.source,
            driver.destination,
            channel,
            bandwidth=MIB,
            precopy_bandwidth=8 * MIB,  # memory that is mostly empty must not have passed whole by then
            capabilities=capabilities,
        )
        for loss in (Loss.KILL, Loss.RESET):
            await trio.sleep(0.2)
            since = len(driver.destination.events)
            await channel.lose(loss)
            with trio.fail_after(10):
                await driver.destination.wait_migration("postcopy-active", since=since)
                await bare.wait_status(driver.source, "postcopy-active")
        for vm in await driver.statuses():
            assert vm.migration.relay == "tracking"
            assert vm.recovery.recoveries == 2
            assert vm.pages.requested > 0
            told = {block.name: block.page_size_bytes for block in vm.pages.blocks}
            assert {name: told.get(name) for name in kind.blocks} == dict.fromkeys(
                kind.blocks, kind.page_size
            )
        await pair.destination.wait_progress()
        await bare.finish(driver.source)
        verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
        assert verdict.right, verdict


async def test_shared_memory_that_stays_where_it_is(tmp_path: Path) -> None:
    """QEMU refuses ignore-shared with postcopy, so this one migrates in precopy."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as shared:
        extra = nodes("memory-backend-ram", f"memory-backend-file,share=on,mem-path={shared.name}")
        async with (
            start_pair(GUEST, tmp_path, PairOptions(extra=extra)) as pair,
            start_channel(tmp_path, free_port()) as channel,
            refault_driver(pair, channel, tmp_path) as driver,
        ):
            for qmp in (driver.source, driver.destination):
                await bare.set_capabilities(qmp, "events", "x-ignore-shared")
            since = len(driver.destination.events)
            await driver.destination.execute("migrate-incoming", {"uri": channel.target_uri})
            await channel.wait_open()
            await driver.source.execute("migrate", {"uri": channel.uri})
            with trio.fail_after(20):
                await driver.destination.wait_migration("completed", since=since)
                await bare.wait_status(driver.source, "completed")
            for vm in await driver.statuses():
                assert "a precopy migration ends" in (vm.migration.relay_reason or "")
                assert {"node0", "node1"} <= {block.name for block in vm.pages.blocks}
            await pair.destination.wait_progress()
            verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
            assert verdict.right, verdict
