"""Keeps what a source has written and we have not read short, where QEMU itself has made the connection: it
delays the page that is asked for. Of a pair that we make we have both ends (local.py)."""

from __future__ import annotations

import logging
import socket

from refault.channel.relay import SOURCE_QUEUE
from refault.daemon.kernel.process import borrowed

log = logging.getLogger("refault.local")


def shorten(pid: int | None, inode: int) -> bool:
    """Sets the send buffer of a process's socket. False where that is not permitted: the queue is longer
    then, and nothing else changes."""
    try:
        if pid is None:
            raise OSError("its process is not known")
        with borrowed(pid, inode) as theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOURCE_QUEUE)
    except OSError as error:
        log.info("QEMU's socket %s keeps its send buffer: %s", inode, error)
        return False
    return True
