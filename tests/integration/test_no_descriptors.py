"""Where descriptors do not reach the source's QEMU its migration is not relayed, and a loss is recovered by
the address."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import trio
from tests.integration.qemus import BINARIES
from tests.integration.test_main_job import GUEST, memory_is_right

from refault.lab import bare
from refault.lab.channel import Loss, free_port, start_channel
from refault.lab.driver import refault_driver
from refault.lab.qemu import PairOptions, start_pair

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]


async def forward(place: Path, to: str, *, task_status: trio.TaskStatus[None]) -> None:
    """Passes bytes, and no descriptors."""

    async def pass_on(one: trio.SocketStream, other: trio.SocketStream) -> None:
        async for data in one:
            await other.send_all(data)
        await other.send_eof()

    async def serve(here: trio.SocketStream) -> None:
        async with await trio.open_unix_socket(to) as there, trio.open_nursery() as nursery:
            nursery.start_soon(pass_on, here, there)
            nursery.start_soon(pass_on, there, here)

    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(place))
    listener.listen()
    task_status.started()
    await trio.serve_listeners(serve, [trio.SocketListener(listener)])


@pytest.mark.parametrize("binary", BINARIES)
async def test_a_loss_is_recovered_by_the_address(tmp_path: Path, binary: str) -> None:
    async with (
        start_pair(GUEST, tmp_path, PairOptions(binary, binary)) as pair,
        start_channel(tmp_path, free_port()) as channel,
        trio.open_nursery() as nursery,
    ):
        between = tmp_path / "between"
        await nursery.start(forward, between, pair.source.monitor.removeprefix("unix:"))
        source = dataclasses.replace(pair.source, monitor=f"unix:{between}")
        async with refault_driver(dataclasses.replace(pair, source=source), channel, tmp_path) as driver:
            await bare.start_postcopy(driver.source, driver.destination, channel, bandwidth=1 << 20)
            [status, _] = await driver.statuses()
            assert "descriptors do not reach QEMU" in str(status.migration.relay_reason)
            since = len(driver.destination.events)
            await channel.lose(Loss.RESET)
            with trio.fail_after(20):
                await driver.destination.wait_migration("postcopy-active", since=since)
                await bare.wait_status(driver.source, "postcopy-active")
            await memory_is_right(pair, driver)
        nursery.cancel_scope.cancel()
