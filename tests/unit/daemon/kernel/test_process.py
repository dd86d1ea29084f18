"""What is known of another process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from tests.support.exhausted import exhausted
from tests.support.hidden import hidden

from refault.daemon.kernel.process import (
    borrowed,
    holds,
    may_be_same,
    process_started,
    resident_pages,
    same_network,
    start_of,
    still_runs,
    user_of,
)


def test_this_process_is_in_its_own_network() -> None:
    assert same_network(os.getpid())


def test_a_process_that_is_gone_is_in_none() -> None:
    assert not same_network(2**22 + 1)


def test_a_process_runs_until_it_has_ended_for_all_that_can_be_told() -> None:
    me = process_started(os.getpid())
    assert me is not None
    assert still_runs(os.getpid(), me)
    assert still_runs(os.getpid(), None)  # it was not told
    assert not still_runs(os.getpid(), me + 1)  # another's number by now
    assert not still_runs(2**22 + 1, me)
    assert not still_runs(None, None)
    assert may_be_same((1, 5), (1, 5))
    assert may_be_same((1, None), (1, 5))
    assert not may_be_same((1, 4), (1, 5))
    assert not may_be_same((2, None), (1, 5))


def test_one_whose_name_is_no_text_is_known_all_the_same() -> None:
    """As QEMU's `-name process=` may be, which the kernel cuts after 15 bytes."""
    named = "open('/proc/self/comm', 'wb').write(b'a' * 14 + b'\\xc3'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", named], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert start_of(process.pid) is not None
        assert user_of(process.pid) == os.getuid()
        process.communicate(b"\n")


def test_one_that_nobody_has_waited_for_has_ended() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleep:
        assert start_of(sleep.pid) is not None
        sleep.kill()
        os.waitid(os.P_PID, sleep.pid, os.WEXITED | os.WNOWAIT)
        assert start_of(sleep.pid) is None
        assert not still_runs(sleep.pid, None)
        with hidden():
            assert start_of(sleep.pid) is None
    assert start_of(2**22 + 1) is None


def test_where_no_descriptor_is_left_nobody_has_ended() -> None:
    with exhausted():
        assert process_started(os.getpid()) is None
        assert still_runs(os.getpid(), 7)
        with pytest.raises(OSError, match="Too many open files"):
            start_of(os.getpid())


def test_who_holds_a_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        inode = os.fstat(ours.fileno()).st_ino
        assert holds(os.getpid(), inode)
        with borrowed(os.getpid(), inode) as same:
            assert os.fstat(same.fileno()).st_ino == inode
    assert not holds(os.getpid(), inode)
    with pytest.raises(FileNotFoundError):
        borrowed(os.getpid(), inode)


def test_the_memory_of_this_process_is_there() -> None:
    assert resident_pages(os.getpid()) > 0


# As the units have it (ProtectProc=invisible), without a capability.
_CONFINED = """
import os, subprocess, sys
from refault.daemon.kernel.process import process_started, socket_at, start_of, still_runs
pid, gone = map(int, sys.argv[1:])
subprocess.run(["mount", "-t", "proc", "-o", "hidepid=invisible", "proc", "/proc"], check=True)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
print(process_started(pid), start_of(gone), start_of(os.getpid()) == process_started(os.getpid()))
print(still_runs(pid, 7), still_runs(gone, 7), still_runs(os.getpid(), 7), socket_at(gone, 0))
for ask in (lambda: socket_at(pid, 0), lambda: start_of(pid)):
    try:
        ask()
    except PermissionError as error:
        print(str(error).rpartition(" ")[2])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone may mount")
def test_a_process_that_may_not_be_looked_at_has_not_ended() -> None:
    command = ["unshare", "--mount", sys.executable, "-c", _CONFINED, str(os.getpid()), str(2**22 + 1)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    told = ["None", "None", "True", "True", "False", "False", "None", *2 * ["(CAP_SYS_PTRACE)"]]
    assert done.stdout.split() == told
