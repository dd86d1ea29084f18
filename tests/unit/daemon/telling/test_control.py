"""The control socket, over real sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from tests.unit.daemon.pictures import BUSY, PICTURE

from refault.daemon.host.errors import OperatorError
from refault.daemon.host.paths import make_again, make_default_directory
from refault.daemon.host.turns import BURST, SHARE
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.address_text import parse_address
from refault.daemon.telling import control
from refault.daemon.telling.snapshot import Status, encode


@asynccontextmanager
async def serving(path: Path, status: Status = PICTURE, options: str = "") -> AsyncIterator[None]:
    address = parse_address(f"unix:{path}{options}", server=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(control.serve_control, address, lambda: status)
        yield
        nursery.cancel_scope.cancel()


async def ask(path: Path) -> Status:
    return await trio.to_thread.run_sync(control.query, path, 5.0)


@contextlib.contextmanager
def listening(path: Path, *, backlog: int = 8) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        server.listen(backlog)
        yield server


async def test_tells_the_status_to_its_own_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "vm.control"
    async with serving(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert await ask(path) == PICTURE
        assert await ask(path) == PICTURE
    assert not path.exists()


async def test_who_asks_on_a_busy_host_is_told_however_long_the_making_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_ANSWER_SECONDS", 0.2)
    path = tmp_path / "vm.control"

    def slices() -> Iterator[None]:
        for _ in range(3):
            time.sleep(0.2)
            yield

    async with trio.open_nursery() as nursery:
        address = parse_address(f"unix:{path}", server=True)
        await nursery.start(control.serve_control, address, lambda: PICTURE, slices)
        assert await ask(path) == PICTURE
        nursery.cancel_scope.cancel()


async def test_a_document_longer_than_the_socket_holds_arrives_whole(tmp_path: Path) -> None:
    status = Status(vms=(BUSY,) * 3000)
    assert len(encode(status)) > 1 << 20
    async with serving(tmp_path / "vm.control", status):
        assert await ask(tmp_path / "vm.control") == status


async def test_a_peer_that_does_not_read_keeps_no_one_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_ANSWER_SECONDS", 0.2)
    path = tmp_path / "vm.control"
    status = Status(vms=(BUSY,) * 3000)
    async with serving(path, status):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as slow:
            slow.settimeout(20)
            slow.connect(str(path))
            received = len(await trio.to_thread.run_sync(slow.recv, 1))
            monkeypatch.setattr(control, "_ANSWER_SECONDS", 5.0)
            with trio.fail_after(9):
                assert await ask(path) == status
            await trio.sleep(0.4)
            while chunk := await trio.to_thread.run_sync(slow.recv, 65536):
                received += len(chunk)
            assert received < len(encode(status))  # it was given up


async def test_a_peer_that_leaves_at_once_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "vm.control"
    async with serving(path, Status(vms=(BUSY,) * 3000)):
        for _ in range(5):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
                peer.connect(str(path))
        assert len((await ask(path)).vms) == 3000


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
@pytest.mark.parametrize(
    ("options", "mode", "may"),
    [
        ("", 0o600, False),
        (",allow-user=4242", 0o666, False),
        (",allow-user=65534", 0o666, True),
        (",allow-group=65534", 0o666, True),
        (",mode=0666", 0o666, True),
        (",mode=0666,allow-group=4242", 0o666, False),
    ],
)
async def test_which_other_users_are_told(
    options: str, mode: int, may: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with tempfile.TemporaryDirectory() as directory:  # tmp_path lets no other user in
        path = Path(directory) / "vm.control"
        os.chmod(directory, 0o755)
        async with serving(path, options=options):
            assert stat.S_IMODE(path.stat().st_mode) == mode
            path.chmod(0o666)  # the credentials alone must do
            connect = ["socat", "-u", f"UNIX-CONNECT:{path}", "STDOUT"]
            told = await trio.run_process(connect, user=65534, group=65534, capture_stdout=True)
            assert told.stdout == (encode(PICTURE) if may else b"")
            told = await trio.run_process(connect, capture_stdout=True)
            assert told.stdout == encode(PICTURE)
    assert ("uid 65534" in caplog.text) == (not may)


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "vm.control"
    with listening(path):
        pass
    assert path.is_socket()
    async with serving(path):
        assert await ask(path) == PICTURE


@pytest.mark.parametrize("backlog", [8, 0])
async def test_a_live_socket_is_not(tmp_path: Path, backlog: int) -> None:
    path = tmp_path / "vm.control"
    with listening(path, backlog=backlog), socket.socket(socket.AF_UNIX) as first:
        first.connect(str(path))  # with a backlog of 0 the queue is full now
        with pytest.raises(OperatorError, match="listens there already"):
            await control.serve_control(Address(str(path)), lambda: PICTURE)
        assert path.is_socket()


@pytest.mark.parametrize(
    "name", ["missing/vm.control", "x" * 120, "file"], ids=["no directory", "too long", "no socket"]
)
async def test_what_cannot_be_bound_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OperatorError, match=r"\Acannot listen on [^\n]*--control\)\Z"):
        await control.serve_control(Address(str(tmp_path / name)), lambda: PICTURE)
    assert (tmp_path / "file").read_text() == "precious"


async def test_the_successors_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "vm.control"
    async with serving(path):
        path.rename(tmp_path / "old")  # else the inode could be used again at once
        with listening(path):
            pass
    assert path.is_socket()


def answering(path: Path, document: bytes) -> threading.Thread:
    """A daemon that says `document` to one peer."""

    def serve(server: socket.socket) -> None:
        with server, server.accept()[0] as peer:
            peer.sendall(document)

    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))
    server.listen()
    thread = threading.Thread(target=serve, args=(server,))
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("document", "told"),
    [(b"", "told nothing; be root"), (b"{", "told no status"), (b'{"QMP": {}, "vms": 1}', "told no status")],
)
def test_query_names_what_is_no_status(tmp_path: Path, document: bytes, told: str) -> None:
    thread = answering(tmp_path / "s", document)
    with pytest.raises(OperatorError, match=told):
        control.query(tmp_path / "s", 5.0)
    thread.join(5)


def test_query_of_no_daemon_says_so(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"no daemon answers at .*/gone: No such file.*; is .* running"):
        control.query(tmp_path / "gone", 5.0)


def test_a_name_that_no_file_can_have_is_one_error(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    with pytest.raises(OperatorError, match=r"no daemon answers at .*too long"):
        control.query(long, 5.0)
    with pytest.raises(OperatorError, match="File name too long"):
        make_default_directory(long)
    make_again(long)


def test_query_of_a_silent_daemon_ends(tmp_path: Path) -> None:
    with listening(tmp_path / "s"), pytest.raises(OperatorError, match=r"gave no answer in 0\.1 s"):
        control.query(tmp_path / "s", 0.1)


async def test_who_asks_without_end_has_pictures_made_for_a_share_of_the_loop(tmp_path: Path) -> None:
    """And each is told one that was made after he had asked."""
    path, made, spent, told = tmp_path / "vm.control", 0, 0.0, 0

    def picture() -> Status:
        nonlocal made, spent
        made += 1
        began = time.thread_time()
        while time.thread_time() - began < 0.02:  # as of a hundred VMs on a busy host
            pass
        spent += time.thread_time() - began
        return Status(vms=(), log_lines_dropped=made)

    async def floods() -> None:
        nonlocal told
        while made < 6:
            before = made
            assert (await ask(path)).log_lines_dropped > before
            told += 1

    async with trio.open_nursery() as nursery:
        await nursery.start(control.serve_control, parse_address(f"unix:{path}", server=True), picture)
        began = time.perf_counter()
        async with trio.open_nursery() as asking:
            for _ in range(8):
                asking.start_soon(floods)
        assert made <= told / 2  # not for each of them
        assert spent <= (SHARE + 0.1) * (time.perf_counter() - began) + BURST + 0.04
        nursery.cancel_scope.cancel()


async def test_who_has_left_by_then_has_no_picture_made(tmp_path: Path) -> None:
    path, made = tmp_path / "vm.control", 0

    def picture() -> Status:
        nonlocal made
        made += 1
        return PICTURE

    async with trio.open_nursery() as nursery:
        await nursery.start(control.serve_control, parse_address(f"unix:{path}", server=True), picture)
        for _ in range(5):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(path))
        assert await ask(path) == PICTURE
        assert made == 1
        nursery.cancel_scope.cancel()


async def test_others_have_their_turn_while_a_picture_is_made(tmp_path: Path) -> None:
    path, turns, seen = tmp_path / "vm.control", 0, []

    def slices() -> Iterator[None]:
        for _ in range(5):
            seen.append(turns)
            yield
        seen.append(turns)

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    address = parse_address(f"unix:{path}", server=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(control.serve_control, address, lambda: PICTURE, slices)
        nursery.start_soon(other)
        assert await ask(path) == PICTURE
        # Tasks take turns in any order.
        assert all(later > before for before, later in zip(seen, seen[2:], strict=False))
        nursery.cancel_scope.cancel()
