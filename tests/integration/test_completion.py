"""A far leg that is lost when the source has turned to the completion, and has not sent all by far."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from tests.integration.qemus import BINARIES
from tests.integration.waiting import nothing_moves

from refault.lab import bare
from refault.lab.channel import free_port, start_channel
from refault.lab.driver import refault_driver
from refault.lab.guest import Guest
from refault.lab.qemu import PairOptions, start_pair

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

GUEST = Guest(vcpus=1, log_pages=14, tick_ns=1_000_000)


@pytest.mark.parametrize("binary", BINARIES[-1:])
async def test_a_source_that_would_run_its_guest_again_is_held(tmp_path: Path, binary: str) -> None:
    """10.0 and later fail a migration whose leg ends in the completion, and run the guest once more."""
    async with (
        start_pair(GUEST, tmp_path, PairOptions(binary, binary)) as pair,
        start_channel(tmp_path, free_port()) as channel,
        refault_driver(pair, channel, tmp_path) as driver,
    ):
        for qmp in (driver.source, driver.destination):
            await bare.set_capabilities(qmp, *bare.CAPABILITIES)
        limits = {"max-bandwidth": bare.PRECOPY_BANDWIDTH, "downtime-limit": bare.DOWNTIME_LIMIT}
        limits["max-postcopy-bandwidth"] = 128 << 10  # or the way is full before QEMU is told to complete
        await driver.source.execute("migrate-set-parameters", limits)
        await driver.destination.execute("migrate-incoming", {"uri": channel.target_uri})
        await channel.wait_open()
        await driver.source.execute("migrate", {"uri": channel.uri})
        with trio.fail_after(30):
            await bare.wait_sent(driver.source, 0.1)
            await driver.source.execute("migrate-start-postcopy")
            await bare.wait_status(driver.source, "postcopy-active")
            await driver.destination.wait_event(lambda event: event.name == "RESUME")
        channel.freeze()
        # What is left fits into that now: QEMU sends it all at once, and stands when the way is full.
        await driver.source.execute("migrate-set-parameters", {"downtime-limit": 2_000_000})
        await nothing_moves(driver)
        channel.thaw()
        await channel.reset()
        with trio.fail_after(30):
            while (await driver.statuses())[0].migration.held is None:
                await trio.sleep(0.05)
        await trio.sleep(0.5)
        assert [event.name for event in driver.source.events if event.name in ("RESUME", "STOP")] == ["STOP"]
        assert (await driver.statuses())[0].migration.status == "postcopy-active"
