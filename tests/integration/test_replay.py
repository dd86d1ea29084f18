"""A request lost with the channel starves a vCPU where QEMU does not repeat it; the replay wakes it."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from refault.lab import bare
from refault.lab.channel import free_port, start_channel
from refault.lab.driver import RefaultDriver, refault_driver
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.qemu import Pair, PairOptions, start_pair

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(90),
    pytest.mark.skipif(
        not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="the preloaded library is for KVM only"
    ),
]

GUEST = Guest(vcpus=4, log_pages=12, tick_ns=2_000_000)
BACKGROUND = 256 << 10
"""Bytes a second: slow enough that the background copy does not come to a lost page by itself soon."""
WITHOUT_REPLAY = """
import sys
from refault.channel.relay import Relay
attach = Relay.attach
Relay.attach = lambda self, local, far, *, recovered, may_replay: attach(
    self, local, far, recovered=recovered, may_replay=False)
from refault.cli.main import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def no_repeat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("preload") / "no_repeat.so"
    source = Path(__file__).with_name("no_repeat.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


async def lose_a_request(
    directory: Path, preload: Path, stack: AsyncExitStack, command: list[str]
) -> tuple[Pair, RefaultDriver]:
    """A recovered migration whose destination does not repeat what was lost inside the killed carrier."""
    options = PairOptions(destination_prefix=["env", f"LD_PRELOAD={preload}"])
    pair = await stack.enter_async_context(start_pair(GUEST, directory, options))
    channel = await stack.enter_async_context(start_channel(directory, free_port()))
    driver = await stack.enter_async_context(refault_driver(pair, channel, directory, command=command))
    await bare.start_postcopy(driver.source, driver.destination, channel, bandwidth=BACKGROUND)
    await trio.sleep(0.2)
    since = len(driver.destination.events)
    lost = await channel.kill()
    assert lost.bytes_inside > 0
    with trio.fail_after(10):
        await driver.destination.wait_migration("postcopy-active", since=since)
    return pair, driver


async def starved(pair: Pair, seconds: float) -> set[int]:
    """The vCPUs that did not go on in this time."""
    before = pair.destination.progress()
    waiting = set(range(GUEST.vcpus))
    with trio.move_on_after(seconds):
        while waiting:
            await trio.sleep(0.02)
            now = pair.destination.progress()
            waiting -= {i for i in waiting if now[i] is not None and now[i] != before[i]}
    return waiting


async def test_the_replay_wakes_the_vcpus_that_wait(tmp_path: Path, no_repeat: Path) -> None:
    async with AsyncExitStack() as stack:
        pair, driver = await lose_a_request(tmp_path, no_repeat, stack, [sys.executable, "-m", "refault"])
        assert await starved(pair, 2.0) == set()
        replayed = {vm.migration.role: vm.pages.replayed for vm in await driver.statuses()}
        assert replayed["destination"] > 0  # only this side had seen the requests
        await bare.finish(driver.source)
        verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
        assert verdict.right, verdict


async def test_without_the_replay_they_starve(tmp_path: Path, no_repeat: Path) -> None:
    async with AsyncExitStack() as stack:
        command = [sys.executable, "-c", WITHOUT_REPLAY]
        pair, driver = await lose_a_request(tmp_path, no_repeat, stack, command)
        assert await starved(pair, 4.0) != set()
        await bare.finish(driver.source)
        verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
        assert verdict.right, verdict
