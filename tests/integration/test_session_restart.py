"""A planned restart of either refault while the channel is a session: no QEMU sees anything of it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
import trio
from tests.integration.qemus import OTHERS_NIGHTLY
from tests.integration.test_session import Lab, lab

from refault.lab.driver import REFAULT
from refault.lab.qemu import DEFAULT_BINARY

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

SEEN = {"setup", "active", "device", "postcopy-device", "postcopy-active", "completed"}
"""What a QEMU says that notices nothing."""
LEFT = "the channel is left to the next refault"
GOES_ON = "going on with the channel"
LOST = "it counts as lost"
ENDS = ("source", "destination")
LITTLE = 256 << 10
"""Bytes."""


async def stop(world: Lab, end: int, directory: Path) -> None:
    """As systemd does it before it starts the next."""
    log = directory / f"refault-{ENDS[end]}.log"
    before = log.read_text().count(LEFT)
    world.driver.processes[end].signal(signal.SIGUSR2)
    await world.driver.processes[end].wait()
    assert log.read_text().count(LEFT) == before + 1, log.read_text()


async def restart(world: Lab, ends: list[int], directory: Path) -> None:
    """Of one end, or of both at once."""

    async def one(end: int) -> None:
        log = directory / f"refault-{ENDS[end]}.log"
        before = log.read_text().count(GOES_ON)
        await stop(world, end, directory)
        world.driver.start_again(end)
        while log.read_text().count(GOES_ON) == before:
            world.driver.processes[end].must_run()
            await trio.sleep(0.005)

    async with trio.open_nursery() as nursery:
        for end in ends:
            nursery.start_soon(one, end)


async def until_the_last(world: Lab) -> None:
    """A migration that is about to end in precopy, and to send the last of it."""
    source = world.pair.source.qmp
    await world.until_a_session("pause-before-switchover", bandwidth=30 << 20)
    while True:  # what is left then has to fit into the session's window
        ram = (await source.execute("query-migrate")).get("ram")
        if ram and ram["dirty-sync-count"] > 1 and ram["remaining"] < LITTLE:
            break
        await trio.sleep(0.01)
    await world.driver.source.execute("migrate-set-parameters", {"downtime-limit": 300})
    await source.wait_migration("pre-switchover")


async def until_the_last_word(world: Lab) -> None:
    """The same, where its source does not hear that its destination has completed."""
    await until_the_last(world)
    await send_the_last(world)


async def send_the_last(world: Lab) -> None:
    world.proxy.mute = True
    await world.driver.source.execute("migrate-continue", {"state": "pre-switchover"})
    await world.pair.destination.qmp.wait_migration("completed")


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([0], [1]),
        pytest.param([1], [0], marks=pytest.mark.nightly),
        pytest.param([0, 1], [0, 1], marks=pytest.mark.nightly),
    ],
    ids=["source-destination", "destination-source", "both-both"],
)
async def test_no_qemu_sees_a_restart(
    binary: str, first: list[int], second: list[int], tmp_path: Path
) -> None:
    """In precopy of the `first`, and in postcopy, where no page comes unasked, of the `second`."""
    async with lab(tmp_path, binary) as world:
        await world.until_a_session()
        await restart(world, first, tmp_path)
        source, destination = world.pair.source.qmp, world.pair.destination.qmp
        await world.driver.source.execute("migrate-start-postcopy")
        await destination.wait_event(lambda event: event.name == "RESUME")
        await source.wait_migration("postcopy-active")
        await restart(world, second, tmp_path)
        await world.complete(pauses=0)
        for qmp in (source, destination):
            told = {str(event.data["status"]) for event in qmp.events if event.name == "MIGRATION"}
            assert told <= SEEN
    for side in ENDS:
        said = (tmp_path / f"refault-{side}.log").read_text()
        assert "internal error" not in said
        assert LOST not in said
        assert list((tmp_path / f"{side}.state").iterdir()) == []


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
@pytest.mark.parametrize("end", [0, pytest.param(1, marks=pytest.mark.nightly)], ids=ENDS)
async def test_what_was_written_down_is_torn_and_the_channel_is_lost_and_recovered(
    binary: str, end: int, tmp_path: Path
) -> None:
    """QEMU holds the leg, so the next refault has to end it."""
    async with lab(tmp_path, binary) as world:
        await world.until_postcopy()
        await stop(world, end, tmp_path)
        [written] = (tmp_path / f"{ENDS[end]}.state").glob("*.session")
        written.write_bytes(written.read_bytes()[:-1])
        world.driver.start_again(end)
        await world.sessions(2)
        await world.complete(pauses=1)
    said = (tmp_path / f"refault-{ENDS[end]}.log").read_text()
    assert LOST in said
    assert "internal error" not in said


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
async def test_a_source_that_has_sent_all_in_precopy_does_not_run_again_though_its_channel_is_lost(
    binary: str, tmp_path: Path
) -> None:
    """Its destination runs the guest. Where that has ended instead the operator cancels."""
    async with lab(tmp_path, binary) as world:
        source, destination = world.pair.source.qmp, world.pair.destination.qmp
        await until_the_last_word(world)
        await stop(world, 0, tmp_path)
        [written] = (tmp_path / "source.state").glob("*.session")
        written.write_bytes(written.read_bytes()[:-1])
        world.driver.start_again(0)
        while "holding QEMU's leg open" not in world.log.read_text():
            await trio.sleep(0.005)
        assert not (await source.execute("query-status"))["running"]
        assert (await destination.execute("query-status"))["running"]
        world.pair.destination.process.kill()
        await world.driver.connect_again(0)
        await world.driver.source.execute("migrate_cancel")
        await source.wait_migration("cancelled")
        await source.wait_event(lambda event: event.name == "RESUME")


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
async def test_a_destination_that_ends_without_a_word_when_all_is_sent_has_the_source_go_on(
    binary: str, tmp_path: Path
) -> None:
    """As with QEMU alone; since 10.0 it says a word. It cannot load a device's state that only the source
    has."""
    more = ("sh", "-c", 'exec "$@" -device piix3-usb-uhci', "sh")
    async with lab(tmp_path, binary, source_prefix=more) as world:
        source = world.pair.source.qmp
        await until_the_last(world)
        await world.driver.source.execute("migrate-continue", {"state": "pre-switchover"})
        await source.wait_migration("failed")
        await source.wait_event(lambda event: event.name == "RESUME")
    for side in ENDS:
        assert "internal error" not in (tmp_path / f"refault-{side}.log").read_text()


def sockets_of(pid: int) -> int:
    count = 0
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            count += os.readlink(each).startswith("socket:")
    return count


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
async def test_a_source_that_has_sent_all_in_precopy_does_not_run_again_though_its_refault_is_killed(
    binary: str, tmp_path: Path
) -> None:
    """It holds its leg by itself, which the next refault tells."""
    async with lab(tmp_path, binary) as world:
        source, destination = world.pair.source, world.pair.destination
        await until_the_last(world)
        held = sockets_of(source.pid)
        await send_the_last(world)
        while sockets_of(source.pid) <= held:
            await trio.sleep(0.005)
        world.driver.processes[0].kill()
        world.driver.start_again(0)
        while "QEMU holds its leg open since an earlier refault" not in world.log.read_text():
            await trio.sleep(0.005)
        assert not (await source.qmp.execute("query-status"))["running"]
        assert (await destination.qmp.execute("query-status"))["running"]


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
async def test_what_a_destination_said_last_outlives_its_refault(binary: str, tmp_path: Path) -> None:
    """The source's is away just then."""
    async with lab(tmp_path, binary) as world:
        await until_the_last_word(world)
        await restart(world, [1], tmp_path)
        world.proxy.mute = False
        world.proxy.lose(0, 1)
        await world.complete(pauses=0)
    said = (tmp_path / "refault-destination.log").read_text()
    assert "internal error" not in said
    assert "ALERT" not in said


@pytest.mark.nightly
async def test_where_none_follows_precopy_is_ended_by_hand(tmp_path: Path) -> None:
    async with lab(tmp_path, DEFAULT_BINARY) as world:
        await world.until_a_session()
        await stop(world, 0, tmp_path)
        state = str(tmp_path / "source.state")
        said = await trio.run_process(
            [*REFAULT, "release", "source", "--state-dir", state], capture_stderr=True, check=False
        )
        assert b"the channel of its migration" in said.stderr
        source = world.pair.source.qmp
        await source.wait_migration("failed")
        assert (await source.execute("query-status"))["running"]
