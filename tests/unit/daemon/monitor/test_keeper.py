"""What QEMU is passed, and when the next refault need know of it no more."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
from tests.support.hidden import hidden

from refault.daemon.host import fd_store, handed
from refault.daemon.host.errors import OperatorError
from refault.daemon.host.turns import Turns
from refault.daemon.kept import recorder
from refault.daemon.kept.journal import Journal
from refault.daemon.kept.lot import Lot
from refault.daemon.kept.taken import end_unclaimed, holder_of, release, why_anothers
from refault.daemon.monitor import clients, keeper, upstream
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.listener import ListenError
from refault.daemon.monitor.monitor import Monitor

VERSION = b'{"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}'
NOT_REVIEWED = b'{"execute": "not-reviewed", "arguments": {"a": 1}}'
REAL_PAIR = socket.socketpair
GREETING = b'{"QMP": {"version": %s, "capabilities": ["oob"]}}\r\n' % VERSION


class Qemu:
    """Takes one client at a time; is this very process, which has all that it is passed."""

    def __init__(self, path: Path) -> None:
        self.may_greet, self.may_take, self.may_close = trio.Event(), trio.Event(), trio.Event()
        self.refuses = -1
        """Which getfd, from 0."""
        self.returns: str | None = None
        """What it answers to commands that it does not know; None: nothing."""
        self.asked: list[str] = []
        self.has: dict[str, int] = {}
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(1)
        self._listening.setblocking(False)

    async def run(self) -> None:
        with self._listening:
            while True:
                await self._take()

    async def _take(self) -> None:
        await trio.lowlevel.wait_readable(self._listening)
        sock, _ = self._listening.accept()
        try:
            with sock:
                sock.setblocking(False)
                await self._serve(sock)
        finally:
            for fd in self.has.values():
                os.close(fd)
            self.has.clear()

    async def _serve(self, sock: socket.socket) -> None:
        await self.may_greet.wait()
        with contextlib.suppress(BrokenPipeError):  # who came has given up
            sock.send(GREETING)
        decoder, text = json.JSONDecoder(), ""
        fds: list[int] = []
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                data, came, _, _ = socket.recv_fds(sock, 65536, 1)
            except ConnectionResetError:
                return
            if not data:
                return
            fds += came
            text = (text + data.decode()).lstrip()
            while text:
                command, end = decoder.raw_decode(text)
                text = text[end:].lstrip()
                reply = json.dumps({**await self._do(command, fds), "id": command["id"]}).encode() + b"\r\n"
                with contextlib.suppress(BrokenPipeError):  # nobody reads it
                    while reply:
                        await trio.lowlevel.wait_writable(sock)
                        reply = reply[sock.send(reply) :]

    async def _do(self, command: dict[str, dict[str, str]], fds: list[int]) -> dict[str, object]:
        name = str(command["execute"])
        self.asked.append(name)
        if name == "getfd":
            await self.may_take.wait()
            fd = fds.pop()
            if self.asked.count(name) - 1 == self.refuses:
                os.close(fd)
                return {"error": {"class": "GenericError", "desc": "it has enough"}}
            self.has[command["arguments"]["fdname"]] = fd
        elif name == "closefd":
            await self.may_close.wait()
            fd = self.has.pop(command["arguments"]["fdname"], -1)
            if fd < 0:
                return {"error": {"class": "GenericError", "desc": "there is none"}}
            os.close(fd)
        elif name == "not-reviewed" and self.returns is not None:
            return {"return": self.returns}
        return {"return": {}}


@asynccontextmanager
async def qemu_at(path: Path, **is_: object) -> AsyncIterator[Qemu]:
    qemu = Qemu(path)
    vars(qemu).update(is_)
    for each in {"may_greet", "may_take"} - is_.keys():
        getattr(qemu, each).set()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qemu.run)
            yield qemu
            nursery.cancel_scope.cancel()


async def until(look: Callable[[], bool]) -> None:
    while not look():
        await trio.sleep(0.001)


def monitor(directory: Path, *fronts: str) -> Monitor:
    listen = [Address(str(directory / front), server=True) for front in fronts]
    return Monitor("vm", Address(str(directory / "qemu")), listen, journal=directory / "vm.clients")


async def kept(made: Monitor) -> None:
    await until(lambda: made.kept[0])


async def negotiates(client: trio.SocketStream) -> None:
    """Whether it is served."""
    await client.send_all(b'{"execute": "qmp_capabilities"}')
    assert await client.receive_some() == b'{"return": {}}\r\n'


async def greeted(path: Path) -> trio.SocketStream:
    """Who comes to a front and is greeted."""
    client = await trio.open_unix_socket(str(path))
    assert b"QMP" in await client.receive_some()
    return client


async def left_behind(directory: Path) -> trio.SocketStream:
    """A client of a refault that has ended, and whose next one is to go on."""
    first = monitor(directory, "front")
    async with trio.open_nursery() as nursery:
        await nursery.start(first.run)
        await kept(first)
        client = await greeted(directory / "front")
        first.hand_over()
        nursery.cancel_scope.cancel()
    return client


async def left_to_manager(directory: Path, manager: Manager) -> trio.SocketStream:
    """The same, where that has just been handed what it left."""
    client = await left_behind(directory)
    manager.look()
    manager.start()
    return client


async def test_a_client_waits_for_a_qemu_that_greets_late(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = monitor(tmp_path, "front")
    async with qemu_at(tmp_path / "qemu", may_greet=trio.Event()) as qemu, trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await until((tmp_path / "front").exists)
        async with await trio.open_unix_socket(str(tmp_path / "front")) as client:
            await until(lambda: made.clients == 1)
            qemu.may_greet.set()
            assert b"QMP" in await client.receive_some()
        await kept(made)
        nursery.cancel_scope.cancel()
    assert "internal error" not in caplog.text


async def test_who_has_come_and_left_is_no_client_any_more(tmp_path: Path) -> None:
    made = monitor(tmp_path, "front")
    async with qemu_at(tmp_path / "qemu"), trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await kept(made)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "front"))
        async with await greeted(tmp_path / "front"):
            assert made.clients_total == 2
            assert made._core.last_client == 1
        nursery.cancel_scope.cancel()


async def test_what_qemu_has_is_known_until_it_has_it_no_more(tmp_path: Path) -> None:
    """It takes our end of its monitor, and nothing else."""
    made = monitor(tmp_path, "front")
    async with qemu_at(tmp_path / "qemu", refuses=1) as qemu, trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await until(lambda: "closefd" in qemu.asked)
        assert made.kept == (False, "it has enough")
        assert len(qemu.has) == 1
        assert (tmp_path / "vm.clients").exists()
        qemu.may_close.set()
        await until(lambda: not (tmp_path / "vm.clients").exists())
        assert not qemu.has
        nursery.cancel_scope.cancel()


async def test_who_lets_go_waits_until_qemu_has(tmp_path: Path) -> None:
    made = monitor(tmp_path, "front")
    async with qemu_at(tmp_path / "qemu") as qemu, trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await kept(made)
        nursery.start_soon(made.let_go)
        await until(lambda: "closefd" in qemu.asked)
        assert len(qemu.has) == 5
        assert (tmp_path / "vm.clients").exists()
        qemu.may_close.set()
        await until(lambda: not (tmp_path / "vm.clients").exists())
        assert not qemu.has
        nursery.cancel_scope.cancel()


async def test_a_qemu_that_does_not_answer_lets_go_when_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of what it is yet to take."""
    monkeypatch.setattr(keeper, "RELEASE_TIMEOUT", 0.01)
    made = monitor(tmp_path, "front")
    async with qemu_at(tmp_path / "qemu", may_take=trio.Event()) as qemu:
        qemu.may_close.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.run)
            await until(lambda: "getfd" in qemu.asked)
            await made.let_go()
            nursery.cancel_scope.cancel()
        assert not (tmp_path / "vm.clients").exists()
        qemu.may_take.set()
        await until(lambda: qemu.asked.count("closefd") == 5)
        async with await trio.open_unix_socket(str(tmp_path / "qemu")) as other:  # its monitor is free
            assert b"QMP" in await other.receive_some()
        assert not qemu.has


async def test_a_start_that_fails_leaves_clients_to_the_next(tmp_path: Path) -> None:
    async with qemu_at(tmp_path / "qemu"):
        client = await left_behind(tmp_path)
        with socket.socket(socket.AF_UNIX) as taken:
            taken.bind(str(tmp_path / "taken"))
            taken.listen()
            with pytest.raises(ListenError):
                await monitor(tmp_path, "front", "taken").run()
        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(monitor(tmp_path, "front").run)
            await negotiates(client)
            nursery.cancel_scope.cancel()


async def test_clients_are_kept_over_any_number_of_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients leave meanwhile, too, and what they had is cleared away: the place changes with that."""
    monkeypatch.setattr(socket, "socketpair", short_pair)
    async with qemu_at(tmp_path / "qemu"), await left_behind(tmp_path) as client:
        for _ in range(20):
            restarted = monitor(tmp_path, "front")
            async with trio.open_nursery() as nursery:
                await nursery.start(restarted.run)
                await negotiates(client)
                leaves = await greeted(tmp_path / "front")
                restarted.hand_over()
                nursery.cancel_scope.cancel()
            await leaves.aclose()


def short_pair(family: int, kind: int) -> tuple[socket.socket, socket.socket]:
    """With room for a few messages."""
    pair = REAL_PAIR(family, kind)
    for each in pair:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    return pair


async def test_what_a_qemu_holds_that_may_not_be_looked_at_waits_for_who_may(tmp_path: Path) -> None:
    """As where a unit with ProtectProc= has lost CAP_SYS_PTRACE: QEMU seems to have ended."""
    async with qemu_at(tmp_path / "qemu"):
        client = await left_behind(tmp_path)
        with hidden():
            told = f"QEMU, process {os.getpid()}, holds its monitor .* CAP_SYS_PTRACE"
            with pytest.raises(OperatorError, match=told + ".*: refault release vm"):
                await monitor(tmp_path, "front").run()
            with pytest.raises(OperatorError, match=told):
                release(tmp_path / "vm.clients")
            elsewhere = why_anothers(tmp_path / "vm.clients", "unix:/elsewhere")
            assert elsewhere is not None
            assert "still runs" in elsewhere
        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(monitor(tmp_path, "front").run)
            await negotiates(client)
            nursery.cancel_scope.cancel()


async def test_what_qemu_comes_to_hold_behind_the_end_of_refault_is_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It had been told to, and had not read that when the next one looked."""
    monkeypatch.setattr(upstream, "_GREETING_TIMEOUT", 0.2)
    async with qemu_at(tmp_path / "qemu") as qemu:
        first = monitor(tmp_path, "front")
        unread, qemus = socket.socketpair()
        with unread, qemus:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first.run)
                await kept(first)
                journal = (tmp_path / "vm.clients").read_bytes()
                socket.send_fds(unread, [b"getfd"], list(qemu.has.values())[:1])
                first.hand_over()
                nursery.cancel_scope.cancel()
            for fd in qemu.has.values():
                os.close(fd)
            qemu.has.clear()
            (tmp_path / "vm.clients").write_bytes(journal)
            second = monitor(tmp_path, "front")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(second.run)
                await until(lambda: "cannot go on" in caplog.text)
                _, [read], _, _ = socket.recv_fds(qemus, 5, 1)
                await kept(second)
                os.close(read)
                nursery.cancel_scope.cancel()


async def test_who_gives_up_waits_until_qemu_has_let_go_and_asks_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked anew, a QEMU that answers late would come to hold more and more."""
    monkeypatch.setattr(keeper, "RELEASE_TIMEOUT", 0.05)
    monkeypatch.setattr(keeper, "_ASK_AGAIN", 0.0)
    made = monitor(tmp_path, "front")
    secret = b'{"execute": "x", "arguments": {"password": "hush-hush"}}'
    async with qemu_at(tmp_path / "qemu") as qemu, trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await kept(made)
        async with await trio.open_unix_socket(str(tmp_path / "front")) as client:
            await client.receive_some()
            (tmp_path / "vm.clients.new").mkdir()  # nothing can be written down anew
            await client.send_all(b'{"execute": "qmp_capabilities"}' + secret)
            await until(lambda: made.kept == (False, "what clients do cannot be written down"))
            await until(lambda: "closefd" in qemu.asked)
            data = (tmp_path / "vm.clients").read_bytes()
            assert b"hush-hush" not in data
            assert holder_of(tmp_path / "vm.clients") == os.getpid()
            (tmp_path / "vm.clients.new").rmdir()
            await trio.sleep(0.06)  # for as long as an end for good waits
            async with await trio.open_unix_socket(str(tmp_path / "front")) as other:
                await other.receive_some()
                await until(lambda: made.clients == 2)
        assert len(qemu.has) == 5
        assert qemu.asked.count("getfd") == 5
        qemu.may_close.set()
        await until(lambda: not qemu.has)
        await until(lambda: not (tmp_path / "vm.clients").exists())
        nursery.cancel_scope.cancel()


async def test_what_qemu_has_not_read_yet_is_not_freed_for_good(tmp_path: Path) -> None:
    journal = tmp_path / "vm.clients"
    async with qemu_at(tmp_path / "qemu") as qemu:
        first = monitor(tmp_path, "front")
        unread, qemus = socket.socketpair()
        with unread, qemus:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first.run)
                await kept(first)
                was = journal.read_bytes()
                [upstream, *_] = qemu.has.values()
                socket.send_fds(unread, [b"getfd"], [upstream])
                first.hand_over()
                nursery.cancel_scope.cancel()
            for fd in qemu.has.values():
                os.close(fd)
            qemu.has.clear()
            with pytest.raises(OperatorError, match="has not read yet"):
                release(journal)
            assert journal.read_bytes() == was
            _, [read], _, _ = socket.recv_fds(qemus, 5, 1)
            assert release(journal) == (os.getpid(), 1)
            assert not journal.exists()
            os.close(read)
            journal.write_bytes(was)
            journal.with_name("vm.clients.new").write_bytes(b"half")
            assert release(journal) == (os.getpid(), 0)  # nobody has it any more
            assert [each for each in os.listdir(tmp_path) if "clients" in each] == []


async def test_no_more_is_kept_than_leaves_qemus_of_the_same_user_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel counts what is in flight by users."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(keeper, "file_limit", lambda _: 2 * (Lot.in_flight + 3))
    monkeypatch.setattr(keeper, "user_of", lambda _: 7)
    monkeypatch.setattr(os, "getuid", lambda: 7)
    made = monitor(tmp_path, "front")
    async with qemu_at(tmp_path / "qemu"), trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await kept(made)
        async with AsyncExitStack() as clients:
            for turn in range(4):
                await clients.enter_async_context(await greeted(tmp_path / "front"))
                assert ("able to pass descriptors" in caplog.text) == (turn >= 2)
        nursery.cancel_scope.cancel()


async def negotiated(path: Path) -> trio.SocketStream:
    """A client of the monitor there."""
    client = await greeted(path)
    await negotiates(client)
    return client


async def test_a_secret_that_its_client_reads_late_is_forgotten_when_it_has_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply goes on record anew as its command is forgotten, for it is unsent."""
    monkeypatch.setattr(recorder.Recorder, "rests", 0.0)
    journal = tmp_path / "vm.clients"
    made = monitor(tmp_path, "front")
    async with (
        qemu_at(tmp_path / "qemu", returns="hush-hush" + 400_000 * "-"),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(made.run)
        await kept(made)
        async with await negotiated(tmp_path / "front") as client:
            await client.send_all(NOT_REVIEWED)
            await until(lambda: b"hush-hush" in journal.read_bytes())
            read = b""
            while not read.endswith(b"\r\n"):
                read += await client.receive_some()
            assert b"hush-hush" in read
            await until(lambda: b"hush-hush" not in journal.read_bytes())
        async with await negotiated(tmp_path / "front") as client:
            await client.send_all(NOT_REVIEWED)
            await until(lambda: b"hush-hush" in journal.read_bytes())
        await until(lambda: b"hush-hush" not in journal.read_bytes())  # nor where it never reads it
        nursery.cancel_scope.cancel()


async def test_what_is_no_command_at_all_is_not_written_down_anew_with_every_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a secret, and who says nothing else is not to have the event loop write files."""
    journal, begun = tmp_path / "vm.clients", 0
    begin = Journal.begin

    def counted(journal: Journal, before: bytes) -> None:
        nonlocal begun
        begun += 1
        begin(journal, before)

    monkeypatch.setattr(Journal, "begin", counted)
    made = monitor(tmp_path, "front")
    async with qemu_at(tmp_path / "qemu"), trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await kept(made)
        async with await negotiated(tmp_path / "front") as client:
            before, since = begun, time.perf_counter()
            for turn in range(200):
                await client.send_all(b'[%d, "hush-hush"]' % turn)
                assert b"error" in await client.receive_some()
            most = recorder._OFTEN * (1 + (time.perf_counter() - since) / recorder._WITHIN)
            assert begun - before <= most
            await until(lambda: b"hush-hush" not in journal.read_bytes())
        nursery.cancel_scope.cancel()


async def test_much_that_clients_do_not_read_is_not_written_down_anew_with_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    took: list[float] = []
    begin = Journal.begin

    def slow(journal: Journal, before: bytes) -> None:
        started = time.perf_counter()
        begin(journal, before)
        if len(before) > 1 << 20:
            time.sleep(0.01)  # as with thirty such clients
        begun.append(len(before))
        took.append(time.perf_counter() - started)

    monkeypatch.setattr(Journal, "begin", slow)
    made = monitor(tmp_path, "front")
    async with qemu_at(tmp_path / "qemu") as qemu, trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await kept(made)
        async with await negotiated(tmp_path / "front") as late, await negotiated(tmp_path / "front") as busy:
            qemu.returns = 2_000_000 * "-"
            await late.send_all(NOT_REVIEWED)
            await until(lambda: begun[-1] > 1 << 20)
            qemu.returns = None
            before, since = len(begun), time.perf_counter()
            for _ in range(100):
                await busy.send_all(NOT_REVIEWED)
                assert await busy.receive_some() == b'{"return": {}}\r\n'
            secret = b'{"execute": "not-reviewed", "arguments": {"a": "hush-hush"}}'
            await busy.send_all(secret)
            await busy.receive_some()
            await until(lambda: b"hush-hush" not in (tmp_path / "vm.clients").read_bytes())
            # It rests after each: the last one, and that in which the secret goes, need not be over by now.
            assert recorder._RESTS * sum(took[before:-2]) <= time.perf_counter() - since
        nursery.cancel_scope.cancel()


async def test_what_a_client_has_not_read_is_sent_to_it_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be megabytes, and clients of other VMs wait meanwhile."""
    begun = 0

    class Counted(Turns):
        @staticmethod
        def begin() -> float:
            nonlocal begun
            begun += 1
            return Turns.begin()

    monkeypatch.setattr(clients, "Turns", Counted)
    made = monitor(tmp_path, "front")
    async with qemu_at(tmp_path / "qemu", returns=4_000_000 * "-"), trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await kept(made)
        async with await negotiated(tmp_path / "front") as client:
            await client.send_all(NOT_REVIEWED)
            await until(lambda: any(each.unsent > 1 << 20 for each in made._core.clients.values()))
            before, read = begun, b""
            while not read.endswith(b"\r\n"):
                read = await client.receive_some()
            assert begun - before >= 2
        nursery.cancel_scope.cancel()


async def test_what_is_received_is_received_in_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is begun anew there, once there is enough in it."""
    said: list[str] = []
    receive = recorder.Recorder.receive

    class Told(Turns):
        @staticmethod
        def begin() -> float:
            said.append("begin")
            return Turns.begin()

    def received(
        self: recorder.Recorder, sock: socket.socket, who: int, most: int, *, takes: bool
    ) -> tuple[bytes, int]:
        said.append("receive")
        return receive(self, sock, who, most, takes=takes)

    monkeypatch.setattr(clients, "Turns", Told)
    monkeypatch.setattr(upstream, "Turns", Told)
    monkeypatch.setattr(recorder.Recorder, "receive", received)
    made = monitor(tmp_path, "front")
    async with qemu_at(tmp_path / "qemu"), trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await kept(made)
        async with await negotiated(tmp_path / "front"):
            pass
        assert said.count("receive") > 2
        assert all(said[at - 1] == "begin" for at, each in enumerate(said) if each == "receive")
        nursery.cancel_scope.cancel()


async def test_a_client_that_leaves_as_the_connection_to_qemu_ends_starts_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of the two a cancellation ends first is the event loop's choice."""
    monkeypatch.setattr(recorder.Recorder, "rests", 1.0)  # it is written down anew later
    made = monitor(tmp_path, "front")
    async with qemu_at(tmp_path / "qemu") as qemu:
        qemu.may_close.set()
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(made.run)
                await kept(made)
                async with await negotiated(tmp_path / "front"):
                    made._core.spent = True
                    nursery.cancel_scope.cancel()
            made.renew()


class Manager:
    """As systemd keeps descriptors for a service."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has: dict[str, int] = {}
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        monkeypatch.setenv("FDSTORE", "5")
        monkeypatch.setattr(fd_store, "_names", set())
        monkeypatch.setattr(fd_store, "_over", [])
        self._monkeypatch = monkeypatch

    def look(self) -> set[str]:
        """Does what it was told; the names of what it has."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, fds, _, _ = socket.recv_fds(self.sock, 4096, 1)
                told = dict(line.split("=") for line in data.decode().splitlines())
                if "FDSTORE" in told:
                    assert told["FDPOLL"] == "0"
                    [self.has[told["FDNAME"]]] = fds
                elif "FDSTOREREMOVE" in told:
                    os.close(self.has.pop(told["FDNAME"]))
        return set(self.has)

    def fill(self) -> None:
        """Has no room in its queue, until it looks."""
        with contextlib.suppress(BlockingIOError):
            while True:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                    sender.setblocking(False)
                    sender.sendto(b"WATCHDOG=1", self.sock.getsockname())

    def start(self) -> None:
        """Hands what it has to the next process of the service."""
        for number, fd in enumerate(self.has.values(), 500):
            os.dup2(fd, number)
        for name, value in (("PID", os.getpid()), ("FDS", len(self.has)), ("FDNAMES", ":".join(self.has))):
            self._monkeypatch.setenv(f"LISTEN_{name}", str(value))
        handed.adopt(first=500)

    def close(self) -> None:
        """It stops the service."""
        self.look()
        for fd in self.has.values():
            os.close(fd)
        self.sock.close()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """And a QEMU out of whose process nothing can be taken."""

    def may_not(pid: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(keeper, "may_take", may_not)
    manager = Manager(tmp_path / "manager", monkeypatch)
    yield manager
    manager.close()


async def test_where_nothing_can_be_taken_from_qemu_the_service_manager_keeps_connections(
    tmp_path: Path, manager: Manager
) -> None:
    async with qemu_at(tmp_path / "qemu") as qemu:
        client, second = await left_behind(tmp_path), monitor(tmp_path, "front")
        assert len(manager.look()) == 5
        manager.start()
        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(second.run)
            await negotiates(client)
            assert handed.unclaimed() == []
            assert len(manager.look()) == 5
            await second.let_go()
            assert manager.look() == set()
            assert [each for each in os.listdir(tmp_path) if "clients" in each] == []
            nursery.cancel_scope.cancel()
        assert "getfd" not in qemu.asked


async def test_a_manager_whose_queue_is_full_is_told_again(
    tmp_path: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is over is removed with the next."""
    monkeypatch.setattr(keeper, "_ASK_AGAIN", 0.0)
    async with qemu_at(tmp_path / "qemu"), trio.open_nursery() as nursery:
        manager.fill()
        made = monitor(tmp_path, "front")
        await nursery.start(made.run)
        await until(lambda: made._keeper.upstream is not None or made.kept[1] is not None)
        assert made.kept == (False, None)
        await until(lambda: len(manager.look()) == 5)
        await kept(made)
        manager.fill()
        await made.let_go()
        first = manager.look().copy()
        assert len(first) == 5
        made._inheritance.keep()
        await until(lambda: len(manager.look() - first) == len(manager.has) == 5)
        await kept(made)
        nursery.cancel_scope.cancel()


async def test_more_than_the_manager_has_room_for_is_not_said_to_be_kept(
    tmp_path: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FDSTORE", "4")
    made = monitor(tmp_path, "front")
    async with qemu_at(tmp_path / "qemu"), trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        await until(lambda: made.kept[1] is not None)
        assert made.kept == (False, "systemd keeps 4 descriptors and no more (FileDescriptorStoreMax=)")
        assert manager.look() == set()
        nursery.cancel_scope.cancel()


async def test_a_qemu_that_has_ended_is_seen_by_who_comes_to_what_the_manager_keeps(
    tmp_path: Path, manager: Manager
) -> None:
    async with qemu_at(tmp_path / "qemu"):
        client = await left_behind(tmp_path)
    manager.look()
    manager.start()
    async with client, trio.open_nursery() as nursery:
        nursery.start_soon(monitor(tmp_path, "front").run)
        assert await client.receive_some() == b""
        await until(lambda: manager.look() == set())
        nursery.cancel_scope.cancel()


async def test_a_start_that_fails_leaves_what_the_manager_keeps_to_the_next(
    tmp_path: Path, manager: Manager
) -> None:
    async with qemu_at(tmp_path / "qemu"):
        client = await left_to_manager(tmp_path, manager)
        with socket.socket(socket.AF_UNIX) as taken:
            taken.bind(str(tmp_path / "taken"))
            taken.listen()
            with pytest.raises(ListenError):
                await monitor(tmp_path, "front", "taken").run()
            assert end_unclaimed() == 0  # it is tried again
        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(monitor(tmp_path, "front").run)
            await negotiates(client)
            assert handed._stored == {}
            nursery.cancel_scope.cancel()


async def test_what_the_manager_keeps_for_a_vm_whose_qemu_is_at_another_address_is_left_alone(
    tmp_path: Path, manager: Manager
) -> None:
    """As is what QEMU holds."""
    async with qemu_at(tmp_path / "qemu"), qemu_at(tmp_path / "other"):
        client = await left_to_manager(tmp_path, manager)
        other = Monitor("vm", Address(str(tmp_path / "other")), [], journal=tmp_path / "vm.clients")
        async with trio.open_nursery() as nursery:
            await nursery.start(other.run)
            on, why = other.kept
            assert not on
            assert "clients wait for a refault" in str(why)
            assert end_unclaimed() == 0
            nursery.cancel_scope.cancel()
        async with client, trio.open_nursery() as nursery:
            nursery.start_soon(monitor(tmp_path, "front").run)
            await negotiates(client)
            nursery.cancel_scope.cancel()


async def test_what_the_manager_kept_for_a_vm_is_over_where_its_qemu_has_ended_and_another_is_wanted(
    tmp_path: Path, manager: Manager
) -> None:
    async with qemu_at(tmp_path / "qemu"):
        client = await left_to_manager(tmp_path, manager)
    async with client, qemu_at(tmp_path / "other"):
        other = Monitor("vm", Address(str(tmp_path / "other")), [], journal=tmp_path / "vm.clients")
        async with trio.open_nursery() as nursery:
            await nursery.start(other.run)
            await kept(other)
            assert await client.receive_some() == b""
            nursery.cancel_scope.cancel()


async def test_clients_who_come_to_a_socket_of_another_process_are_not_kept_by_the_manager(
    tmp_path: Path, manager: Manager
) -> None:
    """The next refault could not have that again where nothing can be taken out of a process."""
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(tmp_path / "theirs"))
        theirs.listen()
        listen = [Address(str(tmp_path / "theirs"), server=True, fd=theirs.fileno())]
        made = Monitor("vm", Address(str(tmp_path / "qemu")), listen, journal=tmp_path / "vm.clients")
        async with qemu_at(tmp_path / "qemu"), trio.open_nursery() as nursery:
            nursery.start_soon(made.run)
            await until(lambda: made.kept[1] is not None)
            assert made.kept == (False, "Operation not permitted")
            assert manager.look() == set()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("journal", ["torn", "gone"])
async def test_what_the_manager_keeps_and_nobody_can_go_on_with_is_ended(
    tmp_path: Path, manager: Manager, journal: str
) -> None:
    path = tmp_path / "vm.clients"
    async with qemu_at(tmp_path / "qemu"):
        client = await left_to_manager(tmp_path, manager)
        handed.claim_stored(handed.unclaimed())  # another process is handed nothing
        with pytest.raises(OperatorError, match="systemctl stop"):
            release(path)
        manager.start()
        if journal == "torn":
            path.write_bytes(path.read_bytes().replace(b"\xa50.1.0", b"\xa50.0.9"))
        else:
            path.unlink()
        async with client:
            assert end_unclaimed() >= 3
            assert await client.receive_some() == b""
        assert manager.look() == set()
