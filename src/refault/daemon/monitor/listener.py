"""Binding sockets: what is there is replaced only if nobody listens on it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import trio

from refault.daemon.host.errors import OperatorError
from refault.daemon.kernel.unix_diag import listens
from refault.daemon.monitor.address import Address

log = logging.getLogger("refault.qmp")

BACKLOG = 128
_MODE = 0o600
_PORT_TRIES = 8
"""How often the kernel is asked for a port that is free in all families."""
_ACL = "system.posix_acl_access"


class ListenError(OperatorError):
    """An address cannot be listened on, for `reason`."""

    def __init__(self, address: Address, reason: str) -> None:
        super().__init__(f"cannot listen on {address}: {reason}")
        self.reason = reason


class NoDirectoryError(ListenError):
    """The directory of a socket file is not there: it may come."""


@dataclass(frozen=True)
class Access:
    """Who may connect at a socket file: its mode, owner, group, and access list, if it has one."""

    mode: int
    uid: int
    gid: int
    acl: bytes | None = None

    @property
    def is_said(self) -> bool:
        """Whether somebody has said so. What bind(2) and a umask make of 0777 lets nobody else connect."""
        return self.acl is not None or self.mode & 0o722 != 0o700


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
            return _inode(os.lstat(self.address.path)) == self.inode
        except OSError:
            return False

    def close(self) -> Access | None:
        """Closes it. Removes its socket file, unless another has taken that place, or somebody has changed
        who may connect: then it stays for the next one to take that from it, and it is returned.
        """
        left = self._remove()
        for sock in self.socks:
            sock.close()
        return left

    def _remove(self) -> Access | None:
        if self.inode is None or self.address.path is None:
            return None
        with contextlib.suppress(OSError), _open_path(self.address.path) as fd:
            if _inode(os.fstat(fd)) != self.inode:
                return None
            access = _access(fd)
            if access != self.plain and access.is_said and _is_free(self.address):
                return access
            os.unlink(self.address.path)
        return None


def _is_free(address: Address) -> bool:
    """Whether no option says who may connect."""
    return (address.mode, address.owner, address.group) == (None, None, None)


async def bind(address: Address) -> Bound:
    """Listens on `address`. Raises ListenError."""
    return bind_unix(address) if address.path is not None else await bind_tcp(address)


def bind_unix(address: Address, access: Access | None = None) -> Bound:
    """Listens on a unix socket. Raises ListenError.

    Its file has the mode, owner and group that the address says; else those of the stale socket file that it
    replaces, if that is root's or ours; else `access`; else mode 0600, whatever the umask.
    """
    with _listen_error(address):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            if address.abstract:
                sock.bind(address.sun_path)
                sock.listen(BACKLOG)
                return Bound((sock,), address)
            access = _remove_stale(address) or access
            # The file gets the socket's own mode, less the umask, in one step (net/unix/af_unix.c,
            # unix_bind_bsd). Who waits for it to appear must not find that nobody listens.
            os.fchmod(sock.fileno(), _MODE)
            sock.bind(address.sun_path)
            sock.listen(BACKLOG)
            with _open_path(address.sun_path) as fd:
                status = os.fstat(fd)
                if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
                    raise OSError(errno.EEXIST, "somebody else put a file there in the same moment")
                os.chmod(_by(fd), _MODE)
                plain = _access(fd)
                bound = Bound((sock,), address, _inode(status), plain)
                try:
                    _give(fd, address, plain, access)
                except OSError as error:
                    os.unlink(address.sun_path)
                    raise OSError(error.errno, f"cannot give its file away: {error.strerror}") from error
            return bound
        except BaseException:
            sock.close()
            raise


def check(address: Address) -> None:
    """Raises ListenError where a unix socket cannot be bound as things are; changes nothing."""
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


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _open_path(path: str | bytes) -> Iterator[int]:
    """The very file that is at `path` now, whatever is put there next."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _by(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _access(fd: int) -> Access:
    status = os.fstat(fd)
    try:
        acl = os.getxattr(_by(fd), _ACL)
    except OSError:  # there is none, or there are none on this file system
        acl = None
    return Access(stat.S_IMODE(status.st_mode) & 0o777, status.st_uid, status.st_gid, acl)


def _give(fd: int, address: Address, plain: Access, access: Access | None) -> None:
    """Has the file at `fd` what the address says, or else what `access` does. Raises OSError."""
    mode, owner, group = address.mode, address.owner, address.group
    if access is not None and _is_free(address):
        try:
            owner = access.uid if os.geteuid() == 0 else None
            _change(fd, plain, access.gid, owner, access.mode, access.acl)
        except OSError as error:
            log.warning(
                "%s: cannot give it group %d again, as the socket file there had: %s; its mode is 0600: put"
                " it right by hand, or name mode= and group= behind the address",
                address,
                access.gid,
                error.strerror,
            )
            _change(fd, plain, plain.gid, None, _MODE, None)
        return
    _change(fd, plain, plain.gid if group is None else group, owner, _MODE if mode is None else mode, None)


def _change(fd: int, plain: Access, gid: int, uid: int | None, mode: int, acl: bytes | None) -> None:
    """The group first, for its rights; the owner last, for only he can change the rest."""
    if gid != plain.gid:
        os.chown(_by(fd), -1, gid)
    os.chmod(_by(fd), mode)
    if acl is not None:
        os.setxattr(_by(fd), _ACL, acl)
    if uid is not None and uid != plain.uid:
        os.chown(_by(fd), uid, -1)


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
    with _open_path(address.sun_path) as fd:
        status, access = os.fstat(fd), _access(fd)
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
    except socket.gaierror as error:
        raise ListenError(address, error.strerror or str(error)) from error
    where = list(dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in found))
    if address.port == 0:
        ports = [0] * _PORT_TRIES
    else:
        ports = list(range(address.port, max(address.port, address.to) + 1))
    with _listen_error(address):
        return _bind_all(address, where, ports)


_Where = tuple[socket.AddressFamily | int, tuple[object, ...]]


def _bind_all(address: Address, where: Sequence[_Where], ports: Sequence[int]) -> Bound:
    """At the first port that nobody has at any of the addresses, or else at any one that is left."""
    trouble: OSError | None = None
    for partly in (False, True):
        for port in ports:
            socks, missed = _try_port(address, where, port)
            if socks and (partly or not any(e.errno == errno.EADDRINUSE for e in missed.values())):
                bound = replace(address, port=socks[0].getsockname()[1], to=0)
                for host, error in missed.items():
                    log.warning("%s: not at %s of it: %s", bound, host, error.strerror)
                return Bound(tuple(socks), bound)
            for sock in socks:
                sock.close()
            trouble = next(iter(missed.values()), trouble)
    raise trouble or OSError(errno.EADDRNOTAVAIL, "it has no address")


def _try_port(
    address: Address, where: Sequence[_Where], port: int
) -> tuple[list[socket.socket], dict[str, OSError]]:
    """The sockets that could be bound, and why the others could not."""
    socks: list[socket.socket] = []
    missed: dict[str, OSError] = {}
    for family, sockaddr in where:
        host = str(sockaddr[0])
        try:
            socks.append(_bind_one(address, family, (host, port, *sockaddr[2:])))
        except OSError as error:
            missed[host] = error
            continue
        port = socks[0].getsockname()[1]
    return socks, missed


def _bind_one(address: Address, family: int, where: tuple[object, ...]) -> socket.socket:
    """As util/qemu-sockets.c has it in try_bind(): one IPv6 socket for both families, if it may be."""
    both = family == socket.AF_INET6 and not address.v6only
    try:
        return _bind_inet(family, where, v6only=not both)
    except OSError as error:
        if not both or error.errno != errno.EADDRINUSE:
            raise
        return _bind_inet(family, where, v6only=True)


def _bind_inet(family: int, where: tuple[object, ...], *, v6only: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        sock.bind(where)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
