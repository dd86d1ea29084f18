"""refault killed with page requests under way: the next one knows them from the state file, and replays them.

The destination repeats nothing by itself, the requests are lost inside the killed carrier, and what was in
memory went with refault: only the file can know them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.integration.qemus import BINARIES
from tests.integration.starving import Case, Recovered, build_no_repeat, lose_a_request

from refault.lab import bare
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.story import Side

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(90),
    pytest.mark.skipif(
        not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="the preloaded library is for KVM only"
    ),
]

GUEST = Guest(vcpus=4, log_pages=12, tick_ns=2_000_000)
BACKGROUND = 256 << 10
BOTH: tuple[Side, ...] = ("source", "destination")


@pytest.fixture(scope="module")
def no_repeat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_no_repeat(tmp_path_factory.mktemp("preload"))


async def memory_is_right(recovered: Recovered) -> None:
    await bare.finish(recovered.pair.source.qmp)
    verdict = await compare(GUEST, recovered.pair.destination.qmp, recovered.pair.source.qmp)
    assert verdict.right, verdict


@pytest.mark.parametrize("binary", BINARIES)
@pytest.mark.parametrize("killed", [BOTH[:1], BOTH[1:], BOTH], ids=["source", "destination", "both"])
async def test_what_a_killed_refault_had_on_record_is_replayed_by_the_next(
    tmp_path: Path, no_repeat: Path, binary: str, killed: tuple[Side, ...]
) -> None:
    case = Case(GUEST, BACKGROUND, True, no_repeat, binary, killed)
    async with lose_a_request(case, tmp_path) as recovered:
        assert await recovered.run_again(3.0) == set()
        replayed = {vm.migration.role: vm.pages.replayed for vm in await recovered.driver.statuses()}
        assert replayed["destination"] > 0
        await memory_is_right(recovered)


@pytest.mark.parametrize("binary", BINARIES)
async def test_without_the_state_file_they_starve(tmp_path: Path, no_repeat: Path, binary: str) -> None:
    case = Case(GUEST, BACKGROUND, True, no_repeat, binary, BOTH[1:], forget=True)
    async with lose_a_request(case, tmp_path) as recovered:
        assert await recovered.run_again(4.0) != set()
        await memory_is_right(recovered)
