"""What befalls refault does not reach its clients: the campaign's short form; and how QEMU is let go of."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from tests.campaign.restart import REFAULT, campaign, qemu_at, start, visit
from tests.campaign.visitors import ALL, Visitor
from tests.integration.qemus import qemus
from tests.integration.test_qmp_out_of_band import fifo
from tests.support.until import until

from refault.daemon.kept.left import decode
from refault.daemon.kernel.process import resident_pages, sockets_of, user_of
from refault.lab.qemu import DEFAULT_BINARY
from refault.qmp.journal import before, checked
from refault.qmp.replies import DESCRIPTOR_LOST
from refault.qmp.session import Limits

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]


@pytest.mark.parametrize("planned", [False, True], ids=["killed", "restarted"])
async def test_no_client_notices_that_refault_ends(tmp_path: Path, *, planned: bool) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    binary = random.choice(qemus("qemu-10", "qemu-11"))
    assert await campaign(binary, 3, seed, tmp_path, planned=planned) == []


class Client:
    """Says one thing after another."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        # A socket's file is there a moment before somebody listens.
        wait_until(lambda: self.sock.connect_ex(str(path)) == 0)
        self.file = self.sock.makefile("rb")

    def line(self) -> dict[str, object]:
        return dict(json.loads(self.file.readline()))

    def say(self, command: str) -> dict[str, object]:
        self.sock.sendall(json.dumps({"execute": command}).encode())
        return self.line()


@contextmanager
def served(
    tmp_path: Path, binary: str = DEFAULT_BINARY, program: Sequence[str] = REFAULT
) -> Iterator[tuple[subprocess.Popen[bytes], subprocess.Popen[bytes], Client]]:
    """A QEMU, a refault, and a client that QEMU holds the connection of."""
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, tmp_path.stat().st_uid, -1)
    with qemu_at(binary, tmp_path) as qemu, started(tmp_path, program) as process:
        client = Client(tmp_path / "f")
        with client.sock, client.file:
            assert "QMP" in client.line()
            assert client.say("qmp_capabilities") == {"return": {}}
            wait_until(lambda: bool(status(tmp_path).get("kept")))
            assert "return" in client.say("query-status")
            yield qemu, process, client


@contextmanager
def started(tmp_path: Path, program: Sequence[str] = REFAULT) -> Iterator[subprocess.Popen[bytes]]:
    process = start(tmp_path, program)
    try:
        wait_until(lambda: (tmp_path / "f").exists())
        yield process
    finally:
        process.kill()
        process.wait()


def status(directory: Path) -> dict[str, object]:
    """What refault tells of the VM's clients; nothing where it has only just begun."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(directory / "control"))
        except OSError:
            return {}
        with sock.makefile("rb") as file:
            return dict(json.load(file)["vms"][0]["clients"])


def wait_until(condition: Callable[[], bool]) -> None:
    until(condition, lambda: "it did not come to that", seconds=30, pause=0.02)


def greeted(path: Path) -> bool:
    """Whether who connects to a monitor gets its greeting."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        try:
            sock.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        return b"QMP" in sock.recv(4096)


async def test_who_is_in_the_midst_of_something_goes_on(tmp_path: Path) -> None:
    with served(tmp_path) as (_, process, _):
        visitors = [(Visitor(tmp_path / "f", do.__name__), do) for do in ALL]
        wrong: list[str] = []
        async with trio.open_nursery() as nursery:
            for visitor, do in visitors:
                nursery.start_soon(visit, visitor, do, wrong)
            for visitor, _ in visitors:
                await visitor.ready.wait()
            process.kill()
            process.wait()
            for visitor, _ in visitors:
                visitor.killed.set()
            await trio.testing.wait_all_tasks_blocked()
            next_one = start(tmp_path)
        try:
            assert wrong == []
            wait_until(lambda: status(tmp_path).get("connected") == 1)
        finally:
            next_one.kill()
            next_one.wait()


ACCEPTS_ALONE = """
import sys, trio
from pathlib import Path
from refault.cli.main import main
from refault.daemon.host.turns import Turns
at_once = Turns.come
async def come(self):
    if self._vm != "vm":  # who asks for the status
        return await at_once(self)
    Path(sys.argv[sys.argv.index("--state-dir") + 1], "accepted").touch()
    await trio.sleep_forever()
Turns.come = come
sys.exit(main())
"""


@pytest.mark.parametrize("planned", [False, True], ids=["killed", "restarted"])
def test_who_was_accepted_and_not_served_yet_is_served_by_the_next(tmp_path: Path, *, planned: bool) -> None:
    (tmp_path / "state").mkdir()
    with qemu_at(DEFAULT_BINARY, tmp_path):
        with started(tmp_path, (sys.executable, "-c", ACCEPTS_ALONE)) as first:
            wait_until(lambda: bool(status(tmp_path).get("kept")))
            client = Client(tmp_path / "f")
            wait_until((tmp_path / "state" / "accepted").exists)
            first.send_signal(signal.SIGUSR2 if planned else signal.SIGKILL)
            first.wait()
        with client.sock, client.file, started(tmp_path):
            assert "QMP" in client.line()
            assert client.say("qmp_capabilities") == {"return": {}}
            assert "return" in client.say("query-status")
            wait_until(lambda: status(tmp_path).get("connected") == 1)


PAUSE = b'{"exec-oob": "migrate-pause", "id": %d}'
"""Fails at once without a migration, but runs out-of-band."""


@contextmanager
def urgent(path: Path) -> Iterator[Client]:
    """One that may say something out of band."""
    client = Client(path)
    with client.sock, client.file:
        assert "QMP" in client.line()
        client.sock.sendall(b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}')
        assert client.line() == {"return": {}}
        yield client


def test_out_of_band_commands_overtake_as_before(tmp_path: Path) -> None:
    """Also one that comes while no refault is there."""
    with (
        served(tmp_path) as (_, process, client),
        fifo(tmp_path / "fifo") as block,
        urgent(tmp_path / "f") as first,
    ):
        first.sock.sendall(block + PAUSE % 1)
        assert first.line()["id"] == 1
        client.sock.sendall(b'{"execute": "query-name", "id": "in-band"}')
        process.kill()
        process.wait()
        first.sock.sendall(PAUSE % 2)
        with started(tmp_path):
            assert first.line()["id"] == 2
            first.sock.sendall(PAUSE % 3)
            assert first.line()["id"] == 3
            os.close(os.open(tmp_path / "fifo", os.O_WRONLY))
            assert first.line()["id"] == "block"
            assert client.line() == {"return": {}, "id": "in-band"}


def all_read(client: Client) -> bool:
    """Whether refault has taken all that a client has sent out of its socket (unix(7), SIOCOUTQ)."""
    return fcntl.ioctl(client.sock, termios.TIOCOUTQ, bytes(4)) == bytes(4)


def test_who_passed_a_descriptor_that_a_kill_has_lost_is_told(tmp_path: Path) -> None:
    with served(tmp_path) as (qemu, process, slow), urgent(tmp_path / "f") as first:
        qemu.send_signal(signal.SIGSTOP)
        first.sock.sendall(b'{"execute": "query-name", "id": 1}')
        socket.send_fds(first.sock, [b'{"execute": "add-fd", "id": 2}'], [2])
        first.sock.sendall(b'{"execute": "query-name", "id": 3}')
        getfd = b'{"execute": "getfd", "arguments": {"fdname": "mine"}, "id": 1}'
        socket.send_fds(slow.sock, [getfd[:30]], [2])
        wait_until(lambda: all_read(first) and all_read(slow))
        process.kill()
        process.wait()
        qemu.send_signal(signal.SIGCONT)
        with started(tmp_path):
            slow.sock.sendall(getfd[30:])
            told = json.loads(DESCRIPTOR_LOST)["error"]
            assert slow.line() == {"id": 1, "error": told}
            assert first.line() == {"id": 1, "return": {}}
            assert first.line() == {"id": 2, "error": told}
            assert first.line() == {"id": 3, "return": {}}
            assert slow.say("query-fdsets") == {"return": []}
            wait_until(lambda: status(tmp_path).get("undecided") == 2)
        assert "2 descriptors that clients had passed are lost" in (tmp_path / "log").read_text()
        assert not re.search('"(add-fd|mine)"', (tmp_path / "trace").read_text())


def test_an_end_for_good_ends_clients_and_frees_the_monitor(tmp_path: Path) -> None:
    with served(tmp_path) as (_, process, client):
        process.send_signal(signal.SIGTERM)
        assert client.file.read() == b""
        assert process.wait() == 0
        assert greeted(tmp_path / "q")
        assert not [path for path in (tmp_path / "state").iterdir() if path.suffix == ".clients"]


@pytest.mark.parametrize("commands", [0, 40])
def test_an_end_for_good_waits_for_no_qemu_and_leaves_nothing_in_it(tmp_path: Path, commands: int) -> None:
    """One that is stopped lets go when it goes on, whatever else it has been told."""
    with served(tmp_path) as (qemu, process, client):
        left = decode(before((tmp_path / "state" / "vm.clients").read_bytes()), records=False)
        ours = {left.upstream.inode, *(lot.inode for lot in left.lots)}
        assert sockets_of(qemu.pid).keys() >= ours
        qemu.send_signal(signal.SIGSTOP)
        client.sock.sendall(b'{"execute": "query-status"}' * commands)
        since = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert client.file.read() == b""
        print(f"{time.monotonic() - since:.1f} s")
        assert process.wait() == 0
        assert not greeted(tmp_path / "f")
        qemu.send_signal(signal.SIGCONT)
        wait_until(lambda: not sockets_of(qemu.pid).keys() & ours)
        assert greeted(tmp_path / "q")


def test_an_end_in_any_moment_of_the_start_leaves_the_monitor_to_the_next(tmp_path: Path) -> None:
    """Also while QEMU is being passed what it is to hold."""
    (tmp_path / "state").mkdir()
    with qemu_at(DEFAULT_BINARY, tmp_path):
        for turn, number in enumerate([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2] * 2):
            (tmp_path / "f").unlink(missing_ok=True)
            with started(tmp_path) as process:
                time.sleep(0.004 * turn)
                process.send_signal(number)
                process.wait()
            if number == signal.SIGTERM:
                assert greeted(tmp_path / "q")
        with started(tmp_path):
            wait_until(lambda: greeted(tmp_path / "f"))


def test_after_a_kill_that_nobody_follows_the_monitor_is_freed_by_hand(tmp_path: Path) -> None:
    with served(tmp_path) as (qemu, process, client):
        process.kill()
        process.wait()
        release = [sys.executable, "-m", "refault", "release", str(qemu.pid)]
        said = subprocess.run(
            [*release, "--state-dir", str(tmp_path / "state")], capture_output=True, text=True
        )
        assert said.returncode == 0, said
        assert client.file.read() == b""
        assert greeted(tmp_path / "q")
        assert not greeted(tmp_path / "f")
        with started(tmp_path):
            wait_until(lambda: greeted(tmp_path / "f"))


NOBODY = 65534
DROPS_ALL = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
    "--bounding-set=-all,+dac_read_search",
)
"""But to read where this Python is: it takes nothing out of another user's process."""
EACH_CLIENT = 32 << 10
"""Bytes of refault's memory, its place in the journal included."""
EACH_IN_THE_JOURNAL = 1 << 10


@pytest.mark.nightly
@pytest.mark.parametrize("user", ["root", "nobody"])
def test_a_descriptor_is_passed_beside_as_many_clients_as_there_may_be(tmp_path: Path, user: str) -> None:
    """More than QEMU may have files, where that does not count for its user; and none of them notices a kill.
    What they cost is bounded."""
    drops: Sequence[str] = () if user == "root" else DROPS_ALL
    files = 4 * Limits().clients if drops else 256
    limited = tmp_path / "limited"
    limited.write_text(f'#!/bin/sh\nulimit -n {files}\nexec {shlex.join(drops)} {DEFAULT_BINARY} "$@"\n')
    limited.chmod(0o755)
    program = (*drops, *REFAULT)
    if drops:
        os.chown(tmp_path, NOBODY, NOBODY)
    with served(tmp_path, str(limited), program) as (_, process, first), contextlib.ExitStack() as stack:
        assert (user_of(process.pid) == NOBODY) == bool(drops)
        before_them = resident(process.pid)
        clients = [first]
        while len(clients) < Limits().clients:
            client = Client(tmp_path / "f")
            stack.enter_context(client.sock)
            stack.enter_context(client.file)
            assert "QMP" in client.line()
            assert client.say("qmp_capabilities") == {"return": {}}
            clients.append(client)
        assert (len(clients), status(tmp_path)["connected"]) == (512, 512)
        check_cost(tmp_path, process.pid, before_them)
        ours, theirs = map(stack.enter_context, socket.socketpair())
        getfd = {"execute": "getfd", "arguments": {"fdname": "mine"}}
        socket.send_fds(first.sock, [json.dumps(getfd).encode()], [theirs.fileno()])
        assert first.line() == {"return": {}}
        data = {"addr": {"type": "fd", "data": {"str": "mine"}}, "server": False}
        plug = {
            "execute": "chardev-add",
            "arguments": {"id": "c", "backend": {"type": "socket", "data": data}},
        }
        first.sock.sendall(json.dumps(plug).encode())
        assert first.line() == {"return": {}}
        process.kill()
        process.wait()
        with started(tmp_path, program) as next_one:
            for _ in range(4):
                for client in clients:
                    assert client.say("query-name") == {"return": {}}
            check_cost(tmp_path, next_one.pid, before_them)
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):  # QEMU has it, and it is open
            ours.recv(1)


def resident(pid: int) -> int:
    """Bytes of a process's memory that are there (VmRSS)."""
    return resident_pages(pid) * resource.getpagesize()


def check_cost(directory: Path, pid: int, before_them: int) -> None:
    """Of the clients, beside a refault that had one."""
    memory = resident(pid) - before_them
    journal = sum(path.stat().st_size for path in (directory / "state").glob("*.clients*"))
    print(f"{memory / 1e6:.1f} MB of {before_them / 1e6:.1f}, journal {journal / 1e3:.0f} kB")
    assert memory <= Limits().clients * EACH_CLIENT
    assert journal <= Limits().clients * EACH_IN_THE_JOURNAL


def test_a_qemu_that_ends_while_no_refault_is_there_ends_its_clients(tmp_path: Path) -> None:
    with served(tmp_path) as (qemu, process, client):
        process.kill()
        process.wait()
        qemu.kill()
        assert client.file.read() == b""


def test_a_journal_that_cannot_be_read_is_told_and_clients_come_again(tmp_path: Path) -> None:
    with served(tmp_path) as (_, process, client):
        process.kill()
        process.wait()
        journal = tmp_path / "state" / "vm.clients"
        data = journal.read_bytes()
        first = bytes(before(data))
        journal.write_bytes(data.replace(checked(first), checked(first.replace(b"\xa50.1.0", b"\xa50.0.9"))))
        with started(tmp_path):
            assert client.file.read() == b""
            wait_until(lambda: greeted(tmp_path / "f"))
            wait_until(lambda: "written by refault 0.0.9" in (tmp_path / "log").read_text())


def test_no_secret_stays_longer_than_its_command(tmp_path: Path) -> None:
    secret = {"qom-type": "secret", "id": "s", "data": "hush-hush"}
    drive = {"driver": "null-co", "node-name": "hush-hush"}
    commands: list[tuple[str, dict[str, object]]] = [
        ("object-add", dict(secret)),
        ("qom-get", {"path": "/objects/s", "property": "data"}),
        ("blockdev-add", dict(drive)),
        ("chardev-add", {"id": "c", "backend": {"type": "hush-hush"}}),
        ("migrate", {"uri": "exec:hush-hush", "no-such": 1}),
        ("no-such-command-yet", {"key": "hush-hush"}),
    ]
    with served(tmp_path) as (_, _, client):
        for name, arguments in commands:
            client.sock.sendall(json.dumps({"execute": name, "arguments": arguments}).encode())
            client.line()
            client.say("query-status")
            assert b"hush-hush" not in (tmp_path / "state" / "vm.clients").read_bytes(), name
