"""What a migration writes down for the next refault."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from refault.daemon.migration import Migration
from refault.daemon.options import Patience
from refault.daemon.state_file import StateFile
from refault.daemon.vm_state import Counters
from refault.migration.endpoint import Inet
from refault.migration.phase import Role
from refault.migration.recovery import Event, State


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
        state_file=StateFile(tmp_path, "vm"),
        start_soon=lambda *_: None,
    )
    made = Migration(cast(Any, vm), lambda _: cast(Any, SimpleNamespace(role=Role.SOURCE)), Inet("h", 1))
    made.begin("it is not relayed")
    made.accepted()
    return made


def test_that_postcopy_has_begun_is_on_record_though_the_monitor_is_lost(migration: Migration) -> None:
    migration.vm.monitor.qemu = None
    migration.on_status("postcopy-active")
    record = migration.vm.state_file.load(os.getpid())
    assert record is not None
    assert record.postcopy


def test_what_has_ended_writes_nothing_down(migration: Migration) -> None:
    migration.feed(Event.FAILED)
    migration.remember()
    assert migration.vm.state_file.load(os.getpid()) is None


async def test_a_recovery_that_refault_gave_up_and_qemu_did_not_is_one(migration: Migration) -> None:
    """As where QEMU 7.2 goes on to wait for the source: no further attempt is taken, and none is needed."""
    for event in (Event.PAUSED, Event.ISSUED, Event.ATTEMPT_FAILED):
        migration.feed(event)
    migration.on_status("postcopy-recover")
    migration.on_status("postcopy-active")
    assert migration.policy.state is State.RUNNING
    assert migration.counters.recoveries == 1


@pytest.mark.parametrize("loss", [Event.CHANNEL_LOST, Event.PAUSED])
async def test_a_loss_that_is_seen_before_the_answer_to_a_clients_pause_is_the_clients(
    migration: Migration, loss: Event
) -> None:
    """Else a recovery is begun that its answer then cancels, when QEMU has the command already."""
    migration.client_pauses = True
    migration.feed(loss)
    states = [migration.policy.state]
    migration.feed(Event.RESUME_ACKNOWLEDGED)  # of another channel than that which was paused
    states.append(migration.policy.state)
    migration.feed(loss)  # the pause has been answered for
    states.append(migration.policy.state)
    assert states[:2] == [State.YIELDED, State.RUNNING]
    assert states[2] is not State.YIELDED
