"""Without a relay: a silent network is noticed because nothing moves, and what moves slowly is left alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from tests.campaign.hosts import Setting, on_two_hosts
from tests.integration.qemus import BINARIES, OTHERS_NIGHTLY

from refault.lab.channel import free_port
from refault.lab.qemu import DEFAULT_BINARY

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(200),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces"),
]

STALL_AFTER = 3


def unrelayed(binary: str) -> Setting:
    options = ("--stall-after", str(STALL_AFTER))
    return Setting(binary, relay="off", options=options, recover_port=free_port())


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
async def test_a_silent_network_is_paused_and_recovered_by_another(tmp_path: Path, binary: str) -> None:
    async with on_two_hosts(tmp_path, unrelayed(binary)) as lab:
        await lab.begin(1 << 20)
        await lab.postcopy()
        since = lab.marks()
        lab.hosts[1].link("down")
        await lab.both("postcopy-paused", since, STALL_AFTER * 5 + 30)
        await lab.both("postcopy-active", since, 60)
        await lab.finish()


async def test_a_silent_network_that_comes_back_finds_one_attempt_under_way(tmp_path: Path) -> None:
    """7.2 aborts where it was told to resume while it still dialled, and both got through."""
    setting = Setting(DEFAULT_BINARY, relay="off", options=("--stall-after", str(STALL_AFTER)))
    async with on_two_hosts(tmp_path, setting) as lab:
        await lab.begin(1 << 20)
        await lab.postcopy()
        since = lab.marks()
        lab.hosts[1].link("down")
        await lab.both("postcopy-paused", since, STALL_AFTER * 5 + 30)
        await trio.sleep(1.0)  # time for many attempts
        since = lab.marks()
        lab.hosts[1].link("up")
        await lab.both("postcopy-active", since, 60)
        await lab.finish()


async def test_what_moves_slowly_is_not_paused(tmp_path: Path) -> None:
    async with on_two_hosts(tmp_path, unrelayed(BINARIES[0])) as lab:
        await lab.begin(8 << 20, 64 << 10)
        await lab.postcopy()
        since = lab.marks()
        await trio.sleep(STALL_AFTER * 3)
        for qemu, mark in zip(lab.qemus, since, strict=True):
            assert "postcopy-paused" not in [event.data.get("status") for event in qemu.qmp.events[mark:]]
        await lab.finish()
