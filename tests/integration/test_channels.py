"""Migrations whose channel has more than one connection: postcopy-preempt with losses, multifd in precopy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from tests.integration.qemus import BINARIES
from tests.integration.test_main_job import GUEST, fronted
from tests.integration.waiting import recovered, told

from refault.lab import bare
from refault.lab.channel import Channel, Cut, Loss, free_port, start_channel
from refault.lab.driver import RefaultDriver, refault_driver
from refault.lab.memory import compare
from refault.lab.qemu import PairOptions, start_pair

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

PREEMPT = (*bare.CAPABILITIES, "postcopy-preempt")
MULTIFD = ("events", "multifd")


# QEMU is stopped while it is given the first recovered channel's preempt lane, until half a second after the
# test has lost that channel.
SLOW_TO_ACCEPT = """
import os, signal, sys, threading, time
from pathlib import Path
from refault.daemon.near.local_unix import PrivateSockets
connect, seen = PrivateSockets.connect, []
async def slow(self, path):
    seen.append(path)
    if len(seen) == 4:
        os.kill(self.qemu.pid, signal.SIGSTOP)
        place = Path(sys.argv[sys.argv.index("--state-dir") + 1])
        place.joinpath("stopped").touch()
        def go_on():
            while not place.joinpath("lost").exists():
                time.sleep(0.01)
            time.sleep(0.5)
            os.kill(self.qemu.pid, signal.SIGCONT)
        threading.Thread(target=go_on, daemon=True).start()
    return await connect(self, path)
PrivateSockets.connect = slow
from refault.cli.main import main
sys.exit(main())
"""


@pytest.mark.parametrize("binary", BINARIES)
async def test_preempt_is_tracked_and_recovers_whichever_connection_is_lost(
    tmp_path: Path, binary: str
) -> None:
    async with fronted(tmp_path, binary=binary) as (pair, channel, driver):
        await bare.start_postcopy(
            driver.source, driver.destination, channel, bandwidth=1 << 20, capabilities=PREEMPT
        )
        cuts = [Cut(Loss.RESET, forward, b".", 0, "now") for forward in (True, False)]
        for number, loss in enumerate((*Loss, *cuts), 1):
            if isinstance(loss, Cut):
                await channel.cut_at(loss)
                await channel.was_cut(loss)
            else:
                await channel.lose(loss)
            await recovered(driver, number)
        for vm in await driver.statuses():
            assert vm.migration.relay == "tracking"
            assert (vm.recovery.losses, vm.recovery.recoveries) == (5, 5)
            assert vm.pages.arrived > 0
        await pair.destination.wait_progress()
        await bare.finish(driver.source)
        verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
        assert verdict.right, verdict
        ended = [("completed", 0)] * 2
        await told(driver, lambda vms: [(vm.migration.status, vm.pages.outstanding) for vm in vms] == ended)


@pytest.mark.skipif("qemu-10" not in BINARIES, reason="run 'make qemus' first")
async def test_a_channel_that_is_lost_while_qemu_takes_up_its_preempt_lane(tmp_path: Path) -> None:
    """QEMU 10.0 would take the lane for a main channel, had it paused before it accepted it."""
    command = [sys.executable, "-c", SLOW_TO_ACCEPT]
    async with fronted(tmp_path, command, "qemu-10") as (pair, channel, driver):
        await bare.start_postcopy(
            driver.source, driver.destination, channel, bandwidth=1 << 20, capabilities=PREEMPT
        )
        await channel.lose(Loss.RESET)
        state = trio.Path(tmp_path / "destination.state")
        with trio.fail_after(40):
            while not await (state / "stopped").exists():
                await trio.sleep(0.01)
        await channel.lose(Loss.RESET)
        await (state / "lost").touch()
        with trio.fail_after(40):
            while [vm.recovery.recoveries for vm in await driver.statuses()] != [1, 1]:
                pair.destination.process.must_run()
                await trio.sleep(0.05)
        await pair.destination.wait_progress()
        await bare.finish(driver.source)
        verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
        assert verdict.right, verdict


VIRTIO_MEM = (
    "-m", "maxmem=1G",
    "-object", "memory-backend-ram,id=more,size=128M",
    "-device", "virtio-mem-pci,id=plug,memdev=more",
)  # fmt: skip


@pytest.mark.skipif("qemu-10" not in BINARIES, reason="run 'make qemus' first")
async def test_preempt_ends_where_the_stream_cannot_be_read(tmp_path: Path) -> None:
    """With virtio-mem, whose state comes first: the destination ends its preempt lane before it says SHUT."""
    options = PairOptions("qemu-10", "qemu-10", VIRTIO_MEM)
    async with (
        start_pair(GUEST, tmp_path, options) as pair,
        start_channel(tmp_path, free_port()) as channel,
        refault_driver(pair, channel, tmp_path) as driver,
    ):
        await bare.start_postcopy(
            driver.source, driver.destination, channel, bandwidth=1 << 20, capabilities=PREEMPT
        )
        await pair.destination.wait_progress()
        await bare.finish(driver.source)
        for vm in await told(driver, lambda vms: all(vm.migration.status == "completed" for vm in vms)):
            assert vm.recovery.losses == 0
        verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
        assert verdict.right, verdict


async def begin_multifd(
    driver: RefaultDriver,
    channel: Channel,
    bandwidth: int,
    downtime: int,
    capabilities: Sequence[str] = MULTIFD,
) -> None:
    for qmp in (driver.source, driver.destination):
        await bare.set_capabilities(qmp, *capabilities)
        await qmp.execute("migrate-set-parameters", {"multifd-channels": 4})
    await driver.source.execute(
        "migrate-set-parameters", {"max-bandwidth": bandwidth, "downtime-limit": downtime}
    )
    await driver.destination.execute("migrate-incoming", {"uri": channel.target_uri})
    await channel.wait_open()
    await driver.source.execute("migrate", {"uri": channel.uri})


@pytest.mark.parametrize("binary", BINARIES)
async def test_multifd_goes_through_the_relay_and_arrives_whole(tmp_path: Path, binary: str) -> None:
    async with fronted(tmp_path, binary=binary) as (pair, channel, driver):
        with trio.fail_after(60):
            await begin_multifd(driver, channel, 256 << 20, 1000)
            await bare.wait_status(driver.source, "completed")
            await driver.destination.wait_migration("completed")
        assert all(vm.channel.bytes_forward > 0 for vm in await driver.statuses())
        await pair.destination.wait_progress()
        with trio.fail_after(20):
            while any(vm.migration.status != "completed" for vm in await driver.statuses()):
                await trio.sleep(0.05)
        assert [vm.recovery.losses for vm in await driver.statuses()] == [0, 0]
        for process in driver.processes:
            assert "lost" not in process.tail()
        verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
        assert verdict.right, verdict


@pytest.mark.parametrize("binary", BINARIES)
async def test_a_lost_multifd_precopy_leaves_the_guest_at_the_source(tmp_path: Path, binary: str) -> None:
    async with fronted(tmp_path, binary=binary) as (pair, channel, driver):
        with trio.fail_after(60):
            await begin_multifd(driver, channel, 4 << 20, bare.DOWNTIME_LIMIT)
            await bare.wait_sent(driver.source, 0.2)
            await channel.lose(Loss.RESET)
            await bare.wait_status(pair.source.qmp, "failed")
        await pair.source.wait_progress()
        verdict = await compare(GUEST, pair.source.qmp)
        assert verdict.right, verdict
