"""What becomes of a migration where QEMU does not answer the questions about it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import trio

from refault.daemon.monitor import Monitor, QemuInfo, QmpError
from refault.daemon.state_file import StateFile
from refault.daemon.vm_state import VmState
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
