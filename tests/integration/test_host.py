"""`refault run` on a host that is not kind to it: what else it needs is not there, nobody reads its log,
signals come that mean nothing to it, and names and directories are used twice."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_service import REFAULT, answer, ask, client_of, daemon, eventually, qemu, qmp

from refault.daemon.telling.control import query
from refault.lab.channel import free_port

pytestmark = pytest.mark.qemu


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short name."""
    with tempfile.TemporaryDirectory(prefix="r") as directory:
        yield Path(directory)


def arguments(place: Path, name: str = "vm1") -> list[str]:
    return ["--name", name, "--qemu", str(place / "q"), "--listen", str(place / "l")]


def serves(place: Path) -> bool:
    """Whether clients reach the QEMU."""
    try:
        (reply,) = qmp(place / "l", "query-status")
    except (OSError, ValueError):
        return False
    return "return" in reply


def status(place: Path, *more: str) -> tuple[int, dict[str, Any]]:
    command = [*REFAULT, "status", "--json", *more]
    environment = os.environ | {"RUNTIME_DIRECTORY": str(place)}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    return done.returncode, json.loads(done.stdout or b"{}")


def test_a_vm_is_served_though_nobody_reads_the_log(place: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    command = [*REFAULT, "run", *arguments(place), "--state-dir", str(place), "--control", str(place / "c")]
    with subprocess.Popen([*command, "--verbose"], stdin=subprocess.DEVNULL, stderr=writer) as process:
        os.close(writer)
        try:
            for _ in range(3):
                with qemu(place / "q"):
                    eventually(lambda: serves(place), lambda: f"in {wchan(process.pid)}")
                (place / "q").unlink()
            process.send_signal(signal.SIGTERM)
            with open(reader, "rb") as log:
                assert b"ending" in log.read()
            assert process.wait(20) == 0
        finally:
            process.kill()


def wchan(pid: int) -> str:
    return Path(f"/proc/{pid}/wchan").read_text()


def test_a_vm_is_served_without_standard_streams(place: Path) -> None:
    with qemu(place / "q"):
        command = [
            *REFAULT,
            "run",
            *arguments(place),
            "--state-dir",
            str(place),
            "--control",
            str(place / "c"),
        ]
        with subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]) as process:
            try:
                eventually(lambda: serves(place), lambda: "not served")
                streams = {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)}
                assert streams == {os.devnull}
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
            finally:
                process.kill()


def test_what_is_not_qmp_keeps_no_vm_from_being_served(place: Path) -> None:
    """The metrics' port is taken, the control socket's directory is a file, and so is that of the state."""
    (place / "file").write_text("precious")
    there = ["--control", str(place / "file" / "c"), "--state-dir", str(place / "file"), "--verbose"]
    with socket.create_server(("127.0.0.1", free_port())) as taken, qemu(place / "q"):
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with daemon(place, *arguments(place), *there, "--metrics", where) as running:
            running.wait_ready()
            eventually(lambda: serves(place), running.output)
            for what in (
                "metrics: cannot serve",
                "control socket: cannot listen",
                "state: cannot keep state",
            ):
                running.wait_output(f"error: vm1: {what}")
            taken.close()
            running.wait_output("vm1: metrics: there again")
            (place / "file").unlink()
            (place / "file").mkdir()
            running.wait_output("vm1: control socket: there again")
            running.wait_output("vm1: state: there again")
            eventually(lambda: "refault_troubles 0.0" in scraped(where), running.output)
            assert (place / "file" / "vm1.lock").read_text() == f"{running.process.pid}\n"
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(20) == 0
    assert os.listdir(place / "file") == []


def scraped(where: str) -> str:
    with urllib.request.urlopen(f"http://{where}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_troubles_are_in_the_status(place: Path) -> None:
    with qemu(place / "q"), daemon(place, *arguments(place), "--state-dir", str(place / "none")) as running:
        running.wait_ready()
        eventually(lambda: serves(place), running.output)
        code, document = status(place)
        assert code == 0
        [trouble] = document["troubles"]
        assert trouble.startswith(f"vm1: state: cannot keep state in {place}/none: No such file or directory")


@pytest.mark.parametrize("length", [45, 64])
def test_the_longest_name_is_served_in_the_directory_of_the_unit(length: int) -> None:
    name = "i-" + "0123456789abcdef" * 4
    place = Path("/run/refault") / name[:length]
    place.mkdir(parents=True)
    try:
        with qemu(place / "q"), daemon(place, *arguments(place, place.name)) as running:
            running.wait_ready()
            eventually(lambda: serves(place), running.output)
            code, document = status(place, place.name)
            assert code == 0
            assert [vm["name"] for vm in document["vms"]] == [place.name]
            assert "error" not in running.output()
    finally:
        shutil.rmtree(place)


STRAYS = (
    "HUP",
    "USR1",
    "ALRM",
    "VTALRM",
    "PROF",
    "IO",
    "PWR",
    "TSTP",
    "TTIN",
    "TTOU",
    "PIPE",
    "RTMIN",
)


def test_signals_that_mean_nothing_here_end_nothing(place: Path) -> None:
    with qemu(place / "q"), daemon(place, *arguments(place)) as running:
        running.wait_ready()
        for name in STRAYS:
            running.process.send_signal(getattr(signal, f"SIG{name}"))
        running.wait_output(r"vm1: signal 1 \(Hangup\) is nothing that refault knows: it goes on")
        eventually(lambda: serves(place), running.output)
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGQUIT)  # as careful as SIGTERM
        running.process.send_signal(signal.SIGHUP)
        assert running.process.wait(20) == 0
    assert not (place / "l").exists()


def test_clients_leave_descriptors_free_and_the_status_says_that_there_are_few(place: Path) -> None:
    control = place / "vm1.control"
    with contextlib.ExitStack() as stack, qemu(place / "q"), daemon(place, *arguments(place)) as running:
        running.wait_ready()
        eventually(lambda: serves(place), running.output)
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (100, 100))
        clients: list[socket.socket] = []

        def few() -> bool:
            for _ in range(10):
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                if client.connect_ex(str(place / "l")) == 0:
                    clients.append(client)
            return bool(query(control, 20).troubles)

        eventually(few, running.output)
        told = query(control, 20)
        assert "LimitNOFILE=" in told.troubles[0]
        assert told.vms[0].clients.connected < 100
        for client in clients:
            client.close()
        eventually(lambda: not query(control, 20).troubles and serves(place), running.output)


def refused(place: Path, *more: str) -> str:
    """What the daemon that cannot start says last."""
    command = [*REFAULT, "run", *more]
    environment = os.environ | {"RUNTIME_DIRECTORY": str(place)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    return done.stderr.splitlines()[-1]


@contextlib.contextmanager
def migrating(place: Path) -> Iterator[None]:
    """A source that waits before its switchover."""
    waits = {"capability": "pause-before-switchover", "state": True}
    with socket.create_server(("127.0.0.1", 0)) as destination, client_of(place / "l") as client:
        ask(client, "migrate-set-capabilities", capabilities=[waits])
        assert answer(client) == "return"
        ask(client, "migrate", uri=f"tcp:127.0.0.1:{destination.getsockname()[1]}")
        assert answer(client) == "return"
        yield


def test_a_second_daemon_of_a_name_is_refused_before_it_touches_anything(place: Path) -> None:
    """And where the first was killed, its QEMU's record is still not another's."""
    os.mkdir(place / "b")
    other = ["--name", "vm1", "--qemu", str(place / "b" / "q"), "--listen", str(place / "b" / "l")]
    record = place / "vm1.migration.json"
    with contextlib.ExitStack() as stack, qemu(place / "q") as first, qemu(place / "b" / "q") as second:
        with daemon(place, *arguments(place)) as running:
            running.wait_ready()
            eventually(lambda: serves(place), running.output)
            stack.enter_context(migrating(place))
            eventually(record.exists, running.output)
            eventually(
                lambda: status(place)[1]["vms"][0]["migration"]["status"] == "pre-switchover", running.output
            )
            files = {name: (place / name).read_bytes() for name in ("vm1.migration.json", "vm1.lock")}
            told = refused(place, *other)
            assert (
                f"another refault (pid {running.process.pid}) keeps the state of a VM of the name vm1" in told
            )
            assert {name: (place / name).read_bytes() for name in files} == files
            assert not (place / "b" / "l").exists()
            assert status(place, "vm1")[1]["vms"][0]["qemu"]["pid"] == first.pid
            running.process.kill()
            running.process.wait()
        clients = (place / "vm1.clients").read_bytes()
        (place / "notify").unlink()
        with daemon(place, *other) as running:
            running.wait_ready()
            running.wait_output(f"vm1.clients is of QEMU process {first.pid} at unix:{place}/q, which")
            running.wait_output(f"is of QEMU process {first.pid}, which still runs, so nothing is kept")
            assert record.read_bytes() == files["vm1.migration.json"]
            eventually(lambda: serves(place / "b"), running.output)
            assert (place / "vm1.clients").read_bytes() == clients
            code, document = status(place, "vm1")
            assert (code, document["vms"][0]["qemu"]["pid"]) == (0, second.pid)


def test_two_of_a_name_with_a_directory_each_are_both_served(place: Path) -> None:
    os.mkdir(place / "b")
    other = ["--name", "vm1", "--qemu", str(place / "b" / "q"), "--listen", str(place / "b" / "l")]
    with (
        qemu(place / "q"),
        qemu(place / "b" / "q"),
        daemon(place, *arguments(place)) as running,
        daemon(place / "b", *other) as second,
    ):
        running.wait_ready()
        second.wait_ready()
        eventually(lambda: serves(place) and serves(place / "b"), second.output)
