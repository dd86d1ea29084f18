"""QEMU's published recipe for a recovery by hand, word for word through refault.

docs/devel/migration/postcopy.rst and the wiki's page on postcopy recovery: out-of-band is negotiated, the
channel is broken with migrate-pause, the destination told to listen at another address, the source to resume
there.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from tests.campaign.hosts import Setting, TwoHosts, on_two_hosts
from tests.integration.qemus import BINARIES

from refault.lab import bare
from refault.lab.channel import free_port

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(200),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces"),
]

LEFT_LONG, LEFT_LESS = 60, 2
"""Seconds that refault leaves a client that has paused."""


async def paused_by_hand(lab: TwoHosts) -> tuple[float, list[int]]:
    """Up to migrate-pause and the look whether it has paused; when that was, and the events before it."""
    await lab.begin(1 << 20)
    await lab.postcopy()
    source, destination = lab.clients
    since = lab.marks()
    when = trio.current_time()
    assert await source.execute("migrate-pause", oob=True) == {}
    with trio.fail_after(30):
        await bare.wait_status(source, "postcopy-paused")
        await destination.wait_migration("postcopy-paused")
    return when, since


@pytest.mark.parametrize("binary", BINARIES)
async def test_the_recipe_word_for_word(tmp_path: Path, binary: str) -> None:
    setting = Setting(binary, options=("--client-wait", str(LEFT_LONG)))
    async with on_two_hosts(tmp_path, setting) as lab:
        paused, since = await paused_by_hand(lab)
        source, destination = lab.clients
        lab.port = free_port()
        assert await destination.execute("migrate-recover", {"uri": lab.uri}, oob=True) == {}
        assert await source.execute("migrate", {"uri": lab.uri, "resume": True}) == {}
        active = await lab.both("postcopy-active", since, LEFT_LONG / 2)
        assert max(active) - paused < LEFT_LONG
        # Where the client paused; the destination's refault only sees a loss, and has its QEMU wait.
        assert not [line for line in lab.log("src") if "recovery attempt" in line]
        with trio.fail_after(10):
            await bare.wait_status(source, "postcopy-active")
        await lab.finish()


async def test_a_client_that_pauses_and_goes_is_followed_by_refault(tmp_path: Path) -> None:
    async with on_two_hosts(tmp_path, Setting(options=("--client-wait", str(LEFT_LESS)))) as lab:
        paused, since = await paused_by_hand(lab)
        active = await lab.both("postcopy-active", since, LEFT_LESS + 40)
        assert max(active) - paused >= LEFT_LESS
        await lab.finish()
