"""A pause that refault recovers is not told where a listener asks for that, and everywhere else it is."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from tests.integration.qemus import BINARIES
from tests.integration.test_main_job import GUEST
from tests.integration.waiting import recovered

from refault.lab import bare
from refault.lab.channel import Channel, free_port, start_channel
from refault.lab.driver import RefaultDriver, bare_driver, refault_driver
from refault.lab.memory import compare
from refault.lab.qemu import DEFAULT_BINARY, Pair, PairOptions, start_pair
from refault.lab.qmp_client import QmpClient, connect
from refault.qmp.hiding import PAUSED

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

HIDDEN = 5
"""Seconds that a pause is hidden for: in them it is asked whether it is."""


@dataclass
class Case:
    """A migration in postcopy; `hiding` are the clients, at the source and at the destination, that are not
    to know of a pause."""

    pair: Pair
    channel: Channel
    driver: RefaultDriver
    hiding: tuple[QmpClient, QmpClient]

    async def both(self, status: str, since: Sequence[int]) -> None:
        """Waits until both QEMUs have said so."""
        with trio.fail_after(40):
            await self.pair.source.qmp.wait_migration(status, since=since[0])
            await self.pair.destination.qmp.wait_migration(status, since=since[1])

    def marks(self) -> list[int]:
        return [len(qemu.qmp.events) for qemu in (self.pair.source, self.pair.destination)]

    async def hidden(self) -> list[bool]:
        return [vm.migration.pause_hidden_since is not None for vm in await self.driver.statuses()]


@contextlib.asynccontextmanager
async def case_of(directory: Path, binary: str, seconds: int = 30) -> AsyncIterator[Case]:
    listen = [f"unix:{directory}/{side}.hiding,hide-pause={seconds}" for side in ("source", "destination")]
    further = [("--listen", each) for each in listen]
    async with (
        start_pair(GUEST, directory, PairOptions(binary, binary)) as pair,
        start_channel(directory, free_port()) as channel,
        refault_driver(pair, channel, directory, options=(further[0], further[1])) as driver,
        connect(str(directory / "source.hiding")) as source,
        connect(str(directory / "destination.hiding")) as destination,
    ):
        await bare.start_postcopy(driver.source, driver.destination, channel, bandwidth=1 << 20)
        # Each client hears of it on a connection of its own; what it hears from here on is of the losses.
        with trio.fail_after(20):
            for client in (source, destination):
                await client.wait_migration("postcopy-active")
        await bare.heard_of_postcopy(pair.source.qmp, pair.destination.qmp)
        yield Case(pair, channel, driver, (source, destination))


def statuses(client: QmpClient, since: int = 0) -> list[str]:
    return [each.data["status"] for each in client.events[since:] if each.name == "MIGRATION"]


def guest_events(client: QmpClient) -> list[str]:
    return [each.name for each in client.events if each.name in ("STOP", "RESUME")]


async def unbroken(directory: Path, binary: str) -> list[tuple[list[str], list[str]]]:
    """What clients hear, bare, of a migration that nothing befalls."""
    async with (
        start_pair(GUEST, directory, PairOptions(binary, binary)) as pair,
        start_channel(directory, free_port()) as channel,
        bare_driver(pair, channel) as driver,
    ):
        await bare.start_postcopy(driver.source, driver.destination, channel)
        await bare.finish(driver.source)
        for each in (driver.source, driver.destination):
            await each.wait_migration("completed")
        return [(statuses(each), guest_events(each)) for each in (driver.source, driver.destination)]


async def ask(client: QmpClient, told: set[str]) -> None:
    """Asks again and again; what it is told."""
    while True:
        told.add(await bare.migration_status(client))
        await trio.sleep(0.002)


@pytest.mark.nightly
@pytest.mark.parametrize("binary", BINARIES)
async def test_two_losses_and_a_kill_are_as_if_they_had_not_been(tmp_path: Path, binary: str) -> None:
    for name in ("lost", "unbroken"):
        (tmp_path / name).mkdir()
    async with case_of(tmp_path / "lost", binary) as case, trio.open_nursery() as nursery:
        told: set[str] = set()
        nursery.start_soon(ask, case.hiding[0], told)
        for loss in range(3):
            since = case.marks()
            if loss == 2:
                case.driver.processes[0].kill()
                await case.both("postcopy-paused", since)
                case.driver.start_again(0)
            else:
                await case.channel.reset()
            await case.both("postcopy-active", since)
        await bare.finish(case.pair.source.qmp)
        for client in case.hiding:
            await client.wait_migration("completed")
        nursery.cancel_scope.cancel()
        assert not told & PAUSED
        heard = [(statuses(client), guest_events(client)) for client in case.hiding]
        plain = statuses(case.driver.destination)
        assert plain == statuses(case.pair.destination.qmp)
        assert plain.count("postcopy-paused") == 3
        verdict = await compare(GUEST, case.pair.destination.qmp, case.pair.source.qmp)
        assert verdict.right, verdict
        assert [vm.clients.hidden_pauses for vm in await case.driver.statuses()] == [1, 3]
    assert heard == await unbroken(tmp_path / "unbroken", binary)


async def test_it_is_told_when_it_takes_too_long_and_when_it_is_a_clients_own(tmp_path: Path) -> None:
    async with case_of(tmp_path, DEFAULT_BINARY, seconds=HIDDEN) as case:
        port = int(case.channel.target_uri.rpartition(":")[2])
        marks = [len(client.events) for client in case.hiding]
        since = case.marks()
        await case.channel.retarget()
        await case.channel.reset()
        await case.both("postcopy-paused", since)
        assert statuses(case.hiding[0], marks[0]) == []
        assert await bare.migration_status(case.hiding[0]) == "postcopy-active"
        assert await case.hidden() == [True, True]
        with trio.fail_after(20):
            for client, mark in zip(case.hiding, marks, strict=True):
                told = await client.wait_event(lambda event: event.name == "MIGRATION", mark)
                assert told.data == {"status": "postcopy-paused"}
                assert told.when - told.emitted > 0.8 * HIDDEN
        assert await bare.migration_status(case.hiding[0]) == "postcopy-paused"
        assert await case.hidden() == [False, False]
        # It is told to its end, and the next one is hidden again.
        since = case.marks()
        await case.channel.retarget(port)
        await case.both("postcopy-active", since)
        with trio.fail_after(20):
            await case.hiding[0].wait_migration("postcopy-active", since=marks[0])
        heard = statuses(case.hiding[0], marks[0])
        since = case.marks()
        await case.channel.reset()
        await case.both("postcopy-active", since)
        await recovered(case.driver, 2)  # so that its end is known there, too
        await case.driver.source.execute("migrate-pause", oob=True)
        with trio.fail_after(20):
            await case.hiding[0].wait_migration("postcopy-paused", since=marks[0] + len(heard))
        assert await bare.migration_status(case.hiding[0]) == "postcopy-paused"
        assert statuses(case.hiding[0], marks[0]) == [*heard, "postcopy-paused"]
