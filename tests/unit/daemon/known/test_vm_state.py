"""What becomes of a migration where QEMU does not answer the questions about it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from refault.daemon.kernel.process import process_started
from refault.daemon.known.vm_state import VmState
from refault.daemon.monitor.monitor import Monitor, QemuInfo, QmpError
from refault.daemon.record.state_file import MigrationRecord, StateFile
from refault.migration.endpoint import Inet
from refault.migration.phase import Role


class Deaf:
    """A monitor behind which QEMU does not do what it is asked."""

    qemu = QemuInfo(1, 0, "7.2.0", (7, 2, 0), "", True)

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def execute(self, command: str, **_: object) -> object:
        raise self._error


@pytest.mark.parametrize(
    ("error", "told"),
    [(trio.TooSlowError(), "did not answer in time"), (QmpError("GenericError", "no such thing"), "no such")],
)
async def test_a_migration_that_qemu_tells_nothing_of_is_not_relayed_but_recovered_all_the_same(
    tmp_path: Path, error: Exception, told: str
) -> None:
    vm = VmState(
        "vm",
        cast("Monitor", Deaf(error)),
        relay_allowed=True,
        recover_uris=(),
        state_file=StateFile(tmp_path, "vm"),
    )
    reason, _ = await vm.judge(Inet("127.0.0.1", 4444), Role.SOURCE)
    assert reason is not None
    assert told in reason


class Slow:
    """Answers in the order in which it was asked, once it has been asked twice."""

    qemu = None

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._both = trio.Event()

    async def execute(self, command: str, **_: object) -> object:
        self.asked.append(command)
        if len(self.asked) == 2:
            self._both.set()
        await self._both.wait()
        if command == "query-bad":
            raise QmpError("GenericError", "no such thing")
        return {"of": command}


async def test_two_queries_are_on_their_way_at_once(tmp_path: Path) -> None:
    def state() -> tuple[Slow, VmState]:
        monitor, file = Slow(), StateFile(tmp_path, "vm")
        return monitor, VmState(
            "vm", cast("Monitor", monitor), relay_allowed=True, recover_uris=(), state_file=file
        )

    monitor, vm = state()
    with trio.fail_after(9):
        assert await vm.query_both("query-a", "query-b") == ({"of": "query-a"}, {"of": "query-b"})
    assert monitor.asked == ["query-a", "query-b"]
    _, vm = state()
    with trio.fail_after(9), pytest.raises(QmpError):
        await vm.query_both("query-a", "query-bad")


class Tells:
    """A monitor behind which QEMU answers as 7.2 does."""

    def __init__(self, pid: int | None, reply: object) -> None:
        self.qemu = QemuInfo(pid, 0, "7.2.0", (7, 2, 0), "", True)
        self._reply = reply

    async def execute(self, command: str, **_: object) -> object:
        assert command == "query-cpus-fast"
        return self._reply


CPUS = [{"cpu-index": 0, "thread-id": 41}, {"cpu-index": 1, "thread-id": 42}]


@pytest.mark.parametrize(
    ("pid", "reply", "threads"),
    [
        (None, CPUS, (41, 42)),
        (7, CPUS, ()),
        (None, [], ()),
        (None, {}, ()),
        (None, [{"thread-id": "41"}], ()),
    ],
)
async def test_a_qemu_whose_process_is_not_known_is_known_by_its_threads(
    tmp_path: Path, pid: int | None, reply: object, threads: tuple[int, ...]
) -> None:
    file = StateFile(tmp_path, "vm")
    vm = VmState(
        "vm",
        cast("Monitor", Tells(pid, reply)),
        relay_allowed=True,
        recover_uris=(),
        state_file=file,
    )
    await vm.ask_threads()
    assert vm.qemu_threads == threads


@pytest.mark.parametrize(("known", "recorded"), [(True, False), (False, True)])
async def test_since_when_qemu_runs_is_forgotten_by_nobody(
    tmp_path: Path, known: bool, recorded: bool
) -> None:
    """Whoever was not told it, for /proc hid QEMU or descriptors were short: this refault, or the last."""
    pid, started = os.getpid(), process_started(os.getpid())
    record = MigrationRecord(
        role=Role.SOURCE,
        uri="tcp:127.0.0.1:1",
        relayed=True,
        qemu_pid=pid,
        qemu_started=started if recorded else None,
    )
    StateFile(tmp_path, "vm").save(record)
    monitor = SimpleNamespace(qemu=QemuInfo(pid, 0, "7.2.0", (7, 2, 0), "", True))
    vm = VmState(
        "vm",
        cast("Monitor", monitor),
        relay_allowed=True,
        recover_uris=(),
        state_file=StateFile(tmp_path, "vm"),
    )
    vm.met(pid, started if known else None)
    assert await vm.record() == record
    assert vm.qemu_started == started
