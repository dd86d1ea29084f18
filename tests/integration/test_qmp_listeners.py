"""Where clients come, and what they find there: as at a QEMU's own socket, which stands beside it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
from tests.integration.qmp_tools import (
    GREETING,
    Client,
    connected,
    directory,
    greet,
    listening,
    negotiated,
    qemu_process,
    refault,
    until,
)

from refault.daemon.kernel.unix_diag import listens
from refault.daemon.monitor import clients
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.address_text import parse_address
from refault.daemon.monitor.monitor import Monitor
from refault.lab.channel import free_port

NOBODY = {"refused", "end"}
"""What a client finds where nobody is."""


def find(address: Address, seconds: float = 30) -> str:
    """What a client finds who connects and reads."""
    family = socket.AF_UNIX if address.path is not None else socket.AF_INET
    with socket.socket(family) as client:
        client.settimeout(seconds)
        try:
            client.connect(address.sun_path if address.path is not None else ("127.0.0.1", address.port))
            data = client.recv(4096)
        except TimeoutError:
            return "silence"
        except OSError:
            return "refused"
    return ("greeting" if b"QMP" in data else repr(data)) if data else "end"


async def finds(address: Address) -> str:
    return await trio.to_thread.run_sync(find, address)


def places(path: Path, kind: str) -> tuple[Address, Address]:
    """Where a bare QEMU listens, and where refault does."""
    match kind:
        case "unix":
            return Address(f"{path}/bare", server=True), Address(f"{path}/front", server=True)
        case "abstract":
            return (
                Address(f"{path}/bare", server=True, abstract=True),
                Address(f"{path}/front", server=True, abstract=True),
            )
        case _:
            return (
                Address(None, "127.0.0.1", free_port(), server=True),
                Address(None, "127.0.0.1", free_port(), server=True),
            )


@pytest.mark.qemu
@pytest.mark.parametrize("kind", ["unix", "abstract", "tcp"])
async def test_without_a_qemu_there_is_nobody(kind: str) -> None:
    with directory() as path:
        bare, front = places(path, kind)

        async def ends(quit_: bool) -> None:
            async with refault(path / "qemu", front) as monitor:
                assert await finds(bare) in NOBODY
                assert await finds(front) in NOBODY
                with qemu_process(
                    f"{bare},server=on,wait=off", f"unix:{path}/qemu,server=on,wait=off"
                ) as qemu:
                    await until(lambda: monitor.qemu and monitor.fronts[0].listening)
                    assert await finds(front) == "greeting"
                    assert await finds(bare) == "greeting"
                    if quit_:
                        await monitor.execute("quit", timeout=20)
                    else:
                        qemu.kill()
                    await trio.to_thread.run_sync(qemu.wait)
                await until(lambda: not monitor.qemu)
                assert await finds(bare) in NOBODY
                assert await finds(front) in NOBODY

        await ends(quit_=False)
        await ends(quit_=True)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_of_many_who_come_in_vain_none_is_left_in_silence(kind: str) -> None:
    """Each has QEMU looked for anew, and is turned away however soon that is over."""
    with directory() as path:
        _, front = places(path, kind)
        async with refault(path / "qemu", front):
            for _ in range(200):
                assert await finds(front) == "end"


@pytest.mark.qemu
@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_who_comes_right_behind_a_new_qemu_is_served(kind: str) -> None:
    """As a manager does that starts QEMU: it looks for QEMU's socket, connects once, and reads."""
    with directory() as path:
        _, front = places(path, kind)
        async with refault(path / "qemu", front) as monitor:
            for _ in range(5):
                await trio.sleep(0.3)  # it is looked for less and less often
                with qemu_process(f"unix:{path}/qemu,server=on,wait=off") as qemu:
                    await until(lambda: listens(f"{path}/qemu"))
                    assert await finds(front) == "greeting"
                    qemu.kill()
                    await trio.to_thread.run_sync(qemu.wait)
                await until(lambda: not monitor.qemu)
                assert await finds(front) == "end"


async def test_who_comes_right_behind_the_end_of_a_qemu_finds_the_next() -> None:
    """Its end may not have been read yet: no client is greeted in its name and then sent away."""
    with directory() as path, listening(path / "qemu") as qemu:
        async with refault(path / "qemu", path / "front") as monitor:
            for micro in range(20):
                connection, _ = await trio.to_thread.run_sync(qemu.accept)
                with connection:
                    await greet(connection, monitor, micro)
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(path / "front"))
                    connection, _ = await trio.to_thread.run_sync(qemu.accept)
                    with connection:
                        await greet(connection, monitor, micro + 1)
                        told = json.loads(await trio.to_thread.run_sync(client.recv, 4096))
                        assert told["QMP"]["version"]["qemu"]["micro"] == micro + 1


async def test_who_comes_between_a_qemus_bind_and_its_listen_is_served() -> None:
    """The socket's file is there, which is what others wait for, and a busy host stops a process anywhere."""
    with directory() as path, socket.socket(socket.AF_UNIX) as qemu, socket.socket(socket.AF_UNIX) as client:
        async with refault(path / "qemu", path / "front") as monitor:
            qemu.bind(str(path / "qemu"))
            client.connect(str(path / "front"))
            client.settimeout(0.2)
            with pytest.raises(TimeoutError):
                await trio.to_thread.run_sync(client.recv, 1)
            client.settimeout(20)
            qemu.listen()
            connection, _ = await trio.to_thread.run_sync(qemu.accept)
            with connection:
                await greet(connection, monitor)
                assert await trio.to_thread.run_sync(client.recv, 1) == b"{"


async def test_a_client_waits_for_a_qemu_that_is_being_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for ever: it may be another client's, and never greet."""
    monkeypatch.setattr(clients, "_GREETED_WITHIN", 1.0)
    with directory() as path, listening(path / "qemu") as qemu:
        front = Address(None, "127.0.0.1", 0, server=True)
        async with refault(path / "qemu", front) as monitor:
            front = monitor.fronts[0].address
            connection, _ = await trio.to_thread.run_sync(qemu.accept)
            with connection:
                assert await finds(front) == "end"
                monkeypatch.setattr(clients, "_GREETED_WITHIN", 30.0)
                async with trio.open_nursery() as nursery:
                    found: list[str] = []

                    async def client() -> None:
                        found.append(await finds(front))

                    nursery.start_soon(client)
                    await until(lambda: monitor.clients)
                    connection.sendall(GREETING)
                assert found == ["greeting"]
                monkeypatch.setattr(clients, "_GREETED_WITHIN", 1.0)
                async with connected(("127.0.0.1", front.port)) as stays:
                    await trio.sleep(1.5)  # longer than one waits who has not been greeted
                    await stays.negotiate()


@pytest.mark.qemu
async def test_a_manager_is_connected_to_while_there_is_a_qemu() -> None:
    with directory() as path, listening(path / "manager") as manager:
        manager.setblocking(False)
        async with refault(path / "qemu", parse_address(f"{path}/manager,server=off")) as monitor:
            for _ in range(2):
                with qemu_process(f"unix:{path}/qemu,server=on,wait=off") as qemu:
                    await until(lambda: monitor.clients == 1)
                    connection, _ = manager.accept()
                    with connection:
                        await trio.lowlevel.wait_readable(connection)
                        assert b"QMP" in connection.recv(4096)
                        qemu.kill()
                        await until(lambda: monitor.clients == 0)
                await trio.sleep(0.2)
                with pytest.raises(BlockingIOError):
                    manager.accept()


# wait=on


@contextlib.contextmanager
def waiting_qemu(path: Path, first: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU that stands still until its first monitor has been connected to, and then makes the second."""
    (path / "second").unlink(missing_ok=True)
    first = first or f"unix:{path}/qemu"
    with qemu_process(f"{first},server=on,wait=on", f"unix:{path}/second,server=on,wait=off") as qemu:
        yield qemu


@pytest.mark.qemu
@pytest.mark.parametrize("kind", ["unix", "abstract", "tcp"])
async def test_a_qemu_that_waits_is_let_go_on_by_the_first_client(kind: str) -> None:
    with directory() as path:
        qemu, _ = places(path, kind)
        with waiting_qemu(path, str(qemu)):
            front = parse_address(f"{path}/front,server=on,wait=on")
            other = parse_address(f"{path}/other", server=True)
            await until(lambda: listens_at(path, qemu.port))
            async with refault(replace(qemu, server=False), front, other) as monitor:
                await until(lambda: monitor.fronts[0].listening)
                assert await finds(other) == "end"
                await trio.sleep(0.5)
                assert not (path / "second").exists()
                async with negotiated(path / "front") as client:
                    assert await client.command("query-name") == {}
                    await until((path / "second").exists)
                    assert await finds(other) == "greeting"


@pytest.mark.qemu
async def test_without_wait_it_is_let_go_on_at_once() -> None:
    with directory() as path, waiting_qemu(path):
        async with refault(path / "qemu", path / "front"):
            await until((path / "second").exists)


@pytest.mark.qemu
async def test_a_first_client_is_held_until_there_is_a_qemu() -> None:
    """At each of those that wait: two monitors with wait=on let QEMU go on when both have a client."""
    with directory() as path:
        fronts = [parse_address(f"{path}/{name},wait=on", server=True) for name in "ab"]
        async with refault(path / "qemu", *fronts) as monitor, await trio.open_unix_socket(path / "a") as one:
            await one.send_all(b'{"execute": "qmp_capabilities"}')  # as QEMU would find it when it accepts
            with waiting_qemu(path):
                await until((path / "qemu").exists)
                await trio.sleep(0.5)
                assert not (path / "second").exists()
                assert monitor.clients == 1
                async with connected(path / "b"):
                    client = Client(one)
                    assert "QMP" in await client.receive()
                    assert await client.receive() == {"return": {}}
                    await until((path / "second").exists)


@pytest.mark.qemu
async def test_each_new_qemu_waits_for_a_client_of_its_own() -> None:
    with directory() as path:
        front = parse_address(f"{path}/front,wait=on", server=True)
        async with refault(path / "qemu", front) as monitor:
            for _ in range(2):
                with waiting_qemu(path) as qemu:
                    await until(lambda: listens(f"{path}/qemu"))
                    assert not (path / "second").exists()
                    async with connected(path / "front"):
                        await until((path / "second").exists)
                    qemu.kill()
                await until(lambda: not monitor.qemu)
                assert await finds(front) in NOBODY


async def test_a_qemu_that_has_gone_on_is_not_left_alone() -> None:
    """Its monitor was lost, and it still listens: it may have to be recovered, with clients or without."""
    with directory() as path, listening(path / "qemu") as qemu:
        front = parse_address(f"{path}/front,wait=on", server=True)
        async with refault(path / "qemu", front) as monitor, await trio.open_unix_socket(path / "front"):
            connection, _ = await trio.to_thread.run_sync(qemu.accept)
            with connection:
                await greet(connection, monitor)
            await until(lambda: not monitor.qemu)
            connection, _ = await trio.to_thread.run_sync(qemu.accept)
            connection.close()
    with directory() as path, listening(path / "qemu") as qemu:
        async with refault(path / "qemu", front, gone_on=True):  # a migration of it is on record
            connection, _ = await trio.to_thread.run_sync(qemu.accept)
            connection.close()


# files and directories


@pytest.mark.qemu
async def test_a_socket_file_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        (path / "run").mkdir()
        front = path / "run" / "front"
        async with refault(path / "qemu", front) as monitor, negotiated(front) as client:
            front.unlink()
            async with connected(front):
                assert await client.command("query-name") == {}
            assert "was removed or replaced" in caplog.text
            shutil.rmtree(path / "run")
            await until(lambda: monitor.fronts[0].trouble)
            assert "its directory does not exist" in caplog.text
            assert not monitor.fronts[0].listening
            (path / "run").mkdir()
            async with connected(front):
                assert monitor.fronts[0].trouble is None


@pytest.mark.qemu
async def test_a_directory_that_is_not_there_yet_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        front = path / "run" / "vm" / "front"
        async with refault(path / "qemu", front) as monitor:
            await until(lambda: monitor.qemu)
            assert "its directory does not exist" in (monitor.fronts[0].trouble or "")
            front.parent.mkdir(parents=True)
            async with connected(front):
                assert monitor.fronts[0].trouble is None
    assert caplog.text.count("its directory does not exist") == 1


async def test_trouble_is_over_when_it_is_over() -> None:
    """Also while there is no QEMU."""
    with directory() as path:
        async with refault(path / "qemu", path / "run" / "front") as monitor:
            assert monitor.fronts[0].trouble
            (path / "run").mkdir()
            await until(lambda: monitor.fronts[0].trouble is None)
            assert await finds(monitor.fronts[0].address) == "end"


@pytest.mark.qemu
async def test_where_qemu_connects_to_us_the_file_comes_back_too() -> None:
    with directory() as path:
        qemu = parse_address(f"{path}/qemu,server=on")
        async with refault(qemu, path / "front") as monitor:
            await until(lambda: (path / "qemu").exists())
            (path / "qemu").unlink()
            await until((path / "qemu").exists)
            argv = ["-chardev", f"socket,id=m,path={path}/qemu", "-mon", "m,mode=control"]
            with qemu_process(extra=argv) as process:
                async with connected(path / "front"):
                    await until(lambda: monitor.qemu)
                    assert monitor.qemu
                    assert monitor.qemu.pid == process.pid


@pytest.mark.qemu
async def test_what_somebody_changed_outlives_qemu_and_refault() -> None:
    with directory() as path:

        def mode() -> int:
            return stat.S_IMODE((path / "front").stat().st_mode)

        async def comes(monitor: Monitor) -> None:
            await until(lambda: monitor.qemu)

        async with refault(path / "qemu", path / "front") as monitor:
            with qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
                await comes(monitor)
                assert mode() == 0o600
                (path / "front").chmod(0o660)
            await until(lambda: not monitor.qemu)
            with qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
                await comes(monitor)
                assert mode() == 0o660
        with qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
            async with refault(path / "qemu", path / "front") as monitor:
                await comes(monitor)
                assert mode() == 0o660
            given = parse_address(f"{path}/front,mode=0640", server=True)
            async with refault(path / "qemu", given) as monitor:
                await comes(monitor)
                assert mode() == 0o640


# QEMU's syntax

TAKEN = [
    "unix:{dir}/s,server=on,wait=off",
    "unix:{dir}/s,server,nowait",
    "unix:{dir}/s,server=yes,wait=no",
    "unix:{dir}/s,server=true,wait=false",
    "unix:{dir}/s,server=y,wait=n",
    "unix:{dir}/s,noserver,server=on,wait=on,wait=off",
    "unix:{dir}/a,,b,server=on,wait=off",
    "unix:path={dir}/a=b,server=on,wait=off",
    "unix:server=on,wait=off,path={dir}/s",
    "unix:{dir}/other,server=on,wait=off,path={dir}/s",
    "unix://{dir}/s,server=on,wait=off",
    "unix:{dir}/s,server=on,wait=off,nodelay,telnet=off,id=x",
    "unix:{dir}/s,server=on,wait=off,abstract=on",
    "unix:{dir}/s,server=on,wait=off,abstract=on,tight=off",
    "unix:{dir}/s,server=on,wait=off,",
    "tcp:127.0.0.1:{port},server=on,wait=off",
    "tcp::{port},server=on,wait=off",
    "tcp:localhost:{port},server=on,wait=off",
    "tcp::{port},server=on,wait=off,ipv4=on",
    "tcp::{port},server=on,wait=off,ipv6=on",
    "tcp::{port},server=on,wait=off,ipv4=on,ipv6=on",
    "tcp::{port},server=on,wait=off,ipv6=off",
    "tcp:127.0.0.1:1,server=on,wait=off,port={port}",
]
REFUSED = [
    "unix:{dir}/s,server=maybe",
    "unix:{dir}/s,server=on,wait=perhaps",
    "unix:{dir}/s,server=on,wait=off,reconnect=1",
    "unix:{dir}/s,server=off,wait=on",
    "unix:{dir}/s,server=off,nowait",
    "unix:{dir}/s,server=on,wait=off,sever=on",
    "unix:{dir}/a=b,server=on,wait=off",
    "unix:{dir}/s,server=on,wait=off,host=localhost",
    "unix:{dir}/s,server=off,reconnect=soon",
    "tcp:127.0.0.1,server=on,wait=off",
    "tcp:127.0.0.1:,server=on,wait=off",
    "tcp:::1:{port},server=on,wait=off",
    "tcp:127.0.0.1:no-such-service,server=on,wait=off",
    "tcp://127.0.0.1:{port},server=on,wait=off",
    "tcp:127.0.0.1:{port},server=on,wait=off,ipv4=off,ipv6=off",
    "tcp:127.0.0.1:{port},server=on,wait=off,tls-creds=none",
    "nonsense",
]
TAKEN_BY_REFAULT_ALONE = [
    "{dir}/s",
    "unix:{dir}/s,wait=on",
    "tcp:[::1]:{port},server=on,wait=off",
    "unix:{dir}/s,server=on,wait=off,mode=0660",
]
TAKEN_BY_QEMU_ALONE = [
    "unix:{dir}/s,server=on,wait=off,ipv4=on",
    "tcp:127.0.0.1:{port},server=on,wait=off,abstract=on",
    "tcp:127.0.0.1:{high},server=on,wait=off",
    "unix:{dir}/s,server=on,wait=off,logfile={dir}/log",
]


def listens_at(directory: Path, port: int) -> set[str]:
    """Where somebody listens below a directory or at a port, as the kernel shows it."""
    found = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if int(fields[3], 16) & 0x10000 and len(fields) > 7 and f"{directory}/" in fields[7]:
            found.add(re.sub("^/+", "/", fields[7]))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[1].endswith(f":{port:04X}"):
                found.add(f"{table} {fields[1]}")
    return found


@pytest.mark.qemu
async def test_a_listener_is_where_qemus_would_be() -> None:
    """All the addresses are given to a QEMU, and then to refault: what listens is the same."""
    with directory() as path, directory() as other:
        filled: dict[str, str] = {}
        places: dict[str, Callable[[], set[str]]] = {}
        for number, text in enumerate(TAKEN):
            (path / str(number)).mkdir()
            port = free_port()
            filled[text] = text.format(dir=path / str(number), port=port)
            places[text] = partial(listens_at, path / str(number), port)
        with qemu_process(*filled.values(), f"unix:{other}/last,server=on,wait=off"):
            await until((other / "last").exists)
            bare = {text: place() for text, place in places.items()}
        assert all(bare.values())
        await until(lambda: not any(place() for place in places.values()))
        with qemu_process(f"unix:{other}/qemu,server=on,wait=off"):
            listen = [parse_address(text, server=True) for text in filled.values()]
            async with refault(other / "qemu", *listen) as monitor:
                await until(lambda: all(front.listening for front in monitor.fronts))
                assert {text: place() for text, place in places.items()} == bare


def qemu_takes(text: str, directory: Path) -> bool:
    """Whether a QEMU goes on with this monitor, to make another."""
    after = directory / "after"
    after.unlink(missing_ok=True)
    with qemu_process(text, f"unix:{after},server=on,wait=off", stderr=subprocess.DEVNULL) as qemu:
        while qemu.poll() is None and not after.exists():
            time.sleep(0.01)
        return after.exists()


def refault_takes(text: str) -> bool:
    try:
        parse_address(text, server=True)
    except ValueError:
        return False
    return True


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("text", "qemu", "refault"),
    [
        *((text, False, False) for text in REFUSED),
        *((text, False, True) for text in TAKEN_BY_REFAULT_ALONE),
        *((text, True, False) for text in TAKEN_BY_QEMU_ALONE),
    ],
)
def test_what_is_refused(text: str, qemu: bool, refault: bool) -> None:
    """By both, or as docs/qmp.md says."""
    with directory() as path:
        port = free_port()
        filled = text.format(dir=path, port=port, high=port + 65536)
        assert (qemu_takes(filled, path), refault_takes(filled)) == (qemu, refault)
