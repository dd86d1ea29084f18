"""A page request that comes before the recovery handshake is over, with postcopy-preempt: 10.0 has no channel
yet to answer it on and aborts (migration/ram.c, ram_save_queue_pages). refault holds it back."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from tests.integration.qemus import qemus
from tests.unit.channel.test_relay import request

from refault.lab import bare
from refault.lab.channel import free_port, start_channel
from refault.lab.driver import bare_driver, refault_driver
from refault.lab.guest import Guest
from refault.lab.qemu import PairOptions, start_pair

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

GUEST = Guest(vcpus=2, log_pages=11, tick_ns=8_000_000)
SIGABRT = -6
LIVES = 0.5
"""A bare one ends within milliseconds."""


@pytest.mark.parametrize("relayed", [False, True])
async def test_a_request_before_its_time_does_not_end_a_source(tmp_path: Path, relayed: bool) -> None:
    binary = qemus("qemu-10")[-1]
    async with (
        start_pair(GUEST, tmp_path, PairOptions(binary, binary)) as pair,
        start_channel(tmp_path, free_port()) as channel,
        (
            refault_driver(pair, channel, tmp_path) if relayed else bare_driver(pair, channel, by_hand=False)
        ) as driver,
    ):
        if driver.source.version < (10, 0, 0):
            pytest.skip("up to 7.2 the preempt channel is there before the handshake")
        capabilities = (*bare.CAPABILITIES, "postcopy-preempt")
        await bare.start_postcopy(
            driver.source, driver.destination, channel, bandwidth=256 << 10, capabilities=capabilities
        )
        with trio.fail_after(60), trio.socket.socket() as early:
            await early.bind(("127.0.0.1", 0))
            early.listen(8)
            port = early.getsockname()[1]
            await channel.retarget(port)
            await channel.reset()
            if not relayed:
                await bare.wait_status(driver.source, "postcopy-paused")
                await driver.source.execute("migrate", {"uri": f"tcp:127.0.0.1:{port}", "resume": True})
            connection, _ = await early.accept()
            with connection:
                assert await connection.recv(1)  # it has begun
                await connection.send(request(1 << 20))
                ended = None
                with trio.move_on_after(LIVES if relayed else 20):
                    ended = await pair.source.process.wait()
                assert ended == (None if relayed else SIGABRT)
                if relayed:
                    await bare.wait_status(pair.source.qmp, "postcopy-recover")
