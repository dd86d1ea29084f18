"""Two VMs alike, and after a loss the network leads each source to the other's destination: no RESUME passes,
and no guest is harmed.

One destination has received more than the source that reaches it has sent. The other has received less than
this VM's own must have, by PONG 2 or by the recovery before.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
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

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

TOLD = "answers for another VM"
SHARES = 0.05, 0.6
"""How much of the memory precopy sends, of the one VM and of the other."""
PRECOPY = 8 << 20
"""Bytes a second: what is left is more than is sent within the downtime limit, or precopy would complete."""


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

    async def lose(self) -> int:
        """Resets the channel; gives the number of its source's events before."""
        mark = len(self.pair.source.qmp.events)
        await self.channel.reset()
        return mark

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


@pytest.mark.parametrize(
    ("binary", "recovered_before"),
    [(BINARIES[0], False), *(pytest.param(name, True, marks=pytest.mark.nightly) for name in BINARIES[1:])],
)
async def test_two_vms_crossed_are_cut_before_resume(
    tmp_path: Path, binary: str, recovered_before: bool
) -> None:
    async with two_vms(tmp_path, binary) as vms:
        for vm, share in zip(vms, SHARES, strict=True):
            await begin(vm, share)
        if recovered_before:
            await wait_active(vms, [await vm.lose() for vm in vms])
        ports = [vm.port for vm in vms]
        for vm, port in zip(vms, reversed(ports), strict=True):
            await vm.channel.retarget(port)
        marks = [await vm.lose() for vm in vms]
        with trio.fail_after(30):
            for vm in vms:
                await vm.was_told()
        for vm, mark in zip(vms, marks, strict=True):
            assert "postcopy-active" not in vm.statuses_since(mark)
        if not abilities(vms[0].pair.source.qmp.version).pauses_again_in_handshake:
            await trio.sleep(1.0)  # nothing leads out of it, but nobody dies
            for vm in vms:
                await is_held(vm)
            return
        for vm, port in zip(vms, ports, strict=True):
            await vm.channel.retarget(port)
        await wait_active(vms, marks)
        for vm in vms:
            await memory_is_right(vm.pair, vm.driver)


async def begin(vm: One, share: float) -> None:
    """Until the guest runs at the destination, with about ``share`` of its memory sent before."""
    driver = vm.driver
    await bare.start_postcopy(
        driver.source,
        driver.destination,
        vm.channel,
        bandwidth=1 << 20,
        precopy_bandwidth=PRECOPY,
        precopy_share=share,
    )
    await bare.heard_of_postcopy(vm.pair.source.qmp, vm.pair.destination.qmp)


async def wait_active(vms: Sequence[One], marks: Sequence[int]) -> None:
    """Until each is recovered; ``marks``: what its `lose` gave."""
    with trio.fail_after(30):
        for vm, mark in zip(vms, marks, strict=True):
            await vm.pair.source.qmp.wait_migration("postcopy-active", since=mark)


async def is_held(vm: One) -> None:
    with trio.fail_after(20):
        await bare.wait_status(vm.pair.source.qmp, "postcopy-recover")
        while not (await vm.driver.statuses())[0].migration.held:
            await trio.sleep(0.02)
    for qemu in (vm.pair.source, vm.pair.destination):
        qemu.process.must_run()
