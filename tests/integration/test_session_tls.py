"""Sessions whose channel speaks TLS: what passes cannot be read, and connections are lost all the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.campaign.session import Lanes, encrypt, migrate
from tests.integration.qemus import qemus
from tests.integration.test_session import has_a_session_behind_a_kill, is_away_for_long, lab

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

BINARIES = qemus("qemu-10", "qemu-11")


@pytest.mark.parametrize(
    ("binary", "kind"),
    [
        (BINARIES[0], "x509"),
        (BINARIES[-1], "psk"),
        *(
            pytest.param(binary, kind, marks=pytest.mark.nightly)
            for binary, kind in (
                (BINARIES[0], "psk"),
                *((other, "x509") for other in BINARIES[1:]),
                *((other, "psk") for other in BINARIES[1:-1]),
            )
        ),
    ],
)
async def test_no_qemu_notices_connections_that_are_lost_under_tls(
    binary: str, kind: str, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    outcome = await migrate(tmp_path, binary, seed, 24, session=True, memory=32 << 20, lanes=Lanes(tls=kind))
    assert outcome.wrong == [], f"seed {seed}"
    assert outcome.losses > 12, f"seed {seed}"


@pytest.mark.nightly
@pytest.mark.parametrize("killed", [0, 1], ids=["source", "destination"])
@pytest.mark.parametrize("binary", BINARIES)
async def test_the_channel_that_follows_a_killed_refault_is_a_session_too(
    binary: str, killed: int, tmp_path: Path
) -> None:
    async with lab(tmp_path, binary) as world:
        await encrypt(world.driver.source, world.driver.destination, "psk", tmp_path)
        await world.until_postcopy()
        await has_a_session_behind_a_kill(world, killed)


@pytest.mark.nightly
@pytest.mark.parametrize("binary", BINARIES)
async def test_a_network_that_is_gone_for_longer_than_patience_is_a_pause_that_is_recovered(
    binary: str, tmp_path: Path
) -> None:
    """By what passes the source might be at its end, and wait for ever: QEMU says that it is not."""
    async with lab(tmp_path, binary, "--session-patience", "1") as world:
        await encrypt(world.driver.source, world.driver.destination, "psk", tmp_path)
        await world.until_postcopy()
        await is_away_for_long(world)
