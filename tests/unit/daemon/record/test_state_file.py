"""What is kept for the next refault, where its directory is not what it was."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from tests.support.hidden import hidden
from tests.support.until import descriptors_and_threads, until_nothing_is_left

from refault.channel.relay import Relay
from refault.channel.tracker import Kept, Restored, StateFds
from refault.daemon import migration as migration_module
from refault.daemon.kernel.process import process_started
from refault.daemon.known.counters import Counters
from refault.daemon.known.patience import Patience
from refault.daemon.migration import Migration
from refault.daemon.record.state_file import MigrationRecord, StateFile
from refault.migration.endpoint import Inet
from refault.migration.phase import Role

KEY = b"a key"
RECORD = MigrationRecord(role=Role.SOURCE, uri="tcp:h:1", relayed=True, qemu_pid=1, qemu_started=2)


def in_the_way(path: Path) -> None:
    """Nothing can be put in its place, nor can it be unlinked."""
    path.unlink(missing_ok=True)
    path.mkdir()


def replaced(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.touch()


HARMS: dict[str, Callable[[Path], None]] = {
    "gone": lambda directory: shutil.rmtree(directory),
    "a file in its place": replaced,
    "the name is taken": lambda directory: in_the_way(directory / "vm.pages"),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "state"
    made.mkdir()
    return made


class NoRole:
    """A source that does nothing."""

    role = Role.SOURCE
    laid: tuple[str, ...] = ()

    def __init__(self, migration: Migration) -> None: ...


def begun(directory: Path, tasks: list[Any] | None = None) -> Migration:
    vm = SimpleNamespace(
        name="vm",
        counters=Counters(),
        alternatives=[],
        patience=Patience(),
        monitor=SimpleNamespace(qemu=SimpleNamespace(pid=os.getpid())),
        qemu_pid=os.getpid(),
        qemu_started=process_started(os.getpid()),
        qemu_threads=(),
        state_file=StateFile(directory, "vm"),
        start_soon=lambda task, *_: tasks.append(task) if tasks is not None else None,
    )
    made = Migration(cast(Any, vm), cast(Any, NoRole), Inet("h", 1))
    made.begin(None)
    return made


@pytest.mark.parametrize("harm", HARMS)
def test_a_migration_begins_though_the_directory_fails_meanwhile_and_nothing_stays(
    directory: Path, harm: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def relay(*arguments: Any, **options: Any) -> Relay:
        made = Relay(*arguments, **options)
        HARMS[harm](directory)
        return made

    monkeypatch.setattr(migration_module, "Relay", relay)
    before = descriptors_and_threads()
    migration = begun(directory)
    assert migration.channels is not None
    assert "page requests are in memory alone" in caplog.text
    troubles = migration.course.vm.state_file.troubles
    assert troubles.count == 1
    assert "a restarted refault will not replay them" in str(troubles.error)
    migration.close()
    until_nothing_is_left(before)
    assert not (directory / "vm.pages.new").exists()


def test_a_relay_that_cannot_be_made_leaves_no_file(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_relay(*arguments: Any, **options: Any) -> Relay:
        raise OSError("no threads")

    monkeypatch.setattr(migration_module, "Relay", no_relay)
    before = descriptors_and_threads()
    tasks: list[Any] = []
    with pytest.raises(OSError, match="no threads"):
        begun(directory, tasks)
    assert tasks == []
    until_nothing_is_left(before)
    assert list(directory.iterdir()) == []


def test_a_relay_that_cannot_be_watched_is_ended(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_channels(*arguments: Any) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(migration_module, "Channels", no_channels)
    before = descriptors_and_threads()
    with pytest.raises(OSError, match="no memory"):
        begun(directory)
    until_nothing_is_left(before)


def test_a_directory_that_went_away_is_made_again(directory: Path) -> None:
    directory.rmdir()
    file = StateFile(directory, "vm")
    with file.pages.opened(KEY, take_over=False) as state:
        assert isinstance(state, StateFds)
    file.save(RECORD)
    assert sorted(path.name for path in directory.iterdir()) == ["vm.migration.json", "vm.pages"]
    assert (file.troubles.count, file.troubles.error) == (0, None)


def test_what_has_gone_away_is_written_again_or_told(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = StateFile(directory, "vm")
    with file.pages.opened(KEY, take_over=False):
        pass
    file.save(RECORD)
    file.look()
    assert file.troubles.error is None
    shutil.rmtree(directory)
    file.look()
    assert "page requests are in memory alone" in str(file.troubles.error)
    assert file.load(1) is None  # of another QEMU, and so it is there
    file.look()
    assert (file.troubles.count, caplog.text.count("in memory alone")) == (1, 1)
    (directory / "vm.pages").touch()
    with file.pages.opened(KEY, take_over=False):
        pass
    assert file.troubles.error is None


def test_a_record_that_cannot_be_written_is_counted_and_leaves_nothing(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = StateFile(directory, "vm")
    in_the_way(directory / "vm.migration.json")
    for _ in range(2):
        file.save(RECORD)
    assert "cannot save the migration" in str(file.troubles.error)
    assert file.troubles.count == 2
    assert [path.name for path in directory.iterdir()] == ["vm.migration.json"]
    (directory / "vm.migration.json").rmdir()
    file.save(RECORD)
    assert file.troubles.error is None


def test_what_can_be_removed_is_removed_at_the_end(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = StateFile(directory, "vm")
    in_the_way(directory / "vm.migration.json")
    (directory / "vm.pages").touch()
    file.remove()
    assert not (directory / "vm.pages").exists()
    assert "cannot remove" in caplog.text
    assert (file.troubles.count, file.troubles.error) == (1, None)


@pytest.mark.parametrize(
    ("threads", "fits"),
    [((41, 42), True), ((42, 43, 44), True), ((42,), True), ((141, 142), False), ((), False)],
)
def test_without_a_process_a_record_is_of_the_qemu_with_its_threads(
    directory: Path, threads: tuple[int, ...], fits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind TCP, say. vCPUs are plugged and unplugged meanwhile."""
    caplog.set_level(logging.INFO)
    file = StateFile(directory, "vm")
    record = msgspec.structs.replace(RECORD, qemu_pid=None, qemu_started=None, qemu_threads=(41, 42))
    file.save(record)
    assert file.load(None, threads) == (record if fits else None)
    assert ("is of another QEMU" in caplog.text) is not fits


def test_a_record_that_names_no_qemu_is_of_none(directory: Path) -> None:
    file = StateFile(directory, "vm")
    file.save(msgspec.structs.replace(RECORD, qemu_pid=None, qemu_started=None))
    assert file.load(None, (41,)) is None


class Found:
    """A relay that has taken over a file of 30 whole records of 50."""

    restored, kept = Restored.WHOLE, Kept.ALL

    def pages(self) -> Any:
        return SimpleNamespace(recorded=30, outstanding=7, refused=0, torn=20)


def test_torn_records_are_counted_and_said(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = StateFile(directory, "vm")
    file.pages.tell(cast(Relay, Found()))
    assert "30 on record, 7 outstanding" in caplog.text
    assert "20 page requests more were torn" in caplog.text
    assert file.troubles.torn == 20


def record(pid: int) -> MigrationRecord:
    return MigrationRecord(
        role=Role.SOURCE,
        uri="tcp:127.0.0.1:1",
        relayed=True,
        qemu_pid=pid,
        qemu_started=process_started(pid),
    )


def test_the_record_of_another_qemu_that_runs_is_not_touched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a VM was given the name of one whose refault was killed."""
    with subprocess.Popen(["sleep", "60"]) as other:
        theirs = record(other.pid)
        StateFile(tmp_path, "vm1").save(theirs)
        (tmp_path / "vm1.pages").touch()
        file = StateFile(tmp_path, "vm1")
        assert file.load(os.getpid()) is None
        file.save(record(os.getpid()))
        file.remove()
        assert StateFile(tmp_path, "vm1").load(other.pid) == theirs
        assert (tmp_path / "vm1.pages").exists()
        file.save(record(os.getpid()))
        assert f"is of QEMU process {other.pid}, which still runs" in str(file.troubles.error)
        assert f"is of QEMU process {other.pid}, which still runs" in caplog.text
        other.kill()
    file.look()
    assert file.troubles.error is None  # it ended
    assert file.load(os.getpid()) == record(os.getpid())


def test_the_record_of_a_qemu_that_may_not_be_looked_at_is_not_removed(tmp_path: Path) -> None:
    """Whether it was written when that was permitted, or read."""
    told = record(os.getpid())
    with hidden():
        for each in (told, msgspec.structs.replace(told, qemu_started=None)):
            StateFile(tmp_path, "vm1").save(each)
            file = StateFile(tmp_path, "vm1")
            assert file.of_a_running_qemu()
            assert file.load(os.getpid()) == each
    assert StateFile(tmp_path, "vm1").load(os.getpid()) == each
    StateFile(tmp_path, "vm1").save(msgspec.structs.replace(told, qemu_started=1))
    assert StateFile(tmp_path, "vm1").load(os.getpid()) is None


def test_the_record_of_another_that_may_not_be_looked_at_is_not_touched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with hidden(), subprocess.Popen(["sleep", "60"]) as other:
        StateFile(tmp_path, "vm1").save(msgspec.structs.replace(record(os.getpid()), qemu_pid=other.pid))
        file = StateFile(tmp_path, "vm1")
        assert file.load(os.getpid()) is None
        assert f"is of QEMU process {other.pid}, which may still run" in caplog.text
        assert "CAP_SYS_PTRACE" in caplog.text
        other.kill()
        other.wait()
        assert file.usable(os.getpid())


def test_page_requests_are_found_again_by_who_is_told_later_since_when_qemu_runs(directory: Path) -> None:
    """Or was told it: the file of one migration has one key."""
    told = record(os.getpid())
    assert told.key("vm") == msgspec.structs.replace(told, qemu_started=None).key("vm")
    assert told.key("vm") != msgspec.structs.replace(told, generation="another").key("vm")


def test_page_requests_of_a_refault_that_knew_the_migration_by_its_former_key_are_found_again(
    directory: Path,
) -> None:
    """By each one that follows."""
    told = record(os.getpid())
    now, former = told.key("vm"), told.former_key("vm")
    file = StateFile(directory, "vm")
    found = []
    for key, take_over in ((former, False), (now, True), (now, True)):
        with file.pages.opened(key, take_over=take_over, former=former if take_over else b"") as state:
            relay = Relay(Role.SOURCE, state=state)
        found.append(relay.restored)
        relay.close()
    assert Restored.FOREIGN not in found
    assert found[1:] == [Restored.WHOLE] * 2


def test_nor_is_anything_while_another_refault_has_the_name(tmp_path: Path) -> None:
    StateFile(tmp_path, "vm1").save(record(os.getpid()))
    file = StateFile(tmp_path, "vm1", lambda: False)
    assert file.load(os.getpid()) is None
    file.save(record(1))
    file.remove()
    assert StateFile(tmp_path, "vm1").load(os.getpid()) == record(os.getpid())


def test_the_record_of_a_qemu_that_has_ended_makes_room(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        StateFile(tmp_path, "vm1").save(record(other.pid))
        other.kill()
    file = StateFile(tmp_path, "vm1")
    assert file.load(os.getpid()) is None
    assert os.listdir(tmp_path) == []
