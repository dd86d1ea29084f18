"""What a QEMU holds for a refault of which nothing is written down any more, its state directory having been
emptied, say. It is found by what it is, both ends in QEMU's hands; and it is ended, for nobody can go on.

A refault that lives has a socket with a name by which others know that the connection is somebody's: it ends
with its process, and needs no right to look at that.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterator

from refault.daemon.kept.lot import Lot
from refault.daemon.kept.sockets import Held, Identity, end_for_all
from refault.daemon.kernel.process import socket_holders
from refault.daemon.kernel.unix_diag import UnixSocket, at, unix_sockets


def claim(cookie: bytes) -> socket.socket:
    """Tells that a connection to a QEMU's monitor, by its cookie, is somebody's, while this is open. Raises
    OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.bind(_name(cookie))
    except BaseException:
        sock.close()
        raise
    return sock


def _name(cookie: bytes) -> bytes:
    return b"\0refault-keeps-" + cookie.hex().encode()


def end_orphans(monitor: str | bytes) -> int:
    """Ends what the QEMU whose monitor is at a path or abstract name holds for nobody: both ends of that
    monitor's connection, and of what connections are kept in. How many connections and listeners there were.

    Raises OSError where the kernel does not tell.
    """
    sockets = {each.inode: each for each in unix_sockets()}
    claimed = {each.name for each in sockets.values()}
    pairs = list(_pairs(sockets))
    qemus = {each.inode for each in at(monitor, sockets.values())}
    upstreams = [pair for pair in pairs if pair[0].inode in qemus and _name(pair[1].cookie) not in claimed]
    if not upstreams:
        return 0
    lots = [pair for pair in pairs if pair[0].kind == socket.SOCK_SEQPACKET]
    holders = socket_holders({each.inode for pair in (*upstreams, *lots) for each in pair})
    ended = 0
    for its, ours in upstreams:
        pids = holders.get(ours.inode, set())
        if len(pids) == 1 and pids == holders.get(its.inode) and pids != {os.getpid()}:
            [pid] = pids
            theirs = [pair for pair in lots if all(holders.get(each.inode) == {pid} for each in pair)]
            ended += _end(pid, ours, theirs)
    return ended


def _pairs(sockets: dict[int, UnixSocket]) -> Iterator[tuple[UnixSocket, UnixSocket]]:
    for one in sockets.values():
        if (other := sockets.get(one.peer)) is not None and other.peer == one.inode:
            yield one, other


def _end(pid: int, upstream: UnixSocket, lots: Collection[tuple[UnixSocket, UnixSocket]]) -> int:
    process = os.pidfd_open(pid)
    try:
        held = Held(pid, process)
        ended = 0
        for pair in lots:  # each comes in both orders, of which one is that of entry and exit
            ends = [sock for each in pair if (sock := _take(held, each)) is not None]
            if len(ends) == len(pair):
                ended += Lot(ends).end()
            for sock in ends:
                sock.close()
        if (ours := _take(held, upstream)) is not None:
            with ours:
                end_for_all(ours)
                ended += 1
        return ended
    finally:
        os.close(process)


def _take(held: Held, sock: UnixSocket) -> socket.socket | None:
    return held.take(Identity(sock.inode, sock.cookie, ""))
