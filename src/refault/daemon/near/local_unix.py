"""Local legs over unix sockets, for migrations with more than one channel: QEMU opens or accepts further
connections at the address that it was given.

    source:       refault listens, QEMU connects, main channel first
    destination:  QEMU listens, refault connects, only with what the far side has sent in hand

The sockets lie in a directory that is QEMU's alone, or ours and QEMU's, each attempt at a path of its own, so
that nobody else comes to them; and whoever does must be the QEMU behind the monitor.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from refault.daemon.host.paths import SUN_PATH
from refault.daemon.kernel.giving import give, is_given
from refault.daemon.kernel.peer import Peer, peer_of
from refault.daemon.kernel.unix_diag import (
    peer_inode,
    peer_inode_now,
)

log = logging.getLogger("refault.local")

_NAME_BYTES = 8
PATH_BYTES = 1 + _NAME_BYTES
"""By how much a socket's path is longer than its directory's."""
_BACKLOG = 256
_LOOK = 0.002
_PATIENCE = 5.0


@dataclass(frozen=True)
class PrivateSockets:
    """Where the sockets of one VM lie, and who is at their other ends."""

    directory: Path
    qemu: Peer
    usable: bool = True
    """Whether the directory is this VM's, or is another's that has its name."""

    def make(self) -> None:
        """Makes the directory anew, empty. Raises OSError, also where QEMU's user cannot be let in, or the
        kernel does not tell what `connect` must know.
        """
        if not self.usable:
            raise OSError("there is no place for sockets, for the state directory is not ours")
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(mode=0o700)
        if self.qemu.uid is not None and self.qemu.uid != os.getuid():
            give(self.directory, 0o700, self.qemu.uid)
        if len(os.fsencode(self.directory)) + PATH_BYTES >= SUN_PATH:
            raise OSError(f"{self.directory} is too long a path for a unix socket")
        one, other = socket.socketpair()
        with one, other:
            peer_inode(one)

    def path(self, name: str | None = None) -> str:
        """A path that was not used before."""
        return str(self.directory / (name or secrets.token_hex(_NAME_BYTES // 2)))

    def make_if_missing(self) -> None:
        """Makes it where it is not there, or not as it is to be. Raises as `make` does."""
        uid = os.getuid() if self.qemu.uid is None else self.qemu.uid
        if not (self.directory.exists() and is_given(self.directory, 0o700, uid)):
            self.make()

    def remove(self) -> None:
        """The migration has ended."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def remove_if_empty(self) -> None:
        """The same, where no other migration of this VM has a socket there."""
        with suppress(OSError):
            self.directory.rmdir()

    def listen(self, *, shut: bool = False) -> Listening:
        """A socket at which QEMU is to connect, and with `shut` waits in connect(2) until it is opened.

        Raises OSError.
        """
        path = self.path()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.bind(path)
            if self.qemu.uid is not None and self.qemu.uid != os.getuid():
                give(path, 0o600, self.qemu.uid)
            sock.listen(0 if shut else _BACKLOG)
            filler = _fill_queue(path) if shut else None
        except BaseException:
            sock.close()
            raise
        return Listening(path, trio.socket.from_stdlib_socket(sock), self.qemu, filler)

    async def connect(self, path: str) -> socket.socket:
        """Connects to where QEMU listens and waits until it has accepted.

        Raises OSError where it does not listen.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(path)
            if not may_be(peer_of(sock), self.qemu):
                raise OSError(f"{path} is not QEMU's")
        except BaseException:
            sock.close()
            raise
        # From here on QEMU must never see it end before it has accepted it and has bytes to read: one that
        # connects and closes ends a destination (docs/campaign.md, Strangers).
        with trio.CancelScope(shield=True):
            began = trio.current_time()
            while not peer_inode_now(sock) and not _ended(sock):
                await trio.sleep(_LOOK)
                if trio.current_time() - began > _PATIENCE:
                    log.warning("%s: QEMU has not accepted a channel for %g s; waiting on", path, _PATIENCE)
                    began = trio.current_time() + 60.0
        return sock


@dataclass(frozen=True)
class QemuListens:
    """Where QEMU was told to listen for a channel; good for one."""

    path: str

    @property
    def uri(self) -> str:
        """The address that QEMU was given."""
        return f"unix:{self.path}"


@dataclass
class Listening:
    """Where QEMU is to connect; closed, it refuses."""

    path: str
    sock: trio.socket.SocketType
    qemu: Peer
    _filler: socket.socket | None = None
    """What fills its queue, while it is shut."""

    @property
    def uri(self) -> str:
        """The address by which QEMU uses it."""
        return f"unix:{self.path}"

    def open(self) -> None:
        """Lets those in who wait in connect(2)."""
        if self._filler is not None:
            with socket.socket(fileno=os.dup(self.sock.fileno())) as queue:
                queue.accept()[0].close()
            self._no_filler()
            self.sock.listen(_BACKLOG)  # which wakes them (net/unix/af_unix.c, unix_listen)

    def take(self) -> socket.socket | None:
        """The next connection of our QEMU, where one is there; strangers are turned away. Raises OSError."""
        while True:
            try:
                with socket.socket(fileno=os.dup(self.sock.fileno())) as queue:
                    connection, _ = queue.accept()
            except BlockingIOError:
                return None
            connection.setblocking(False)
            peer = peer_of(connection)
            if may_be(peer, self.qemu):
                return connection
            log.warning(
                "%s: closed a connection of pid %s, uid %s: not QEMU's", self.path, peer.pid, peer.uid
            )
            connection.close()

    async def accept(self) -> socket.socket:
        """The same, once one is there."""
        while (connection := self.take()) is None:
            await trio.lowlevel.wait_readable(self.sock)
        return connection

    def refuse(self) -> None:
        """Closes it; who waits in connect(2) is told that the connection is refused."""
        self.sock.close()
        self._no_filler()

    def _no_filler(self) -> None:
        if self._filler is not None:
            self._filler.close()
            self._filler = None

    def close(self) -> None:
        """Closes it and removes the path; what was accepted stays."""
        self.refuse()
        Path(self.path).unlink(missing_ok=True)


def _fill_queue(path: str) -> socket.socket:
    """Takes the one place in a queue of length 0 (net/unix/af_unix.c, unix_recvq_full)."""
    filler = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        filler.connect(path)
    except BaseException:
        filler.close()
        raise
    return filler


def may_be(peer: Peer, qemu: Peer) -> bool:
    """Whether `peer` is our QEMU: its pid where both are known (not so in another pid namespace), else its
    uid."""
    if peer.pid is not None and qemu.pid is not None:
        return peer.pid == qemu.pid
    return peer.uid == qemu.uid


def _ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
