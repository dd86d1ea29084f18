"""`refault run` as a service manager and an operator meet it: start, status, metrics, errors, end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from refault.cli.daemons import NO_QEMU
from refault.cli.main import build_parser
from refault.cli.run import configuration
from refault.lab.channel import free_port

ROOT = Path(__file__).parents[2]
REFAULT = [sys.executable, "-m", "refault"]


class Daemon:
    """A `refault run` in `directory`, with a service manager's socket to report to."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.directory = directory
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(directory / "notify"))
        self.log = directory / "log"
        environment = os.environ | {
            "NOTIFY_SOCKET": str(directory / "notify"),
            "RUNTIME_DIRECTORY": str(directory),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*REFAULT, "run", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )

    def notices(self, timeout: float = 60.0) -> Iterator[list[str]]:
        self.manager.settimeout(timeout)
        while True:
            yield self.manager.recv(4096).decode().splitlines()

    def wait_ready(self) -> None:
        try:
            assert any("READY=1" in notice for notice in self.notices())
        except TimeoutError:
            pytest.fail(f"never ready: {self.output()}")

    def output(self) -> str:
        return self.log.read_text()

    def wait_output(self, pattern: str) -> None:
        eventually(
            lambda: re.search(pattern, self.output()) is not None, lambda: f"{pattern}: {self.output()}"
        )

    def status(self) -> dict[str, Any]:
        done = subprocess.run(
            [*REFAULT, "status", "--json"],
            env=os.environ | {"RUNTIME_DIRECTORY": str(self.directory)},
            capture_output=True,
            check=False,
            timeout=60,
        )
        (vm,) = json.loads(done.stdout)["vms"]
        assert done.returncode == (0 if vm["qemu"]["connected"] else NO_QEMU)
        return vm  # type: ignore[no-any-return]

    def close(self) -> None:
        self.manager.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


@contextlib.contextmanager
def daemon(directory: Path, *arguments: str) -> Iterator[Daemon]:
    started = Daemon(directory, *arguments)
    try:
        yield started
    finally:
        started.close()


def eventually(holds: Callable[[], bool], tell: Callable[[], str], timeout: float = 40.0) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, tell()
        time.sleep(0.05)


@contextlib.contextmanager
def qemu(monitor: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU without a machine: its monitor is what matters here."""
    command = ["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none"]
    process = subprocess.Popen(
        [*command, "-qmp", f"unix:{monitor},server=on,wait=off"], stdin=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def qmp(path: Path, *commands: str) -> list[dict[str, Any]]:
    """The replies to `commands`, sent by a plain client."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        stream = connection.makefile("rw")
        assert "QMP" in json.loads(stream.readline())
        replies = []
        for command in ("qmp_capabilities", *commands):
            stream.write(json.dumps({"execute": command}) + "\n")
            stream.flush()
            replies.append(json.loads(stream.readline()))
    return replies[1:]


@pytest.mark.qemu
def test_a_service_from_start_to_end(tmp_path: Path) -> None:
    port = free_port()
    monitor, listen = tmp_path / "q", tmp_path / "l"
    arguments = [
        "--qemu",
        str(monitor),
        "--listen",
        str(listen),
        "--name",
        "vm1",
        "--metrics",
        f"127.0.0.1:{port}",
    ]
    with daemon(tmp_path, *arguments) as running:
        running.wait_ready()  # before there is a QEMU
        assert listen.is_socket()
        vm = running.status()
        assert vm["name"] == "vm1"
        assert vm["qemu"] == {"connected": False, "address": f"unix:{monitor}", "pid": None, "version": None}
        with qemu(monitor) as process:
            eventually(lambda: bool(running.status()["qemu"]["connected"]), running.output)
            assert running.status()["qemu"]["pid"] == process.pid
            (reply,) = qmp(listen, "query-status")
            assert "return" in reply
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
                assert 'refault_qemu_connected{vm="vm1"} ' in response.read().decode()
        eventually(lambda: not running.status()["qemu"]["connected"], running.output)
        running.process.send_signal(signal.SIGTERM)
        assert any("STOPPING=1" in notice for notice in running.notices())
        assert running.process.wait(20) == 0
        assert "Traceback" not in running.output()
    assert not listen.exists()
    assert not (tmp_path / "vm1.control").exists()


WAITS = {"capability": "pause-before-switchover", "state": True}
"""A source waits there, however little there is to migrate."""


def ask(stream: Any, name: str, **arguments: object) -> None:
    stream.write(json.dumps({"execute": name, "arguments": arguments}))
    stream.flush()


def answer(stream: Any) -> str:
    reply = next(message for message in map(json.loads, stream) if {"return", "error"} & set(message))
    return "error" if "error" in reply else "return"


@contextlib.contextmanager
def client_of(listen: Path) -> Iterator[Any]:
    """A client that has negotiated; it comes again until there is a QEMU."""
    with contextlib.ExitStack() as stack:
        streams: list[Any] = []

        def greeted() -> bool:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(20)
            connection.connect(str(listen))
            stream = connection.makefile("rw")
            connection.close()  # the stream keeps it
            try:
                streams.append(stack.enter_context(stream))
                return "QMP" in stream.readline()
            except ConnectionError:
                return False

        eventually(greeted, lambda: "no QEMU, for all that refault knows")
        ask(streams[-1], "qmp_capabilities")
        assert answer(streams[-1]) == "return"
        yield streams[-1]


@pytest.mark.qemu
def test_of_two_clients_who_migrate_at_once_one_does(tmp_path: Path) -> None:
    """The other's command takes nothing from it, and its destination sees no other source."""
    monitor, listen = tmp_path / "q", tmp_path / "l"
    with (
        daemon(tmp_path, "--qemu", str(monitor), "--listen", str(listen), "--name", "vm1") as running,
        socket.create_server(("127.0.0.1", 0)) as destination,
        qemu(monitor),
        contextlib.ExitStack() as stack,
    ):
        streams = []

        running.wait_ready()
        for _ in range(2):
            streams.append(stack.enter_context(client_of(listen)))
        ask(streams[0], "migrate-set-capabilities", capabilities=[WAITS])
        assert answer(streams[0]) == "return"
        for stream in streams:
            ask(stream, "migrate", uri=f"tcp:127.0.0.1:{destination.getsockname()[1]}")
        assert sorted(map(answer, streams)) == ["error", "return"]
        destination.settimeout(20)
        with destination.accept()[0]:
            destination.settimeout(0.5)
            with pytest.raises(TimeoutError):
                destination.accept()
        assert "Traceback" not in running.output()


@contextlib.contextmanager
def carried(port: int, monitor: Path) -> Iterator[None]:
    """A monitor as TCP, until the connection breaks."""
    argv = [
        "socat",
        f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr",
        f"UNIX-CONNECT:{monitor},retry=200,interval=0.05",
    ]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


@pytest.mark.qemu
def test_a_migration_outlives_its_tcp_monitor_but_not_its_qemu(tmp_path: Path) -> None:
    """No pid tells whether it is the same QEMU that answers again: it does by what it is at."""
    monitor, listen, port = tmp_path / "q", tmp_path / "l", free_port()
    record = tmp_path / "vm1.migration.json"
    arguments = ["--qemu", f"tcp:127.0.0.1:{port}", "--listen", str(listen), "--name", "vm1"]
    with daemon(tmp_path, *arguments) as running, socket.create_server(("127.0.0.1", 0)) as destination:
        running.wait_ready()

        def connected() -> bool:
            return bool(running.status()["qemu"]["connected"])

        def migrate(client: Any) -> None:
            ask(client, "migrate-set-capabilities", capabilities=[WAITS])
            assert answer(client) == "return"
            ask(client, "migrate", uri=f"tcp:127.0.0.1:{destination.getsockname()[1]}")
            assert answer(client) == "return"
            eventually(record.exists, running.output)

        with qemu(monitor):
            with carried(port, monitor), client_of(listen) as client:
                migrate(client)
            eventually(lambda: not connected(), running.output)
            with carried(port, monitor):
                eventually(connected, running.output)
                eventually(
                    lambda: running.status()["migration"]["status"] == "pre-switchover", running.output
                )
                time.sleep(0.5)
                assert record.exists()
        with qemu(monitor), carried(port, monitor), client_of(listen) as client:
            eventually(lambda: not record.exists(), running.output)
            migrate(client)
            ask(client, "quit")
            eventually(lambda: not record.exists(), running.output)
        assert "Traceback" not in running.output()


def test_the_example_of_the_unit_is_a_command_line() -> None:
    text = (ROOT / "systemd" / "example.env").read_text()
    (line,) = re.findall(r'^ARGS="(.*)"$', text, flags=re.MULTILINE)
    arguments = ["run", "--name", "vm1", *shlex.split(line)]
    assert configuration(build_parser(arguments).parse_args(arguments)).vms[0].name == "vm1"


def refused(tmp_path: Path, *arguments: str) -> str:
    """What a `refault run` that cannot start says last, which is one line, with exit status 1."""
    done = subprocess.run(
        [*REFAULT, "run", "--name", "vm1", *arguments],
        env=os.environ | {"RUNTIME_DIRECTORY": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    *log, told = done.stderr.splitlines()
    assert told.startswith("refault: vm1: "), done.stderr
    assert all(" vm1: no QEMU at " in line for line in log), done.stderr  # it may have come to that before
    return told


def test_what_cannot_be_bound_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert "no socket" in refused(tmp_path, "--qemu", "/q", "--listen", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "listens there already" in refused(
            tmp_path, "--qemu", "/q", "--listen", f"tcp:127.0.0.1:{port}"
        )
    assert not (tmp_path / "l").exists()


@pytest.mark.qemu
def test_a_live_socket_is_left_alone_and_a_stale_one_replaced(tmp_path: Path) -> None:
    listen = tmp_path / "l"
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(listen))
        live.listen()
        assert "listens there already" in refused(tmp_path, "--qemu", "/q", "--listen", str(listen))
        assert listen.is_socket()
    monitor = tmp_path / "q"
    with qemu(monitor), daemon(tmp_path, "--qemu", str(monitor), "--listen", str(listen)) as running:
        running.wait_ready()
        eventually(lambda: bool(running.status()["listeners"][0]["listening"]), running.output)
        (reply,) = qmp(listen, "query-status")  # it was closed, and its file was still there
        assert "return" in reply


@pytest.mark.qemu
def test_an_address_that_is_not_there_yet_is_waited_for_and_seen(tmp_path: Path) -> None:
    monitor, listen, port = tmp_path / "q", tmp_path / "run" / "l", free_port()
    arguments = ["--qemu", str(monitor), "--listen", str(listen), "--listen", f"tcp:localhost:{port}"]
    with daemon(tmp_path, *arguments, "--listen", "tcp:127.0.0.1:0") as running, qemu(monitor):
        running.wait_ready()
        missing, named, chosen = running.status()["listeners"]
        assert missing["address"] == f"unix:{listen}"
        assert not missing["listening"]
        assert "its directory does not exist" in missing["trouble"]
        assert named["address"] == f"tcp:localhost:{port}"
        assert (named["listening"], named["trouble"]) == (True, None)
        port = int(chosen["address"].rpartition(":")[2])
        running.wait_output(f"tcp:127.0.0.1:0 is tcp:127.0.0.1:{port}")
        listen.parent.mkdir()
        eventually(lambda: bool(running.status()["listeners"][0]["listening"]), running.output)
        assert running.status()["listeners"][0]["trouble"] is None
        assert running.output().count("its directory does not exist") == 1


@contextlib.contextmanager
def impostor(path: Path, greeting: bytes) -> Iterator[None]:
    """A socket that accepts one connection, says `greeting`, and then nothing."""
    command = ["socat", f"UNIX-LISTEN:{path}", "SYSTEM:cat greeting; sleep 60"]
    (path.parent / "greeting").write_bytes(greeting)
    process = subprocess.Popen(command, cwd=path.parent, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        eventually(path.is_socket, lambda: "socat does not listen")
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.2\r\n", b'{"hello": "world"}\r\n'])
def test_a_qemu_that_speaks_something_else_is_named_and_waited_for(tmp_path: Path, greeting: bytes) -> None:
    with (
        impostor(tmp_path / "q", greeting),
        daemon(
            tmp_path, "--qemu", str(tmp_path / "q"), "--listen", str(tmp_path / "l"), "--name", "vm1"
        ) as running,
    ):
        running.wait_ready()
        running.wait_output(r"vm1: .*QMP")
        assert running.process.poll() is None
        assert running.status()["qemu"]["connected"] is False
        assert "Traceback" not in running.output()
