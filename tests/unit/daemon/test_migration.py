"""What a migration writes down for the next refault."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from tests.unit.daemon.record.test_session_file import ABOUT

from refault.daemon.kernel.process import process_started
from refault.daemon.known.counters import Counters
from refault.daemon.known.patience import Patience
from refault.daemon.migration import Migration
from refault.daemon.monitor.monitor import Forward, WatchedCommand
from refault.daemon.near.handed_leg import identity_of
from refault.daemon.record.state_file import StateFile
from refault.daemon.roles.destination import Destination
from refault.daemon.roles.source import Source
from refault.migration.endpoint import Inet
from refault.migration.phase import Role
from refault.migration.recovery import Event, State


class NoRole:
    """A source that does nothing."""

    role = Role.SOURCE
    laid: tuple[str, ...] = ()

    def __init__(self, migration: Migration) -> None: ...

    def takes_leg(self, *, goes_on: bool) -> None: ...


@pytest.fixture
def migration(tmp_path: Path) -> Migration:
    """One that this process's own QEMU, so to say, has accepted."""
    vm = SimpleNamespace(
        name="vm",
        counters=Counters(),
        alternatives=[],
        patience=Patience(),
        monitor=SimpleNamespace(qemu=SimpleNamespace(pid=os.getpid())),
        qemu_pid=os.getpid(),
        qemu_started=process_started(os.getpid()),
        version=(7, 2, 0),
        qemu_threads=(),
        state_file=StateFile(tmp_path, "vm"),
        start_soon=lambda *_: None,
    )
    made = Migration(cast(Any, vm), cast(Any, NoRole), Inet("h", 1))
    made.begin("it is not relayed")
    made.accepted()
    return made


def test_that_postcopy_has_begun_is_on_record_though_the_monitor_is_lost(migration: Migration) -> None:
    migration.course.vm.monitor.qemu = None
    migration.course.on_status("postcopy-active")
    record = migration.course.vm.state_file.load(os.getpid())
    assert record is not None
    assert record.postcopy


def test_which_session_its_channel_was_is_on_record(migration: Migration, tmp_path: Path) -> None:
    session = bytes(range(240, 256))
    migration.course.session_began(session)
    record = StateFile(tmp_path, "vm").load(os.getpid())
    assert record is not None
    again = Migration(cast(Any, migration.course.vm), cast(Any, NoRole), Inet("h", 1))
    again.begin("it is not relayed", met=record)
    assert again.course.session == session


async def test_what_was_left_of_a_channel_is_good_for_one_refault_though_it_cannot_be_removed(
    migration: Migration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who counts it as lost may do with the leg what makes it another one."""
    ours, qemu = socket.socketpair()
    leg = identity_of(ours)
    migration.course.remember()
    state = StateFile(tmp_path, "vm")
    record = state.load(os.getpid())
    assert record is not None
    record = msgspec.structs.replace(record, relayed=True, leg=leg, handed="first")
    state.save(record)
    about = msgspec.structs.replace(ABOUT, generation=record.generation, leg=leg[1])
    with state.session.reserved(4096) as write:
        write(about, b"channel")

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "it is immutable")

    with monkeypatch.context() as odd:
        odd.setattr(Path, "unlink", fails)
        assert state.session.take(record.generation, leg[1], record.handed) is None
    second = Migration(cast(Any, migration.course.vm), cast(Any, NoRole), Inet("h", 1))
    second.begin(None, met=record)
    with qemu:
        second.go_on(ours, None)
        again = state.load(os.getpid())
        assert again is not None
        assert again.leg == leg
        assert state.session.take(again.generation, leg[1], again.handed) is None
        second.close()


def test_what_lies_with_qemu_for_recoveries_is_not_on_record(
    migration: Migration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU may have been told of it when refault is killed, and must never see an end of what it was told of:
    from the record it would be closed behind the next planned restart."""
    monkeypatch.setattr(NoRole, "laid", ("laid",))
    migration.course.remember()
    record = StateFile(tmp_path, "vm").load(os.getpid())
    assert record is not None
    assert record.kept == ()


def test_what_has_ended_writes_nothing_down(migration: Migration) -> None:
    migration.course.feed(Event.FAILED)
    migration.course.remember()
    assert migration.course.vm.state_file.load(os.getpid()) is None


@pytest.mark.parametrize("role", [Source, Destination])
async def test_without_a_relay_the_next_recovery_goes_where_a_client_recovered(
    migration: Migration, role: type[Source] | type[Destination]
) -> None:
    migration.procedure = procedure = role(migration)
    for uri, taken in (("unix:/run/new", True), ("unix:/run/refused", False), ("fd:once", True)):
        command = WatchedCommand("", False, {"uri": uri}, None, 1)
        if isinstance(procedure, Source):
            verdict = await procedure.client_resumes(command)
        else:
            verdict = await procedure.migrate_recover(command)
        assert isinstance(verdict, Forward)
        assert verdict.on_reply is not None
        verdict.on_reply(b'{"return": {}}' if taken else b'{"error": {}}')
    assert [endpoint.uri for endpoint in migration.course.addresses.order()] == ["unix:/run/new"]
    record = migration.course.vm.state_file.load(os.getpid())
    assert record is not None
    assert record.uri == "unix:/run/new"


async def test_a_recovery_that_refault_gave_up_and_qemu_did_not_is_one(migration: Migration) -> None:
    """As where QEMU 7.2 goes on to wait for the source: no further attempt is taken, and none is needed."""
    for event in (Event.PAUSED, Event.ISSUED, Event.ATTEMPT_FAILED):
        migration.course.feed(event)
    migration.course.on_status("postcopy-recover")
    migration.course.on_status("postcopy-active")
    assert migration.course.policy.state is State.RUNNING
    assert migration.course.counters.recoveries == 1


def test_a_record_that_cannot_be_removed_stands_in_nobodys_way(
    migration: Migration, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    assert migration.course.vm.state_file.load(1) is None  # the record of another QEMU
    migration.course.feed(Event.FAILED)
    assert migration.course.policy.state is State.ENDED


@pytest.mark.parametrize("loss", [Event.CHANNEL_LOST, Event.PAUSED])
async def test_a_loss_that_is_seen_before_the_answer_to_a_clients_pause_is_the_clients(
    migration: Migration, loss: Event
) -> None:
    """Else a recovery is begun that its answer then cancels, when QEMU has the command already."""
    migration.course.client_pauses = True
    migration.course.feed(loss)
    states = [migration.course.policy.state]
    migration.course.feed(Event.RESUME_ACKNOWLEDGED)  # of another channel than that which was paused
    states.append(migration.course.policy.state)
    migration.course.feed(loss)  # the pause has been answered for
    states.append(migration.course.policy.state)
    assert states[:2] == [State.YIELDED, State.RUNNING]
    assert states[2] is not State.YIELDED
