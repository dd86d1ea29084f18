"""The monitor: whom it serves, and where."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import trio

from refault.daemon.monitor.address import Address
from refault.daemon.monitor.monitor import Monitor


@pytest.mark.parametrize("server", [False, True])
def test_clients_do_not_come_to_where_qemu_does(server: bool) -> None:
    clients = Address("/front", server=True)
    manager = Address("/manager")
    monitor = Monitor("vm", Address("/qemu", server=server), [clients, manager])
    assert monitor.clients_come_to == [clients, manager]


@pytest.mark.parametrize("told", [[{}], [{"name": 1}], {"name": "quit"}, None])
def test_commands_that_are_not_told_as_they_should_be_end_nothing(
    told: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def execute(command: str, arguments: Mapping[str, object] | None = None, **_: object) -> object:
        return told

    monitor = Monitor("vm", Address("/qemu"), [Address("/front", server=True)])
    monkeypatch.setattr(monitor, "execute", execute)
    trio.run(monitor._check_denied, "7.2.0")
