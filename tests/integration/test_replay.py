"""A request lost with the channel starves who made it where QEMU does not repeat it; the replay wakes them.

tests/campaign/starvation.py measures how soon.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from refault.lab import bare
from refault.lab.guest import Guest
from refault.lab.memory import compare

from . import starving_back_end
from .qemus import BINARIES
from .starving import WOKEN, Case, Recovered, build_no_repeat, lose_a_request
from .starving_back_end import lose_a_back_ends_request

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(90)]
kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="the preloaded library is for KVM only"
)

GUEST = Guest(vcpus=4, log_pages=12, tick_ns=2_000_000)
BACKGROUND = 256 << 10
"""Bytes a second: slow enough that the background copy does not come to a lost page by itself soon."""
MOSTLY_BACK_END = Guest(vcpus=1, log_pages=15, tick_ns=1_000_000_000)


@pytest.fixture(scope="module")
def no_repeat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_no_repeat(tmp_path_factory.mktemp("preload"))


async def memory_is_right(recovered: Recovered | starving_back_end.Recovered) -> None:
    await bare.finish(recovered.driver.source)
    destination, source = recovered.pair.destination, recovered.pair.source
    verdict = await compare(source.guest, destination.qmp, source.qmp)
    assert verdict.right, verdict


async def replayed(recovered: Recovered | starving_back_end.Recovered) -> int:
    """By the destination's refault: only this side had seen the requests."""
    statuses = await recovered.driver.statuses()
    return sum(vm.pages.replayed for vm in statuses if vm.migration.role == "destination")


@kvm
async def test_the_replay_wakes_the_vcpus_that_wait(tmp_path: Path, no_repeat: Path) -> None:
    async with lose_a_request(Case(GUEST, BACKGROUND, True, no_repeat), tmp_path) as recovered:
        assert await recovered.run_again(WOKEN) == set()
        assert await replayed(recovered) > 0
        await memory_is_right(recovered)


@kvm
async def test_without_the_replay_they_starve(tmp_path: Path, no_repeat: Path) -> None:
    async with lose_a_request(Case(GUEST, BACKGROUND, False, no_repeat), tmp_path) as recovered:
        assert await recovered.run_again(4.0) != set()
        await memory_is_right(recovered)


@pytest.mark.parametrize("binary", BINARIES)
async def test_the_replay_wakes_a_vhost_user_back_end(tmp_path: Path, binary: str) -> None:
    case = Case(MOSTLY_BACK_END, BACKGROUND, True, None, binary)
    async with lose_a_back_ends_request(case, tmp_path) as recovered:
        assert await recovered.run_again(WOKEN) is not None
        assert await replayed(recovered) > 0
        await memory_is_right(recovered)


async def test_without_the_replay_a_vhost_user_back_end_starves(tmp_path: Path) -> None:
    case = Case(MOSTLY_BACK_END, BACKGROUND // 4, False, None)
    async with lose_a_back_ends_request(case, tmp_path) as recovered:
        assert await recovered.run_again(3.0) is None
        waiting = [vm.pages.kernel_waiting for vm in await recovered.driver.statuses()]
        assert any(waiting)  # a thread of another process, and still counted
        await memory_is_right(recovered)
        assert await recovered.run_again(10.0) is not None
