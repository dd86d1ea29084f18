"""A state directory that goes away, is read-only or full: the migration goes on and is recovered, and the
operator hears of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from refault.daemon.telling.snapshot import VmStatus
from refault.lab import bare
from refault.lab.channel import Loss, free_port, start_channel
from refault.lab.driver import RefaultDriver, refault_driver
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.qemu import start_pair
from refault.lab.story import SIDES

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(200),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems"),
]

GUEST = Guest(vcpus=2, log_pages=12, tick_ns=20_000_000)


def read_only(directory: Path) -> None:
    subprocess.run(["mount", "--bind", directory, directory], check=True)  # files that are open stay so
    subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)


def full(directory: Path) -> None:
    with contextlib.suppress(OSError), open(directory / "other", "ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def gone(directory: Path) -> None:
    """To refault, for which that is what a directory is under which nothing can be made."""
    shutil.rmtree(directory, ignore_errors=True)  # the mount point stays
    read_only(directory)


HARMS: dict[str, Callable[[Path], None]] = {"read-only": read_only, "full": full, "gone": gone}


def unmount(directory: Path) -> None:
    while subprocess.run(["umount", "-l", directory], capture_output=True).returncode == 0:
        pass


@pytest.fixture
def states(tmp_path: Path) -> Iterator[list[Path]]:
    """The two state directories, each a small tmpfs of its own."""
    with contextlib.ExitStack() as stack:
        directories = [tmp_path / f"{side}.state" for side in SIDES]
        for directory in directories:
            directory.mkdir(mode=0o700)
            stack.callback(unmount, directory)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1400k", "state", directory], check=True)
        yield directories


async def stays_full(directory: Path) -> None:
    """Whatever room becomes free there."""
    while True:
        full(directory)
        await trio.sleep(0.005)


async def told(driver: RefaultDriver) -> dict[str, VmStatus]:
    return {vm.name: vm for vm in await driver.statuses()}


@pytest.mark.parametrize("harm", HARMS)
async def test_a_migration_goes_on_and_is_recovered_without_its_state_directory(
    tmp_path: Path, states: list[Path], harm: str
) -> None:
    """The source's fails before the migration begins, the destination's while it runs; neither comes back."""
    async with (
        start_pair(GUEST, tmp_path) as pair,
        start_channel(tmp_path, free_port()) as channel,
        refault_driver(pair, channel, tmp_path) as driver,
        trio.open_nursery() as nursery,
    ):
        HARMS[harm](states[0])
        if harm == "full":  # what clients do is given up first, and the room of that is free
            with trio.fail_after(40):
                while "cannot write down what clients do" not in driver.processes[0].tail(50):
                    await driver.source.execute("query-status")
            nursery.start_soon(stays_full, states[0])
            await trio.sleep(0.05)
        await bare.start_postcopy(driver.source, driver.destination, channel, bandwidth=256 << 10)
        before = await told(driver)
        assert before["source"].state.error is not None
        noticed = "the state directory is not usable"  # where that it has gone is seen before it is needed
        assert any(
            told in before["source"].state.error for told in ("page requests are in memory alone", noticed)
        )
        assert before["destination"].state.error is None
        HARMS[harm](states[1])
        await channel.lose(Loss.RESET)
        with trio.fail_after(40):
            while [vm.recovery.recoveries for vm in (await told(driver)).values()] != [1, 1]:
                await trio.sleep(0.02)
            while harm == "gone" and (await told(driver))["destination"].state.error is None:
                await trio.sleep(0.02)
        assert {vm.migration.relay for vm in (await told(driver)).values()} == {"tracking"}
        await bare.finish(driver.source)
        await driver.destination.wait_migration("completed")
        assert (await compare(GUEST, pair.destination.qmp, pair.source.qmp)).right
        with trio.fail_after(40):
            while any(vm.state.error for vm in (await told(driver)).values()):
                await trio.sleep(0.02)
        ended = await told(driver)
        assert ended["source"].state.errors > 0
        # All that a full one must take for the destination is there already.
        assert (ended["destination"].state.errors > 0) is (harm != "full")
        nursery.cancel_scope.cancel()
    logs = [(tmp_path / f"refault-{side}.log").read_text() for side in SIDES]
    for log in logs:
        assert "Traceback" not in log
