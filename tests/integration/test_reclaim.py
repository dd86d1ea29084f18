"""A channel lost while the source writes its device state: the guest goes on there, disks and all."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import trio
from tests.campaign.losses import PING_2, PONG_3
from tests.integration.qemus import qemus
from tests.integration.test_main_job import GUEST, fronted
from tests.integration.waiting import nothing_moves, recovered, told

from refault.daemon.recovery.doubt import TAKE_BACK
from refault.lab import bare
from refault.lab.channel import Channel, Cut, Loss, free_port, start_channel
from refault.lab.driver import RefaultDriver, refault_driver
from refault.lab.memory import compare
from refault.lab.qemu import Pair, PairOptions, disks, start_pair
from refault.lab.qmp_client import QmpError
from refault.migration.legs import WAITS_FOR_PONG

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

DISKS = 24
"""A package of 1 MiB, so that the loss is surely noticed before all of it has left QEMU."""
PING_3 = PING_2[:-1] + rb"3"
PREEMPT = (*bare.CAPABILITIES, "postcopy-preempt")


async def run_precopy(
    driver: RefaultDriver, channel: Channel, bandwidth: int, capabilities: tuple[str, ...]
) -> None:
    """Until a tenth of the memory has been sent; ``bandwidth`` is that of postcopy."""
    await bare.begin(
        driver.source,
        driver.destination,
        channel,
        bandwidth=bandwidth,
        precopy_bandwidth=bare.PRECOPY_BANDWIDTH,
        capabilities=capabilities,
    )
    await bare.wait_sent(driver.source, 0.1)


async def wait_for_arrival(pair: Pair, driver: RefaultDriver) -> None:
    """Has the source wait to hear that its guest has arrived, by stopping the destination's QEMU.

    Slowly, or what nobody reads fills the way before precopy has ended.
    """
    await driver.source.execute("migrate-set-parameters", {"max-bandwidth": 64 << 10})
    pair.destination.process.signal(signal.SIGSTOP)
    await driver.source.execute("migrate-start-postcopy")
    await bare.wait_status(pair.source.qmp, "postcopy-device")


async def take_back(pair: Pair, driver: RefaultDriver) -> None:
    """As the operator does; the guest goes on at the source, and its memory is right."""
    pair.destination.process.kill()
    await driver.source.execute("migrate", {"uri": TAKE_BACK, "resume": True})
    with trio.fail_after(40):
        await bare.wait_status(pair.source.qmp, "failed")
        await pair.source.wait_progress()
    assert (await driver.source.execute("query-status"))["running"]
    verdict = await compare(GUEST, pair.source.qmp)
    assert verdict.right, verdict


async def lose_in_switchover(
    driver: RefaultDriver, channel: Channel, cut: Cut, capabilities: tuple[str, ...] = bare.CAPABILITIES
) -> None:
    """Begins a migration and loses its channel where ``cut`` says."""
    await run_precopy(driver, channel, 1 << 20, capabilities)
    await channel.cut_at(cut)
    await driver.source.execute("migrate-start-postcopy")
    await channel.was_cut(cut)


@pytest.mark.parametrize("binary", qemus("qemu-10", "qemu-11"))
@pytest.mark.parametrize("capabilities", [bare.CAPABILITIES, PREEMPT], ids=["plain", "preempt"])
async def test_the_guest_goes_on_at_the_source(
    tmp_path: Path, binary: str, capabilities: tuple[str, ...]
) -> None:
    async with (
        start_pair(GUEST, tmp_path, PairOptions(binary, binary, extra=disks(DISKS))) as pair,
        start_channel(tmp_path, free_port()) as channel,
        refault_driver(pair, channel, tmp_path) as driver,
    ):
        cut = Cut(Loss.CLOSE, True, PING_2, 0, "now")
        with trio.fail_after(60):
            await lose_in_switchover(driver, channel, cut, capabilities)
            await bare.wait_status(pair.source.qmp, "failed")
            await pair.source.wait_progress()
        assert not [event for event in pair.destination.qmp.events if event.name == "RESUME"]
        # A write to a disk that is not activated ends QEMU.
        await pair.source.qmp.monitor_command('qemu-io -d disk0/virtio-backend "write 0 512"')
        assert (await driver.source.execute("query-status"))["running"]
        verdict = await compare(GUEST, pair.source.qmp)
        assert verdict.right, verdict


@pytest.mark.parametrize("killed", [False, True], ids=["", "refault-killed"])
@pytest.mark.parametrize("binary", qemus("qemu-10"))
async def test_the_guest_of_a_package_lost_on_its_way_is_taken_back_on_the_operators_word(
    tmp_path: Path, binary: str, killed: bool
) -> None:
    """It is cut right before RUN, its last command, when the relay has surely read it whole. The next refault
    knows from the record that nobody has said that the guest has arrived."""
    async with fronted(tmp_path, binary=binary) as (pair, channel, driver):
        cut = Cut(Loss.CLOSE, True, PING_3, 0, "now")
        with trio.fail_after(60):
            await lose_in_switchover(driver, channel, cut, bare.CAPABILITIES if killed else PREEMPT)
            if killed:
                await bare.wait_status(pair.source.qmp, "postcopy-paused")
                driver.processes[0].kill()
                driver.processes[0].output.unlink()
                driver.start_again(0)
            while "ALERT: the channel was lost in the switchover" not in driver.processes[0].tail(50):
                await trio.sleep(0.05)
            assert not (await driver.source.execute("query-status"))["running"]
            await take_back(pair, driver)


async def test_a_guest_that_has_arrived_is_not_taken_back(tmp_path: Path) -> None:
    async with fronted(tmp_path) as (pair, channel, driver):
        await bare.start_postcopy(driver.source, driver.destination, channel, bandwidth=1 << 20)
        # The destination's word that it has the guest: QEMU tells of postcopy before it has come.
        await told(driver, lambda vms: vms[0].migration.phase == "postcopy")
        driver.processes[1].kill()  # so that the channel is lost, and not recovered
        with trio.fail_after(40):
            await bare.wait_status(pair.source.qmp, "postcopy-paused")
            with pytest.raises(QmpError, match="has said that it had it"):
                await driver.source.execute("migrate", {"uri": TAKE_BACK, "resume": True})
        assert await bare.migration_status(pair.source.qmp) == "postcopy-paused"


WITHOUT_EVENTS = ("postcopy-ram",)
"""QEMU does not tell by itself how far it is."""
ONLY_11 = [name for name in qemus("qemu-11") if name == "qemu-11"]


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "refault-stopped"])
@pytest.mark.parametrize("binary", ONLY_11)
async def test_a_source_that_writes_while_it_waits_for_its_guests_arrival_pauses(
    tmp_path: Path, binary: str, lost: bool
) -> None:
    async with fronted(tmp_path, binary=binary) as (pair, channel, driver):
        with trio.fail_after(60):
            await run_precopy(driver, channel, 1 << 30, WITHOUT_EVENTS)
            await wait_for_arrival(pair, driver)
            await nothing_moves(driver)
            if lost:
                await channel.reset()
            else:
                assert await driver.processes.pop(0).stop() == 0
            await bare.wait_status(pair.source.qmp, "postcopy-paused")
            while lost and "ALERT: the channel was lost in" not in driver.processes[0].tail(50):
                await trio.sleep(0.05)
        pair.destination.process.kill()  # or its end would be waited for
        assert not [event for event in pair.source.qmp.events if event.name == "RESUME"]


async def arrives_and_runs_there_alone(pair: Pair, driver: RefaultDriver) -> None:
    """To the end, and with the right memory."""
    await bare.finish(driver.source)
    assert not [event for event in pair.source.qmp.events if event.name == "RESUME"]
    await pair.destination.wait_progress()
    verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
    assert verdict.right, verdict


@pytest.mark.parametrize("binary", ONLY_11)
async def test_a_source_that_never_hears_that_its_guest_has_arrived_does_not_run_it_again(
    tmp_path: Path, binary: str
) -> None:
    """From 10.2 on a source fails where its channel ends before that, instead of pausing."""
    async with fronted(tmp_path, binary=binary) as (pair, channel, driver):
        cut = Cut(Loss.CLOSE, False, PONG_3, 0, "now")
        with trio.fail_after(60):
            await lose_in_switchover(driver, channel, cut)
            await recovered(driver, 1)
        await arrives_and_runs_there_alone(pair, driver)


@pytest.mark.parametrize("binary", ONLY_11)
async def test_nor_where_refault_is_killed_before_it_has_heard(tmp_path: Path, binary: str) -> None:
    """All device state has passed, and nothing passes back until it is dead."""
    async with fronted(tmp_path, binary=binary) as (pair, channel, driver):
        await run_precopy(driver, channel, 1 << 20, bare.CAPABILITIES)
        await channel.cut_at(Cut(Loss.CLOSE, True, PING_3, 0, "now"), freezes=True)
        with trio.fail_after(60):
            await driver.source.execute("migrate-start-postcopy")
            await channel.was_frozen()
            await bare.wait_status(pair.source.qmp, WAITS_FOR_PONG)
            driver.processes[0].kill()
            channel.thaw()
            await pair.destination.qmp.wait_event(lambda event: event.name == "RESUME")
            driver.start_again(0)
            await pair.source.qmp.wait_migration("postcopy-paused")
            await recovered(driver, 1)
        await arrives_and_runs_there_alone(pair, driver)
