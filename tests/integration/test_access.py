"""Who may speak at a listener, and what is refused there: real users, and the whole schema of real QEMUs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.integration.qemus import qemus
from tests.integration.qmp_tools import (
    Client,
    Message,
    connected,
    directory,
    listening,
    negotiated,
    qemu_process,
    refault,
)

from refault.daemon.monitor.address_text import parse_address

pytestmark = pytest.mark.qemu

ARGUMENTS: dict[str, dict[str, object]] = {
    "object-add": {"qom-type": "rng-builtin", "id": "rng0"},
    "chardev-add": {"id": "null0", "backend": {"type": "null", "data": {}}},
    "human-monitor-command": {"command-line": "quit"},
    "migrate": {"uri": "exec:cat >/dev/null"},
    "transaction": {"actions": []},
    "getfd": {"fdname": "fd0"},
    "migrate-set-parameters": {"max-bandwidth": 4096},
    "qom-set": {"path": "/machine", "property": "graphics", "value": False},
    "qom-get": {"path": "/objects/s", "property": "data"},
    "trace-event-set-state": {"name": "qmp_job_cancel", "enable": True},
}
"""With which a command does something where it is let through."""
TELLING = [
    ("query-status", {}),
    ("query-chardev", {}),
    ("query-fdsets", {}),
    ("query-migrate", {}),
    ("query-migrate-parameters", {}),
    ("query-named-block-nodes", {}),
    ("qom-list", {"path": "/objects"}),
    ("qom-get", {"path": "/machine", "property": "graphics"}),
    ("trace-event-get-state", {"name": "qmp_job_cancel"}),
]
"""What QEMU is asked, before and after."""


async def state(bare: Client) -> list[object]:
    return [await bare.command(name, arguments) for name, arguments in TELLING]


def may(name: str) -> bool:
    """Whether it is let through with ARGUMENTS."""
    if name.startswith("query-cpu-model-"):
        return False
    return name.startswith("query-") or name in ("qom-list", "qmp_capabilities")


def exchange(commands: list[str], verb: str) -> bytes:
    return b"".join(
        json.dumps({verb: name, "arguments": ARGUMENTS.get(name, {}), "id": name}).encode()
        for name in commands
    )


async def replies(client: Client, commands: list[str]) -> dict[str, Message]:
    found: dict[str, Message] = {}
    while len(found) < len(commands):
        message = await client.receive()
        if "event" not in message:
            found[message["id"]] = message
    return found


def refused(reply: Message) -> bool:
    error: dict[str, str] = reply.get("error", {})
    return error.get("class") == "GenericError" and error["desc"].startswith(
        f"The command {reply['id']} is ref"
    )


@contextlib.asynccontextmanager
async def every_kind(path: Path, rule: str) -> AsyncIterator[dict[str, Client]]:
    """Clients of listeners of every kind, each with `rule`."""
    name = f"refault-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as manager:
        manager.bind(str(path / "manager"))
        manager.listen()
        addresses = [
            f"unix:{path}/front",
            f"unix:{name},abstract=on",
            "tcp:127.0.0.1:0",
            f"unix:{path}/manager,server=off",
        ]
        listen = [parse_address(f"{address},{rule}", server=True) for address in addresses]
        async with refault(path / "qemu", *listen) as monitor:
            with trio.fail_after(30):
                accepted, _ = await trio.to_thread.run_sync(manager.accept)
            dialled = Client(trio.SocketStream(trio.socket.from_stdlib_socket(accepted)))
            dialled.greeting = await dialled.receive()
            async with (
                dialled.stream,
                connected(path / "front") as unix,
                connected(Path(f"\0{name}")) as abstract,
                connected(("127.0.0.1", monitor.fronts[2].address.port)) as tcp,
            ):
                yield {"unix": unix, "abstract": abstract, "tcp": tcp, "manager": dialled}


@pytest.mark.parametrize("qemu", qemus("qemu-11"))
async def test_read_only_lets_nothing_through_that_changes(qemu: str) -> None:
    secret = ["-object", "secret,id=s,data=hunter2"]
    monitors = ["qemu", "bare"]
    with directory() as path:
        where = [f"unix:{path}/{name},server=on,wait=off" for name in monitors]
        with qemu_process(*where, qemu=qemu, extra=secret) as process:
            async with negotiated(path / "bare") as bare:
                schema = await bare.command("query-qmp-schema")
                commands = sorted(each["name"] for each in schema if each["meta-type"] == "command")
                assert {"quit", "device_add", "human-monitor-command", "system_reset"} < set(commands)
                before = await state(bare)
                async with every_kind(path, "read-only=on") as clients:
                    for kind, client in clients.items():
                        await client.negotiate("oob")
                        # What may be said takes QEMU its time: once is enough.
                        sent = commands if kind == "unix" else [name for name in commands if not may(name)]
                        for verb in ("execute", "exec-oob"):
                            await client.send(exchange(sent, verb))
                            for name, reply in (await replies(client, sent)).items():
                                assert refused(reply) == (not may(name)), (kind, verb, reply)
                        told = await client.command("qom-get", {"path": "/objects/s", "property": "type"})
                        assert told == "secret"
                with trio.move_on_after(20):  # QEMU may be late to see that nobody is at refault's monitor
                    while await state(bare) != before:
                        await trio.sleep(0.02)
                assert await state(bare) == before
                assert process.poll() is None


async def test_a_descriptor_of_a_refused_command_is_closed() -> None:
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        front = parse_address(f"unix:{path}/front,deny=getfd,deny=stop", server=True)
        async with refault(path / "qemu", front), negotiated(path / "front") as client:
            for name in ("getfd", "stop"):
                reader, writer = os.pipe()
                await client.send_fd(exchange([name], "execute"), writer)
                os.close(writer)
                assert refused(await client.reply(name))
                with trio.fail_after(30), os.fdopen(reader, "rb", buffering=0) as pipe:
                    held = await trio.to_thread.run_sync(pipe.read, 1)  # while anybody has the other end
                    assert held == b""


CONNECT = """
import os, socket, sys
os.setgroups(GROUPS)
os.setgid(4243)
os.setuid(UID)
with socket.socket(socket.AF_UNIX) as sock:
    sock.settimeout(20)
    sock.connect(WHERE)
    sys.stdout.buffer.write(sock.recv(1))
"""


async def greets(where: str | bytes, uid: int, groups: list[int]) -> bool:
    """Whether a process of another user gets anything at all."""
    said = f"WHERE, UID, GROUPS = {where!r}, {uid}, {groups}"
    done = await trio.run_process(
        [sys.executable, "-ISc", said + CONNECT], capture_stdout=True, stderr=subprocess.STDOUT, check=False
    )
    assert done.stdout in (b"", b"{"), done.stdout
    return bool(done.stdout)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
async def test_who_is_not_allowed_gets_nothing(caplog: pytest.LogCaptureFixture) -> None:
    name = f"refault-test-{os.getpid()}"
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        path.chmod(0o755)
        rule = "allow-user=4242,allow-group=4300"
        listen = [f"unix:{path}/front,{rule}", f"unix:{name},abstract=on,{rule}"]
        async with refault(path / "qemu", *(parse_address(each, server=True) for each in listen)) as monitor:
            with trio.fail_after(30):
                while monitor.qemu is None:  # without QEMU nobody is let in
                    await trio.sleep(0.01)
            for where in (f"{path}/front", f"\0{name}".encode()):
                assert await greets(where, 4242, [])
                assert await greets(where, 4244, [4299, 4300])
                assert not await greets(where, 4244, [4299])
                assert not await greets(where, 0, [])
            assert monitor.clients_total == 4
    assert f"unix:{path}/front (uid 4244, pid " in caplog.text


@pytest.mark.parametrize("user", [os.geteuid(), 4242])
async def test_a_manager_who_is_not_allowed_gets_nothing(user: int) -> None:
    with (
        directory() as path,
        qemu_process(f"unix:{path}/qemu,server=on,wait=off"),
        listening(path / "manager") as manager,
    ):
        address = parse_address(f"unix:{path}/manager,server=off,allow-user={user}", server=True)
        async with refault(path / "qemu", address):
            with trio.fail_after(30):
                accepted, _ = await trio.to_thread.run_sync(manager.accept)
                async with trio.SocketStream(trio.socket.from_stdlib_socket(accepted)) as stream:
                    assert bool(await stream.receive_some(1)) == (user == os.geteuid())


async def test_what_changes_the_vm_is_on_record(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with every_kind(path, "audit=on,deny=stop,deny=device-add,deny=qiut") as clients:
            for client in clients.values():
                await client.negotiate()
                await client.command("query-status")
                secret = {"qom-type": "secret", "id": "s", "data": "hunter2"}
                await client.command("object-add", secret)
                await client.command("object-del", {"id": "s"})
                await client.send(exchange(["stop"], "execute"))
                assert refused(await client.reply("stop"))
    told = [record for record in caplog.records if record.name == "refault.audit"]
    assert len(told) == 3 * 4
    assert "hunter2" not in caplog.text
    fields: list[dict[str, Any]] = [vars(record)["journal"] for record in told]
    me = {"CLIENT_UID": str(os.geteuid()), "CLIENT_PID": str(os.getpid())}
    assert fields[0].items() >= {"VM": "vm", "COMMAND": "object-add", "REFUSED": "0", **me}.items()
    assert fields[2]["REFUSED"] == "1"
    assert "object-add qom-type=secret id=s (data)" in told[0].getMessage()
    assert "refused: stop" in told[2].getMessage()
    [tcp] = {each["CLIENT_ADDRESS"] for each in fields if "CLIENT_ADDRESS" in each}
    assert f"({tcp}) at tcp:127.0.0.1:" in caplog.text
    assert re.search(r"/front is denied what QEMU [\d.]+ does not have: qiut; look", caplog.text)
