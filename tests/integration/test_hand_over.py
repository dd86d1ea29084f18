"""A QEMU started as libvirt starts it, with the wrapper as its emulator, and bare beside it.

libvirt binds the monitor's socket, passes it listening, and connects by its path. It has no deadline there,
and takes an end of the connection for QEMU's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_serve import CRASHING, Served
from tests.support.until import until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

QEMU = "qemu-system-x86_64"
WRAPPER = Path(__file__).parents[2] / "wrapper"
PATIENCE = 2.8


def build_wrapper(directory: Path, refault: Path, *defined: str) -> Path:
    """A wrapper, in a directory, whose refault is in another."""
    program = directory / f"refault-{QEMU}"
    macros = [f'-DREFAULT_EXEC_SOCKET="{refault}/run/exec"', *defined]
    command = ["gcc", "-std=c11", "-D_GNU_SOURCE", *macros, "-o", str(program)]
    subprocess.run([*command, *map(str, WRAPPER.glob("*.c"))], check=True)
    return program


@pytest.fixture(scope="module")
def wrapper() -> Callable[[Path], Path]:
    """A wrapper whose refault is in a directory, and which waits for it as long as a busy machine takes."""
    return lambda directory: build_wrapper(directory, directory, "-DREFAULT_PATIENCE=30000")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path, sys.executable, "-c", CRASHING)
    (tmp_path / "refault.toml").write_text(f'[daemon]\nexec = "{tmp_path}/run/exec"\n')
    with served.manager, served.process:
        try:
            served.until_ready()
            served.reload()
            yield served
        finally:
            served.process.kill()


class Domain:
    """A QEMU as libvirt starts it, and libvirt's connection to it. `started` is called before it greets."""

    def __init__(
        self,
        directory: Path,
        emulator: str,
        name: str,
        *more: str,
        started: Callable[[subprocess.Popen[bytes]], None] = lambda _: None,
    ) -> None:
        self.path = directory / f"{name}.sock"
        self.path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(self.path))
            listening.listen(1)
            fd = listening.fileno()
            chardev = f"socket,id=charmonitor,fd={fd},server=on,wait=off"
            machine = ["-machine", "none", "-nodefaults", "-display", "none", *more]
            monitor = ["-chardev", chardev, "-mon", "chardev=charmonitor,id=monitor,mode=control"]
            began = time.monotonic()
            self.process = subprocess.Popen(
                [emulator, "-name", f"guest={name},debug-threads=on", *machine, *monitor],
                pass_fds=(fd,),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"LC_ALL": "C", "PATH": ""},
            )
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)  # the next refault may have to start first
        self.socket.connect(str(self.path))  # before it listens, as libvirt
        self._lines = self.socket.makefile("rb")
        started(self.process)
        self.greeting = self._line()
        self.seconds = time.monotonic() - began

    def _line(self) -> bytes:
        """The next; how it ends, where it does."""
        try:
            return self._lines.readline() or b"end of file"
        except ConnectionResetError:
            return b"reset"

    def ask(self, command: str, end: bytes = b"") -> Any:
        self.say(command, end)
        return json.loads(self._line())

    def say(self, command: str, end: bytes = b"") -> None:
        self.socket.sendall(json.dumps({"execute": command}).encode() + end)

    def until_read(self) -> None:
        """Until nothing of what was said waits to be read."""
        until(lambda: _unread(self.socket) == 0, lambda: self.process.poll())

    def end(self) -> tuple[list[bytes], int, bytes]:
        """What is said up to the end, QEMU's exit, and its errors."""
        said = []
        while (line := self._line()) not in (b"end of file", b"reset"):
            said.append(line)
        return (
            [*said, line],
            self.process.wait(60),
            self.process.stderr.read() if self.process.stderr else b"",
        )

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()
        self._lines.close()
        self.socket.close()


def _unread(sock: socket.socket) -> int:
    """By the other side of a unix socket; in the kernel's own measure."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])


def domain(
    directory: Path, emulator: Path | str, name: str, *more: str
) -> contextlib.AbstractContextManager[Domain]:
    return contextlib.closing(Domain(directory, str(emulator), name, *more))


def without_times(lines: list[bytes]) -> list[Any]:
    *said, end = lines
    told = [json.loads(line) for line in said]
    return [{key: value for key, value in each.items() if key != "timestamp"} for each in told] + [end]


def test_libvirt_sees_what_it_sees_of_a_bare_qemu(
    served: Served, wrapper: Callable[[Path], Path], tmp_path: Path
) -> None:
    with (
        domain(tmp_path, wrapper(tmp_path), "a") as fronted,
        domain(tmp_path, f"/usr/bin/{QEMU}", "b") as bare,
    ):
        assert fronted.greeting == bare.greeting
        for command in ("query-status", "qmp_capabilities", "query-status", "query-name", "nonsense"):
            told, beside = fronted.ask(command), bare.ask(command)
            if command == "query-name":
                assert (told, beside) == ({"return": {"name": "a"}}, {"return": {"name": "b"}})
            else:
                assert told == beside
        [vm] = served.until(lambda status: status.vms and status.vms[0].qemu.connected).vms
        assert (vm.name, vm.qemu.pid) == ("a", fronted.process.pid)
        with socket.socket(socket.AF_UNIX) as person:
            person.settimeout(60)
            person.connect(str(tmp_path / "run" / "a" / "qmp"))
            assert b"QMP" in person.recv(4096)
        fronted.say("quit")
        bare.say("quit")
        (said, *ended), (beside_said, *beside_ended) = fronted.end(), bare.end()
        assert (without_times(said), ended) == (without_times(beside_said), beside_ended)
    served.until(lambda status: status.vms == ())
    until(lambda: not (tmp_path / "run" / "a").exists(), served.log.read_text)
    with domain(tmp_path, wrapper(tmp_path), "a") as again:  # under the same name at once
        assert again.ask("qmp_capabilities") == {"return": {}}
        assert served.until(lambda status: status.vms).vms[0].name == "a"
        again.process.kill()
        assert again.end()[0] == [b"end of file"]


def test_a_qemu_that_does_not_start_ends_libvirts_connection(
    served: Served, wrapper: Callable[[Path], Path], tmp_path: Path
) -> None:
    with (
        domain(tmp_path, wrapper(tmp_path), "a", "-device", "nonsense") as fronted,
        domain(tmp_path, f"/usr/bin/{QEMU}", "b", "-device", "nonsense") as bare,
    ):
        ends = [each.end() for each in (fronted, bare)]
        assert {said[-1] for said, _, _ in ends} <= {b"end of file", b"reset"}  # whether it had been accepted
        assert [code for _, code, _ in ends] == [1, 1]
        assert [errors.partition(b": ")[2] for _, _, errors in ends] == [ends[0][2].partition(b": ")[2]] * 2
    served.until(lambda status: status.vms == ())


@pytest.mark.parametrize("end", [b"", b"\r\n"])
def test_a_qemu_that_ends_before_it_takes_commands_leaves_the_end_of_the_line_unread(
    served: Served, wrapper: Callable[[Path], Path], tmp_path: Path, end: bytes
) -> None:
    """libvirt tells of an error of its monitor then, in addition to the end of the domain."""
    fifos = [tmp_path / f"{name}.fifo" for name in "ab"]
    for fifo in fifos:
        os.mkfifo(fifo)
    waits = [("-device", f"loader,file={fifo},force-raw=on") for fifo in fifos]  # until it can be opened
    with (
        domain(tmp_path, wrapper(tmp_path), "a", *waits[0]) as fronted,
        domain(tmp_path, f"/usr/bin/{QEMU}", "b", *waits[1]) as bare,
    ):
        assert fronted.ask("qmp_capabilities", end) == {"return": {}}
        fronted.say("query-name", end)
        bare.say("qmp_capabilities", end)
        for each, fifo in zip((fronted, bare), fifos, strict=True):
            if not end:
                each.until_read()
            fifo.open("wb").close()
        ends = [each.end() for each in (fronted, bare)]
    assert [(said, code) for said, code, _ in ends] == [([b"reset" if end else b"end of file"], 1)] * 2
    assert all(b"Cannot load specified image" in errors for _, _, errors in ends)


@pytest.mark.parametrize("why", ["none", "stopped", "no directory", "no listener"])
def test_qemu_starts_whatever_refault_does(served: Served, tmp_path: Path, why: str) -> None:
    program = build_wrapper(tmp_path, tmp_path)
    if why == "none":
        served.process.kill()
        served.process.wait()
    elif why == "stopped":
        served.process.send_signal(signal.SIGSTOP)
    elif why == "no directory":
        (tmp_path / "run" / "a").write_text("a file")
    else:
        (tmp_path / "run" / "a").mkdir()
        (tmp_path / "run" / "a" / "qmp").write_text("a file")
    with domain(tmp_path, program, "a") as bare:
        assert bare.ask("qmp_capabilities") == {"return": {}}
        if why == "stopped":
            assert bare.seconds >= PATIENCE
            served.process.send_signal(signal.SIGCONT)
            served.until(lambda status: status.vms == ())
        assert bare.ask("query-status")["return"]["status"] == "running"
        bare.say("quit")
        _, code, errors = bare.end()
        assert code == 0
        assert errors.decode().startswith(f"{program}: QEMU starts without refault: ")
        assert errors.count(b"\n") == 1


@contextlib.contextmanager
def next_refault(directory: Path) -> Iterator[None]:
    environment = os.environ | {"RUNTIME_DIRECTORY": str(directory / "run")}
    command = [sys.executable, "-m", "refault", "serve", "--config", str(directory / "refault.toml")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


def is_greeted(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as libvirt:
        libvirt.settimeout(60)
        try:
            libvirt.connect(str(path))
            return b"QMP" in libvirt.recv(4096)
        except (ConnectionError, FileNotFoundError):
            return False


def greeted(path: Path) -> bool:
    """Whether who comes again until there is somebody finds a QEMU."""
    return until(lambda: is_greeted(path), lambda: f"nobody greets at {path}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR2])
def test_libvirt_does_not_notice_that_refault_is_another(
    served: Served, wrapper: Callable[[Path], Path], tmp_path: Path, number: signal.Signals
) -> None:
    """It has one connection for life, and says something while no refault is there; others come later."""
    with domain(tmp_path, wrapper(tmp_path), "a") as fronted:
        assert fronted.ask("qmp_capabilities") == {"return": {}}
        served.until(lambda status: status.vms and status.vms[0].clients.kept)
        served.process.send_signal(number)
        served.process.wait()
        fronted.say("query-name")
        for _ in range(2):  # which ends by SIGKILL
            with next_refault(tmp_path):
                assert json.loads(fronted._line()) == {"return": {"name": "a"}}
                assert greeted(fronted.path)
                assert greeted(tmp_path / "run" / "a" / "qmp")
            fronted.say("query-name")
        fronted.process.kill()
        assert fronted.end()[0] in ([b"end of file"], [b"reset"])


def test_after_a_stop_the_next_refault_has_the_vm(
    served: Served, wrapper: Callable[[Path], Path], tmp_path: Path
) -> None:
    """libvirt's connection has ended, which it takes for QEMU's end; who connects again is served."""
    with domain(tmp_path, wrapper(tmp_path), "a") as fronted:
        assert fronted.ask("qmp_capabilities") == {"return": {}}
        served.process.send_signal(signal.SIGTERM)
        served.process.wait()
        assert fronted._line() == b"end of file"
        with next_refault(tmp_path):
            assert greeted(fronted.path)


def test_after_an_internal_error_libvirts_socket_is_there_yet(
    served: Served, wrapper: Callable[[Path], Path], tmp_path: Path
) -> None:
    """It is not refault's to end: nobody could listen there again."""
    with domain(tmp_path, wrapper(tmp_path), "a") as fronted:
        served.until(lambda status: status.vms and status.vms[0].clients.kept)
        Path(f"{fronted.path}.crash").touch()
        with socket.socket(socket.AF_UNIX) as victim:
            victim.connect(str(fronted.path))
            assert victim.recv(1) == b""
        served.until(lambda status: status.vms and status.vms[0].internal_errors == 1)
        assert greeted(fronted.path)
