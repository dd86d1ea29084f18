"""refault killed with page requests under way: the next one knows them from the state file, and replays them.

The destination repeats nothing by itself, the requests are lost inside the killed carrier, and what was in
memory went with refault: only the file can know them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from tests.campaign.losses import EOF
from tests.integration.qemus import BINARIES, qemus
from tests.integration.starving import Case, Recovered, build_no_repeat, lose_a_request

from refault.lab import bare
from refault.lab.channel import Cut, Loss, free_port, start_channel
from refault.lab.driver import refault_driver
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.qemu import PairOptions, start_pair
from refault.lab.story import Side

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(90),
    pytest.mark.skipif(
        not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="the preloaded library is for KVM only"
    ),
]

GUEST = Guest(vcpus=4, log_pages=12, tick_ns=2_000_000)
SMALL = Guest(vcpus=4, log_pages=11, tick_ns=1_000_000)
BACKGROUND = 256 << 10
BOTH: tuple[Side, ...] = ("source", "destination")


@pytest.fixture(scope="module")
def no_repeat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_no_repeat(tmp_path_factory.mktemp("preload"))


async def memory_is_right(recovered: Recovered) -> None:
    await bare.finish(recovered.pair.source.qmp)
    verdict = await compare(GUEST, recovered.pair.destination.qmp, recovered.pair.source.qmp)
    assert verdict.right, verdict


@pytest.mark.parametrize("binary", BINARIES)
@pytest.mark.parametrize("killed", [BOTH[:1], BOTH[1:], BOTH], ids=["source", "destination", "both"])
async def test_what_a_killed_refault_had_on_record_is_replayed_by_the_next(
    tmp_path: Path, no_repeat: Path, binary: str, killed: tuple[Side, ...]
) -> None:
    case = Case(GUEST, BACKGROUND, True, no_repeat, binary, killed)
    async with lose_a_request(case, tmp_path) as recovered:
        assert await recovered.run_again(3.0) == set()
        replayed = {vm.migration.role: vm.pages.replayed for vm in await recovered.driver.statuses()}
        assert replayed["destination"] > 0
        await memory_is_right(recovered)


@pytest.mark.parametrize("binary", BINARIES)
async def test_without_the_state_file_they_starve(tmp_path: Path, no_repeat: Path, binary: str) -> None:
    case = Case(GUEST, BACKGROUND, True, no_repeat, binary, BOTH[1:], forget=True)
    async with lose_a_request(case, tmp_path) as recovered:
        assert await recovered.run_again(4.0) != set()
        await memory_is_right(recovered)


async def test_a_source_that_failed_while_refault_was_dead_is_stopped(tmp_path: Path) -> None:
    """A killed refault cannot hold the source's leg between EOF and SHUT, and 10.0 runs the guest again."""
    binary = qemus("qemu-10")[-1]
    async with (
        start_pair(SMALL, tmp_path, PairOptions(binary, binary)) as pair,
        start_channel(tmp_path, free_port()) as channel,
        refault_driver(pair, channel, tmp_path) as driver,
    ):
        await bare.start_postcopy(driver.source, driver.destination, channel, bandwidth=1 << 20)
        cut = Cut(Loss.CLOSE, True, EOF, 0, "now")
        await channel.cut_at(cut)
        await driver.source.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
        await channel.was_cut(cut, 30)
        with trio.fail_after(20):
            while not [vm for vm in await driver.statuses() if vm.name == "source" and vm.migration.held]:
                await trio.sleep(0.02)
            driver.processes[0].kill()
            if pair.source.qmp.version < (10, 0, 0):
                return  # it hangs, and does not run
            await bare.wait_status(pair.source.qmp, "failed")
            assert (await pair.source.qmp.execute("query-status"))["running"]
            driver.start_again(0)
            while (await pair.source.qmp.execute("query-status"))["running"]:
                await trio.sleep(0.02)
        await pair.destination.wait_progress()
