"""Migrations whose channel has more than one connection: postcopy-preempt with losses, multifd in precopy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from refault.lab import bare
from refault.lab.channel import Channel, Cut, Loss, free_port, start_channel
from refault.lab.driver import RefaultDriver, refault_driver
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.qemu import Pair, start_pair

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(90)]

GUEST = Guest(vcpus=4, log_pages=11, tick_ns=1_000_000)
PREEMPT = (*bare.CAPABILITIES, "postcopy-preempt")
MULTIFD = ("events", "multifd")


@asynccontextmanager
async def fronted(directory: Path) -> AsyncIterator[tuple[Pair, Channel, RefaultDriver]]:
    async with (
        start_pair(GUEST, directory) as pair,
        start_channel(directory, free_port()) as channel,
        refault_driver(pair, channel, directory) as driver,
    ):
        yield pair, channel, driver


async def test_preempt_is_tracked_and_recovers_whichever_connection_is_lost(tmp_path: Path) -> None:
    async with fronted(tmp_path) as (pair, channel, driver):
        await bare.start_postcopy(
            driver.source, driver.destination, channel, bandwidth=1 << 20, capabilities=PREEMPT
        )
        cuts = [Cut(Loss.RESET, forward, b".", 0, "now") for forward in (True, False)]
        for loss in (*Loss, *cuts):
            since = len(driver.destination.events)
            if isinstance(loss, Cut):
                await channel.cut_at(loss)
                await channel.was_cut(loss)
            else:
                await channel.lose(loss)
            with trio.fail_after(15):
                await driver.destination.wait_migration("postcopy-active", since=since)
                await bare.wait_status(driver.source, "postcopy-active")
        for vm in await driver.statuses():
            assert vm.migration.relay == "tracking"
            assert (vm.recovery.losses, vm.recovery.recoveries) == (5, 5)
            assert vm.pages.arrived > 0
        await pair.destination.wait_progress()
        await bare.finish(driver.source)
        verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
        assert verdict.right, verdict
        with trio.fail_after(10):
            while any(vm.migration.status != "completed" for vm in await driver.statuses()):
                await trio.sleep(0.05)
        assert [vm.pages.outstanding for vm in await driver.statuses()] == [0, 0]


async def begin_multifd(
    driver: RefaultDriver, channel: Channel, bandwidth: int, capabilities: Sequence[str] = MULTIFD
) -> None:
    for qmp in (driver.source, driver.destination):
        await bare.set_capabilities(qmp, *capabilities)
        await qmp.execute("migrate-set-parameters", {"multifd-channels": 4})
    await driver.source.execute(
        "migrate-set-parameters", {"max-bandwidth": bandwidth, "downtime-limit": 1000}
    )
    await driver.destination.execute("migrate-incoming", {"uri": channel.target_uri})
    await channel.wait_open()
    await driver.source.execute("migrate", {"uri": channel.uri})


async def test_multifd_goes_through_the_relay_and_arrives_whole(tmp_path: Path) -> None:
    async with fronted(tmp_path) as (pair, channel, driver):
        with trio.fail_after(60):
            await begin_multifd(driver, channel, 256 << 20)
            await bare.wait_status(driver.source, "completed")
            await driver.destination.wait_migration("completed")
        assert all(vm.channel.bytes_forward > 0 for vm in await driver.statuses())
        await pair.destination.wait_progress()
        verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
        assert verdict.right, verdict


async def test_a_lost_multifd_precopy_leaves_the_guest_at_the_source(tmp_path: Path) -> None:
    async with fronted(tmp_path) as (pair, channel, driver):
        with trio.fail_after(60):
            await begin_multifd(driver, channel, 8 << 20)
            await bare.wait_sent(driver.source, 0.2)
            await channel.lose(Loss.RESET)
            await bare.wait_status(pair.source.qmp, "failed")
        await pair.source.wait_progress()
        verdict = await compare(GUEST, pair.source.qmp)
        assert verdict.right, verdict
