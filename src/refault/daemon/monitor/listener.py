"""Binding sockets: what is there is replaced only if nobody listens on it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass

import trio

from refault.daemon.host.errors import OperatorError
from refault.daemon.host.handed import handed, is_handed
from refault.daemon.kernel.unix_diag import listens
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.socket_file import (
    MODE,
    Access,
    access_of,
    by_number,
    give_as_said,
    inode_of,
    is_free,
    open_path,
)
from refault.daemon.monitor.tcp_ports import BACKLOG, bind_all

log = logging.getLogger("refault.qmp")

_PORT_TRIES = 8
"""How often the kernel is asked for a port that is free in all families."""


class ListenError(OperatorError):
    """An address cannot be listened on, for `reason`."""

    def __init__(self, address: Address, reason: str) -> None:
        super().__init__(f"cannot listen on {address}: {reason}")
        self.reason = reason


class NoDirectoryError(ListenError):
    """The directory of a socket file is not there: it may come."""


@dataclass(frozen=True)
class Bound:
    """Listening sockets, non-blocking, and the address that they really have (a TCP port 0 is the kernel's
    choice). A name of TCP's may stand for several.
    """

    socks: tuple[socket.socket, ...]
    address: Address
    inode: tuple[int, int] | None = None
    plain: Access | None = None
    """What the socket file had before it was given to anybody."""
    given: bool = False
    """Whether somebody else has opened them, who keeps them."""

    @property
    def sock(self) -> socket.socket:
        """The socket, where it is a unix socket's."""
        [sock] = self.socks
        return sock

    @property
    def in_place(self) -> bool:
        """Whether who connects at the address reaches us."""
        if self.inode is None or self.address.path is None:
            return True
        try:
            return inode_of(os.lstat(self.address.path)) == self.inode
        except OSError:
            return False

    def close(self) -> Access | None:
        """Closes it, and removes its file as `remove` does."""
        left = self.remove()
        for sock in self.socks:
            sock.close()
        return left

    def remove(self) -> Access | None:
        """Removes its socket file, unless another has taken that place, or somebody has changed who may
        connect: then it stays for the next one to take that from it, and it is returned.
        """
        if self.inode is None or self.address.path is None:
            return None
        with contextlib.suppress(OSError), open_path(self.address.path) as fd:
            if inode_of(os.fstat(fd)) != self.inode:
                return None
            access = access_of(fd)
            if access != self.plain and access.is_said and is_free(self.address):
                return access
            os.unlink(self.address.path)
        return None


async def bind(address: Address) -> Bound:
    """Listens on `address`. Raises ListenError."""
    return bind_unix(address) if address.path is not None else await bind_tcp(address)


def bind_unix(
    address: Address, access: Access | None = None, kind: socket.SocketKind = socket.SOCK_STREAM
) -> Bound:
    """Listens on a unix socket, or is at the one that the service manager has there. Raises ListenError.

    Its file has the mode, owner and group that the address says; else those of the stale socket file that it
    replaces, if that is root's or ours; else `access`; else mode 0600, whatever the umask.
    """
    with _listen_error(address):
        if address.fd is not None:
            given = socket.socket(fileno=os.dup(address.fd))
            given.setblocking(False)
            return Bound((given,), address)
        if (managed := handed(address.sun_path)) is not None:
            return Bound((managed,), address, given=True)
        sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
        try:
            if address.abstract:
                sock.bind(address.sun_path)
                sock.listen(BACKLOG)
                return Bound((sock,), address)
            access = _remove_stale(address) or access
            # The file gets the socket's own mode, less the umask, in one step (net/unix/af_unix.c,
            # unix_bind_bsd). Who waits for it to appear must not find that nobody listens.
            os.fchmod(sock.fileno(), MODE)
            sock.bind(address.sun_path)
            sock.listen(BACKLOG)
            with open_path(address.sun_path) as fd:
                status = os.fstat(fd)
                if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
                    raise OSError(errno.EEXIST, "somebody else put a file there in the same moment")
                os.chmod(by_number(fd), MODE)
                plain = access_of(fd)
                bound = Bound((sock,), address, inode_of(status), plain)
                try:
                    give_as_said(fd, address, plain, access)
                except OSError as error:
                    os.unlink(address.sun_path)
                    raise OSError(error.errno, f"cannot give its file away: {error.strerror}") from error
            return bound
        except BaseException:
            sock.close()
            raise


def check(address: Address) -> None:
    """Raises ListenError where a unix socket cannot be bound as things are; changes nothing."""
    if is_handed(address.sun_path):
        return
    with _listen_error(address):
        if address.abstract:
            if _told_to_listen(address):
                raise OSError(errno.EADDRINUSE, "in use")
            return
        directory = os.path.dirname(os.fsdecode(address.sun_path)) or "."
        os.stat(directory)
        _stale(address)
        if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
            raise OSError(errno.EACCES, f"uid {os.geteuid()} cannot make files in {directory}")


@contextlib.contextmanager
def _listen_error(address: Address) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoDirectoryError(
            address, "its directory does not exist; make it, or name another address"
        ) from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = "something listens there already; stop it, or name another address"
        else:
            reason = error.strerror or str(error)
        raise ListenError(address, reason) from error


def _told_to_listen(address: Address) -> bool:
    """Whether the kernel says that somebody listens there; False also where it does not tell."""
    try:
        return listens(address.sun_path)
    except OSError:
        return False


def _stale(address: Address) -> bool:
    """Whether there is a socket file at a path on which nobody listens. Raises OSError, ListenError."""
    try:
        kind = os.lstat(address.sun_path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(kind):
        what = "a directory" if stat.S_ISDIR(kind) else "a file that is no socket"
        raise ListenError(address, f"{what} is there; remove it, or name another path")
    if _told_to_listen(address):  # a connection that is closed again may do harm there
        raise OSError(errno.EADDRINUSE, "in use")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(address.sun_path)
        except ConnectionRefusedError:
            return True
        except BlockingIOError:  # somebody of another network namespace listens, and has much to do
            pass
        raise OSError(errno.EADDRINUSE, "in use")


def _remove_stale(address: Address) -> Access | None:
    """Removes a stale socket file. Returns who could connect there, if it was root or us who said so.

    A link that was made to it could be a link to a file that says something else.
    """
    if not _stale(address):
        return None
    with open_path(address.sun_path) as fd:
        status, access = os.fstat(fd), access_of(fd)
    os.unlink(address.sun_path)
    trusted = stat.S_ISSOCK(status.st_mode) and status.st_uid in (0, os.geteuid()) and status.st_nlink == 1
    return access if trusted and access.is_said else None


# TCP


async def bind_tcp(address: Address) -> Bound:
    """Listens at every address of a host's name at which that can be, in both families, as QEMU does
    (io/net-listener.c, qio_net_listener_open_sync), and at the same port of them all. Raises ListenError.
    """
    try:
        found = await trio.socket.getaddrinfo(
            address.host or None,
            address.port,
            family=address.family,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
    except (socket.gaierror, UnicodeError) as error:  # that of IDNA, for a name that cannot be one
        raise ListenError(address, getattr(error, "strerror", None) or str(error)) from error
    where = list(dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in found))
    given = [sock for _, sockaddr in where if (sock := handed(sockaddr)) is not None]
    if given:
        return Bound(tuple(given), address, given=True)
    if address.port == 0:
        ports = [0] * _PORT_TRIES
    else:
        ports = list(range(address.port, max(address.port, address.to) + 1))
    with _listen_error(address):
        socks, bound = bind_all(address, where, ports)
    return Bound(tuple(socks), bound)
