"""Private unix sockets: who is let in, and when the other side has accepted."""

import errno
import os
import socket
import sys
from pathlib import Path

import pytest
import trio

from refault.daemon.kernel import unix_diag
from refault.daemon.kernel.peer import Peer
from refault.daemon.kernel.unix_diag import peer_inode
from refault.daemon.near.local_unix import PrivateSockets, may_be

OURSELVES = Peer(os.getpid(), os.getuid())


@pytest.fixture
def sockets(tmp_path: Path) -> PrivateSockets:
    made = PrivateSockets(tmp_path / "vm.legs", OURSELVES)
    made.make()
    return made


def test_the_directory_is_qemus_alone(sockets: PrivateSockets) -> None:
    assert sockets.directory.stat().st_mode & 0o777 == 0o700
    Path(sockets.path("old")).touch()
    sockets.make()
    assert not list(sockets.directory.iterdir())
    assert sockets.path() != sockets.path()


@pytest.mark.parametrize(
    ("peer", "same"),
    [
        (Peer(7, 100), True),
        (Peer(8, 100), False),
        (Peer(None, 100), True),  # of another pid namespace
        (Peer(None, 101), False),
    ],
)
def test_who_may_be_our_qemu(peer: Peer, same: bool) -> None:
    assert may_be(peer, Peer(7, 100)) is same


async def test_a_stranger_at_our_socket_is_turned_away(sockets: PrivateSockets) -> None:
    listening = sockets.listen()
    connect = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(1))"
    accepted = []

    async def accept() -> None:
        accepted.append(await listening.accept())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        stranger = await trio.run_process(
            [sys.executable, "-c", connect, listening.path], capture_stdout=True
        )
        assert stranger.stdout == b"b''\n"
        assert not accepted
        with socket.socket(socket.AF_UNIX) as ours:
            ours.connect(listening.path)
            with trio.fail_after(9):
                while not accepted:
                    await trio.sleep(0.001)
    accepted[0].close()
    listening.close()
    assert not list(sockets.directory.iterdir())


def connecting(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


async def waiting(path: str, told: list[object]) -> None:
    try:
        told.append(await trio.to_thread.run_sync(connecting, path))
    except OSError as error:
        told.append(error)


@pytest.mark.parametrize("let_in", [True, False])
async def test_who_comes_to_one_that_is_shut_waits_until_it_is_opened_or_refuses(
    sockets: PrivateSockets, let_in: bool
) -> None:
    listening = sockets.listen(shut=True)
    told: list[object] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(waiting, listening.path, told)
            await trio.sleep(0.2)
            assert not told
            if let_in:
                listening.open()
                accepted = [await listening.accept() for _ in range(3)]
            else:
                listening.refuse()
                accepted = []
    for end in told:
        if let_in:
            assert isinstance(end, socket.socket)
            end.close()
        else:
            assert isinstance(end, ConnectionRefusedError)
    for connection in accepted:
        connection.close()
    listening.close()
    sockets.remove_if_empty()
    assert not sockets.directory.exists()


def test_the_directory_is_made_anew_only_where_it_is_not_as_it_must_be(sockets: PrivateSockets) -> None:
    kept = Path(sockets.path("kept"))
    kept.touch()
    sockets.make_if_missing()
    sockets.remove_if_empty()
    assert kept.exists()
    sockets.directory.chmod(0o755)
    sockets.make_if_missing()
    assert not kept.exists()
    sockets.remove()
    sockets.make_if_missing()
    assert sockets.directory.exists()


@pytest.mark.parametrize("short", [False, True])
async def test_connecting_waits_until_it_is_accepted(
    sockets: PrivateSockets, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where descriptors are `short`: if QEMU saw an end instead it would not survive it."""
    errors = [OSError(errno.EMFILE, "Too many open files")] * short

    def asked(sock: socket.socket) -> int:
        if errors:
            raise errors.pop()
        return peer_inode(sock)

    monkeypatch.setattr(unix_diag, "peer_inode", asked)
    path = sockets.path()
    with socket.socket(socket.AF_UNIX) as qemu:
        qemu.bind(path)
        qemu.listen(1)
        connected = []

        async def connect() -> None:
            connected.append(await sockets.connect(path))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            await trio.sleep(0.05)
            assert not connected
            other, _ = qemu.accept()
        assert peer_inode(connected[0]) == os.fstat(other.fileno()).st_ino
        other.close()
        connected[0].close()


async def test_where_qemu_does_not_listen_nothing_is_connected(sockets: PrivateSockets) -> None:
    with pytest.raises(OSError, match="No such file"):
        await sockets.connect(sockets.path())
