"""The destination's ends: none on which QEMU may listen is closed, whatever becomes of the commands."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from refault.daemon.far import listen
from refault.daemon.far.dial import connect
from refault.daemon.far.listen import FarListener
from refault.daemon.known.vm_state import VmState
from refault.daemon.migration import Migration
from refault.daemon.monitor.monitor import (
    Answer,
    Forward,
    Monitor,
    MonitorLost,
    QemuInfo,
    QmpError,
    WatchedCommand,
)
from refault.daemon.near.local_unix import QemuListens
from refault.daemon.record.state_file import MigrationRecord, StateFile
from refault.daemon.roles.destination import Destination
from refault.daemon.roles.destination_lanes import Gathered
from refault.migration.endpoint import Inet
from refault.migration.messages import MultifdInit, multifd_init
from refault.migration.relayable import Lanes

INCOMING = WatchedCommand("migrate-incoming", False, {"uri": "tcp:127.0.0.1:0"}, None, 1)
RECOVER = WatchedCommand("migrate-recover", True, {"uri": "tcp:127.0.0.1:0"}, None, 1)


class Qemu:
    """A monitor that keeps the descriptors it is given, while it answers."""

    name = "vm1"
    qemu = QemuInfo(1, 0, "7.2.0", (7, 2, 0), "", True)

    def __init__(self) -> None:
        self.answers = True
        self.unanswered: Exception | None = None
        """What becomes of a migrate-recover that it does not answer."""
        self.refuses: str | None = None
        self.recovers: list[str] = []
        self.ends: dict[str, socket.socket] = {}

    async def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, fd: int | None = None, **_: object
    ) -> object:
        if not self.answers:
            raise MonitorLost("the monitor was lost")
        if command == "chardev-add":
            raise QmpError("GenericError", "Failed to bind socket: Permission denied")
        if command == "query-uuid":
            return {"UUID": "00000000-0000-0000-0000-000000000000"}
        if command == "migrate-recover":
            assert arguments is not None
            self.recovers.append(arguments["uri"])
            if self.unanswered is not None:
                raise self.unanswered
            if self.refuses is not None:
                raise QmpError("GenericError", self.refuses)
        if fd is not None:
            assert arguments is not None
            self.ends[arguments["fdname"]] = socket.socket(fileno=os.dup(fd))
        return {}

    def sees_an_end(self, name: str) -> bool:
        self.ends[name].setblocking(False)
        try:
            return self.ends[name].recv(1) == b""
        except BlockingIOError:
            return False


@asynccontextmanager
async def destination(
    directory: Path,
    endpoint: Inet | None = None,
    recover_uris: Sequence[str] = (),
    met: MigrationRecord | None = None,
) -> AsyncIterator[tuple[Qemu, VmState, Destination]]:
    qemu = Qemu()
    vm = VmState(
        "vm",
        cast(Monitor, qemu),
        relay_allowed=True,
        recover_uris=recover_uris,
        state_file=StateFile(directory, "vm"),
    )
    migration = Migration(vm, Destination, endpoint)
    migration.begin(None, met)
    procedure = migration.procedure
    assert isinstance(procedure, Destination)
    try:
        yield qemu, vm, procedure
    finally:
        qemu.answers = True
        await procedure.clean_up()
        await vm.let_go_all()
        migration.close()
        for end in qemu.ends.values():
            end.close()


async def recover_by_hand(qemu: Qemu, procedure: Destination) -> tuple[str, Forward]:
    """A client's migrate-recover, and the name of QEMU's end that it is sent to QEMU with."""
    procedure._migration.accepted()
    await procedure._doors._deposits.fill(cast(Monitor, qemu))
    forward = await procedure.migrate_recover(RECOVER)
    assert isinstance(forward, Forward)
    assert forward.arguments is not None
    return str(forward.arguments["uri"]).removeprefix("fd:"), forward


async def answers(endpoint: Inet) -> None:
    """Waits until somebody listens there; the deadline is the caller's."""
    while True:
        with contextlib.suppress(OSError):
            (await connect(endpoint, 5)).close()
            return
        await trio.sleep(0.001)


async def test_a_clients_recover_whose_reply_never_comes(tmp_path: Path) -> None:
    async with destination(tmp_path) as (qemu, _, procedure):
        name, forward = await recover_by_hand(qemu, procedure)
        del forward
        gc.collect()
        assert not qemu.sees_an_end(name)


async def test_an_end_that_qemu_does_not_take_back_stays_open_until_it_does(tmp_path: Path) -> None:
    async with destination(tmp_path) as (qemu, vm, procedure):
        name, forward = await recover_by_hand(qemu, procedure)
        assert forward.on_reply is not None
        forward.on_reply(b'{"return": {}}')
        qemu.answers = False
        await procedure.clean_up()
        gc.collect()
        assert not qemu.sees_an_end(name)
        assert not await vm.let_go_all()
        qemu.answers = True
        assert await vm.let_go_all()
        assert not qemu.sees_an_end(name)


UNANSWERED = pytest.mark.parametrize("why", [MonitorLost("the monitor was lost"), trio.TooSlowError()])


async def lost_in_a_recover(qemu: Qemu, procedure: Destination, why: Exception) -> None:
    qemu.unanswered = why
    with pytest.raises(type(why)):
        await procedure.attempt()
    qemu.unanswered = None
    assert procedure._doors.open is None, "a source would be let in to a QEMU that may not wait there"


@UNANSWERED
async def test_nobody_is_let_in_to_a_qemu_that_has_not_answered_until_it_is_heard_of(
    tmp_path: Path, why: Exception
) -> None:
    async with destination(tmp_path, Inet("127.0.0.1", 0)) as (qemu, _, procedure):
        await lost_in_a_recover(qemu, procedure, why)
        qemu.refuses = "Migrate recovery is triggered already"
        await procedure.attempt()
        assert procedure._doors.open is not None
        assert {procedure._doors.open.uri} == set(qemu.recovers)


async def test_a_qemu_that_refuses_too_late_is_told_again(tmp_path: Path) -> None:
    """It had not paused when it read the command."""
    async with destination(tmp_path, Inet("127.0.0.1", 0)) as (qemu, _, procedure):
        await lost_in_a_recover(qemu, procedure, trio.TooSlowError())
        await procedure.attempt()
        first, again = qemu.recovers
        assert first == again
        assert procedure._doors.open is not None


@UNANSWERED
async def test_a_door_of_which_qemu_knows_nothing_after_all_is_kept_and_another_taken(
    tmp_path: Path, why: Exception
) -> None:
    async with destination(tmp_path, Inet("127.0.0.1", 0)) as (qemu, _, procedure):
        await lost_in_a_recover(qemu, procedure, why)
        qemu.refuses = "File descriptor named 'refault' has not been found"
        with pytest.raises(QmpError):
            await procedure.attempt()
        qemu.refuses = None
        await procedure.attempt()
        first, again, other = qemu.recovers
        assert first == again != other
        assert not qemu.sees_an_end(first.removeprefix("fd:"))


async def test_the_alternatives_are_bound_with_the_address_as_far_as_they_can_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    taken = await FarListener.bind(Inet("127.0.0.1", 0))
    free = await FarListener.bind(Inet("127.0.0.1", 0))
    free.close()
    uris = [taken.endpoint.uri, "unix:/run/r", free.endpoint.uri]
    async with destination(tmp_path, Inet("127.0.0.1", 0), uris) as (_, vm, procedure):
        async with trio.open_nursery() as nursery:
            await nursery.start(vm.run)
            assert await procedure.set_up(INCOMING) == Answer(value={})
            with trio.fail_after(9):
                await answers(free.endpoint)
            nursery.cancel_scope.cancel()
        show = procedure.show_address()
        assert show is not None
        assert show(b'{"return": {}}').count(b'"port"') == 1  # what the client asked for, and nothing else
    told = [record.getMessage() for record in caplog.records]
    assert [
        uri for uri in uris if any(f"cannot listen at --recover-uri {uri}" in line for line in told)
    ] == uris[:2]
    taken.close()
    (await FarListener.bind(free.endpoint)).close()  # free again when the migration has ended


async def test_a_name_that_takes_long_to_be_found_keeps_no_recovery_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up, asked = listen.look_up, []

    async def slow(endpoint: Inet) -> list[listen.Where]:
        if endpoint.host == "slow":
            asked.append(endpoint)
            await trio.sleep_forever()
        return await look_up(endpoint)

    monkeypatch.setattr(listen, "look_up", slow)
    async with (
        destination(tmp_path, Inet("127.0.0.1", 0), ["tcp:slow:1"]) as (_, vm, procedure),
        trio.open_nursery() as nursery,
    ):
        await nursery.start(vm.run)
        with trio.fail_after(9):
            assert await procedure.set_up(INCOMING) == Answer(value={})
            for _ in range(2):
                await procedure.attempt()
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert len(asked) == 1  # one look-up that is under way is enough


async def test_a_clients_recover_for_which_nothing_was_laid_ahead(tmp_path: Path) -> None:
    """As right after a restart of refault. QEMU cannot listen there itself: refault has the address."""
    async with destination(tmp_path) as (qemu, _, procedure):
        procedure._migration.accepted()
        forward = await procedure.migrate_recover(RECOVER)
        assert isinstance(forward, Forward)
        assert forward.arguments is not None
        assert str(forward.arguments["uri"]).removeprefix("fd:") in qemu.ends


async def test_a_recover_without_a_migration_is_left_to_qemu(tmp_path: Path) -> None:
    async with destination(tmp_path) as (_, _, procedure):
        assert await procedure.migrate_recover(RECOVER) == Forward()
        assert not procedure._addresses.shown()


async def test_where_a_client_recovered_the_next_refault_listens_too(tmp_path: Path) -> None:
    free = await FarListener.bind(Inet("127.0.0.1", 0))
    free.close()
    command = WatchedCommand("migrate-recover", True, {"uri": free.endpoint.uri}, None, 1)
    async with destination(tmp_path, Inet("127.0.0.1", 0)) as (_, vm, procedure):
        vm.qemu_threads = (41,)  # its process is not known
        procedure._migration.accepted()
        forward = await procedure.migrate_recover(command)
        assert isinstance(forward, Forward)
        assert forward.on_reply is not None
        with pytest.raises(OSError, match="refused"):
            await connect(free.endpoint, 5)  # QEMU has not taken the command
        forward.on_reply(b'{"return": {}}')
        record = vm.state_file.load(None, vm.qemu_threads)
    assert record is not None
    async with (
        destination(tmp_path, Inet("127.0.0.1", 0), met=record) as (_, vm, procedure),
        trio.open_nursery() as nursery,
    ):
        await nursery.start(vm.run)
        await procedure.adopt(Inet("127.0.0.1", 0))
        with trio.fail_after(9):
            await answers(free.endpoint)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("recovered", [False, True])
async def test_a_door_stays_open_where_descriptors_are_short_for_who_comes(
    tmp_path: Path, recovered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async with destination(tmp_path, Inet("127.0.0.1", 0)) as (qemu, _, procedure):
        await procedure.set_up(INCOMING)
        channels = procedure._migration.channels
        assert channels is not None
        if recovered:
            await procedure.attempt()
        monkeypatch.setattr(channels.kept, "begin", short)
        offer = procedure._arrivals._wait_in_line if recovered else procedure._arrivals._begin
        for _ in range(2):
            with trio.socket.from_stdlib_socket(socket.create_server(("127.0.0.1", 0))) as listening:
                there = await trio.open_tcp_stream(*listening.getsockname())
                here, _ = await listening.accept()
            procedure._arrivals._gathering._room.enter(here)
            with trio.fail_after(2), pytest.raises(OSError, match="Too many"):
                await offer(here)
            await there.aclose()
            here.close()
        gc.collect()
        assert not any(qemu.sees_an_end(name) for name in qemu.ends)


async def test_a_door_through_which_a_part_of_a_channel_came_is_not_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU 7.2 is killed by the next channel there."""
    async with destination(tmp_path, Inet("127.0.0.1", 0)) as (_, _, procedure):
        channels = procedure._migration.channels
        assert channels is not None

        async def half(*_: object, **__: object) -> bool:
            procedure._course.joined()
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(procedure._arrivals._gathering, "connect", half)
        procedure._doors.open = QemuListens("there")
        with socket.create_server(("127.0.0.1", 0)) as listening:
            there = socket.create_connection(listening.getsockname())
            here, _ = listening.accept()
        with there, trio.socket.from_stdlib_socket(here) as connection:
            procedure._arrivals._gathering._room.enter(connection)
            with pytest.raises(OSError, match="many"):
                await procedure._arrivals._wait_in_line(connection)
        assert procedure._doors.open is None


async def test_a_multifd_channel_that_stays_alone_is_not_kept(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with destination(tmp_path, Inet("127.0.0.1", 0)) as (_, _, procedure):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            there = socket.create_connection(listening.getsockname())
            here, _ = listening.accept()
        with there, trio.socket.from_stdlib_socket(here) as connection, trio.fail_after(60):
            procedure._arrivals._gathering._room.enter(connection)
            there.sendall(bytes.fromhex("11223344 00000001") + bytes(56))
            await procedure._arrivals._gathering.offer_multifd(connection)


class Comers:
    """Connections that come to a destination, in a room of its own."""

    def __init__(self, procedure: Destination) -> None:
        self._gathering = procedure._arrivals._gathering
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._there = [self._listening]
        self._came: list[trio.socket.SocketType] = []

    def come(self, says: bytes, *, ends: bool = False) -> trio.socket.SocketType:
        there = socket.create_connection(self._listening.getsockname())
        here = trio.socket.from_stdlib_socket(self._listening.accept()[0])
        self._came.append(here)
        self._gathering._room.enter(here)
        there.sendall(says)
        if ends:
            there.close()
        self._there.append(there)
        return here

    def multifd(self, number: int, *, uuid: bytes = bytes(16), ends: bool = False) -> trio.socket.SocketType:
        return self.come(struct.pack(">II16sB39x", 0x11223344, 1, uuid, number), ends=ends)

    def close(self) -> None:
        for there in self._there:
            there.close()
        for here in self._came:
            here.close()


async def test_a_source_that_has_sent_all_before_its_channel_was_gathered(tmp_path: Path) -> None:
    async with destination(tmp_path, Inet("127.0.0.1", 0)) as (_, _, procedure):
        procedure._course.has(Lanes(multifd=2))
        gathering = procedure._arrivals._gathering
        with contextlib.closing(Comers(procedure)) as comers, trio.fail_after(9):
            async with trio.open_nursery() as nursery:
                main = comers.come(b"QEVM", ends=True)
                for connection in (
                    comers.multifd(0, ends=True),
                    comers.multifd(0, uuid=b"another VM".ljust(16)),
                    comers.multifd(1, ends=True),
                ):
                    nursery.start_soon(gathering.offer_multifd, connection)
                gathered = await gathering.gather(main, recovered=False)
                nursery.cancel_scope.cancel()
            assert gathered is not None
            told = [multifd_init(await other.recv(64)) for other in gathered.others]
            assert told == [MultifdInit(bytes(16), number) for number in range(2)]
            gathered.close()


async def test_a_peer_that_begins_anew_is_waited_for_no_longer_where_it_began_before(tmp_path: Path) -> None:
    async with destination(tmp_path, Inet("127.0.0.1", 0)) as (_, _, procedure):
        procedure._course.has(Lanes(multifd=1))
        gathering = procedure._arrivals._gathering
        gathered: dict[str, object] = {}

        async def gather(name: str, main: trio.socket.SocketType) -> None:
            gathered[name] = await gathering.gather(main, recovered=False)

        with contextlib.closing(Comers(procedure)) as comers, trio.fail_after(9):
            async with trio.open_nursery() as nursery:
                first = comers.come(b"QEVM", ends=True)
                nursery.start_soon(gather, "first", first)
                await trio.testing.wait_all_tasks_blocked()
                second = comers.come(b"QEVM")
                nursery.start_soon(gather, "second", second)
                while "first" not in gathered:
                    await trio.sleep(0.01)
                nursery.start_soon(gathering.offer_multifd, comers.multifd(0))
        assert gathered["first"] is None
        second_gathered = gathered["second"]
        assert isinstance(second_gathered, Gathered)
        second_gathered.close()
