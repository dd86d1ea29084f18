"""refault killed with page requests under way: the next one knows them from the state file, and replays them.

The destination repeats nothing by itself, the requests are lost inside the killed carrier, and what was in
memory went with refault: only the file can know them.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import trio
from tests.campaign.losses import EOF
from tests.integration.qemus import OTHERS_NIGHTLY, qemus
from tests.integration.starving import WOKEN, Case, Recovered, build_no_repeat, lose_a_request
from tests.integration.waiting import held_by_qemu

from refault.lab import bare
from refault.lab.channel import Cut, Loss, free_port, start_channel
from refault.lab.driver import REFAULT, RefaultDriver, refault_driver
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.qemu import DEFAULT_BINARY, Pair, PairOptions, Qemu, start_pair
from refault.lab.story import Side

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(200),
    pytest.mark.skipif(
        not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="the preloaded library is for KVM only"
    ),
]

GUEST = Guest(vcpus=4, log_pages=12, tick_ns=2_000_000)
SMALL = Guest(vcpus=4, log_pages=11, tick_ns=4_000_000)
BACKGROUND = 16 << 10
UNGUARDED = """
import sys
from refault.daemon.relayed.guard import Guard
Guard.start = lambda self: None
from refault.cli.main import main
sys.exit(main())
"""
KEPT = re.compile(r"\.(json|pages|legs)")
"""What is in the state directory of a migration."""
BOTH: tuple[Side, ...] = ("source", "destination")


@pytest.fixture(scope="module")
def no_repeat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_no_repeat(tmp_path_factory.mktemp("preload"))


async def memory_is_right(recovered: Recovered) -> None:
    await bare.finish(recovered.pair.source.qmp)
    verdict = await compare(GUEST, recovered.pair.destination.qmp, recovered.pair.source.qmp)
    assert verdict.right, verdict


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
@pytest.mark.parametrize("killed", [BOTH[:1], BOTH[1:], BOTH], ids=["source", "destination", "both"])
async def test_what_a_killed_refault_had_on_record_is_replayed_by_the_next(
    tmp_path: Path, no_repeat: Path, binary: str, killed: tuple[Side, ...]
) -> None:
    case = Case(GUEST, BACKGROUND, True, no_repeat, binary, killed)
    async with lose_a_request(case, tmp_path) as recovered:
        assert await recovered.run_again(WOKEN) == set()
        replayed = {vm.migration.role: vm.pages.replayed for vm in await recovered.driver.statuses()}
        assert replayed["destination"] > 0
        await memory_is_right(recovered)


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
async def test_without_the_state_file_they_starve(tmp_path: Path, no_repeat: Path, binary: str) -> None:
    case = Case(GUEST, BACKGROUND, True, no_repeat, binary, BOTH[1:], forget=True)
    async with lose_a_request(case, tmp_path) as recovered:
        assert await recovered.run_again(4.0) != set()
        await memory_is_right(recovered)


@contextlib.asynccontextmanager
async def all_sent(
    directory: Path, binary: str, command: Sequence[str] = REFAULT
) -> AsyncIterator[tuple[Pair, RefaultDriver]]:
    """A source that has sent all and hears nothing, for its channel was lost: refault holds its leg."""
    async with (
        start_pair(SMALL, directory, PairOptions(binary, binary)) as pair,
        start_channel(directory, free_port()) as channel,
        refault_driver(pair, channel, directory, command=command) as driver,
    ):
        await bare.start_postcopy(driver.source, driver.destination, channel, bandwidth=1 << 20)
        cut = Cut(Loss.CLOSE, True, EOF, 0, "now")
        await channel.cut_at(cut)
        await driver.source.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
        await channel.was_cut(cut)
        with trio.fail_after(40):
            while not [vm for vm in await driver.statuses() if vm.name == "source" and vm.migration.held]:
                await trio.sleep(0.02)
        yield pair, driver


async def runs(qemu: Qemu) -> bool:
    return bool((await qemu.qmp.execute("query-status"))["running"])


async def test_a_source_that_has_sent_all_does_not_run_again_though_refault_is_killed(tmp_path: Path) -> None:
    async with all_sent(tmp_path, qemus("qemu-10")[-1]) as (pair, driver):
        with trio.fail_after(40):
            await held_by_qemu(pair.source.pid, driver.processes[0].pid)
            driver.processes[0].kill()
            again = driver.start_again(0)
            while "ALERT: QEMU holds its leg open" not in again.tail(50):
                assert not await runs(pair.source)
                await trio.sleep(0.02)
            (told,) = [vm.migration for vm in await driver.statuses() if vm.name == "source"]
            assert told.phase == "completing"
            assert told.held is not None
            await pair.destination.qmp.wait_migration("completed")
            await pair.destination.wait_progress()
        assert await bare.migration_status(pair.source.qmp) == "postcopy-active"
        assert not await runs(pair.source)
        verdict = await compare(SMALL, pair.destination.qmp, pair.source.qmp)
        assert verdict.right, verdict


async def test_a_source_that_failed_while_refault_was_dead_is_stopped(tmp_path: Path) -> None:
    """A kill in the moment before QEMU holds both ends: 10.0 runs the guest again."""
    binary = qemus("qemu-10")[-1]
    async with all_sent(tmp_path, binary, [REFAULT[0], "-c", UNGUARDED]) as (pair, driver):
        with trio.fail_after(40):
            driver.processes[0].kill()
            if pair.source.qmp.version < (10, 0, 0):
                return  # it hangs, and does not run
            await bare.wait_status(pair.source.qmp, "failed")
            while not await runs(pair.source):  # it says so first
                await trio.sleep(0.02)
            driver.start_again(0)
            while await runs(pair.source):
                await trio.sleep(0.02)
        await pair.destination.wait_progress()


async def test_a_qemu_that_is_killed_while_its_leg_is_held_leaves_no_hold(tmp_path: Path) -> None:
    """Not in the status, the metrics, or the state directory."""
    served = f"unix:{tmp_path}/$$.metrics"  # the pid that refault has
    command = ("sh", "-c", f'exec "$0" -m refault "$@" --metrics "{served}"', sys.executable)
    async with all_sent(tmp_path, DEFAULT_BINARY, command=command) as (pair, driver):
        metrics = tmp_path / f"{driver.processes[0].pid}.metrics"

        async def left() -> list[object]:
            (vm,) = [vm for vm in await driver.statuses() if vm.name == "source"]
            kept = [name for name in os.listdir(tmp_path / "source.state") if KEPT.search(name)]
            gauges = [line for line in await scraped(metrics) if line.startswith("refault_leg_held{")]
            told = [vm.migration.held, vm.migration.status, vm.recovery.last_error]
            return [*filter(None, told), *kept, *[line for line in gauges if not line.endswith(" 0.0")]]

        with trio.fail_after(40):  # metrics may be of a moment ago
            while "refault_leg_held" not in str(held := await left()) or len(held) < 4:
                await trio.sleep(0.02)
        pair.source.process.kill()
        with trio.fail_after(40):
            while await left():
                await trio.sleep(0.02)


async def scraped(metrics: Path) -> list[str]:
    async with await trio.open_unix_socket(str(metrics)) as stream:
        await stream.send_all(b"GET /metrics HTTP/1.0\r\n\r\n")
        return b"".join([chunk async for chunk in stream]).decode().splitlines()
