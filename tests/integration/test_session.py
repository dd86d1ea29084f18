"""Sessions between two refaults, on real QEMUs: the campaign's short form, and a bare QEMU at one end."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from tests.campaign.session import migrate
from tests.integration.qemus import BINARIES

from refault.lab import bare
from refault.lab.channel import free_port
from refault.lab.driver import REFAULT
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.process import started
from refault.lab.qemu import DEFAULT_BINARY, PairOptions, start_pair
from refault.lab.qmp_client import connect

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]


@pytest.mark.parametrize("binary", [BINARIES[-1]])
async def test_no_qemu_notices_connections_that_are_lost_over_the_whole_life(
    binary: str, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    outcome = await migrate(tmp_path, binary, seed, 24, session=True, memory=48 << 20)
    assert outcome.wrong == [], f"seed {seed}"
    assert outcome.losses > 12, f"seed {seed}"


async def test_a_bare_source_reads_the_offer_and_makes_nothing_of_it(tmp_path: Path) -> None:
    guest = Guest.of_size(16 << 20, 1, 5_000_000)
    uri = f"tcp:127.0.0.1:{free_port()}"
    async with (
        start_pair(guest, tmp_path, PairOptions(DEFAULT_BINARY, DEFAULT_BINARY)) as pair,
        AsyncExitStack() as stack,
    ):
        qemu = pair.destination
        client = tmp_path / "client"
        command = [*REFAULT, "run", "--qemu", qemu.monitor, "--listen", f"unix:{client}", "--session", "auto"]
        command += [
            "--name",
            "destination",
            "--control",
            str(tmp_path / "control"),
            "--state-dir",
            str(tmp_path),
        ]
        log = tmp_path / "refault.log"
        stack.enter_context(started("refault", command, log))
        with trio.fail_after(30):
            while not client.exists():
                await trio.sleep(0.01)
        source = pair.source.qmp
        destination = await stack.enter_async_context(connect(str(client), name="destination"))
        for qmp in (source, destination):
            await bare.set_capabilities(qmp, *bare.CAPABILITIES)
        with trio.fail_after(60):
            await source.execute("migrate-set-parameters", {"downtime-limit": bare.DOWNTIME_LIMIT})
            await destination.execute("migrate-incoming", {"uri": uri})
            await source.execute("migrate", {"uri": uri})
            await bare.wait_sent(source, 0.1)
            await source.execute("migrate-start-postcopy")
            await source.wait_migration("completed")
            await destination.wait_migration("completed")
        verdict = await compare(guest, pair.destination.qmp, pair.source.qmp)
        assert verdict.right, verdict
        assert "relaying" in log.read_text()
        assert "session" not in log.read_text().replace(str(tmp_path), "")
