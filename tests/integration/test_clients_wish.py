"""What a client wants while the migration is paused is done and not fought; and a refault that was told to
gives up.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from tests.integration.qemus import ALL_BINARIES
from tests.integration.test_main_job import GUEST, REFAULT

from refault.daemon.telling.snapshot import RecoveryStatus
from refault.lab import bare
from refault.lab.channel import Channel, free_port, start_channel
from refault.lab.driver import RefaultDriver, refault_driver
from refault.lab.memory import compare
from refault.lab.qemu import DEFAULT_BINARY, Pair, PairOptions, start_pair
from refault.lab.qmp_client import QmpClosed, QmpError

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

GIVE_UP_AFTER = 1
# `refault run` with an option more: what the lab starts ends with the command's own arguments.
WITH_OPTION = "import sys; from refault.cli.main import main; sys.exit(main([*sys.argv[1:], *{options}]))"


@dataclass
class Lost:
    """A migration in postcopy that is paused on both sides and cannot recover until the way is back."""

    pair: Pair
    channel: Channel
    driver: RefaultDriver
    port: int

    async def way_back(self) -> None:
        """The address leads to the destination again."""
        await self.channel.retarget(self.port)
        await self.channel.wait_open()

    async def recoveries(self) -> list[RecoveryStatus]:
        return [vm.recovery for vm in await self.driver.statuses()]

    async def ends_well(self) -> None:
        """Active again on both sides, by whatever way; completes, and its memory is right."""
        with trio.fail_after(40):
            await bare.wait_status(self.pair.source.qmp, "postcopy-active")
        await self.pair.destination.wait_progress(40)
        await bare.finish(self.pair.source.qmp)
        verdict = await compare(GUEST, self.pair.destination.qmp, self.pair.source.qmp)
        assert verdict.right, verdict


@contextlib.asynccontextmanager
async def lost(directory: Path, binary: str = DEFAULT_BINARY, *options: str) -> AsyncIterator[Lost]:
    command: Sequence[str] = REFAULT
    if options:
        command = [REFAULT[0], "-c", WITH_OPTION.format(options=list(options))]
    async with (
        start_pair(GUEST, directory, PairOptions(binary, binary)) as pair,
        start_channel(directory, free_port()) as channel,
        refault_driver(pair, channel, directory, command=command) as driver,
    ):
        await bare.start_postcopy(driver.source, driver.destination, channel, bandwidth=1 << 20)
        port = int(channel.target_uri.rpartition(":")[2])
        since = len(pair.destination.qmp.events)
        await channel.retarget()
        await channel.reset()
        with trio.fail_after(40):
            await bare.wait_status(pair.source.qmp, "postcopy-paused")
            await pair.destination.qmp.wait_migration("postcopy-paused", since=since)
        yield Lost(pair, channel, driver, port)


@pytest.mark.parametrize("binary", ALL_BINARIES)
async def test_a_cancel_in_postcopy_is_refused_in_the_words_of_10_0(tmp_path: Path, binary: str) -> None:
    async with lost(tmp_path, binary) as case:
        await cancel_is_refused(case)
        await case.way_back()
        with trio.fail_after(40):
            await bare.wait_status(case.pair.source.qmp, "postcopy-active")
        await cancel_is_refused(case)
        await case.ends_well()


async def cancel_is_refused(case: Lost) -> None:
    for _ in range(3):  # while paused: between refault's attempts, and in them
        with pytest.raises(QmpError) as refused, trio.fail_after(20):
            await case.driver.source.execute("migrate_cancel")
        assert refused.value.kind == "GenericError"
        assert refused.value.description == "Postcopy migration in progress, cannot cancel."
        await trio.sleep(0.05)


async def test_a_client_that_quits_qemu_while_paused_is_obeyed(tmp_path: Path) -> None:
    """At the source: the destination's QEMU cannot, for its vCPUs sleep on missing pages."""
    async with lost(tmp_path) as case:
        refault = case.driver.processes[0]
        with trio.fail_after(40):
            with contextlib.suppress(QmpClosed):
                await case.driver.source.execute("quit")
            assert await case.pair.source.process.wait() == 0
            while list((tmp_path / "source.state").glob("*.json")):  # the migration has ended with it
                await trio.sleep(0.02)
            while "closed its monitor" not in refault.output.read_text():  # it is written beside the work
                await trio.sleep(0.02)
        said = refault.output.read_text()
        tried = (await case.recoveries())[0].attempts
        await trio.sleep(1)
        refault.must_run()
        assert (await case.recoveries())[0].attempts == tried
        assert not re.search(r"recovery attempt \d+: ", refault.output.read_text().removeprefix(said))


async def test_a_loss_that_is_given_up_is_left_to_the_client(tmp_path: Path) -> None:
    async with lost(tmp_path, DEFAULT_BINARY, "--give-up-after", str(GIVE_UP_AFTER)) as case:
        with trio.fail_after(GIVE_UP_AFTER + 40):
            while not all(recovery.given_up for recovery in await case.recoveries()):
                await trio.sleep(0.05)
        tried: list[int] = []
        with trio.fail_after(40):  # the attempt under way is the last
            while tried != (tried := [recovery.attempts for recovery in await case.recoveries()]):
                await trio.sleep(1)
        await case.way_back()
        await trio.sleep(2)  # the next back-off delay would be over
        assert [recovery.attempts for recovery in await case.recoveries()] == tried
        assert await bare.migration_status(case.pair.source.qmp) == "postcopy-paused"
        for process in case.driver.processes:
            with trio.fail_after(20):
                while f"ALERT: gave up after {GIVE_UP_AFTER} s" not in process.output.read_text():
                    await trio.sleep(0.02)
            assert process.output.read_text().count(f"ALERT: gave up after {GIVE_UP_AFTER} s") == 1
        with trio.fail_after(40):
            await case.driver.destination.execute(
                "migrate-recover", {"uri": case.channel.target_uri}, oob=True
            )
            await case.driver.source.execute("migrate", {"uri": case.channel.uri, "resume": True})
            await bare.wait_status(case.pair.source.qmp, "postcopy-active")
            while [(each.given_up, each.recoveries) for each in await case.recoveries()] != [(False, 1)] * 2:
                await trio.sleep(0.05)
            # A new loss begins anew.
            await case.channel.reset()
            while [each.recoveries for each in await case.recoveries()] != [2, 2]:
                await trio.sleep(0.05)
        await case.ends_well()
