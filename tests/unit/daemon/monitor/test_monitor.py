"""The monitor: whom it serves, and where."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

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


@pytest.mark.parametrize("who_ends", ["refault", "QEMU"])
async def test_who_has_ended_the_connection_to_qemu_is_told(
    who_ends: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    version = {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}
    greeting = json.dumps({"QMP": {"version": version, "capabilities": []}}).encode()
    caplog.set_level(logging.INFO)
    ends, over = trio.Event(), trio.Event()

    async def qemu(stream: trio.SocketStream) -> None:
        await stream.send_all(greeting)
        async for data in stream:
            await stream.send_all(json.dumps({"return": {}, "id": json.loads(data)["id"]}).encode())
            await ends.wait()
            await stream.aclose()
            return

    async with trio.open_nursery() as nursery:
        with trio.socket.socket(trio.socket.AF_UNIX) as sock:
            await sock.bind(str(tmp_path / "qemu"))
            sock.listen()
            nursery.start_soon(trio.serve_listeners, qemu, [trio.SocketListener(sock)])
            connected = trio.Event()
            monitor = Monitor(
                "vm",
                Address(str(tmp_path / "qemu")),
                [],
                on_connect=lambda _: connected.set(),
                on_disconnect=over.set,
            )
            with trio.fail_after(20):
                await nursery.start(monitor.run)
                await connected.wait()
                if who_ends == "QEMU":
                    ends.set()
                    await over.wait()
                nursery.cancel_scope.cancel()
    told = {
        "refault": "vm: left the monitor of QEMU 10.0.0",
        "QEMU": "vm: QEMU 10.0.0 closed its monitor; clients disconnected: 0",
    }
    assert [line for line in caplog.messages if line in told.values()] == [told[who_ends]]
