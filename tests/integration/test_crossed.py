"""Two VMs alike, and after a loss the network leads the one's source to the other's destination: no RESUME
passes, and no guest is harmed.

The destination that is reached has received more than this source has sent, and that gives it away. Where it
has less, nothing in the stream does.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from tests.integration.qemus import BINARIES
from tests.integration.test_main_job import fronted, memory_is_right

from refault.lab import bare
from refault.lab.channel import Channel
from refault.lab.driver import RefaultDriver
from refault.lab.qemu import Pair
from refault.migration.versions import abilities

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]

TOLD = "answers for another VM"


@dataclass
class One:
    """One VM: its two QEMUs and their refaults."""

    pair: Pair
    channel: Channel
    driver: RefaultDriver

    @property
    def port(self) -> int:
        return int(self.channel.target_uri.rpartition(":")[2])

    async def was_told(self) -> None:
        """Its source's refault has cut a channel, and said so. The deadline is the caller's."""
        while TOLD not in self.driver.processes[0].tail(1000):
            await trio.sleep(0.05)

    def statuses_since(self, mark: int) -> set[str]:
        return {event.data["status"] for event in self.pair.source.qmp.events[mark:]
                if event.name == "MIGRATION"}  # fmt: skip


@contextlib.asynccontextmanager
async def two_vms(directory: Path, binary: str) -> AsyncIterator[tuple[One, One]]:
    here, there = directory / "a", directory / "b"
    here.mkdir()
    there.mkdir()
    async with fronted(here, binary=binary) as one, fronted(there, binary=binary) as other:
        yield One(*one), One(*other)


@pytest.mark.parametrize("binary", BINARIES)
async def test_a_source_led_to_another_vm_is_cut_before_resume(tmp_path: Path, binary: str) -> None:
    async with two_vms(tmp_path, binary) as (one, other):
        for vm, share in ((one, 0.05), (other, 0.6)):
            driver = vm.driver
            await bare.start_postcopy(
                driver.source, driver.destination, vm.channel, bandwidth=1 << 20, precopy_share=share
            )
        marks = [len(vm.pair.source.qmp.events) for vm in (one, other)]
        ports = one.port, other.port
        await one.channel.retarget(ports[1])
        await other.channel.retarget()  # nobody is there
        for vm in (one, other):
            await vm.channel.reset()
        with trio.fail_after(30):
            await one.was_told()
        assert "postcopy-active" not in one.statuses_since(marks[0])
        if not abilities(one.pair.source.qmp.version).pauses_again_in_handshake:
            await trio.sleep(1.0)  # nothing leads out of it, but nobody dies
            for qemu in (one.pair.source, one.pair.destination, other.pair.source, other.pair.destination):
                qemu.process.must_run()
            assert await bare.migration_status(one.pair.source.qmp) == "postcopy-recover"
            assert (await one.driver.statuses())[0].migration.held
            return
        await one.channel.retarget(ports[0])
        await other.channel.retarget(ports[1])
        with trio.fail_after(30):
            for vm, mark in zip((one, other), marks, strict=True):
                await vm.pair.source.qmp.wait_migration("postcopy-active", since=mark)
        for vm in (one, other):
            await memory_is_right(vm.pair, vm.driver)
