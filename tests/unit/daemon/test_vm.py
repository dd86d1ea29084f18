"""Which migrations a VM's refault takes care of, whoever set them up and whatever comes between."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing
from tests.support.hidden import hidden

from refault.daemon import meeting
from refault.daemon import migration as migration_module
from refault.daemon.kernel import process
from refault.daemon.kernel.process import process_started
from refault.daemon.known.patience import Patience
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.monitor import (
    Answer,
    Counters,
    Forward,
    Monitor,
    MonitorLost,
    QemuInfo,
    QmpError,
    WatchedCommand,
)
from refault.daemon.near.local_unix import PrivateSockets
from refault.daemon.options import VmOptions
from refault.daemon.record.state_file import MigrationRecord, StateFile
from refault.daemon.telling.picture import picture
from refault.daemon.vm import Vm
from refault.migration.endpoint import Inet
from refault.migration.legs import RULES, SENT_ALL, UNTIL_LOADED
from refault.migration.phase import Phase, Role
from refault.migration.recovery import Event, State

OK = b'{"return": {}}'
GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""},'
    b' "capabilities": ["oob"]}}\r\n'
)
REFUSED = b'{"error": {"class": "GenericError", "desc": "no"}}'


class Qemu:
    """A monitor whose QEMU says what it is told to."""

    def __init__(self, pid: int | None) -> None:
        self.qemu = QemuInfo(pid, 0, "10.0.0", (10, 0, 0), "", True)
        self.asked: list[str] = []
        self.says: dict[str, object] = {"query-migrate-capabilities": []}
        self.hides: list[bool | None] = []

    def hide_pauses(self, may: bool | None, _: str) -> None:
        self.hides.append(may)

    async def execute(self, command: str, arguments: Any = None, **_: object) -> object:
        await trio.lowlevel.checkpoint()
        self.asked.append(command)
        if command == "chardev-add":
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(arguments["backend"]["data"]["addr"]["data"]["path"])
        said = self.says.get(command, {})
        if isinstance(said, Exception):
            raise said
        return said


@asynccontextmanager
async def fronted(directory: Path, pid: int | None = os.getpid()) -> AsyncIterator[tuple[Qemu, Vm]]:
    address = Address(str(directory / "qemu"))
    vm = Vm(VmOptions(name="vm", qemu=address, listen=(address,), state_dir=directory))
    qemu = Qemu(pid)
    vm.monitor = vm.state.monitor = cast(Monitor, qemu)
    async with trio.open_nursery() as nursery:
        await nursery.start(vm.state.run)
        await vm._on_connect(qemu.qemu)
        await trio.testing.wait_all_tasks_blocked()
        yield qemu, vm
        if vm.migration is not None:
            vm.migration.close()
        nursery.cancel_scope.cancel()


def migrate(uri: str) -> WatchedCommand:
    return WatchedCommand("migrate", False, {"uri": uri}, None, 1)


def answer(verdict: object, reply: bytes) -> None:
    assert isinstance(verdict, Forward)
    assert verdict.on_reply is not None
    verdict.on_reply(reply)


async def test_one_does_not_leave_before_a_source_is_told_what_became_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its QEMU has ended, so it is wanted no more."""
    async with fronted(tmp_path) as (_, vm):
        for tells in (True, False):
            channels = SimpleNamespace(tells=tells, delivers=False)
            migration = SimpleNamespace(channels=channels, cost_of_stopping=lambda: None)
            with monkeypatch.context() as patch:
                patch.setattr(Vm, "migration", migration)
                assert vm.may_leave is not tells


@pytest.mark.parametrize("relayed", [True, False])
async def test_whether_it_is_relayed_is_said_of_a_migration_and_not_of_what_qemu_refuses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, relayed: bool
) -> None:
    def said() -> int:
        return sum("relaying as" in text or "not relayed" in text for text in caplog.messages)

    caplog.set_level("INFO")
    with socket.create_server(("127.0.0.1", 0)) as far:
        async with fronted(tmp_path) as (_, vm):
            uri = f"tcp:127.0.0.1:{far.getsockname()[1]}" if relayed else "unix:/run/x"
            answer(await vm._migrate(migrate(uri)), REFUSED)
            assert said() == 0
            answer(await vm._migrate(migrate(uri)), OK)
            assert said() == 1


async def test_a_second_migrate_does_the_first_no_harm(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as far:
        uri = f"tcp:127.0.0.1:{far.getsockname()[1]}"
        async with fronted(tmp_path) as (qemu, vm):
            verdicts: list[Any] = []

            async def again() -> None:
                verdicts.append(await vm._migrate(migrate(uri)))

            first = await vm._migrate(migrate(uri))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(again)
                await trio.testing.wait_all_tasks_blocked(0.05)
                qemu.says["query-migrate"] = {"status": "active"}
                answer(first, OK)
            assert verdicts == [Forward()]  # QEMU says that one is under way
            assert vm.migration is not None
            assert vm.migration.channels is not None
            assert vm.migration.course.under_way
            assert await vm.state.record() is not None


async def test_a_migrate_from_before_the_monitor_was_lost_does_the_next_no_harm(tmp_path: Path) -> None:
    """Nobody answers it, and what comes later waits for no answer."""
    with socket.create_server(("127.0.0.1", 0)) as far:
        uri = f"tcp:127.0.0.1:{far.getsockname()[1]}"
        async with fronted(tmp_path) as (qemu, vm):
            lost: list[type[MonitorLost]] = []

            async def stale() -> None:
                with pytest.raises(MonitorLost) as raised:
                    await vm._migrate(migrate(uri))
                lost.append(raised.type)

            await vm._migrate(migrate(uri))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stale)
                await trio.testing.wait_all_tasks_blocked(0.05)
                vm._on_disconnect()
                qemu.qemu = QemuInfo(os.getpid(), 0, "10.0.0", (10, 0, 0), "", True)
                await vm._on_connect(qemu.qemu)
            with trio.fail_after(9):
                answer(await vm._migrate(migrate(uri)), OK)
            assert lost == [MonitorLost]


async def test_a_migrate_during_which_the_monitor_is_lost_does_the_next_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fronted(tmp_path) as (qemu, vm):
        answer(await vm._migrate(migrate("unix:/run/x")), OK)
        vm._on_event("MIGRATION", {"status": "failed"})
        execute = qemu.execute

        async def is_lost(command: str, *more: object, **named: Any) -> object:
            vm._on_disconnect()
            qemu.qemu = QemuInfo(os.getpid(), 0, "10.0.0", (10, 0, 0), "", True)
            return await execute(command, *more, **named)

        with monkeypatch.context() as patch:
            patch.setattr(qemu, "execute", is_lost)
            with pytest.raises(MonitorLost):
                await vm._migrate(migrate("unix:/run/x"))
        with trio.fail_after(9):
            answer(await vm._migrate(migrate("unix:/run/x")), OK)


async def test_a_migrate_that_goes_to_qemu_unwatched_delays_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError

    async with fronted(tmp_path) as (_, vm):
        with monkeypatch.context() as patch:
            patch.setattr(migration_module, "Relay", broken)
            with pytest.raises(RuntimeError):
                await vm._migrate(migrate("tcp:127.0.0.1:1"))
        with trio.fail_after(9):
            answer(await vm._migrate(migrate("unix:/run/x")), OK)


async def test_a_migrate_that_qemu_refuses_is_as_if_it_had_never_been(tmp_path: Path) -> None:
    """A bare QEMU that listens there ends with a connection on which nothing comes; and what the migration
    before has left is not touched."""
    with socket.create_server(("127.0.0.1", 0)) as far:
        far.setblocking(False)
        uri = f"tcp:127.0.0.1:{far.getsockname()[1]}"
        async with fronted(tmp_path) as (_, vm):
            answer(await vm._migrate(migrate("unix:/run/x")), OK)
            before = vm.migration
            vm._on_event("MIGRATION", {"status": "completed"})
            answer(await vm._migrate(migrate(uri)), REFUSED)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert vm.migration is before
            assert not vm.state.sockets.directory.exists()
            answer(await vm._migrate(migrate("unix:/run/x")), OK)
            assert vm.migration is not before
        with pytest.raises(BlockingIOError):
            far.accept()


async def test_a_source_for_whose_lanes_no_socket_can_be_had_is_not_relayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_permitted(_: object) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr(PrivateSockets, "make", not_permitted)
    async with fronted(tmp_path) as (qemu, vm):
        qemu.says["query-migrate-capabilities"] = [{"capability": "postcopy-preempt", "state": True}]
        answer(await vm._migrate(migrate("tcp:127.0.0.1:1")), OK)
        assert vm.migration is not None
        assert vm.migration.course.under_way
        assert "not permitted" in str(vm.migration.relay_reason)


async def test_without_a_descriptor_to_spare_a_migration_is_not_relayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def none_left(_: object) -> bool:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("refault.daemon.known.vm_state.takes_descriptor", none_left)
    async with fronted(tmp_path) as (_, vm):
        answer(await vm._migrate(migrate("tcp:127.0.0.1:1")), OK)
        assert vm.migration is not None
        assert "Too many open files" in str(vm.migration.relay_reason)


async def test_a_resume_without_a_migration_does_not_reach_the_other_host(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as far:
        uri = f"tcp:127.0.0.1:{far.getsockname()[1]}"
        async with fronted(tmp_path) as (_, vm):
            answer(await vm._migrate(migrate(uri)), OK)
            with trio.fail_after(9):
                (await trio.to_thread.run_sync(far.accept))[0].close()
            vm._on_event("MIGRATION", {"status": "failed"})
            far.setblocking(False)
            command = WatchedCommand("migrate", False, {"uri": uri, "resume": True}, None, 1)
            assert await vm._migrate(command) == Forward()
        with pytest.raises(BlockingIOError):
            far.accept()


async def test_a_connection_for_an_unrelayed_recovery_outlasts_a_monitor_that_is_lost(tmp_path: Path) -> None:
    """QEMU 7.2 that listens for it is killed by a connection that ends."""
    with socket.create_server(("127.0.0.1", 0)) as far:
        async with fronted(tmp_path) as (qemu, vm):
            qemu.qemu = QemuInfo(os.getpid(), 0, "7.2.0", (7, 2, 0), "", True)
            answer(await vm._migrate(migrate(f"tcp:127.0.0.1:{far.getsockname()[1]},ipv4=on")), OK)
            assert vm.migration is not None
            vm.migration.course.addresses.moved(Inet("127.0.0.1", far.getsockname()[1]))
            qemu.says["query-migrate"] = {"status": "postcopy-paused"}
            assert await vm.state.takes_descriptors()
            qemu.says["getfd"] = MonitorLost("the monitor was lost")
            vm._on_event("MIGRATION", {"status": "postcopy-paused"})
            with trio.fail_after(9):
                while vm.state.counters.last_error is None:
                    await trio.sleep(0.01)
            there, _ = far.accept()
            there.setblocking(False)
            with pytest.raises(BlockingIOError):
                there.recv(1)
            there.close()


@pytest.mark.parametrize("relayed", [True, False])
async def test_an_attempt_that_is_cancelled_while_it_dials_makes_no_connection(
    tmp_path: Path, relayed: bool
) -> None:
    """As when refault ends: its monitor is gone then, and who listens may not survive the connection."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as far:
        where = far.getsockname()
        async with fronted(tmp_path) as (qemu, vm):
            qemu.qemu = QemuInfo(os.getpid(), 0, "7.2.0", (7, 2, 0), "", True)
            if not relayed:
                qemu.says["query-migrate-capabilities"] = [{"capability": "release-ram", "state": True}]
            answer(await vm._migrate(migrate(f"tcp:127.0.0.1:{where[1]}")), OK)
            assert vm.migration is not None
            assert (vm.migration.channels is not None) is relayed
            qemu.says["query-migrate"] = {"status": "postcopy-paused"}
            fillers = [socket.create_connection(where) for _ in range(1 - relayed)]  # the queue is full
            vm.migration.course.feed(Event.PAUSED)
            await trio.sleep(0.3)
            vm.migration.attempts.cancel()
            await trio.testing.wait_all_tasks_blocked()
            far.settimeout(0)
            for filler in (*fillers, far.accept()[0]):
                filler.close()
            await trio.sleep(1.2)  # a SYN that was still in the air would be sent again
            with pytest.raises(BlockingIOError):
                far.accept()


async def test_a_qemu_that_still_dials_is_not_told_again(tmp_path: Path) -> None:
    """By nobody, also where its monitor, on TCP, was lost meanwhile: 7.2 aborts when both get through."""
    async with fronted(tmp_path, pid=None) as (qemu, vm):
        qemu.qemu = QemuInfo(None, None, "7.2.0", (7, 2, 0), "", True)
        answer(await vm._migrate(migrate("tcp:127.0.0.1:1")), OK)
        qemu.says["query-migrate"] = {"status": "postcopy-paused"}
        vm._on_event("MIGRATION", {"status": "postcopy-paused"})
        await wait_for(qemu, "migrate")
        resume = WatchedCommand("migrate", False, {"uri": "tcp:127.0.0.1:2", "resume": True}, None, 1)
        assert isinstance(await vm._migrate(resume), Answer)
        paused, qemu.says["query-migrate"] = qemu.says["query-migrate"], MonitorLost("the monitor was lost")
        await trio.sleep(0.2)
        qemu.says["query-migrate"] = paused
        await trio.sleep(0.5)
        assert qemu.asked.count("migrate") == 1
        vm._on_event("MIGRATION", {"status": "postcopy-active"})
        vm._on_event("MIGRATION", {"status": "postcopy-paused"})
        await wait_for(qemu, "migrate", 2)


async def test_a_qemu_that_dials_at_a_clients_word_is_not_told_again(tmp_path: Path) -> None:
    async with fronted(tmp_path, pid=None) as (qemu, vm):
        vm.state.patience = Patience(client_wait=0.05)
        qemu.qemu = QemuInfo(None, None, "7.2.0", (7, 2, 0), "", True)
        answer(await vm._migrate(migrate("tcp:127.0.0.1:1")), OK)
        qemu.says["query-migrate"] = {"status": "postcopy-paused"}
        vm._on_event("MIGRATION", {"status": "postcopy-paused"})
        resume = WatchedCommand("migrate", False, {"uri": "tcp:127.0.0.1:2", "resume": True}, None, 1)
        answer(await vm._migrate(resume), OK)
        assert isinstance(await vm._migrate(resume), Answer)
        await trio.sleep(0.3)  # the client's time is over
        assert "migrate" not in qemu.asked


async def test_a_resume_that_qemu_refuses_is_made_again_at_once(tmp_path: Path) -> None:
    async with fronted(tmp_path, pid=None) as (qemu, vm):
        qemu.qemu = QemuInfo(None, None, "7.2.0", (7, 2, 0), "", True)
        answer(await vm._migrate(migrate("tcp:127.0.0.1:1")), OK)
        qemu.says["query-migrate"] = {"status": "postcopy-paused"}
        qemu.says["migrate"] = QmpError("GenericError", "no")
        vm._on_event("MIGRATION", {"status": "postcopy-paused"})
        await wait_for(qemu, "migrate", 2)


async def wait_for(qemu: Qemu, command: str, times: int = 1) -> None:
    with trio.fail_after(9):
        while qemu.asked.count(command) < times:
            await trio.sleep(0.01)


async def test_a_migration_for_which_no_relay_can_be_made_is_recovered_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object, **__: object) -> None:
        raise OSError("Too many open files")

    monkeypatch.setattr(migration_module, "Relay", short)
    async with fronted(tmp_path) as (_, vm):
        answer(await vm._migrate(migrate("tcp:127.0.0.1:1")), OK)
        assert vm.migration is not None
        assert vm.migration.course.under_way
        assert "Too many" in str(vm.migration.relay_reason)


@pytest.mark.parametrize("status", ["wait-unplug", "pre-switchover"])
async def test_a_source_is_met_wherever_it_is_before_postcopy(tmp_path: Path, status: str) -> None:
    async with fronted(tmp_path) as (qemu, vm):
        qemu.says["query-migrate"] = {"status": status, "ram": {}}
        await vm._on_connect(qemu.qemu)
        await trio.testing.wait_all_tasks_blocked()
        assert vm.migration is not None
        vm._on_event("MIGRATION", {"status": "postcopy-active"})
        vm._on_event("MIGRATION", {"status": "postcopy-paused"})
        assert vm.migration.course.policy.state is State.ATTEMPTING


def source_record(**facts: Any) -> MigrationRecord:
    """Of a relayed source whose QEMU is there."""
    return MigrationRecord(
        role=Role.SOURCE,
        uri="tcp:127.0.0.1:1",
        relayed=True,
        qemu_pid=os.getpid(),
        qemu_started=process_started(os.getpid()),
        **facts,
    )


@pytest.mark.parametrize(("kept", "told"), [(("kept",), 1), ((), 0)])
async def test_a_source_whose_leg_qemu_holds_in_precopy_since_an_earlier_refault_is_told_of(
    kept: tuple[str, ...], told: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """That refault was stopped when all had been sent. Nobody else says why the guest stands."""
    record = source_record(kept=kept)
    async with fronted(tmp_path) as (qemu, vm):
        qemu.says["query-migrate"] = {"status": "device", "ram": {}}
        StateFile(tmp_path, "vm").save(record)
        await vm._on_connect(qemu.qemu)
        await trio.testing.wait_all_tasks_blocked()
        assert caplog.text.count(SENT_ALL.effect) == told
        met = await vm.state.record()
        assert met is not None
        assert met.kept == kept, "for the next refault, and to be taken back at its end"
        vm._on_event("MIGRATION", {"status": "cancelled"})
        with trio.fail_after(9):
            while qemu.asked.count("closefd") < told:
                await trio.sleep(0.01)


async def test_a_source_whose_leg_qemu_holds_in_its_last_moments_is_held(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The refault that had it held was killed. It waits for good, which log and status say."""
    async with fronted(tmp_path) as (qemu, vm):
        vars(qemu).update(fronts=(), clients=0, clients_total=0, counters=Counters(), kept=(True, None))
        vars(qemu).update(pause_hidden_since=None)
        qemu.says["query-migrate"] = {"status": "postcopy-active", "ram": {"transferred": 1, "remaining": 0}}
        StateFile(tmp_path, "vm").save(source_record(postcopy=True, kept=("kept",)))
        await vm._on_connect(qemu.qemu)
        await trio.testing.wait_all_tasks_blocked()
        rule = RULES[Phase.COMPLETING, Role.SOURCE]
        assert (
            caplog.text.count(
                f"ALERT: QEMU holds its leg open since an earlier refault, for if it closed: {rule.effect}"
            )
            == 1
        )
        told = picture(vm).migration
        assert (told.phase, told.held) == (Phase.COMPLETING, f"completing: {rule.effect}")
        met = await vm.state.record()
        assert met is not None
        assert met.kept == ("kept",), "for the next refault"
        qemu.asked.clear()
        vm._on_event("MIGRATION", {"status": "failed"})
        with trio.fail_after(9):
            while "stop" not in qemu.asked:
                await trio.sleep(0.01)
        assert picture(vm).migration.held is None


async def test_a_leg_that_may_not_be_taken_out_of_qemu_delays_a_recovery_only_until_it_has_paused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was left there by a refault that might."""
    record = source_record(postcopy=True, leg=(1, b"cookie"))

    def take(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(meeting, "take", take)
    async with fronted(tmp_path) as (qemu, vm):
        qemu.says["query-migrate"] = {"status": "postcopy-active", "ram": {}}
        StateFile(tmp_path, "vm").save(record)
        await vm._on_connect(qemu.qemu)
        with trio.fail_after(9):
            while meeting.MAY_NOT_TAKE not in caplog.text:
                await trio.sleep(0.01)
            assert vm.migration is None
            qemu.says["query-migrate"] = {"status": "postcopy-paused", "ram": {}}
            while vm.migration is None or not vm.migration.course.under_way:
                await trio.sleep(0.01)


@pytest.mark.parametrize("is_source", [True, False])
async def test_what_was_begun_unseen_is_recovered(tmp_path: Path, is_source: bool) -> None:
    """By human-monitor-command, or by -incoming."""
    reply: Mapping[str, object] = {"ram": {}} if is_source else {}
    async with fronted(tmp_path) as (qemu, vm):
        for status in ("setup", "active", "postcopy-active", "postcopy-paused"):
            qemu.says["query-migrate"] = {**reply, "status": status}
            vm._on_event("MIGRATION", {"status": status})
            await trio.testing.wait_all_tasks_blocked()
        assert vm.migration is not None
        assert vm.state.counters.losses == 1
        assert vm.migration.course.role == ("source" if is_source else "destination")


async def test_a_vm_that_is_cancelled_while_its_qemu_is_there_ends_without_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = Address(str(tmp_path / "qemu"))
    listen = Address(str(tmp_path / "listen"), server=True)
    vm = Vm(VmOptions(name="vm", qemu=address, listen=(listen,), state_dir=tmp_path))

    async def qemu(listening: trio.socket.SocketType) -> None:
        connection, _ = await listening.accept()
        async with trio.SocketStream(connection) as stream:
            await stream.send_all(GREETING)
            with contextlib.suppress(trio.BrokenResourceError):
                async for data in stream:
                    for line in data.splitlines():
                        reply = {"return": {}, "id": msgspec.json.decode(line)["id"]}
                        await stream.send_all(msgspec.json.encode(reply) + b"\r\n")

    with trio.socket.socket(socket.AF_UNIX) as listening, trio.fail_after(9):
        await listening.bind(address.path)
        listening.listen(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qemu, listening)
            serving = await nursery.start(_serving, vm)
            while vm.monitor.qemu is None:
                await trio.sleep(0.001)
            serving.cancel()
            while vm.monitor.qemu is not None:
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
    assert [record.message for record in caplog.records if "internal error" in record.message] == []


async def _serving(vm: Vm, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            await nursery.start(vm.run)
            task_status.started(scope)


@pytest.mark.parametrize("knows", [True, False])
async def test_a_monitor_on_tcp_that_is_lost_for_a_moment_is_no_end(tmp_path: Path, knows: bool) -> None:
    async with fronted(tmp_path, pid=None) as (qemu, vm):
        answer(await vm._migrate(migrate("tcp:127.0.0.1:1")), OK)
        vm._on_disconnect()
        await trio.testing.wait_all_tasks_blocked()
        first = vm.migration
        assert first is not None
        assert first.course.under_way
        qemu.says["query-migrate"] = {"status": "postcopy-active", "ram": {}} if knows else {}
        await vm._on_connect(qemu.qemu)
        await trio.testing.wait_all_tasks_blocked()
        assert first.course.under_way is knows


async def test_a_qemu_that_may_not_be_looked_at_has_not_ended_with_its_monitor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """/proc hides it (hidepid=, ProtectProc=): what it may still listen on stays open."""
    hides = True
    monkeypatch.setattr(process, "_has_ended", lambda _: not hides)
    with hidden():
        async with fronted(tmp_path) as (qemu, vm):
            answer(await vm._migrate(migrate("tcp:127.0.0.1:1")), OK)
            assert vm.migration is not None
            vars(qemu)["qemu"] = None
            vm._on_disconnect()
            await trio.sleep(10)
            assert vm.migration.course.under_way
            assert vm.state.qemu_lives
            hides = False
            await trio.sleep(1)
            assert not vm.migration.course.under_way
            assert not vm.state.qemu_lives


@pytest.mark.parametrize("by_guest", [True, False])
async def test_a_guest_that_powers_off_is_not_the_end_of_its_qemu(tmp_path: Path, by_guest: bool) -> None:
    """With -no-shutdown."""
    async with fronted(tmp_path, pid=None) as (_, vm):
        answer(await vm._migrate(migrate("tcp:127.0.0.1:1")), OK)
        vm._on_event(
            "SHUTDOWN", {"guest": by_guest, "reason": "guest-shutdown" if by_guest else "host-qmp-quit"}
        )
        vm._on_disconnect()
        await trio.testing.wait_all_tasks_blocked()
        assert vm.migration is not None
        assert vm.migration.course.under_way is by_guest


async def test_a_clients_pause_that_is_never_answered_delays_no_recovery(tmp_path: Path) -> None:
    async with fronted(tmp_path) as (qemu, vm):
        answer(await vm._migrate(migrate("unix:/run/x")), OK)
        await vm._migrate_pause(WatchedCommand("migrate-pause", True, {}, None, 1))
        vm._on_disconnect()
        await vm._on_connect(qemu.qemu)
        vm._on_event("MIGRATION", {"status": "postcopy-paused"})
        assert vm.migration is not None
        assert vm.migration.course.policy.state is State.ATTEMPTING


@pytest.mark.parametrize("unknown", ["query-migrate", "query-status"])
async def test_a_qmp_server_that_knows_no_such_query_is_served_without_an_alarm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, unknown: str
) -> None:
    async with fronted(tmp_path) as (qemu, vm):
        qemu.says[unknown] = QmpError("CommandNotFound", f"The command {unknown} has not been found")
        qemu.asked.clear()
        await vm._on_connect(qemu.qemu)
        await trio.testing.wait_all_tasks_blocked()
        assert unknown in qemu.asked
        assert vm.migration is None
    assert caplog.messages == []


async def test_a_new_qemu_that_cannot_be_asked_is_not_at_the_last_ones_migration(tmp_path: Path) -> None:
    """Its process is not known, and it was started with --preconfig."""
    async with fronted(tmp_path, pid=None) as (qemu, vm):
        answer(await vm._migrate(migrate("tcp:127.0.0.1:1")), OK)
        assert vm.migration is not None
        vm._on_disconnect()
        qemu.says["query-migrate"] = QmpError("GenericError", "permitted only after machine initialization")
        await vm._on_connect(qemu.qemu)
        assert not vm.migration.course.under_way


async def test_a_leg_held_for_a_qemu_that_has_ended_is_held_no_more(tmp_path: Path) -> None:
    """Nor is it told; and nothing of it goes to the QEMU that is behind the monitor by now."""
    async with fronted(tmp_path) as (qemu, vm):
        vars(qemu).update(fronts=(), clients=0, clients_total=0, counters=Counters(), kept=(True, None))
        vars(qemu).update(pause_hidden_since=None)
        answer(await vm._migrate(migrate("tcp:127.0.0.1:1")), OK)
        assert vm.migration is not None
        assert vm.migration.channels is not None
        relay = vm.migration.channels.relay
        vm.migration.channels.hold(Phase.COMPLETING, UNTIL_LOADED)
        vm.state.counters.fail("no route")
        assert picture(vm).migration.held is not None
        qemu.asked.clear()
        vm._forget(vm.migration)
        told = picture(vm)
        assert (told.migration.held, told.migration.status, told.migration.role) == (None, None, "none")
        assert told.recovery.last_error is None
        with trio.fail_after(9):
            while not relay.closed:
                await trio.sleep(0.01)
        assert "getfd" not in qemu.asked
        assert await vm.state.record() is None


async def test_a_qemu_that_is_slow_to_say_which_it_is_loses_no_record(tmp_path: Path) -> None:
    """Behind TCP it is known by its threads, of which it is asked once it has answered."""
    record = MigrationRecord(
        role=Role.SOURCE,
        uri="tcp:127.0.0.1:1",
        relayed=True,
        qemu_pid=None,
        qemu_started=None,
        qemu_threads=(41,),
    )
    async with fronted(tmp_path, pid=None) as (qemu, vm):
        qemu.says["query-migrate"] = qemu.says["query-cpus-fast"] = trio.TooSlowError()
        StateFile(tmp_path, "vm").save(record)
        await vm._on_connect(qemu.qemu)
        await trio.testing.wait_all_tasks_blocked()
        assert StateFile(tmp_path, "vm").load(None, (41,)) == record
