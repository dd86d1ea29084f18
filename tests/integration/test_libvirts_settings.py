"""What libvirt from 10.3 on switches on for `virsh migrate --postcopy`: relayed, and recovered."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from tests.integration.qemus import qemus
from tests.integration.test_addresses import fronted, lose, memory_is_right

from refault.lab import bare
from refault.lab.qemu import PairOptions

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

SWITCHED_ON = (
    "events",
    "late-block-activate",
    "pause-before-switchover",
    "postcopy-preempt",
    "postcopy-ram",
    "return-path",
    "switchover-ack",
)


@pytest.mark.parametrize("binary", qemus("qemu-10", "qemu-11")[1:])
async def test_it_is_relayed_and_recovered(tmp_path: Path, binary: str) -> None:
    async with fronted(tmp_path, PairOptions(binary, binary)) as (pair, channel, driver):
        with trio.fail_after(30):
            await bare.begin(
                driver.source,
                driver.destination,
                channel,
                bandwidth=1 << 20,
                precopy_bandwidth=bare.PRECOPY_BANDWIDTH,
                capabilities=SWITCHED_ON,
            )
            await bare.wait_sent(driver.source, 0.1)
            await driver.source.execute("migrate-start-postcopy")
            await bare.wait_status(driver.source, "pre-switchover")
            await driver.source.execute("migrate-continue", {"state": "pre-switchover"})
            await bare.wait_status(driver.source, "postcopy-active")
            await driver.destination.wait_event(lambda event: event.name == "RESUME")
        await lose(channel, driver)
        assert [vm.migration.relay for vm in await driver.statuses()] == ["tracking", "tracking"]
        await memory_is_right(pair, driver)
