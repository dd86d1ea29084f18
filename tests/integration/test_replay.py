"""A request lost with the channel starves who made it where QEMU does not repeat it; the replay wakes them.

tests/campaign/starvation.py measures how soon; test_lab_demo.py has the back end that nobody wakes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from refault.lab import bare
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.starving_back_end import BackEndCase, BackEndMigration, start_with_back_ends

from .qemus import OTHERS_NIGHTLY
from .starving import WOKEN, Case, Recovered, build_no_repeat, lose_a_request

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]
kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="the preloaded library is for KVM only"
)

GUEST = Guest(vcpus=4, log_pages=12, tick_ns=2_000_000)
BACKGROUND = 16 << 10
"""Bytes a second: slow enough that the background copy does not come to a lost page by itself soon."""
MOSTLY_BACK_END = Guest(vcpus=1, log_pages=15, tick_ns=1_000_000_000)


@pytest.fixture(scope="module")
def no_repeat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_no_repeat(tmp_path_factory.mktemp("preload"))


async def memory_is_right(recovered: Recovered | BackEndMigration) -> None:
    await bare.finish(recovered.driver.source)
    destination, source = recovered.pair.destination, recovered.pair.source
    verdict = await compare(source.guest, destination.qmp, source.qmp)
    assert verdict.right, verdict


async def replayed(recovered: Recovered | BackEndMigration) -> int:
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


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
async def test_the_replay_wakes_a_vhost_user_back_end(tmp_path: Path, binary: str) -> None:
    case = BackEndCase(MOSTLY_BACK_END, BACKGROUND, True, binary)
    async with start_with_back_ends(case, tmp_path) as migration:
        await migration.start_postcopy()
        await migration.lose()
        assert await migration.run_again(WOKEN) is not None
        assert await replayed(migration) > 0
        await memory_is_right(migration)
