"""Who is at the other end of a socket, with real processes of other users."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from refault.daemon.kernel.peer import groups_of
from refault.daemon.monitor.caller import Caller, caller_of, may_speak
from refault.qmp.access import ANYBODY, Callers

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
CONNECT = """
import ctypes, os, socket
ctypes.CDLL(None).prctl(15, NAME)  # PR_SET_NAME
if GROUPS is not None:
    os.setgroups(GROUPS)
    os.setgid(4243)
    os.setuid(4242)
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(WHERE)
    sock.recv(1)
"""


@contextmanager
def connected(groups: list[int] | None = None, name: bytes = b"client") -> Iterator[socket.socket]:
    """A connection of another process's, of user 4242 and group 4243 where `groups` are said."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # the kernel gives it an abstract name
        listener.listen()
        listener.settimeout(10)
        said = f"NAME, GROUPS, WHERE = {name!r}, {groups!r}, {listener.getsockname()!r}"
        with subprocess.Popen([sys.executable, "-ISc", said + CONNECT]) as process:
            try:
                with listener.accept()[0] as sock:
                    yield sock
            finally:
                process.kill()


def test_our_own_process() -> None:
    first, second = socket.socketpair()
    with first, second:
        caller = caller_of(first)
        assert (caller.uid, caller.pid) == (os.geteuid(), os.getpid())
        assert caller.exe == str(Path("/proc/self/exe").readlink())
        assert groups_of(first) == {os.getegid(), *os.getgroups()}
        assert may_speak(first, ANYBODY)
        assert may_speak(first, Callers(frozenset((os.geteuid(),))))
        assert may_speak(first, Callers(groups=frozenset((os.getegid(),))))
        assert not may_speak(first, Callers(frozenset((4242,)), frozenset((4242,))))


def test_over_tcp_nobody_is_known() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.connect(listener.getsockname())
        sock, (host, port) = listener.accept()
        with sock:
            assert str(caller_of(sock)) == f"{host}:{port}"
            assert not may_speak(sock, Callers(frozenset((0,))))


def test_a_name_is_no_more_than_a_name() -> None:
    with connected(name=b"a\n<0>b\x1b\xff") as sock:
        assert caller_of(sock).comm == "a?<0>b?\ufffd"


@ROOT
@pytest.mark.parametrize("count", [0, 1, 300])
def test_the_groups_of_another(count: int) -> None:
    groups = list(range(5000, 5000 + count))
    with connected(groups) as sock:
        assert groups_of(sock) == {4243, *groups}
        caller = caller_of(sock)
        assert (caller.uid, caller.comm) == (4242, "client")
        assert may_speak(sock, Callers(frozenset((1, 4242))))
        assert may_speak(sock, Callers(groups=frozenset((1, 4243))))
        assert may_speak(sock, Callers(groups=frozenset((5299,)))) == (count == 300)
        assert not may_speak(sock, Callers(frozenset((0,)), frozenset((0,))))


def test_how_it_is_told() -> None:
    assert str(Caller(7, None)) == "uid 7, pid ?, ?, ?"
    assert str(Caller(7, 8, "virsh", "/usr/bin/virsh")) == "uid 7, pid 8, virsh, /usr/bin/virsh"
