"""Sessions between two refaults, on real QEMUs: the campaign's short form, and a bare QEMU at one end."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import trio
from tests.campaign.session import Between, Lanes, encrypt, migrate
from tests.integration.qemus import BINARIES, OTHERS_NIGHTLY
from tests.support.breaking_proxy import BreakingProxy

from refault.lab import bare
from refault.lab.channel import Channel, free_port
from refault.lab.driver import REFAULT, RefaultDriver, refault_driver
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.process import started
from refault.lab.qemu import DEFAULT_BINARY, Pair, PairOptions, start_pair
from refault.lab.qmp_client import connect

GUEST = Guest.of_size(32 << 20, 1, 5_000_000)

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]


# The second connection is there before the offer on 7.2, and comes when it is needed since 8.0.
@pytest.mark.parametrize(
    ("binary", "lanes"),
    [
        (BINARIES[-1], Lanes()),
        *((binary, Lanes(preempt=True)) for binary in BINARIES),
        (BINARIES[0], Lanes(multifd=3)),
        pytest.param(BINARIES[-1], Lanes(multifd=3), marks=pytest.mark.nightly),
    ],
    ids=str,
)
async def test_no_qemu_notices_connections_that_are_lost_over_the_whole_life(
    binary: str, lanes: Lanes, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    outcome = await migrate(tmp_path, binary, seed, 24, session=True, memory=32 << 20, lanes=lanes)
    assert outcome.wrong == [], f"seed {seed}"
    assert outcome.losses > 12, f"seed {seed}"


@dataclass
class Lab:
    """A pair of QEMUs, two refaults, and the network between them."""

    pair: Pair
    driver: RefaultDriver
    proxy: BreakingProxy
    way: Channel
    log: Path
    """The source's refault's."""

    async def sessions(self, number: int) -> None:
        """Waits until so many channels have become sessions."""
        while self.log.read_text().count("the channel is a session") < number:
            await trio.sleep(0.005)

    async def until_a_session(self, *further: str, bandwidth: int = 4 << 20) -> None:
        """A migration in precopy, at so many bytes a second, with which it does not end by itself."""
        driver = self.driver
        for qmp in (driver.source, driver.destination):
            await bare.set_capabilities(qmp, *bare.CAPABILITIES, *further)
        limits = {"max-bandwidth": bandwidth, "max-postcopy-bandwidth": 1, "downtime-limit": 1}
        await driver.source.execute("migrate-set-parameters", limits)
        await driver.destination.execute("migrate-incoming", {"uri": self.way.target_uri})
        await driver.source.execute("migrate", {"uri": self.way.uri})
        await self.sessions(1)

    async def until_postcopy(self, *further: str) -> None:
        """The same in postcopy, where no page comes unasked."""
        await self.until_a_session(*further)
        await self.driver.source.execute("migrate-start-postcopy")
        await self.pair.destination.qmp.wait_event(lambda event: event.name == "RESUME")
        await self.pair.source.qmp.wait_migration("postcopy-active")

    async def complete(self, *, pauses: int) -> None:
        """Until both QEMUs say so, which have paused so often; memory is right."""
        source, destination = self.pair.source.qmp, self.pair.destination.qmp
        await source.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
        for qmp in (source, destination):
            await qmp.wait_migration("completed")
            told = [event.data["status"] for event in qmp.events if event.name == "MIGRATION"]
            assert told.count("postcopy-paused") == pauses
        verdict = await compare(GUEST, destination, source)
        assert verdict.right, verdict


@asynccontextmanager
async def lab(
    directory: Path,
    binary: str,
    *options: str,
    second_network: bool = False,
    source_prefix: Sequence[str] = (),
) -> AsyncIterator[Lab]:
    """What happens in it takes 100 s at most. Both refaults have these options."""
    port, other = free_port(), free_port()
    with (
        BreakingProxy(port, 15, losses=0, most=1) as proxy,
        BreakingProxy(other, 16, losses=0, most=1) as second,
    ):
        way = cast("Channel", Between(f"tcp:127.0.0.1:{proxy.port}", f"tcp:127.0.0.1:{port}"))
        further = [("--recover-uri", f"tcp:127.0.0.1:{each}") for each in (second.port, other)]
        here, there = (("--session", "auto", *options, *(each if second_network else ())) for each in further)
        async with (
            start_pair(GUEST, directory, PairOptions(binary, binary, source_prefix=source_prefix)) as pair,
            refault_driver(pair, way, directory, options=(here, there)) as driver,
        ):
            with trio.fail_after(100):
                yield Lab(pair, driver, proxy, way, directory / "refault-source.log")


async def has_a_session_behind_a_kill(world: Lab, killed: int) -> None:
    """In postcopy: that of the refault at this end is the loss that QEMUs see, and those that follow none."""
    world.driver.processes[killed].kill()
    world.driver.start_again(killed)
    await world.sessions(2)
    world.proxy.lose(6, 3000)
    while world.proxy.busy:
        await trio.sleep(0.005)
    await world.complete(pauses=1)


async def is_away_for_long(world: Lab) -> None:
    """In postcopy: the network is, for longer than patience, and comes back."""
    port = world.proxy.to
    world.proxy.block()
    for qemu in (world.pair.source, world.pair.destination):
        await qemu.qmp.wait_migration("postcopy-paused")
    world.proxy.to = port
    await world.sessions(2)
    await world.complete(pauses=1)


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
@pytest.mark.parametrize("killed", [0, 1], ids=["source", "destination"])
@pytest.mark.parametrize(
    "further",
    [(), pytest.param(("postcopy-preempt",), marks=pytest.mark.nightly)],
    ids=["one", "preempt"],
)
async def test_the_channel_that_follows_a_killed_refault_is_a_session_too(
    binary: str, killed: int, further: tuple[str, ...], tmp_path: Path
) -> None:
    """The loss that a kill is both QEMUs see; those that follow none."""
    async with lab(tmp_path, binary) as world:
        await world.until_postcopy(*further)
        await has_a_session_behind_a_kill(world, killed)


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
async def test_a_network_that_is_gone_for_longer_than_patience_is_a_pause_that_is_recovered(
    binary: str, tmp_path: Path
) -> None:
    async with lab(tmp_path, binary, "--session-patience", "1") as world:
        await world.until_postcopy()
        await is_away_for_long(world)


@pytest.mark.nightly
@pytest.mark.parametrize("binary", BINARIES)
async def test_in_precopy_it_is_a_migration_that_failed(binary: str, tmp_path: Path) -> None:
    async with lab(tmp_path, binary, "--session-patience", "1") as world:
        await world.until_a_session()
        world.proxy.block()
        source = world.pair.source.qmp
        await source.wait_migration("failed")
        assert (await source.execute("query-status"))["running"]


async def test_a_session_goes_on_over_the_second_network_where_the_first_is_gone(tmp_path: Path) -> None:
    async with lab(tmp_path, DEFAULT_BINARY, second_network=True) as world:
        await world.until_postcopy()
        world.proxy.stop()
        await world.complete(pauses=0)
        while "resumed after" not in world.log.read_text():  # it is written beside the work
            await trio.sleep(0.005)


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
async def test_a_source_whose_refault_is_gone_recovers_without_a_session(binary: str, tmp_path: Path) -> None:
    """It reads the offer that its destination's refault makes it, and makes nothing of it."""
    async with lab(tmp_path, binary) as world:
        await world.until_postcopy()
        world.driver.processes[0].kill()
        source = world.pair.source.qmp
        await source.wait_migration("postcopy-paused")
        await source.execute("migrate", {"uri": world.way.uri, "resume": True})
        await source.wait_migration("postcopy-recover")
        await world.complete(pauses=1)


@pytest.mark.parametrize(
    ("binary", "further", "tls"),
    [
        (DEFAULT_BINARY, (), ""),
        (BINARIES[-1], ("postcopy-preempt",), ""),
        (DEFAULT_BINARY, (), "x509"),
        *(pytest.param(binary, (), "psk", marks=pytest.mark.nightly) for binary in BINARIES),
    ],
)
async def test_a_bare_source_reads_the_offer_and_makes_nothing_of_it(
    binary: str, further: tuple[str, ...], tls: str, tmp_path: Path
) -> None:
    guest = Guest.of_size(16 << 20, 1, 5_000_000)
    uri = f"tcp:127.0.0.1:{free_port()}"
    async with (
        start_pair(guest, tmp_path, PairOptions(binary, binary)) as pair,
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
            await bare.set_capabilities(qmp, *bare.CAPABILITIES, *further)
        if tls:
            await encrypt(source, destination, tls, tmp_path)
        with trio.fail_after(60):
            limits = {"max-bandwidth": bare.PRECOPY_BANDWIDTH, "downtime-limit": bare.DOWNTIME_LIMIT}
            await source.execute("migrate-set-parameters", limits)
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
