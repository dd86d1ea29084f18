"""Short forms of `make campaign-patience`, of `campaign-strays` and of `campaign-floor`."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
from tests.campaign import floor, patience, strays

from refault.lab.qemu import DEFAULT_BINARY
from refault.migration.versions import abilities

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(200),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces"),
]


LEFT_ALONE = 3.0
# Where it is not seen that the source may be resumed at once it is left alone for so long that a busy machine
# does not hide it.
LEAVES_IT_ALONE = f"""
import sys
from dataclasses import replace
from refault.daemon.roles import source
known = source.abilities
source.abilities = lambda version: replace(known(version), resume_after={LEFT_ALONE})
from refault.cli.main import main
sys.exit(main())
"""


@pytest.mark.parametrize("scenario", ["blocked", "refused"])
async def test_what_is_waited_out(tmp_path: Path, scenario: str) -> None:
    print(await patience.one(tmp_path, scenario, DEFAULT_BINARY, seconds=3))


async def test_strangers_in_every_phase(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    counts = await strays.with_refault(tmp_path, DEFAULT_BINARY, 8, random.Random(seed))
    for phase, made in counts.items():
        assert made.total() == 8, phase


async def test_a_source_before_8_2_is_resumed_when_the_destination_has_answered_and_no_later() -> None:
    command = [sys.executable, "-c", LEAVES_IT_ALONE]
    taken, version = await floor.losses_of_one(DEFAULT_BINARY, True, 5, command)
    assert abilities(version).resume_after > 0
    left_alone = [steps[floor.BEGUN] - steps["src", "postcopy-paused"] for steps in taken]
    assert min(left_alone) < LEFT_ALONE, left_alone
