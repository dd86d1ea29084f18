"""The <emulator> of a libvirt domain: whatever refault does, QEMU starts with what it was given."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[3] / "wrapper").glob("*.c"))
PATIENCE, HASTE = 20.0, 0.3
"""Seconds that a wrapper waits for a refault that may be slow to answer, and for one that does not."""
NAME = "refault-qemu-system-x86_64"
SCRIPT = """#!/bin/sh
printf 'argument %s\\n' "$0" "$@"
for fd in /proc/$$/fd/*; do printf 'fd %s %s\\n' "${fd##*/}" "$(/usr/bin/readlink "$fd")"; done
"""
"""What stands in for QEMU, and says what it was given."""


def inode(sock: socket.socket) -> str:
    return f"socket:[{os.fstat(sock.fileno()).st_ino}]"


@dataclass
class Started:
    """What became of it."""

    code: int
    errors: str
    arguments: list[str]
    fds: dict[int, str]
    seconds: float


class Place:
    """A directory with a wrapper whose QEMU and whose refault are in it."""

    def __init__(self, path: Path, patience: float) -> None:
        self.path = path
        self.patience = patience
        self.exec = path / "exec"
        self.qemu = path / "bin" / "qemu-system-x86_64"
        self.qemu.parent.mkdir()
        self.qemu.write_text(SCRIPT)
        self.qemu.chmod(0o755)
        self.wrapper = path / NAME
        macros = {
            "QEMU_DIRS": f'"{path}/none", "{path}/bin"',
            "QEMU_KVM": f'"{path}/qemu-kvm"',
            "EXEC_SOCKET": f'"{self.exec}"',
            "PATIENCE": str(int(1000 * patience)),
        }
        sanitized = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
        warnings = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
        defined = [f"-DREFAULT_{name}={value}" for name, value in macros.items()]
        command = ["gcc", *warnings, *sanitized, *defined, "-o", str(self.wrapper), *map(str, SOURCES)]
        subprocess.run(command, check=True)

    def start(self, *arguments: str, called: Path | None = None, fds: tuple[int, ...] = ()) -> Started:
        began = time.monotonic()
        done = subprocess.run(
            [str(called or self.wrapper), *arguments],
            pass_fds=fds,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
            env={"LC_ALL": "C", "PATH": ""},
        )
        lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
        return Started(
            done.returncode,
            done.stderr,
            [" ".join(line[1:]) for line in lines if line[0] == "argument"],
            {int(line[1]): line[2] for line in lines if line[0] == "fd" and line[2]},
            time.monotonic() - began,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("w"), PATIENCE)


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("h"), HASTE)


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[socket.socket]:
    """As libvirt binds it."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "monitor.sock"))
        sock.listen(1)
        yield sock


def chardev(sock: socket.socket) -> str:
    return f"socket,id=charmonitor,fd={sock.fileno()},server=on,wait=off"


Answer = Callable[[socket.socket, list[bytes], int], object]


@pytest.fixture
def refault(place: Place) -> Iterator[Callable[[Answer], None]]:
    """Has one hand-over answered."""
    with answering(place) as refault:
        yield refault


@contextlib.contextmanager
def answering(place: Place) -> Iterator[Callable[[Answer], None]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        place.exec.unlink(missing_ok=True)
        listening.bind(str(place.exec))
        listening.listen(0)
        threads = []

        def serve(answer: Answer) -> None:
            connection, _ = listening.accept()
            with connection:
                packet, fds, _, _ = socket.recv_fds(connection, 4096, 4)
                answer(connection, packet.split(b"\0"), fds[0])
                for fd in fds:
                    os.close(fd)

        def begin(answer: Answer) -> None:
            thread = threading.Thread(target=serve, args=(answer,), daemon=True)
            thread.start()
            threads.append(thread)

        yield begin
        for thread in threads:
            thread.join(10)
    place.exec.unlink()


def as_if_there_were_no_refault(place: Place, started: Started, monitor: socket.socket, why: str) -> None:
    assert (started.code, started.arguments) == (0, [str(place.qemu), "-chardev", chardev(monitor), "-S"])
    assert started.fds[monitor.fileno()] == inode(monitor)
    assert list(started.fds.values()).count(inode(monitor)) == 1
    assert started.errors == f"{place.wrapper}: QEMU starts without refault: {why}\n"
    # It is not waited out, or not for long on a busy machine.
    assert started.seconds < max(place.patience, 10)


def test_who_hands_over_finds_the_new_socket_in_its_place(
    place: Place, monitor: socket.socket, refault: Callable[[Answer], None], tmp_path: Path
) -> None:
    told: list[list[bytes]] = []
    ended: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as fresh, monitor.dup() as other:
        fresh.bind(str(tmp_path / "fresh"))

        def answer(connection: socket.socket, packet: list[bytes], fd: int) -> None:
            assert f"socket:[{os.fstat(fd).st_ino}]" == inode(monitor)
            told.append(packet)
            socket.send_fds(connection, [b"ok"], [fresh.fileno()])
            ended.append(connection.recv(1))

        refault(answer)
        arguments = ["-name", "guest=a,,b,debug-threads=on", "-uuid", "c0ffee", "-chardev", chardev(monitor)]
        started = place.start(*arguments, fds=(monitor.fileno(), other.fileno()))
        assert (started.code, started.errors) == (0, "")
        assert started.arguments == [str(place.qemu), *arguments]
        assert told == [[b"refault-exec 1", b"a,b", b"c0ffee", b"%d" % monitor.fileno(), b""]]
        assert started.fds[monitor.fileno()] == inode(fresh)
        assert started.fds[other.fileno()] == inode(monitor)
        [kept] = [fd for fd, what in started.fds.items() if what == inode(monitor) and fd != other.fileno()]
        assert kept >= 200
        assert list(started.fds.values()).count(inode(fresh)) == 1
        assert fresh.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        while not ended:
            time.sleep(0.01)
        assert ended == [b""]  # the exec has closed it


ODD: dict[str, tuple[Answer, str]] = {
    "refuses": (lambda connection, *_: connection.sendall(b"no room\n"), "room?"),
    "goes away": (lambda *_: None, "it went away"),
    "says something else": (
        lambda connection, *_: connection.sendall(b"yes"),
        "its answer is not understood",
    ),
    "gives nothing": (lambda connection, *_: connection.sendall(b"ok"), "its answer is not understood"),
    "gives no socket": (
        lambda connection, *_: socket.send_fds(connection, [b"ok"], [0]),
        "what it gives is no socket to listen at",
    ),
    "gives one that is connected": (
        lambda connection, *_: socket.send_fds(connection, [b"ok"], [connection.fileno()]),
        "what it gives is no socket to listen at",
    ),
    "says much": (lambda connection, *_: connection.sendall(b"no " + b"x" * 9000), "x" * 252),
}


@pytest.mark.parametrize("what", ODD)
def test_whatever_refault_does_qemu_starts(
    place: Place, monitor: socket.socket, refault: Callable[[Answer], None], what: str
) -> None:
    answer, why = ODD[what]
    refault(answer)
    started = place.start("-chardev", chardev(monitor), "-S", fds=(monitor.fileno(),))
    as_if_there_were_no_refault(place, started, monitor, why)


def test_where_refault_says_nothing_it_is_not_waited_for_for_long(
    hasty: Place, monitor: socket.socket
) -> None:
    with answering(hasty) as refault:
        refault(lambda connection, *_: connection.recv(1))
        started = hasty.start("-chardev", chardev(monitor), "-S", fds=(monitor.fileno(),))
    as_if_there_were_no_refault(hasty, started, monitor, "it does not answer")
    assert started.seconds >= HASTE


def test_without_a_refault_qemu_starts_at_once(place: Place, monitor: socket.socket) -> None:
    place.exec.unlink(missing_ok=True)
    started = place.start("-chardev", chardev(monitor), "-S", fds=(monitor.fileno(),))
    as_if_there_were_no_refault(place, started, monitor, f"{place.exec}: No such file or directory")


def test_where_a_queue_is_full_nobody_waits_for_long(hasty: Place, monitor: socket.socket) -> None:
    """As of a daemon that is stopped: connect(2) would wait for ever."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(hasty.exec))
        listening.listen(0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first:
            first.connect(str(hasty.exec))
            started = hasty.start("-chardev", chardev(monitor), "-S", fds=(monitor.fileno(),))
    hasty.exec.unlink()
    as_if_there_were_no_refault(hasty, started, monitor, f"{hasty.exec}: it does not answer")
    assert started.seconds >= HASTE


@pytest.mark.parametrize(
    "argument",
    [
        "socket,id=charmonitor,path=/run/m,server=on,wait=off",  # libvirt before 5
        "socket,id=charserial0,fd=%d,server=on,wait=off",
        "socket,id=charmonitor,fd=%d,server=off",
        "socket,id=charmonitor,fd=%d",
        "socket,id=charmonitor,fd=monitor-%d,server=on",
        "pty,id=charmonitor,fd=%d,server=on",
        "socket,id=charmonitor,fd=99999999999999999999,server=on",
        "",
        ",,,=,",
    ],
)
def test_without_such_a_monitor_it_is_qemu_at_once(
    place: Place, monitor: socket.socket, argument: str
) -> None:
    argument = argument.replace("%d", str(monitor.fileno()))
    started = place.start("-chardev", argument, "-machine", "none", fds=(monitor.fileno(),))
    assert started.arguments == [str(place.qemu), "-chardev", argument, "-machine", "none"]
    assert (started.code, started.errors) == (0, "")


def test_what_is_no_socket_that_listens_is_not_handed_over(place: Place) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        started = place.start("-chardev", chardev(sock), "-S", fds=(sock.fileno(),))
        why = f"descriptor {sock.fileno()} is no unix socket that listens"
        as_if_there_were_no_refault(place, started, sock, why)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("guest=vm1,debug-threads=on", b"vm1"),
        ("vm1", b"vm1"),
        ("debug-threads=on", b""),
        ("guest=", b""),
        ("guest=a=b", b"a=b"),
        ("guest=one,guest=two", b"two"),
        ("guest=" + "n" * 1023, b"n" * 1023),
        ("guest=" + "n" * 1024, b""),  # for the uuid to be taken
        ("guest=" + "n" * 100000, b""),
    ],
    ids=lambda value: str(value[:40]),
)
def test_the_name_is_read_as_qemu_reads_it(
    place: Place, monitor: socket.socket, refault: Callable[[Answer], None], name: str, told: bytes
) -> None:
    packets: list[list[bytes]] = []
    refault(lambda _, packet, __: packets.append(packet))
    place.start("-name", name, "-chardev", chardev(monitor), fds=(monitor.fileno(),))
    assert packets == [[b"refault-exec 1", told, b"", b"%d" % monitor.fileno(), b""]]


def test_it_never_becomes_itself(place: Place, tmp_path: Path) -> None:
    for called in (place.wrapper, tmp_path / "qemu-system-x86_64", tmp_path / "refault-"):
        if called != place.wrapper:
            os.link(place.wrapper, called)
        script = place.qemu.read_text()
        place.qemu.unlink()
        os.link(place.wrapper, place.qemu)
        try:
            started = place.start("-S", called=called)
        finally:
            place.qemu.unlink()
            place.qemu.write_text(script)
            place.qemu.chmod(0o755)
        assert started.code == 127
        assert started.errors.startswith(f"{called}: no QEMU: ")


def test_the_one_qemu_of_red_hat_is_for_its_own_machine(place: Place, tmp_path: Path) -> None:
    kvm = place.path / "qemu-kvm"
    os.rename(place.qemu, kvm)
    try:
        mine, other = (tmp_path / f"refault-qemu-system-{arch}" for arch in (os.uname().machine, "sparc64"))
        for called in (mine, other):
            os.link(place.wrapper, called)
        assert place.start("-S", called=mine).arguments == [str(kvm), "-S"]
        assert place.start("-S", called=other).code == 127
    finally:
        os.rename(kvm, place.qemu)


def test_a_qemu_that_cannot_be_run_is_said(place: Place) -> None:
    mode = stat.S_IMODE(place.qemu.stat().st_mode)
    script = place.qemu.read_text()
    place.qemu.write_bytes(b"\x7fELF, and nothing more")
    try:
        started = place.start("-S")
    finally:
        place.qemu.write_text(script)
        place.qemu.chmod(mode)
    assert started.code == 126
    assert started.errors == f"{place.wrapper}: {place.qemu}: Exec format error\n"
