"""Commands, connections and ends that come at the wrong moment: no guest, no QEMU and no refault is lost."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.integration.beside import listens
from tests.integration.qemus import BINARIES
from tests.integration.test_main_job import GUEST, begin_postcopy, fronted
from tests.integration.waiting import told

from refault.daemon.telling import control
from refault.daemon.telling.snapshot import VmStatus
from refault.lab import bare, qmp_client
from refault.lab.channel import Channel, free_port
from refault.lab.driver import RefaultDriver
from refault.lab.memory import compare
from refault.lab.qemu import Pair, Qemu, start_qemu
from refault.lab.qmp_client import QmpClient, QmpError

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

SETTLES = 0.5
"""Seconds after which a QEMU that saw the end of a descriptor it listens on is surely gone."""

THREADS_END = 15
"""Seconds after which trio has ended the thread of a call (to_thread) that nothing else needed, and more."""

# The destination's first migrate-recover does not come to its orderly end.
INTERRUPTED = """
import sys, trio
from refault.daemon.roles.destination import Destination
from refault.migration.recovery import Event
recover, seen = Destination._recover, []
async def interrupted(self, uri):
    if seen:
        return await recover(self, uri)
    seen.append(uri)
    {interruption}
Destination._recover = interrupted
from refault.cli.main import main
sys.exit(main())
"""
INTERRUPTIONS = {
    "cancelled": """
    await recover(self, uri)
    self._course.feed(Event.CHANNEL_LOST)
    await trio.lowlevel.checkpoint()
""",
    "not-answered": """
    await self._vm.monitor.execute("migrate-recover", {"uri": uri}, oob=True, timeout=0.0)
""",
}


async def all_ends_well(pair: Pair, driver: RefaultDriver, source: QmpClient | None = None) -> None:
    """Completes; neither that nor the end of both refaults harms the destination, whose memory is right."""
    await pair.destination.wait_progress()
    await bare.finish(source or driver.source)
    await trio.sleep(SETTLES)
    for process in driver.processes:
        await process.stop()
    await trio.sleep(SETTLES)
    pair.destination.process.must_run()
    verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
    assert verdict.right, verdict


async def is_active(pair: Pair) -> None:
    """Both ends, within 20 s; the destination by what its guest does, for it may not answer."""
    with trio.fail_after(40):
        await bare.wait_status(pair.source.qmp, "postcopy-active")
    await pair.destination.wait_progress(40)


@contextlib.asynccontextmanager
async def new_destination(pair: Pair, directory: Path) -> AsyncIterator[tuple[Qemu, QmpClient]]:
    """Another QEMU in the place of the destination's, and a client at the refault in front of it."""
    pair.destination.process.kill()
    async with (
        start_qemu(GUEST, directory, "dst", incoming="defer") as qemu,
        qmp_client.connect(str(directory / "destination.client")) as client,
    ):
        yield qemu, client


@pytest.mark.parametrize("how", INTERRUPTIONS)
async def test_a_recover_that_is_interrupted_leaves_no_end_to_be_seen(tmp_path: Path, how: str) -> None:
    script = INTERRUPTED.format(interruption=INTERRUPTIONS[how].strip())
    async with fronted(tmp_path, [sys.executable, "-c", script]) as (pair, channel, driver):
        await begin_postcopy(pair, channel, driver)
        since = len(pair.destination.qmp.events)
        await channel.reset()
        with trio.fail_after(40):
            await pair.destination.qmp.wait_migration("postcopy-active", since=since)
        await all_ends_well(pair, driver)


async def test_a_destination_that_pauses_by_itself_sees_no_end_of_a_leg(tmp_path: Path) -> None:
    async with fronted(tmp_path) as (pair, channel, driver):
        await begin_postcopy(pair, channel, driver)
        for _ in range(5):
            await trio.sleep(0.2)
            since = len(pair.destination.qmp.events)
            await pair.destination.qmp.execute("migrate-pause", oob=True)
            with trio.fail_after(40):
                await pair.destination.qmp.wait_migration("postcopy-active", since=since)
                await bare.wait_status(pair.source.qmp, "postcopy-active")
        await all_ends_well(pair, driver)


async def waits_for_the_source(driver: RefaultDriver) -> None:
    with trio.fail_after(40):
        while not any(
            vm.migration.role == "destination" and vm.recovery.attempts for vm in await driver.statuses()
        ):
            await trio.sleep(0.02)


@pytest.mark.parametrize("how", ["stopped", "killed", "killed twice"])
async def test_a_refault_that_ends_while_qemu_waits_for_the_source(tmp_path: Path, how: str) -> None:
    async with fronted(tmp_path) as (pair, channel, driver):
        await begin_postcopy(pair, channel, driver)
        port = int(channel.target_uri.rpartition(":")[2])
        await channel.retarget()
        await channel.reset()
        if how == "killed twice":  # the second has laid nothing with QEMU before it is needed
            driver.processes[1].kill()
            await trio.sleep(SETTLES)
            driver.start_again(1)
        await waits_for_the_source(driver)
        if how == "stopped":
            assert await driver.processes[1].stop() == 0
        else:
            driver.processes[1].kill()
        await trio.sleep(SETTLES)
        pair.destination.process.must_run()
        await channel.retarget(port)
        driver.start_again(1)
        await is_active(pair)
        await all_ends_well(pair, driver)


async def test_a_second_migration_is_qemus_to_refuse_and_harms_nothing(tmp_path: Path) -> None:
    async with fronted(tmp_path) as (pair, channel, driver):
        await begin_postcopy(pair, channel, driver)
        with trio.fail_after(40):
            with pytest.raises(QmpError, match="migration process in progress"):
                await driver.source.execute("migrate", {"uri": channel.uri})
            with pytest.raises(QmpError, match="already been started"):
                await driver.destination.execute("migrate-incoming", {"uri": channel.target_uri})
            with pytest.raises(QmpError, match="no paused migration"):
                await driver.source.execute("migrate", {"uri": channel.uri, "resume": True})
        for vm in await driver.statuses():
            assert (vm.migration.relay, vm.recovery.losses) == ("tracking", 0)
        await all_ends_well(pair, driver)


async def refused(client: QmpClient, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(QmpError, match=match):
        await client.execute("migrate-recover", arguments, oob=True)


async def test_a_recover_that_qemu_refuses_leaves_nothing_bound(tmp_path: Path) -> None:
    port = free_port()
    right = {"uri": f"tcp:127.0.0.1:{port}"}
    # It leaves a client that has paused as long as a busy machine takes for all this.
    async with fronted(tmp_path, options=("--client-wait", "80")) as (pair, channel, driver):
        await begin_postcopy(pair, channel, driver)
        client = driver.destination
        with trio.fail_after(80), socket.create_server(("127.0.0.1", 0)) as taken:
            in_use = {"uri": f"tcp:127.0.0.1:{taken.getsockname()[1]}"}
            for arguments in (right, in_use):
                await refused(client, arguments, "when postcopy is paused")
                assert not listens(port)
            since = len(client.events)
            await channel.retarget()  # the source does not find it
            await client.execute("migrate-pause", oob=True)  # and refault waits for the client
            await client.wait_migration("postcopy-paused", since=since)
            await bare.wait_status(driver.source, "postcopy-paused")
            await refused(client, {**right, "more": 1}, "more")
            await refused(client, {"uri": 5}, "uri")
            await refused(client, {}, "uri")
            await refused(client, in_use, "Failed to find an available port: Address already in use")
            await refused(
                client, {"uri": "tcp:nobody.invalid:1"}, "address resolution failed for nobody.invalid"
            )
            assert not listens(port)
            await client.execute("migrate-recover", right, oob=True)
            assert listens(port)
            await refused(client, {**right, "more": 1}, "more")
            await client.execute("migrate-recover", right, oob=True)  # once more, as QEMU takes it
            await channel.retarget(port)
            await is_active(pair)
            await refused(client, right, "when postcopy is paused")
        await all_ends_well(pair, driver)


async def knock(channel: Channel) -> None:
    """Connects to the migration's address and resets, again and again."""
    port = int(channel.target_uri.rpartition(":")[2])
    while True:
        with contextlib.suppress(OSError):
            connection = await trio.open_tcp_stream("127.0.0.1", port)
            linger = struct.pack("ii", 1, 0)
            connection.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, linger)
            connection.socket.close()
        await trio.sleep(0.01)


async def test_connections_that_are_reset_at_once_harm_nothing(tmp_path: Path) -> None:
    async with fronted(tmp_path) as (pair, channel, driver):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(knock, channel)
            await begin_postcopy(pair, channel, driver)
            await trio.sleep(0.3)
            since = len(pair.destination.qmp.events)
            await channel.reset()
            with trio.fail_after(40):
                await pair.destination.qmp.wait_migration("postcopy-active", since=since)
            nursery.cancel_scope.cancel()
        for process in driver.processes:
            process.must_run()
        await all_ends_well(pair, driver)


async def test_a_qemu_killed_before_the_migration_is_followed_by_the_next(tmp_path: Path) -> None:
    async with fronted(tmp_path) as (pair, channel, driver):
        await driver.destination.execute("migrate-incoming", {"uri": channel.target_uri})
        async with new_destination(pair, tmp_path) as (destination, client):
            driver.processes[1].must_run()
            await bare.start_postcopy(driver.source, client, channel, bandwidth=1 << 20)
            await all_ends_well(Pair(pair.source, destination), driver)


@pytest.mark.skipif("qemu-10" not in BINARIES, reason="run 'make qemus' first")
async def test_a_clients_resume_in_our_own_handshake_is_qemus_to_refuse(tmp_path: Path) -> None:
    """On 10.0: before 8.2 refault has no handshake begun until the other side has answered."""
    async with fronted(tmp_path, binary="qemu-10") as (pair, channel, driver):
        await begin_postcopy(pair, channel, driver)
        driver.processes[1].signal(signal.SIGSTOP)
        await channel.reset()
        with trio.fail_after(20):
            await bare.wait_status(pair.source.qmp, "postcopy-recover", "postcopy-recover-setup")
            with pytest.raises(QmpError, match="no paused migration"):
                await driver.source.execute("migrate", {"uri": channel.uri, "resume": True})
        driver.processes[1].signal(signal.SIGCONT)
        await is_active(pair)
        pair.destination.process.must_run()
        await told(driver, lambda vms: [vm.migration.relay for vm in vms] == ["tracking", "tracking"])
        await all_ends_well(pair, driver)


async def told_by(path: Path) -> VmStatus:
    """What one refault says, where the other stands still."""
    return (await trio.to_thread.run_sync(control.query, path, 20.0)).vms[0]


async def test_a_source_that_waits_for_an_answer_makes_way_for_a_clients_resume(tmp_path: Path) -> None:
    async with fronted(tmp_path) as (pair, channel, driver):
        await begin_postcopy(pair, channel, driver)
        driver.processes[1].signal(signal.SIGSTOP)
        await channel.reset()
        with trio.fail_after(40):
            while (await told_by(driver.controls[0])).recovery.attempts == 0:
                await trio.sleep(0.02)
            await trio.sleep(SETTLES)
            assert await bare.migration_status(pair.source.qmp) == "postcopy-paused"
            await driver.source.execute("migrate", {"uri": channel.uri, "resume": True})
        driver.processes[1].signal(signal.SIGCONT)
        await is_active(pair)
        await all_ends_well(pair, driver)


async def accepts_and_says_nothing(listener: trio.SocketListener) -> trio.SocketStream:
    """Takes one connection, and what comes first on it."""
    connection = await listener.accept()
    await connection.receive_some(1)
    return connection


@pytest.mark.parametrize("end", [False, True], ids=["reset", "garbage"])
async def test_a_source_is_not_resumed_into_what_only_accepts(tmp_path: Path, end: bool) -> None:
    """7.2 cannot leave a handshake in which the connection is lost: it must not begin there."""
    async with fronted(tmp_path) as (pair, channel, driver):
        await begin_postcopy(pair, channel, driver)
        port = int(channel.target_uri.rpartition(":")[2])
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener:
            await channel.retarget(listener.socket.getsockname()[1])
            await channel.reset()
            with trio.fail_after(40):
                connection = await accepts_and_says_nothing(listener)
            await trio.sleep(SETTLES)
            assert await bare.migration_status(pair.source.qmp) == "postcopy-paused"
            await channel.retarget(port)
            async with connection:
                if end:
                    await connection.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await is_active(pair)
        await all_ends_well(pair, driver)


async def test_a_bare_destination_answers_a_source_that_asks(tmp_path: Path) -> None:
    async with fronted(tmp_path) as (pair, channel, driver):
        await driver.processes[1].stop()
        destination = pair.destination.qmp
        await bare.start_postcopy(driver.source, destination, channel, bandwidth=1 << 20)
        since = len(destination.events)
        await channel.retarget()  # QEMU's first listener may be open, and does not survive being met
        await channel.reset()
        with trio.fail_after(40):
            await destination.wait_migration("postcopy-paused", since=since)
        await destination.execute("migrate-recover", {"uri": channel.target_uri}, oob=True)
        await is_active(pair)
        driver.processes = driver.processes[:1]
        await all_ends_well(pair, driver)


def held(driver: RefaultDriver) -> dict[str, list[str]]:
    """What each refault holds, by role and kind."""
    return {
        f"{role} {kind}": [
            name for entry in Path(f"/proc/{process.pid}/{kind}").iterdir() if (name := what(entry))
        ]
        for role, process in zip(("source", "destination"), driver.processes, strict=True)
        for kind in ("fd", "task")
    }


def what(entry: Path) -> str | None:
    """A descriptor, or a thread, as /proc names it; None where it has gone meanwhile."""
    try:
        return str(entry.readlink()) if entry.is_symlink() else (entry / "comm").read_text()
    except OSError:
        return None


def socket_directories(directory: Path) -> list[Path]:
    """Those in which a refault keeps local legs that are unix sockets."""
    return list(directory.glob("*.state/*.legs"))


@pytest.mark.parametrize("further", [(), ("postcopy-preempt",)])
async def test_migrations_in_a_row_leave_nothing_behind(tmp_path: Path, further: tuple[str, ...]) -> None:
    capabilities = (*bare.CAPABILITIES, *further)
    async with fronted(tmp_path) as (pair, channel, driver), contextlib.AsyncExitStack() as stack:
        destination, client = pair.destination, driver.destination
        first: dict[str, list[str]] = {}
        for _ in range(3):
            await bare.set_capabilities(driver.source, *capabilities)
            await bare.set_capabilities(client, *capabilities)
            await driver.source.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
            await client.execute("migrate-incoming", {"uri": channel.target_uri})
            await channel.wait_open()
            await driver.source.execute("migrate", {"uri": channel.uri})
            with trio.fail_after(40):
                await bare.wait_status(driver.source, "active")
                await driver.source.execute("migrate_cancel")
                # 7.2 shuts the channel down before it notes the cancellation (migrate_fd_cancel).
                await bare.wait_status(driver.source, "cancelled", "failed")
            pair = Pair(pair.source, destination)
            destination, client = await stack.enter_async_context(new_destination(pair, tmp_path))
            await trio.sleep(SETTLES)
            with trio.fail_after(40):  # then all is held by which QEMU keeps clients' connections
                while [status.clients.kept for status in await driver.statuses()] != [True, True]:
                    await trio.sleep(0.05)
            first = first or held(driver)
            with trio.move_on_after(THREADS_END):  # a loaded machine settles late
                while socket_directories(tmp_path) or any(
                    len(now) > len(first[kind]) for kind, now in held(driver).items()
                ):
                    await trio.sleep(0.1)
            for kind, now in held(driver).items():
                assert len(now) <= len(first[kind]), (kind, first[kind], now)
            assert not socket_directories(tmp_path)
        await bare.start_postcopy(
            driver.source, client, channel, bandwidth=1 << 20, capabilities=capabilities
        )
        await all_ends_well(Pair(pair.source, destination), driver)
