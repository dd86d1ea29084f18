"""The monitor: whom it serves, and where."""

from __future__ import annotations

import pytest

from refault.daemon.monitor.address import Address
from refault.daemon.monitor.monitor import Monitor


@pytest.mark.parametrize("server", [False, True])
def test_clients_do_not_come_to_where_qemu_does(server: bool) -> None:
    clients = Address("/front", server=True)
    manager = Address("/manager")
    monitor = Monitor("vm", Address("/qemu", server=server), [clients, manager])
    assert monitor.clients_come_to == [clients, manager]
