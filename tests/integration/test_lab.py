"""The lab by itself, without refault: a pair of real QEMUs, losses, recovery by hand, and a comparison that
can fail.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from refault.lab import bare
from refault.lab.channel import Channel, Loss, free_port, start_channel
from refault.lab.guest import ARENA_BASE, PAGE, Guest
from refault.lab.memory import compare
from refault.lab.process import ProcessFailed
from refault.lab.qemu import DEFAULT_BINARY, Pair, PairOptions, start_pair, start_qemu
from refault.lab.qmp_client import QmpError

from .qemus import BINARIES

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

GUEST = Guest(vcpus=4, log_pages=11, tick_ns=4_000_000)
"""It takes eight seconds to ask for all of its memory, in which the losses are to fall."""


@asynccontextmanager
async def postcopy(directory: Path, binary: str) -> AsyncIterator[tuple[Pair, Channel]]:
    options = PairOptions(binary, binary)
    async with (
        start_pair(GUEST, directory, options) as pair,
        start_channel(directory, free_port()) as channel,
    ):
        await bare.start_postcopy(pair.source.qmp, pair.destination.qmp, channel, bandwidth=1 << 20)
        yield pair, channel


@pytest.mark.parametrize("binary", BINARIES)
async def test_losses_recovered_by_hand_leave_memory_right(tmp_path: Path, binary: str) -> None:
    async with postcopy(tmp_path, binary) as (pair, channel):
        source, destination = pair.source.qmp, pair.destination.qmp
        for loss in Loss:
            await trio.sleep(0.1)
            since = len(destination.events)
            lost = await channel.lose(loss)
            assert (lost.bytes_inside > 0) == (loss is Loss.KILL)
            await bare.recover(source, destination, channel, since=since)
        await pair.destination.wait_progress()
        await bare.finish(source)
        verdict = await compare(GUEST, destination, source)
        assert str(verdict) == f"{verdict.pages} pages compared, all right"
        assert verdict.pages * PAGE > GUEST.written_bytes

        at = ARENA_BASE + 3 * PAGE + 100
        pair.destination.memory.flip(at)
        pair.destination.memory.flip(GUEST.ram_bytes - 1)
        verdict = await compare(GUEST, destination, source)
        assert (verdict.right, verdict.wrong) == (False, 2)
        assert [each.address + each.first for each in verdict.mismatches] == [at, GUEST.ram_bytes - 1]
        assert f"pc.ram offset {ARENA_BASE + 3 * PAGE:#x}): byte 0x64" in str(verdict)


async def test_nobody_recovers_a_loss_by_itself(tmp_path: Path) -> None:
    async with postcopy(tmp_path, DEFAULT_BINARY) as (pair, channel):
        since = len(pair.destination.qmp.events)
        await channel.close()
        with trio.fail_after(30):
            await pair.destination.qmp.wait_migration("postcopy-paused", since=since)
            await bare.wait_status(pair.source.qmp, "postcopy-paused")
        await trio.sleep(1)
        assert await bare.migration_status(pair.source.qmp) == "postcopy-paused"


async def test_a_guest_that_stands_still_after_the_migration_is_seen(tmp_path: Path) -> None:
    async with postcopy(tmp_path, DEFAULT_BINARY) as (pair, _):
        await bare.finish(pair.source.qmp)
        verdict = await compare(GUEST, pair.source.qmp, pair.source.qmp, patience=1.0)
        assert verdict.stuck_vcpus == (0, 1, 2, 3)
        assert not verdict.right
        assert "did not go on" in str(verdict)


async def test_a_missing_page_is_not_asked_for_by_reading_progress(tmp_path: Path) -> None:
    async with start_qemu(GUEST, tmp_path, incoming="defer") as qemu:
        assert qemu.progress() == [None] * GUEST.vcpus
        assert qemu.memory.read(ARENA_BASE, 8) is None
        with pytest.raises(ValueError, match="is not there"):
            qemu.memory.flip(ARENA_BASE)


async def test_a_guest_without_tick_writes_as_fast_as_it_can(tmp_path: Path) -> None:
    guest = Guest(vcpus=2, log_pages=6, tick_ns=0)
    async with start_qemu(guest, tmp_path) as qemu:
        with trio.fail_after(60):
            while any(state is None or state.sweep < 600 for state in qemu.progress()):
                await trio.sleep(0.05)
        verdict = await compare(guest, qemu.qmp)
        assert str(verdict) == "128 pages compared, all right"


async def test_a_qemu_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailed, match="no-such-device"):
        async with start_qemu(GUEST, tmp_path, extra=["-device", "no-such-device"]):
            pass
    with pytest.raises(ProcessFailed, match="cannot start qemu"):
        async with start_qemu(GUEST, tmp_path, binary=str(tmp_path / "nothing")):
            pass


async def test_errors_and_missing_commands_reach_the_client(tmp_path: Path) -> None:
    async with start_qemu(GUEST, tmp_path) as qemu:
        with pytest.raises(QmpError, match=r"no-such-command.*CommandNotFound"):
            await qemu.qmp.execute("no-such-command")
        assert (await qemu.qmp.execute("query-status"))["running"]


async def test_nothing_runs_on_when_the_block_is_cancelled(tmp_path: Path) -> None:
    pids: list[int] = []
    with trio.move_on_after(90) as scope:
        async with postcopy(tmp_path, DEFAULT_BINARY) as (pair, channel):
            pids += [pair.source.pid, pair.destination.pid, channel.pid]
            scope.cancel()
            await trio.sleep_forever()
    assert len(pids) == 3
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
