"""Who connects to whom, when, and what is seen when it fails: addresses, listeners, QEMU gone and back."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from tests.integration.qmp_tools import (
    GREETING,
    Client,
    clients_gone,
    connected,
    dial,
    directory,
    greet,
    listening,
    negotiated,
    open_fds,
    qemu_process,
    refault,
    until,
)

from refault.daemon.host.repeats import Sparing
from refault.daemon.monitor.address_text import parse_address
from refault.daemon.monitor.dial import prepare
from refault.daemon.monitor.listener import ListenError
from refault.daemon.monitor.monitor import Limits, Monitor, MonitorLost, QemuInfo
from refault.lab.channel import free_port

# QEMU comes and goes


@pytest.mark.qemu
async def test_qemu_quits_and_another_comes() -> None:
    seen: list[str] = []

    async def came(info: QemuInfo) -> None:
        await monitor.execute("query-status", timeout=20)
        seen.append(f"came {info.pid}")

    with directory() as path:
        async with refault(
            path / "qemu",
            path / "front",
            on_connect=came,
            on_disconnect=lambda: seen.append("went"),
            on_event=lambda name, data: seen.append(f"{name} {data}"),
        ) as monitor:
            for _ in range(3):
                with qemu_process(f"unix:{path}/qemu,server=on,wait=off") as qemu:
                    async with negotiated(path / "front") as client, negotiated(path / "front") as other:
                        await until(lambda: seen)
                        assert monitor.qemu
                        assert monitor.qemu.pid == qemu.pid
                        assert monitor.qemu.uid == os.getuid()
                        assert monitor.qemu.version.startswith(f"{monitor.qemu.version_triple[0]}.")
                        await client.send(b'{"execute": "quit", "id": 1}')
                        messages = [await client.receive(), await client.receive()]
                        assert {message.get("event", message.get("id")) for message in messages} == {
                            "SHUTDOWN",
                            1,
                        }
                        assert await client.line() == b""
                        assert (await other.receive())["event"] == "SHUTDOWN"
                        assert await other.line() == b""
                await until(lambda: seen[-1] == "went")
                assert seen[0] == f"came {qemu.pid}"
                assert seen[1].startswith("SHUTDOWN")
                seen.clear()
                await clients_gone(monitor)


@pytest.mark.qemu
async def test_qemu_killed_with_commands_on_the_way() -> None:
    with directory() as path:
        async with refault(path / "qemu", path / "front") as monitor:
            with qemu_process(f"unix:{path}/qemu,server=on,wait=off") as qemu:
                async with negotiated(path / "front") as client:
                    os.kill(qemu.pid, 19)  # SIGSTOP
                    await client.send(b'{"execute": "query-status"}' * 50)
                    async with trio.open_nursery() as nursery:

                        async def own() -> None:
                            with pytest.raises(MonitorLost):
                                await monitor.execute("query-status", timeout=10)

                        nursery.start_soon(own)
                        await trio.sleep(0.1)
                        qemu.kill()
                    assert await client.line() == b""
            with qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
                async with negotiated(path / "front") as client:
                    assert await client.command("query-name") == {}
                assert await monitor.execute("query-name", timeout=20) == {}


@pytest.mark.qemu
@pytest.mark.parametrize("pretty", ["", ",pretty=on"])
@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_kinds_of_monitors_and_listeners(kind: str, pretty: str) -> None:
    with directory() as path:
        where = f"unix:{path}/qemu" if kind == "unix" else f"tcp:127.0.0.1:{free_port()}"
        argv = ["-chardev", _chardev(where, "server=on,wait=off"), "-mon", f"chardev=m,mode=control{pretty}"]
        with qemu_process(extra=argv):
            listen = [
                parse_address(f"{path}/front", server=True),
                parse_address("tcp:127.0.0.1:0", server=True),
            ]
            async with refault(parse_address(where), *listen) as monitor:
                await until(lambda: monitor.qemu)
                tcp = ("127.0.0.1", monitor.fronts[1].address.port)
                async with trio.open_nursery() as nursery:
                    for address in (path / "front", tcp):
                        nursery.start_soon(_talk, address, bool(pretty))
                assert monitor.qemu
                assert (monitor.qemu.pid is None) == (kind == "tcp")


def _chardev(where: str, options: str) -> str:
    kind, _, rest = where.partition(":")
    if kind == "unix":
        return f"socket,id=m,path={rest},{options}"
    host, _, port = rest.rpartition(":")
    return f"socket,id=m,host={host},port={port},{options}"


async def _talk(address: Path | tuple[str, int], pretty: bool) -> None:
    async with await dial(address) as stream:
        await stream.send_all(b'{"execute": "qmp_capabilities"}{"execute": "query-status", "id": [1]}')
        text = b""
        with trio.fail_after(30):
            while text.count(b"return") < 2 or not text.endswith(b"}\r\n"):
                text += await stream.receive_some()
        assert (b"\r\n    " in text) == pretty
        assert b'"id": [1]' in text


@pytest.mark.qemu
async def test_qemu_dials_and_the_manager_listens() -> None:
    """The mirror of the usual: -chardev socket,server=off, reconnect=1 on both sides of refault."""
    with directory() as path, listening(path / "manager") as manager:
        manager.setblocking(False)
        trio_manager = trio.SocketListener(trio.socket.from_stdlib_socket(manager))
        qemu = parse_address(f"unix:{path}/qemu,server=on")
        async with refault(qemu, parse_address(f"unix:{path}/manager,server=off")) as monitor:
            for _ in range(2):
                argv = [
                    "-chardev",
                    _chardev(f"unix:{path}/qemu", "server=off,reconnect=1"),
                    "-mon",
                    "m,mode=control",
                ]
                with qemu_process(extra=argv) as process:
                    async with await trio_manager.accept() as stream:
                        client = Client(stream)
                        assert "QMP" in await client.receive()
                        await client.negotiate("oob")
                        assert await client.command("query-name") == {}
                        assert monitor.qemu
                        assert monitor.qemu.pid == process.pid
                        await client.send(b'{"execute": "quit"}')
                        while await client.line():
                            pass


@pytest.mark.qemu
async def test_a_client_that_closes_its_sending_side_gets_its_replies() -> None:
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with refault(path / "qemu", path / "front") as monitor:
            async with connected(path / "front") as client:
                commands = b'{"execute": "qmp_capabilities"}' + b'{"execute": "query-status"}' * 50
                await client.send(commands)
                await client.stream.send_eof()
                for _ in range(51):
                    assert "return" in await client.receive()
                assert await client.line() == b""
            await clients_gone(monitor)


async def test_a_client_that_is_gone_while_it_is_not_read_from() -> None:
    """It sent more than is taken of one client, and QEMU answers nothing for the time being."""
    with directory() as path, listening(path / "qemu") as silent:
        async with refault(path / "qemu", path / "front") as monitor:
            connection, _ = await trio.to_thread.run_sync(silent.accept)
            with connection:
                connection.sendall(GREETING)
                async with await dial(path / "front") as stream:
                    with trio.move_on_after(0.3):
                        while True:
                            await stream.send_all(b'{"execute": "query-status"}' * 100)
                    assert monitor.clients == 1
                await clients_gone(monitor)


async def test_qemu_stops_talking_while_it_does_not_read() -> None:
    """Bytes wait to be sent to it when its end of file comes: the connection is made anew."""
    with directory() as path, listening(path / "qemu") as qemu:
        async with refault(path / "qemu", path / "front") as monitor:
            connection, _ = await trio.to_thread.run_sync(qemu.accept)
            with connection:
                await greet(connection, monitor)
                async with negotiated(path / "front") as client:
                    for _ in range(2):
                        await client.send(
                            b'{"execute": "getfd", "arguments": {"name": "%s"}}' % (b"x" * 400_000)
                        )
                    await until(lambda: (wire := monitor._upstream._wire) and wire.backlog)
                    connection.shutdown(socket.SHUT_WR)
                    await until(lambda: not monitor.qemu)
            connection, _ = await trio.to_thread.run_sync(qemu.accept)
            connection.close()


async def test_a_client_that_has_more_to_say_when_qemu_goes_costs_nothing() -> None:
    """It does not read what QEMU said last, and is left a while for that."""
    with directory() as path, listening(path / "qemu") as qemu:
        async with refault(path / "qemu", path / "front") as monitor:
            connection, _ = await trio.to_thread.run_sync(qemu.accept)
            with connection:
                await greet(connection, monitor)
                async with negotiated(path / "front") as client:
                    await client.send(b'{"execute": "x"}' * 200)
                    event = {"event": "X", "data": {"text": "x" * (2 << 20)}}
                    await trio.to_thread.run_sync(connection.sendall, json.dumps(event).encode())
                    await until(lambda: monitor.counters.events)
                    connection.close()
                    await until(lambda: not monitor.qemu)
                    before = time.process_time()
                    await trio.sleep(0.5)
                    assert time.process_time() - before < 0.2
                    assert monitor.clients == 1


async def test_the_host_of_a_tcp_monitor_vanishes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keepalive has had no answer: QEMU is gone as if it had said so."""

    class Vanishing(socket.socket):
        def recv(self, *args: Any) -> bytes:
            if not monitor.qemu:
                return super().recv(*args)
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    def vanishing(sock: socket.socket) -> socket.socket:
        return Vanishing(fileno=prepare(sock).detach())

    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("refault.daemon.monitor.dial.prepare", vanishing)
    with socket.create_server(("127.0.0.1", 0)) as qemu, directory() as path:
        address = parse_address(f"tcp:127.0.0.1:{qemu.getsockname()[1]}")
        async with refault(address, path / "front") as monitor:
            connection, _ = await trio.to_thread.run_sync(qemu.accept)
            with connection:
                await greet(connection, monitor)
                connection.sendall(b" ")
                await until(lambda: not monitor.qemu)
    assert caplog.messages == []


# what is not as it should be: one clear line each


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b'{"return": {}}', b'{"QMP": 5}', b"\x00\xff" * 100]
)
async def test_something_else_than_qmp(answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with directory() as path, listening(path / "qemu") as other:
        async with refault(path / "qemu", path / "front"):
            for _ in range(2):
                connection, _ = await trio.to_thread.run_sync(other.accept)
                with connection:
                    connection.sendall(answer)
                    await trio.sleep(0.1)
        [record] = caplog.records
        assert record.getMessage().startswith(f"vm: what answers at unix:{path}/qemu is no QMP monitor: ")
        assert "\n" not in record.getMessage()
        assert record.exc_info is None


async def test_an_event_before_the_greeting(caplog: pytest.LogCaptureFixture) -> None:
    """Played, for a real QEMU has microseconds to do it: it is of what the last connection had negotiated."""
    caplog.set_level(logging.WARNING)
    early = (
        b'{"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 0}}\r\n{"return": {}, "id": 7}\r\n'
    )
    events: list[str] = []
    with directory() as path, listening(path / "qemu") as qemu:
        async with refault(
            path / "qemu", path / "front", on_event=lambda name, _: events.append(name)
        ) as monitor:
            connection, _ = await trio.to_thread.run_sync(qemu.accept)
            with connection:
                connection.sendall(early)
                await greet(connection, monitor)
                async with negotiated(path / "front") as client:
                    connection.sendall(early.replace(b"RESUME", b"STOP"))
                    assert (await client.receive())["event"] == "STOP"
    assert events == ["STOP"]
    assert caplog.messages == []


async def test_events_and_no_greeting(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refault.daemon.monitor.upstream._GREETING_TIMEOUT", 0.5)

    async def says(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # a loaded machine: there is a next one
            await stream.send_all(b'{"event": "tick"}\r\n')
            await trio.sleep_forever()

    said = """is no QMP monitor: it sent b'{"event": "tick"}' and no greeting"""
    with directory() as path, listening(path / "qemu") as other:
        other.setblocking(False)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(other))
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, says, [listener])
            async with refault(path / "qemu", path / "front"):
                await until(lambda: any(message.endswith(said) for message in caplog.messages))
            nursery.cancel_scope.cancel()


async def test_silence(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refault.daemon.monitor.upstream._GREETING_TIMEOUT", 0.1)
    with directory() as path, listening(path / "qemu"):
        async with refault(path / "qemu", path / "front") as monitor:
            await until(lambda: caplog.records)
            assert monitor.qemu is None
        assert caplog.messages == [
            f"vm: nothing answers at unix:{path}/qemu: another client may hold the monitor; detach it,"
            " or name a monitor of its own for refault"
        ]


async def test_absence_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with directory() as path:
        async with refault(path / "qemu", path / "front"):
            await trio.sleep(0.5)
        assert caplog.messages == [f"vm: no QEMU at unix:{path}/qemu yet: No such file or directory"]


@pytest.mark.parametrize(
    ("make", "said"), [(Path.mkdir, "a directory"), (Path.touch, "a file and no socket")]
)
async def test_what_is_no_socket_is_told(
    make: Callable[[Path], None], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with directory() as path:
        make(path / "qemu")
        async with refault(path / "qemu", path / "front"):
            await until(lambda: f"no QEMU at unix:{path}/qemu yet: that is {said}" in caplog.text)


@pytest.mark.qemu
async def test_clients_that_are_refused_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    sparing = Sparing()
    caplog.handler.addFilter(sparing)
    try:
        with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
            async with (
                refault(path / "qemu", path / "front", limits=Limits(clients=1)),
                connected(path / "front"),
            ):
                for _ in range(20):
                    async with await dial(path / "front") as refused:
                        assert await refused.receive_some() == b""
    finally:
        caplog.handler.removeFilter(sparing)
    assert caplog.messages.count("vm: a client more than the 1 allowed is refused") == 1


@pytest.mark.qemu
async def test_a_monitor_that_another_client_holds() -> None:
    """QEMU talks to one client at a time: refault waits for its turn, as its own clients do, and gets it."""
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with (
            connected(path / "qemu") as holder,
            refault(path / "qemu", path / "front") as monitor,
            await dial(path / "front") as stream,
        ):
            await until(lambda: monitor.clients == 1)
            await holder.stream.aclose()
            assert "QMP" in await Client(stream).receive()


async def listen_error(address: str) -> str:
    monitor = Monitor("vm", parse_address("/nowhere/qemu"), [parse_address(address, server=True)])
    with pytest.raises(ListenError) as caught:
        await monitor.run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_addresses_that_cannot_be_bound() -> None:
    with directory() as path:
        assert "a directory is there" in await listen_error(f"{path}")
        (path / "file").write_text("precious")
        assert "a file that is no socket is there" in await listen_error(f"{path}/file")
        assert (path / "file").read_text() == "precious"
        with listening(path / "live"):
            assert "something listens there already" in await listen_error(f"unix:{path}/live")
            assert (path / "live").exists()
        with socket.socket() as live:
            live.bind(("127.0.0.1", 0))
            live.listen(1)
            text = await listen_error(f"tcp:127.0.0.1:{live.getsockname()[1]}")
            assert "something listens there already" in text
        assert "cannot listen on tcp:192.0.2.1:1" in await listen_error("tcp:192.0.2.1:1")


async def test_a_live_socket_with_a_full_backlog_is_live() -> None:
    with directory() as path, listening(path / "live"), contextlib.ExitStack() as stack:
        for _ in range(3):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(str(path / "live"))
        assert "something listens there already" in await listen_error(f"{path}/live")


@pytest.mark.qemu
async def test_a_stale_socket_is_replaced_and_none_is_left() -> None:
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        listening(path / "front").close()
        before = open_fds()
        async with refault(path / "qemu", path / "front") as monitor, connected(path / "front"):
            assert monitor.clients == 1
        assert not (path / "front").exists()
        assert open_fds().keys() == before.keys()


@pytest.mark.qemu
async def test_another_ones_socket_is_not_removed(caplog: pytest.LogCaptureFixture) -> None:
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with refault(path / "qemu", path / "front") as monitor, connected(path / "front") as client:
            (path / "front").unlink()
            with listening(path / "front"):
                await until(lambda: monitor.fronts[0].trouble)
                assert "something listens there already" in caplog.text
                await client.negotiate()  # who was there before stays
            async with connected(path / "front"):  # its turn again: what is left is stale
                assert monitor.fronts[0].trouble is None
            (path / "front").unlink()
            successor = listening(path / "front")
        assert (path / "front").exists()
        successor.close()


@pytest.mark.qemu
def test_everything_is_closed_however_it_ends() -> None:
    """A monitor that is cancelled with clients and QEMU in all states leaves no descriptor and no warning."""
    script = """
        import os, sys, trio
        from pathlib import Path
        from tests.integration.qmp_tools import *
        commands = b'{"execute": "qmp_capabilities"}' + b'{"execute": "query-name"}' * 99
        async def main(path):
            before = open_fds()
            with qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
                async with connected(path / "qemu"):
                    pass
                for _ in range(5):
                    async with refault(path / "qemu", path / "front"):
                        clients = [await dial(path / "front") for _ in range(5)]
                        for client in clients[1:]:
                            await client.send_all(commands)
                    for client in clients:
                        await client.aclose()
                    assert not (path / "front").exists()
            assert open_fds().keys() == before.keys(), open_fds()
        with directory() as path:
            trio.run(main, path)
    """
    argv = [sys.executable, "-W", "error", "-X", "dev", "-c", textwrap.dedent(script)]
    done = subprocess.run(argv, capture_output=True, timeout=60, text=True, check=False)
    assert (done.returncode, done.stderr.count("Traceback"), done.stderr.count("Warning:")) == (0, 0, 0), (
        done.stderr
    )
