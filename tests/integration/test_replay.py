"""A request lost with the channel starves a vCPU where QEMU does not repeat it; the replay wakes it.

tests/campaign/starvation.py measures how soon.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from refault.lab import bare
from refault.lab.guest import Guest
from refault.lab.memory import compare

from .starving import Case, Recovered, build_no_repeat, lose_a_request

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


@pytest.fixture(scope="module")
def no_repeat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_no_repeat(tmp_path_factory.mktemp("preload"))


async def memory_is_right(recovered: Recovered) -> None:
    await bare.finish(recovered.driver.source)
    verdict = await compare(GUEST, recovered.pair.destination.qmp, recovered.pair.source.qmp)
    assert verdict.right, verdict


async def test_the_replay_wakes_the_vcpus_that_wait(tmp_path: Path, no_repeat: Path) -> None:
    async with lose_a_request(Case(GUEST, BACKGROUND, True, no_repeat), tmp_path) as recovered:
        assert await recovered.run_again(2.0) == set()
        replayed = {vm.migration.role: vm.pages.replayed for vm in await recovered.driver.statuses()}
        assert replayed["destination"] > 0  # only this side had seen the requests
        await memory_is_right(recovered)


async def test_without_the_replay_they_starve(tmp_path: Path, no_repeat: Path) -> None:
    async with lose_a_request(Case(GUEST, BACKGROUND, False, no_repeat), tmp_path) as recovered:
        assert await recovered.run_again(4.0) != set()
        await memory_is_right(recovered)
