"""The return path ends first, and whether the other process took note."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import trio

from refault.daemon.kernel.process import holds
from refault.daemon.near.return_path import end_first

PEER = """
import socket, sys, time
leg = socket.socket(fileno=int(sys.argv[1]))
sys.stdout.write("ready")
sys.stdout.flush()
leg.recv(1)
if sys.argv[2] == "closes":
    leg.close()
time.sleep(60)
"""


@pytest.mark.parametrize(("peer", "over"), [("closes", True), ("stays", False)])
async def test_it_is_over_when_the_other_process_has_closed_its_end(peer: str, *, over: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        inode = os.fstat(theirs.fileno()).st_ino
        with theirs:
            command = [sys.executable, "-c", PEER, str(theirs.fileno()), peer]
            child = subprocess.Popen(  # noqa: ASYNC220 - it only starts
                command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE
            )
        with child:
            assert child.stdout is not None
            await trio.to_thread.run_sync(child.stdout.read, 5)
            assert holds(child.pid, inode)
            assert await end_first(ours, child.pid, inode) is over
            child.kill()


async def test_where_one_may_not_look_it_is_not_over() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not await end_first(ours, 0, os.fstat(theirs.fileno()).st_ino)
        assert theirs.send(b"and nothing was ended") > 0
        assert ours.send(b"either way") > 0


async def test_an_end_that_the_process_never_had_proves_nothing() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not await end_first(ours, os.getpid(), 1)
        assert ours.send(b"nothing was ended") > 0
