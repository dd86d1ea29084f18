"""Encrypted channels: carried unread, recovered all the same, and what a stranger's handshake does."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from tests.integration.qemus import BINARIES, OTHERS_NIGHTLY, qemus
from tests.integration.test_addresses import active_again, lose, memory_is_right, set_up, to_postcopy
from tests.integration.test_main_job import GUEST
from tests.integration.test_reclaim import ONLY_11, take_back, wait_for_arrival
from tests.integration.test_restart import runs
from tests.integration.waiting import held_by_qemu, nothing_moves
from tests.support.certificates import make_certificates, make_key, set_tls

from refault.daemon.app import PHASE_PATIENCE
from refault.daemon.known.vm_state import QUERY_TIMEOUT
from refault.daemon.near.local import GIVE_BACK_TIMEOUT
from refault.lab import bare
from refault.lab.channel import Channel, free_port, start_channel
from refault.lab.driver import RefaultDriver, refault_driver
from refault.lab.qemu import Pair, PairOptions, start_pair
from refault.lab.qmp_client import QmpError

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

NAME = "destination.example"
CLIENT_HELLO = (
    bytes.fromhex("16030100360100003203035a5a")
    + bytes(30)
    + bytes.fromhex("000004c02fc0300100000500ff01000100")
)


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as QEMU's tls-creds-x509 and tls-creds-psk want it, for both ends."""
    place = tmp_path_factory.mktemp("tls")
    make_certificates(place, f"DNS:{NAME},IP:127.0.0.1")
    make_key(place)
    return place


@asynccontextmanager
async def encrypted(
    directory: Path,
    credentials: Path,
    binary: str,
    *,
    kind: str = "x509",
    hostname: str = NAME,
    postcopy: bool = True,
) -> AsyncIterator[tuple[Pair, Channel, RefaultDriver]]:
    """A pair with a refault in front of each, and postcopy (or precopy) under way over TLS."""
    async with (
        start_pair(GUEST, directory, PairOptions(binary, binary)) as pair,
        start_channel(directory, free_port()) as channel,
        refault_driver(pair, channel, directory) as driver,
    ):
        await set_up(driver)
        await set_tls(driver.source, driver.destination, kind, credentials)
        await driver.source.execute("migrate-set-parameters", {"tls-hostname": hostname})
        await driver.destination.execute("migrate-incoming", {"uri": channel.target_uri})
        await channel.wait_open()
        await driver.source.execute("migrate", {"uri": channel.uri})
        if postcopy:
            await to_postcopy(driver)
        yield pair, channel, driver


@pytest.mark.parametrize(("binary", "kind"), list(zip(BINARIES, ("x509", "psk"), strict=False)))
async def test_an_encrypted_channel_is_recovered_unread(
    tmp_path: Path, credentials: Path, binary: str, kind: str
) -> None:
    async with encrypted(tmp_path, credentials, binary, kind=kind) as (pair, channel, driver):
        for _ in range(3):
            await lose(channel, driver)
        for vm in await driver.statuses():
            assert (vm.migration.relay, vm.migration.held, vm.recovery.losses) == ("opaque", None, 3)
            assert "TLS" in (vm.migration.relay_reason or "")
            assert (vm.pages.requested, vm.pages.replayed) == (0, 0)
        await memory_is_right(pair, driver)


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
async def test_a_source_that_is_told_no_name_has_that_of_the_address_and_no_client_sees_it(
    tmp_path: Path, credentials: Path, binary: str
) -> None:
    async with encrypted(tmp_path, credentials, binary, hostname="") as (pair, channel, driver):

        async def names() -> list[str]:
            parameters = [
                await qmp.execute("query-migrate-parameters") for qmp in (driver.source, pair.source.qmp)
            ]
            return [each["tls-hostname"] for each in parameters]

        await lose(channel, driver)
        assert [vm.migration.relay for vm in await driver.statuses()] == ["opaque", "opaque"]
        for killed in (True, False):
            assert await names() == ["", "127.0.0.1"]
            since = len(driver.destination.events)
            if killed:
                driver.processes[0].kill()
            else:
                await driver.processes[0].stop()
                assert (await pair.source.qmp.execute("query-migrate-parameters"))["tls-hostname"] == ""
            await start_again(driver)
            await active_again(driver, since)
        assert await names() == ["", "127.0.0.1"]
        await memory_is_right(pair, driver)
        with trio.fail_after(40):
            while await names() != ["", ""]:
                await trio.sleep(0.02)
            while [name for name in os.listdir(tmp_path / "source.state") if name.endswith(".json")]:
                await trio.sleep(0.02)


async def test_a_migration_that_is_cancelled_or_refused_leaves_no_name_behind(
    tmp_path: Path, credentials: Path
) -> None:
    async with encrypted(tmp_path, credentials, BINARIES[0], hostname="", postcopy=False) as lab:
        pair, channel, driver = lab

        async def name() -> str:
            return str((await pair.source.qmp.execute("query-migrate-parameters"))["tls-hostname"])

        async def is_put_back() -> None:
            with trio.fail_after(40):
                while await name():
                    await trio.sleep(0.02)

        assert await name() == "127.0.0.1"
        await driver.source.execute("migrate_cancel")
        # 7.2 shuts the channel down before it notes the cancellation (migrate_fd_cancel).
        await bare.wait_status(driver.source, "cancelled", "failed")
        await is_put_back()
        with pytest.raises(QmpError):
            await driver.source.execute("migrate", {"uri": channel.uri, "detach": "no"})
        await is_put_back()


@pytest.mark.parametrize("binary", OTHERS_NIGHTLY)
async def test_tls_handshakes_that_come_to_nothing_while_it_is_paused(
    tmp_path: Path, credentials: Path, binary: str
) -> None:
    async with encrypted(tmp_path, credentials, binary) as (pair, channel, driver):
        port = int(channel.target_uri.rpartition(":")[2])
        hellos, said = trio.open_memory_channel[bytes](10)

        async def hang_up(stream: trio.SocketStream) -> None:
            await hellos.send(await stream.receive_some(4096))

        async with trio.open_nursery() as nursery:
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, hang_up, [listener])
            await channel.retarget(listener.socket.getsockname()[1])  # the source finds somebody else
            since = len(driver.destination.events)
            await channel.reset()
            with trio.fail_after(40):
                await driver.destination.wait_migration("postcopy-paused", since=since)
                for _ in range(2):
                    assert (await said.receive()).startswith(b"\x16\x03")
                for hello in (CLIENT_HELLO, CLIENT_HELLO[:20], b"\x16\x03garbage"):
                    async with await trio.open_tcp_stream("127.0.0.1", port) as stranger:
                        await stranger.send_all(hello)
                        await trio.sleep(0.2)
            nursery.cancel_scope.cancel()
        await channel.retarget(port)
        await active_again(driver, since)
        await memory_is_right(pair, driver)


@asynccontextmanager
async def waits_for_arrival(
    directory: Path, credentials: Path, binary: str
) -> AsyncIterator[tuple[Pair, Channel, RefaultDriver]]:
    """A source that waits to hear that its guest has arrived; the destination's QEMU is stopped."""
    async with encrypted(directory, credentials, binary, postcopy=False) as (pair, channel, driver):
        await bare.wait_sent(driver.source, 0.1)
        await wait_for_arrival(pair, driver)
        await nothing_moves(driver)
        yield pair, channel, driver


async def is_held(driver: RefaultDriver) -> None:
    with trio.fail_after(40):
        while "the source fails and runs the guest again" not in str((await driver.statuses())[0]):
            await trio.sleep(0.05)


async def is_taken_back(pair: Pair, driver: RefaultDriver) -> None:
    """The guest has not run at the source, and does so on the operator's word."""
    assert await bare.migration_status(pair.source.qmp) == "postcopy-device"
    assert not [event for event in pair.source.qmp.events if event.name == "RESUME"]
    await take_back(pair, driver)


async def start_again(driver: RefaultDriver) -> None:
    """The source's refault has ended; the next one, and a client at it."""
    driver.start_again(0)
    await driver.connect_again(0)


@pytest.mark.parametrize("binary", ONLY_11)
async def test_a_source_that_cannot_be_told_of_its_guests_arrival_is_held_until_the_operator_says(
    tmp_path: Path, credentials: Path, binary: str
) -> None:
    """From 10.2 on it fails at the end of its channel, and runs the guest beside the destination's."""
    async with waits_for_arrival(tmp_path, credentials, binary) as (pair, channel, driver):
        await channel.reset()
        await is_held(driver)
        await trio.sleep(1)
        await is_taken_back(pair, driver)


@pytest.mark.parametrize("binary", ONLY_11)
async def test_it_stays_held_though_it_does_not_answer_for_a_time_and_refault_is_killed(
    tmp_path: Path, credentials: Path, binary: str
) -> None:
    async with waits_for_arrival(tmp_path, credentials, binary) as (pair, channel, driver):
        pair.source.process.signal(signal.SIGSTOP)
        await channel.reset()
        await trio.sleep(QUERY_TIMEOUT + GIVE_BACK_TIMEOUT + 1.5)
        pair.source.process.signal(signal.SIGCONT)
        await is_held(driver)
        await held_by_qemu(pair.source.pid, driver.processes[0].pid)
        driver.processes[0].kill()
        await start_again(driver)
        await is_held(driver)
        await is_taken_back(pair, driver)


@pytest.mark.parametrize("binary", ONLY_11)
async def test_it_stays_held_though_refault_is_stopped(
    tmp_path: Path, credentials: Path, binary: str
) -> None:
    async with waits_for_arrival(tmp_path, credentials, binary) as (pair, channel, driver):
        await channel.reset()
        await is_held(driver)
        assert await driver.processes[0].stop() == 0
        await start_again(driver)
        await is_held(driver)
        await is_taken_back(pair, driver)


@pytest.mark.parametrize("binary", ONLY_11)
async def test_refault_does_not_end_before_the_source_has_heard_of_the_arrival(
    tmp_path: Path, credentials: Path, binary: str
) -> None:
    """It would lose the guest: the source never heard, and would send no more."""
    async with waits_for_arrival(tmp_path, credentials, binary) as (pair, _, driver):
        driver.processes[0].signal(signal.SIGTERM)
        await trio.sleep(PHASE_PATIENCE + 1.5)
        assert driver.processes[0].status is None
        pair.destination.process.signal(signal.SIGCONT)
        with trio.fail_after(40):
            while driver.processes[0].status is None:
                await trio.sleep(0.05)
        await start_again(driver)
        await memory_is_right(pair, driver)


@pytest.mark.parametrize("binary", ONLY_11)
async def test_an_encrypted_source_that_failed_while_refault_was_dead_is_stopped(
    tmp_path: Path, credentials: Path, binary: str
) -> None:
    async with waits_for_arrival(tmp_path, credentials, binary) as (pair, _, driver):
        driver.processes[0].kill()
        with trio.fail_after(40):
            await bare.wait_status(pair.source.qmp, "failed")
            while not await runs(pair.source):  # it says so first
                await trio.sleep(0.02)
            driver.start_again(0)
            while await runs(pair.source):
                await trio.sleep(0.05)
        pair.destination.process.kill()


@pytest.mark.parametrize("binary", qemus("qemu-11"))
async def test_an_encrypted_channel_lost_as_soon_as_the_guest_runs_is_recovered_or_held(
    tmp_path: Path, credentials: Path, binary: str
) -> None:
    """Held where the word of the arrival was lost with it, which a loaded machine makes happen."""
    async with encrypted(tmp_path, credentials, binary, postcopy=False) as (pair, channel, driver):
        await driver.source.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
        await bare.wait_sent(driver.source, 0.1)
        await driver.source.execute("migrate-start-postcopy")
        await pair.destination.qmp.wait_event(lambda event: event.name == "RESUME")
        await channel.reset()

        def has_completed() -> bool:
            """By its events, for a source that is held as it completes answers nobody."""
            return any(event.data.get("status") == "completed" for event in pair.source.qmp.events)

        with trio.fail_after(60):
            while not (held := (await driver.statuses())[0].migration.held) and not has_completed():
                await trio.sleep(0.05)
        if not held:
            await memory_is_right(pair, driver)
        assert not [event for event in pair.source.qmp.events if event.name == "RESUME"]
