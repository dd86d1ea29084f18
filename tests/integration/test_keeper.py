"""What QEMU holds for refault and what it does not, and what refault makes of a record that is not true."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from tests.campaign.restart import REFAULT, qemu_at
from tests.integration.qmp_tools import qemu_process
from tests.integration.test_kept_clients import (
    PAUSE,
    Client,
    greeted,
    served,
    started,
    status,
    urgent,
    wait_until,
)
from tests.integration.test_qmp_out_of_band import fifo
from tests.integration.test_qmp_servers import PRECONFIG

from refault.daemon.host.errors import OperatorError
from refault.daemon.kept.journal import Journal
from refault.daemon.kept.left import Left, encode
from refault.daemon.kept.lot import Lot
from refault.daemon.kept.sockets import Identity
from refault.daemon.kept.taken import read_whole
from refault.daemon.kernel.process import duplicate_of, sockets_of, start_of
from refault.daemon.monitor.keeper import KEPT_TIMEOUT, WELCOME_AFTER
from refault.daemon.telling.control import query
from refault.lab.qemu import DEFAULT_BINARY

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]
NIGHTLY = pytest.mark.nightly

replace = msgspec.structs.replace


def names_held(pid: int) -> set[str]:
    """Where the sockets are bound that a process has, and those that are kept in them."""
    names: set[str] = set()
    process = os.pidfd_open(pid)
    try:
        for number in sockets_of(pid).values():
            with socket.socket(fileno=duplicate_of(process, number)) as sock:
                names.add(str(sock.getsockname()))
                if sock.type == socket.SOCK_SEQPACKET:
                    for each in Lot((sock, sock)).look():
                        with each:
                            names.add(str(each.getsockname()))
    finally:
        os.close(process)
    return names


@dataclass
class Serving:
    """A `refault serve` that fronts one VM, whose sockets are named with `version`."""

    directory: Path
    version: int = 0

    def own(self) -> list[Path]:
        """Its control socket, and those for metrics and hand-overs."""
        return [self.directory / f"{name}{self.version}" for name in ("control", "metrics", "exec")]

    def write(self) -> None:
        control, metrics, handed = self.own()
        fronts = [str(self.directory / f"f{number}") for number in range(self.version + 1)]
        (self.directory / "refault.toml").write_text(
            f'[daemon]\ncontrol = "{control}"\nmetrics = "unix:{metrics}"\nexec = "{handed}"\n'
            f'state_dir = "{self.directory}/state"\n'
            f'[vm.vm]\nqemu = "{self.directory}/q"\nlisten = {fronts}\n'
        )

    def kept(self) -> bool:
        """Whether all that is written down is served, and clients outlive its end."""
        control, *others = self.own()
        try:
            [vm] = query(control, 20).vms
        except (OperatorError, ValueError):
            return False
        serves = [each.listening for each in vm.listeners] == [True] * (self.version + 1)
        return serves and vm.clients.kept and all(map(Path.exists, others))

    @contextmanager
    def run(self) -> Iterator[subprocess.Popen[bytes]]:
        command = [*REFAULT, "serve", "--config", "refault.toml"]
        with open(self.directory / "serve.log", "ab") as log:
            process = subprocess.Popen(command, cwd=self.directory, stderr=log)
        try:
            wait_until(self.kept)
            yield process
        finally:
            process.kill()
            process.wait()

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Somebody is connected to each of its own sockets, and says nothing."""
        with contextlib.ExitStack() as stack:
            for path, kind in zip(self.own(), ("STREAM", "STREAM", "SEQPACKET"), strict=True):
                sock = socket.socket(socket.AF_UNIX, getattr(socket, f"SOCK_{kind}"))
                stack.enter_context(sock)
                sock.connect(str(path))
            yield


def test_qemu_never_holds_what_is_refaults_own(tmp_path: Path) -> None:
    """Neither the sockets for the status, the metrics and hand-overs, nor who is connected there: a guest
    that has broken out has what QEMU holds."""
    serving = Serving(tmp_path)
    serving.write()
    (tmp_path / "state").mkdir()
    with qemu_at(DEFAULT_BINARY, tmp_path) as qemu:

        def check() -> None:
            held = names_held(qemu.pid)
            assert str(tmp_path / "f0") in held
            assert not {name for name in held if name.startswith(tuple(map(str, never)))}

        never = [tmp_path / name for name in ("control", "metrics", "exec")]
        with serving.run() as process, serving.asked():
            check()
            process.kill()
            process.wait()
            check()
        with serving.run() as process, serving.asked():
            check()
            serving.version = 1
            serving.write()
            process.send_signal(signal.SIGHUP)
            while not serving.kept():
                check()
            check()
            assert str(tmp_path / "f1") in names_held(qemu.pid)
            process.send_signal(signal.SIGUSR2)
            process.wait()
            check()
        with serving.run():
            check()


def returned(client: Client, command: str) -> None:
    """Whether it is done; events do not count."""
    reply = client.say(command)
    while "event" in reply:
        reply = client.line()
    assert "return" in reply, reply


def test_who_comes_while_qemu_takes_no_descriptor_is_greeted_and_not_kept(tmp_path: Path) -> None:
    """Its main loop is blocked as it is asked to; what is out-of-band does not wait for that."""
    unwritable = tmp_path / "state" / "vm.clients.new"
    unwritable.mkdir(parents=True)
    with (
        qemu_at(DEFAULT_BINARY, tmp_path),
        started(tmp_path),
        fifo(tmp_path / "fifo") as block,
        urgent(tmp_path / "f") as client,
        urgent(tmp_path / "q2") as blocks,
    ):
        wait_until(lambda: status(tmp_path).get("not_kept") is not None)
        unwritable.rmdir()
        blocks.sock.sendall(block + PAUSE % 1)
        assert blocks.line()["id"] == 1
        trace = tmp_path / "trace"
        wait_until(lambda: greeted(tmp_path / "f") and '"getfd"' in trace.read_text())  # it is asked anew
        since = time.monotonic()
        assert greeted(tmp_path / "f")
        assert WELCOME_AFTER <= time.monotonic() - since < KEPT_TIMEOUT / 2
        assert not status(tmp_path)["kept"]
        client.sock.sendall(PAUSE % 2)
        assert client.line()["id"] == 2
        os.close(os.open(tmp_path / "fifo", os.O_WRONLY))
        assert blocks.line()["id"] == "block"
        wait_until(lambda: greeted(tmp_path / "f") and bool(status(tmp_path)["kept"]))


def test_who_came_in_preconfig_is_kept_once_qemu_has_its_machine(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    monitor = f"unix:{tmp_path}/q,server=on,wait=off"
    with qemu_process(monitor, extra=PRECONFIG), contextlib.ExitStack() as stack:
        with started(tmp_path):
            client = stack.enter_context(urgent(tmp_path / "f"))
            wait_until(lambda: status(tmp_path).get("not_kept") is not None)
            assert not status(tmp_path)["kept"]
            returned(client, "x-exit-preconfig")
            wait_until(lambda: bool(status(tmp_path)["kept"]))
        with started(tmp_path):
            returned(client, "query-name")


def spoiled(left: Left, wrong: str, other: int) -> Left:
    """A record in which one thing is wrong; `other`: a process that is no QEMU."""
    upstream = left.upstream
    match wrong:
        case "cookie":
            return replace(left, upstream=Identity(upstream.inode, bytes(8), upstream.name))
        case "inode":
            return replace(left, upstream=Identity(upstream.inode + 1, upstream.cookie, upstream.name))
        case "pid":
            return replace(left, pid=other)
        case "pid used again":
            return replace(left, pid=other, started=start_of(other))
        case _:
            return replace(left, started=left.started + 1)


@pytest.mark.parametrize(
    "wrong",
    ["start", *(pytest.param(each, marks=NIGHTLY) for each in ("pid", "pid used again", "cookie", "inode"))],
)
def test_a_record_that_is_not_true_is_told_and_nothing_is_taken_by_it(tmp_path: Path, wrong: str) -> None:
    """Its clients are as after a kill without a keeper, and who comes is served."""
    path = tmp_path / "state" / "vm.clients"
    with served(tmp_path) as (_, process, client), subprocess.Popen(["sleep", "1000"]) as other:
        process.kill()
        process.wait()
        left, _ = read_whole(path.read_bytes())
        Journal(path).begin(encode(spoiled(left, wrong, other.pid)))
        with started(tmp_path):
            assert client.file.read() == b""
            wait_until(lambda: greeted(tmp_path / "f"))
            wait_until(lambda: bool(status(tmp_path).get("kept")))
        log = (tmp_path / "log").read_text()
        assert "cannot go on where the last refault ended" in log or "has left no record here" in log
        assert other.poll() is None
        other.kill()
