"""Binding QMP sockets: what is there is replaced only if nobody listens on it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass

from refault.daemon.address import Address
from refault.daemon.errors import OperatorError

BACKLOG = 128
_MODE = 0o600


class ListenError(OperatorError):
    """An address cannot be listened on."""


@dataclass(frozen=True)
class Bound:
    """A listening socket, non-blocking, and the address that it really has (a TCP port 0 is the kernel's
    choice).
    """

    sock: socket.socket
    address: Address
    inode: tuple[int, int] | None

    def close(self) -> None:
        """Closes it and removes its socket file, unless another has taken that place."""
        self.sock.close()
        if self.address.path is None:
            return
        with contextlib.suppress(OSError):
            if _inode(self.address.path) == self.inode:
                os.unlink(self.address.path)


def bind(address: Address, *, mode: int = _MODE) -> Bound:
    """Listens on `address`; a unix socket's file has `mode`, whatever the umask. Raises ListenError."""
    try:
        if address.path is not None:
            return _bind_unix(address, address.path, mode)
        return _bind_tcp(address)
    except OSError as error:
        raise ListenError(f"cannot listen on {address}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "something listens there already; stop it, or name another address"
    if error.errno == errno.ENOENT:
        return "its directory does not exist; make it, or name another address"
    return error.strerror or str(error)


def _inode(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _bind_unix(address: Address, path: str, mode: int) -> Bound:
    _remove_stale(address, path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # The file gets the socket's own mode, less the umask, in one step (net/unix/af_unix.c,
        # unix_bind_bsd).
        os.fchmod(sock.fileno(), mode)
        sock.bind(path)
        os.chmod(path, mode)
        sock.listen(BACKLOG)
        return Bound(sock, address, _inode(path))
    except BaseException:
        sock.close()
        raise


def _remove_stale(address: Address, path: str) -> None:
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise ListenError(
            f"cannot listen on {address}: a file that is no socket is there; remove it, or name another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # somebody listens, and has much to do
            pass
        raise OSError(errno.EADDRINUSE, "in use")


def _bind_tcp(address: Address) -> Bound:
    try:
        found = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise ListenError(f"cannot listen on {address}: {error.strerror}") from error
    family, _, _, _, where = found[0]
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return Bound(sock, Address(None, address.host, sock.getsockname()[1], address.server), None)
