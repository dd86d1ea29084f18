"""The send buffer of another process's socket, where that is permitted."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from refault.channel.relay import SOURCE_QUEUE
from refault.daemon.kernel.unix_diag import peer_inode
from refault.daemon.near.short_queue import shorten

WRITES = """
import socket, sys
with socket.socket(fileno=0) as end:
    end.send(b"1")
    end.recv(1)
    end.setblocking(False)
    written = 0
    try:
        while True:
            written += end.send(bytes(1024))
    except BlockingIOError:
        print(written)
"""


def test_what_another_process_has_written_stays_short() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITES], stdin=theirs.fileno(), stdout=subprocess.PIPE
        )
        assert ours.recv(1) == b"1"
        assert shorten(writer.pid, peer_inode(ours))
        ours.send(b"1")
        assert int(writer.communicate()[0]) <= 2 * SOURCE_QUEUE


def test_where_it_is_not_permitted_nothing_changes() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not shorten(None, peer_inode(ours))
        assert not shorten(os.getppid(), 1)
        assert not shorten(2**22 - 1, peer_inode(ours))
