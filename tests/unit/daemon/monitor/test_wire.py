"""A connection's sending side: what happens to bytes and descriptors that do not go at once."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from refault.daemon.kept.recorder import Recorder
from refault.daemon.monitor.wire import Wire

NOT_RECORDED = Recorder("vm", None, bytes, lambda: None)
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def tcp() -> Iterator[Pair]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    near.setblocking(False)
    with near, far:
        yield near, far


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def filled(sock: socket.socket) -> Wire:
    wire = Wire(sock, trio.CancelScope(), NOT_RECORDED)
    wire.backlog.append((memoryview(bytes(64 << 20)), -1))
    while wire.flush():
        time.sleep(0.01)  # the kernel makes room yet
    assert wire.backlog
    return wire


async def test_a_descriptor_that_waits_behind_bytes_stays_open(
    tcp: Pair,
) -> None:
    near, far = tcp
    wire, fd = filled(near), os.open(os.devnull, os.O_RDONLY)
    wire.backlog.clear()
    wire.backlog.append((memoryview(b"getfd"), fd))
    assert wire.flush() == 0
    assert is_open(fd)
    while wire.backlog:
        far.recv(1 << 20)
        wire.flush()
    assert not is_open(fd)


async def test_what_is_discarded_leaves_no_descriptor(tcp: Pair) -> None:
    wire, fd = filled(tcp[0]), os.open(os.devnull, os.O_RDONLY)
    wire.backlog.append((memoryview(b"getfd"), fd))
    wire.discard()
    assert not wire.backlog
    assert not is_open(fd)


async def test_a_broken_connection_takes_everything(tcp: Pair) -> None:
    near, _ = tcp
    wire = Wire(near, trio.CancelScope(), NOT_RECORDED)
    near.shutdown(socket.SHUT_WR)
    wire.backlog.append((memoryview(b"{}"), -1))
    assert wire.flush() == 2
    assert wire.broken
    assert wire.scope.cancel_called


async def test_nobody_waits_for_a_socket_that_is_closed(tcp: Pair) -> None:
    near, _ = tcp
    wire = filled(near)
    async with trio.open_nursery() as nursery:
        answers: list[bool] = []

        async def wait() -> None:
            answers.append(await wire.writable())

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.notify_closing(near)
    assert answers == [False]
