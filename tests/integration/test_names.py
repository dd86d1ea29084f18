"""A resolver that takes five seconds delays a migration and its recovery, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from tests.integration.qemus import OTHERS_NIGHTLY
from tests.integration.slow_resolver import SLOW_NAME, slow_resolver
from tests.integration.test_main_job import GUEST
from tests.integration.waiting import recovered

from refault.lab import bare
from refault.lab.channel import Loss, free_port, start_channel
from refault.lab.driver import refault_driver
from refault.lab.qemu import PairOptions, start_pair

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
async def test_while_names_take_five_seconds_a_loss_is_recovered(tmp_path: Path, binary: str) -> None:
    slow, held = tmp_path / "slow", tmp_path / "held"
    prefix = ["env", f"LD_PRELOAD={slow_resolver(tmp_path)}", f"SLOW={slow}", f"HELD={held}"]
    async with (
        start_pair(GUEST, tmp_path, PairOptions(binary, binary)) as pair,
        start_channel(tmp_path, free_port()) as channel,
        refault_driver(pair, channel, tmp_path, prefixes=(prefix, ())) as driver,
    ):
        for qmp in (driver.source, driver.destination):
            await bare.set_capabilities(qmp, *bare.CAPABILITIES)
        limits = {"max-bandwidth": bare.PRECOPY_BANDWIDTH, "downtime-limit": bare.DOWNTIME_LIMIT}
        limits["max-postcopy-bandwidth"] = 1 << 20
        await driver.source.execute("migrate-set-parameters", limits)
        await driver.destination.execute("migrate-incoming", {"uri": channel.target_uri})
        await channel.wait_open()
        slow.touch()
        held.touch()
        await driver.source.execute("migrate", {"uri": f"tcp:{SLOW_NAME}:{channel.port}"})
        assert await bare.migration_status(driver.source) == "setup"
        held.unlink()
        with trio.fail_after(30):
            await bare.wait_sent(driver.source, 0.1)
            await driver.source.execute("migrate-start-postcopy")
            await driver.destination.wait_event(lambda event: event.name == "RESUME")
        since = len(driver.destination.events)
        await channel.lose(Loss.RESET)
        with trio.fail_after(40):
            await driver.destination.wait_migration("postcopy-active", since=since)
            await bare.wait_status(driver.source, "postcopy-active")
        await recovered(driver, 1)
        await pair.destination.wait_progress()
