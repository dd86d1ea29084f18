"""Sockets of the service manager's: taken by their addresses, and left as they are."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from refault.daemon.host import handed
from refault.daemon.monitor.address_text import parse_address
from refault.daemon.monitor.listener import bind, check

FIRST = 700


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(handed, "_sockets", {})
    yield
    for sock in handed._sockets.values():
        sock.close()


def hand(*socks: socket.socket, pid: int | None = None) -> dict[str, str]:
    for number, sock in enumerate(socks, FIRST):
        os.dup2(sock.fileno(), number)
    environment = {
        "LISTEN_PID": str(pid or os.getpid()),
        "LISTEN_FDS": str(len(socks)),
        "LISTEN_FDNAMES": "x",
    }
    handed.adopt(environment, FIRST)
    return environment


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


@pytest.mark.usefixtures("nobody")
async def test_what_listens_at_an_address_is_taken_and_its_file_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with listening(tmp_path / "s") as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        os.chmod(tmp_path / "s", 0o660)
        assert hand(unix, tcp) == {}
        port = tcp.getsockname()[1]
        for text in (f"{tmp_path}/link/s", f"tcp:127.0.0.1:{port}"):
            address = parse_address(text, server=True)
            if address.path is not None:
                check(address)
            for _ in range(2):  # a reload may come back to it
                bound = await bind(address)
                assert bound.in_place
                [sock] = bound.socks
                assert not sock.get_inheritable()
                where = sock.getsockname()
                with socket.socket(sock.family) as client:
                    client.connect(where)
                    sock.accept()[0].close()
                bound.close()
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o660


@pytest.mark.usefixtures("nobody")
async def test_what_is_another_processes_or_does_not_listen_is_left_alone(tmp_path: Path) -> None:
    with listening(tmp_path / "s") as unix:
        hand(unix, pid=os.getpid() + 1)
        assert not handed.is_handed(str(tmp_path / "s"))
        os.close(FIRST)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(tmp_path / "d"))
        hand(other)
        assert not handed.is_handed(str(tmp_path / "d"))
