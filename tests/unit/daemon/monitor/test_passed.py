"""Which connections are known that a client has passed to QEMU, and for how long."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator

import pytest

from refault.daemon.monitor.passed import Passed


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sock,
        server.accept()[0],
    ):
        yield sock


@pytest.fixture
def passed(connection: socket.socket) -> Iterator[Passed]:
    made = Passed()
    made.sends([said("getfd", fdname="migrate", fd=connection.fileno())])
    yield made
    made.clear()


def said(command: str, *, fd: int = -1, **arguments: object) -> tuple[bytes, int]:
    return json.dumps({"execute": command, "arguments": arguments}).encode(), fd


def knows(passed: Passed, name: str) -> bool:
    if (sock := passed.get(name)) is not None:
        sock.close()
    return sock is not None


def test_one_is_known_until_qemu_is_told_of_its_name(passed: Passed) -> None:
    for unrelated in (
        said("migrate-set-capabilities", capabilities=[{"capability": "migrate", "state": True}][:0]),
        said("query-migrate"),
        said("migrate", uri="unix:/run/x"),
        said("getfd", fdname="migrate2"),
    ):
        passed.sends([unrelated])
        assert knows(passed, "migrate")
    for used in (
        said("closefd", fdname="migrate"),
        said("getfd", fdname="migrate"),
        said("migrate", uri="fd:migrate"),
        (b'{"execute": "human-monitor-command", "arguments": {"command-line": "closefd migrate"}}', -1),
        said("netdev_add", fds="a:migrate"),
        (b"{'execute': 'closefd', 'arguments': {'fdname': 'migrate'}}", -1),
        (b'{"execute": "closefd", "arguments": {"fdname": "migr\\u0061te"}}', -1),
    ):
        again = Passed()
        sock = passed.get("migrate")
        assert sock is not None
        with sock:
            again.sends([said("getfd", fdname="migrate", fd=sock.fileno())])
        assert knows(again, "migrate")
        again.sends([used])
        assert not knows(again, "migrate"), used


def test_what_is_no_tcp_connection_is_not_known() -> None:
    passed = Passed()
    reads, writes = os.pipe()
    one, other = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as alone, one, other:
        for fd in (reads, writes, one.fileno(), listening.fileno(), alone.fileno()):
            passed.sends([said("getfd", fdname="migrate", fd=fd)])
            assert not knows(passed, "migrate")
    os.close(reads)
    os.close(writes)


def test_an_older_one_makes_way_and_none_is_left(connection: socket.socket) -> None:
    before = len(os.listdir("/proc/self/fd"))
    passed = Passed()
    for number in range(20):
        passed.sends([said("getfd", fdname=f"n{number}", fd=connection.fileno())])
        passed.sends([said("add-fd", fd=connection.fileno())])
    assert [number for number in range(20) if knows(passed, f"n{number}")] == list(range(12, 20))
    passed.clear()
    assert len(os.listdir("/proc/self/fd")) == before
