"""Addresses of a migration: which are relayed, and that the others reach QEMU as they came."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.integration.qemus import BINARIES
from tests.integration.test_main_job import GUEST, recv_bitmap
from tests.integration.waiting import told

from refault.lab import bare
from refault.lab.channel import Channel, Loss, free_port, start_channel
from refault.lab.driver import REFAULT, RefaultDriver, refault_driver
from refault.lab.memory import compare
from refault.lab.qemu import DEFAULT_BINARY, Pair, PairOptions, start_pair
from refault.lab.qmp_client import QmpClient, QmpError

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

NEW = [binary for binary in BINARIES if binary != DEFAULT_BINARY]
"""Those that know `channels`: QEMU 8.2 and later."""


@asynccontextmanager
async def fronted(
    directory: Path, options: PairOptions, refault: Sequence[str] = (), command: Sequence[str] = REFAULT
) -> AsyncIterator[tuple[Pair, Channel, RefaultDriver]]:
    """A refault in front of each; `refault`: further options of the destination's, with PORT for the port."""
    port = free_port()
    # A client that has paused is left as long as a busy machine takes for it.
    waits = ["--client-wait", "60"]
    further = [*waits, *(option.replace("PORT", str(port)) for option in refault)]
    async with (
        start_pair(GUEST, directory, options) as pair,
        start_channel(directory, port) as channel,
        refault_driver(pair, channel, directory, options=(waits, further), command=command) as driver,
    ):
        yield pair, channel, driver


async def set_up(driver: RefaultDriver) -> None:
    for qmp in (driver.source, driver.destination):
        await bare.set_capabilities(qmp, *bare.CAPABILITIES)
    limits = {"max-bandwidth": bare.PRECOPY_BANDWIDTH, "downtime-limit": bare.DOWNTIME_LIMIT}
    limits["max-postcopy-bandwidth"] = 1 << 20
    await driver.source.execute("migrate-set-parameters", limits)


async def to_postcopy(driver: RefaultDriver) -> None:
    with trio.fail_after(30):
        await bare.wait_sent(driver.source, 0.1)
        await driver.source.execute("migrate-start-postcopy")
        await bare.wait_status(driver.source, "postcopy-active")
        await driver.destination.wait_event(lambda event: event.name == "RESUME")


async def lose(channel: Channel, driver: RefaultDriver) -> None:
    since = len(driver.destination.events)
    before = [vm.recovery.recoveries + 1 for vm in await driver.statuses()]
    await channel.lose(Loss.RESET)
    await active_again(driver, since)
    await told(driver, lambda vms: [vm.recovery.recoveries for vm in vms] == before)


async def active_again(driver: RefaultDriver, since: int) -> None:
    with trio.fail_after(40):
        await driver.destination.wait_migration("postcopy-active", since=since)
        await bare.wait_status(driver.source, "postcopy-active")


async def memory_is_right(pair: Pair, driver: RefaultDriver) -> None:
    await pair.destination.wait_progress()
    await bare.finish(driver.source)
    verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
    assert verdict.right, verdict


# ---- -incoming, and strangers who know our blocks ----


@pytest.mark.parametrize("binary", BINARIES)
async def test_a_qemu_that_listens_by_its_command_line(tmp_path: Path, binary: str) -> None:
    private = f"unix:{tmp_path}/private"
    options = PairOptions(binary, binary, incoming=private)
    async with fronted(tmp_path, options, ["--incoming", f"tcp:127.0.0.1:PORT,{private}"]) as lab:
        pair, channel, driver = lab
        await set_up(driver)
        [address] = (await driver.destination.execute("query-migrate"))["socket-address"]
        assert (address["type"], address["host"]) == ("inet", "127.0.0.1")
        port = int(address["port"])
        with trio.fail_after(20):
            for stranger in (b"", b"GET / HTTP/1.0\r\n\r\n"):  # QEMU hears of neither
                async with await trio.open_tcp_stream("127.0.0.1", port) as connection:
                    await connection.send_all(stranger)
        await channel.wait_open()
        await driver.source.execute("migrate", {"uri": channel.uri})
        await to_postcopy(driver)
        await a_copy_of_a_recovered_channel_displaces_nothing(driver, port)
        for _ in range(2):
            await lose(channel, driver)
        assert [vm.recovery.recoveries for vm in await driver.statuses()] == [2, 2]
        assert [vm.migration.relay for vm in await driver.statuses()] == ["tracking", "tracking"]
        await memory_is_right(pair, driver)


async def a_copy_of_a_recovered_channel_displaces_nothing(driver: RefaultDriver, port: int) -> None:
    names = [block.name.encode() for block in (await driver.statuses())[1].pages.blocks]
    copy = b"".join(recv_bitmap(name) for name in names)
    with trio.fail_after(20):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stranger:
            await stranger.send_all(copy)
            with contextlib.suppress(trio.BrokenResourceError):
                assert await stranger.receive_some(1) == b""  # closed while the channel worked on
    assert [vm.recovery.losses for vm in await driver.statuses()] == [0, 0]


# ---- channels ----


def channels(uri: str) -> list[dict[str, Any]]:
    _, host, port = uri.split(":")
    address = {"transport": "socket", "type": "inet", "host": host, "port": port}
    return [{"channel-type": "main", "addr": address}]


@pytest.mark.parametrize("binary", NEW)
async def test_channels_in_place_of_uri(tmp_path: Path, binary: str) -> None:
    async with fronted(tmp_path, PairOptions(binary, binary)) as (pair, channel, driver):
        await set_up(driver)
        await driver.destination.execute("migrate-incoming", {"channels": channels(channel.target_uri)})
        await channel.wait_open()
        await driver.source.execute("migrate", {"channels": channels(channel.uri)})
        await to_postcopy(driver)
        await lose(channel, driver)
        # By hand, to another port; migrate-recover takes a uri only.
        since = len(driver.destination.events)
        await driver.source.execute("migrate-pause", oob=True)
        with trio.fail_after(40):
            await driver.destination.wait_migration("postcopy-paused", since=since)
            await bare.wait_status(driver.source, "postcopy-paused")
        await channel.retarget()
        await driver.destination.execute("migrate-recover", {"uri": channel.target_uri}, oob=True)
        await channel.wait_open()
        await driver.source.execute("migrate", {"channels": channels(channel.uri), "resume": True})
        await active_again(driver, since)
        assert [vm.migration.relay for vm in await driver.statuses()] == ["tracking", "tracking"]
        await memory_is_right(pair, driver)


# ---- what passes beside the relay ----


async def migrate_away(source: QmpClient, arguments: dict[str, Any]) -> None:
    """A precopy migration to anywhere, after which the guest goes on here."""
    await source.execute("migrate", arguments)
    with trio.fail_after(30):
        await bare.wait_status(source, "completed")
        while True:
            try:
                await source.execute("cont")
            except QmpError as error:  # for a moment, until its migration thread has ended
                if "not finalized" not in str(error):
                    raise
            else:
                return


@pytest.mark.skipif(not shutil.which("qemu-10"), reason="run 'make qemus' first")
async def test_addresses_that_are_not_relayed_pass_word_for_word(tmp_path: Path) -> None:
    options = PairOptions("qemu-10", "qemu-10")
    async with fronted(tmp_path, options) as (pair, _, driver):
        source = driver.source
        await bare.set_capabilities(source, "events")
        await source.execute("migrate-set-parameters", {"max-bandwidth": 0})
        saved = [tmp_path / name for name in ("exec", "exec-channel", "file", "file-channel", "fd")]
        fd = os.open(saved[4], os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            await source.execute("getfd", {"fdname": "mine"}, fds=[fd])
        finally:
            os.close(fd)
        shell = ["/bin/sh", "-c", f"cat >{saved[1]}"]
        offset_file = {"transport": "file", "filename": str(saved[3]), "offset": 0}
        main = {"channel-type": "main"}
        for arguments, reason in (
            ({"uri": f"exec:cat >{saved[0]}"}, "exec:"),
            ({"channels": [{**main, "addr": {"transport": "exec", "args": shell}}]}, "exec"),
            ({"uri": f"file:{saved[2]}"}, "file:"),
            ({"channels": [{**main, "addr": offset_file}]}, "file"),
            ({"uri": "fd:mine"}, "fd:mine"),
        ):
            await migrate_away(source, arguments)
            vm = (await driver.statuses())[0]
            assert vm.migration.relay == "off"
            assert reason in (vm.migration.relay_reason or "")
        assert all(path.stat().st_size > 1 << 20 for path in saved)
        # What came out last goes in again, as the client says it; cat has all of it later than QEMU says.
        await source.execute("stop")
        whole = tmp_path / "whole"
        await source.execute("migrate", {"uri": f"exec:cat >{whole}.part && mv {whole}.part {whole}"})
        with trio.fail_after(30):
            await bare.wait_status(source, "completed")
            while not whole.exists():
                await trio.sleep(0.01)
        await driver.destination.execute("migrate-incoming", {"uri": f"exec:cat {whole}"})
        with trio.fail_after(30):
            await bare.wait_status(driver.destination, "completed")
        await driver.destination.execute("cont")  # it was saved while it stood still
        await pair.destination.wait_progress()
        verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
        assert verdict.right, verdict


async def test_a_qemu_that_listens_publicly_is_told_of_and_passes_beside_the_relay(tmp_path: Path) -> None:
    options = PairOptions(incoming=f"tcp:127.0.0.1:{free_port()}")
    async with fronted(tmp_path, options) as (pair, _, driver):
        with trio.fail_after(20):
            while "QEMU itself listens" not in (tmp_path / "refault-destination.log").read_text():
                await trio.sleep(0.05)
        for qmp in (driver.source, driver.destination):
            await bare.set_capabilities(qmp, "events", "compress")
        await driver.source.execute("migrate-set-parameters", {"max-bandwidth": 0})
        await driver.source.execute("migrate", {"uri": options.incoming})
        await completed(pair, driver, "compress")


async def test_a_unix_socket_is_qemus_own(tmp_path: Path) -> None:
    async with fronted(tmp_path, PairOptions()) as (pair, _, driver):
        await bare.set_capabilities(driver.source, "events")
        await driver.source.execute("migrate-set-parameters", {"max-bandwidth": 0})
        uri = f"unix:{tmp_path}/migration"
        await driver.destination.execute("migrate-incoming", {"uri": uri})
        assert (tmp_path / "migration").is_socket()
        await driver.source.execute("migrate", {"uri": uri})
        await completed(pair, driver, "unix:")


async def completed(pair: Pair, driver: RefaultDriver, reason: str) -> None:
    """It came to its end, not relayed for `reason`."""
    with trio.fail_after(30):
        await bare.wait_status(driver.source, "completed")
        await bare.wait_status(driver.destination, "completed")
    vm = (await driver.statuses())[0]
    assert vm.migration.relay == "off"
    assert reason in (vm.migration.relay_reason or "")
    await pair.destination.wait_progress()
    verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
    assert verdict.right, verdict
