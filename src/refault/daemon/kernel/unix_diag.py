"""What the kernel tells of unix sockets without a connection to them (unix_diag, net/unix/diag.c)."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# <linux/netlink.h>, <linux/sock_diag.h>, <linux/unix_diag.h>
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLM_F_DUMP = 0x300
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NO_COOKIE = 0xFFFFFFFF
_UDIAG_SHOW_NAME = 1
_UDIAG_SHOW_VFS = 2
_UNIX_DIAG_NAME = 0
_UNIX_DIAG_VFS = 1
_UNIX_DIAG_PEER = 2
_UNIX_DIAG_SHUTDOWN = 6
_UDIAG_SHOW_PEER = 4
_ANY_STATE = 0xFFFFFFFF
_LISTEN = 1 << 10
"""TCP_LISTEN as a bit of the states that are asked for."""
_NLMSGHDR = struct.Struct("=IHHII")
_UNIX_DIAG_REQ = struct.Struct("=BBHIIIII")
_UNIX_DIAG_MSG = struct.Struct("=xBxxIII")
_RTATTR = struct.Struct("=HH")
_VFS = struct.Struct("=II")
_INODE = struct.Struct("=I")
_ERROR = struct.Struct("=i")
_DOES_NOT_TELL = "the kernel does not tell of unix sockets (unix_diag)"
_ANSWER = 64 << 10


@contextmanager
def _sock_diag() -> Iterator[socket.socket]:
    """A socket to ask at. Raises OSError where there is none to be had."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1.0)
        yield netlink


@dataclass(frozen=True)
class UnixSocket:
    """One of this network namespace's. `peer`: the inode of the other side; 0 where there is none."""

    kind: int
    """socket.SOCK_STREAM and its like."""
    inode: int
    cookie: bytes
    """As SO_COOKIE has it."""
    name: bytes
    file: tuple[int, int] | None
    """Inode and device of the file that it is at."""
    peer: int
    shut: bool


def listens(where: str | bytes) -> bool:
    """Whether somebody of this network namespace listens at a unix socket's path, or at a name in the
    abstract namespace, which is bytes and begins with a zero one.

    Raises OSError where the kernel does not tell.
    """
    # Who was shut down refuses everybody, whoever still holds it.
    return any(not each.shut for each in at(where, unix_sockets(_LISTEN)))


def at(where: str | bytes, sockets: Iterable[UnixSocket]) -> list[UnixSocket]:
    """Those that are at a path or an abstract name. Who was accepted there is there too."""
    if isinstance(where, bytes):
        return [each for each in sockets if each.name == where]
    try:
        status = os.stat(where)
    except (FileNotFoundError, NotADirectoryError):
        return []
    # The low half of the inode's number, and the kernel's own dev_t (linux/kdev_t.h), which is not that of
    # stat(2) on every file system.
    inode = status.st_ino & 0xFFFFFFFF
    device = os.major(status.st_dev) << 20 | os.minor(status.st_dev)
    path = os.fsencode(where)
    return [
        each
        for each in sockets
        if each.file is not None
        and each.file[0] == inode
        and (each.file[1] == device or each.name.rstrip(b"\0") == path)
    ]


def unix_sockets(states: int = _ANY_STATE) -> Iterator[UnixSocket]:
    """Those of this network namespace. Raises OSError where the kernel does not tell."""
    show = _UDIAG_SHOW_NAME | _UDIAG_SHOW_VFS | _UDIAG_SHOW_PEER
    body = _UNIX_DIAG_REQ.pack(socket.AF_UNIX, 0, 0, states, 0, show, _NO_COOKIE, _NO_COOKIE)
    size = _NLMSGHDR.size + len(body)
    with _sock_diag() as netlink:
        netlink.send(_NLMSGHDR.pack(size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0) + body)
        while True:
            answer = netlink.recv(_ANSWER)
            at = 0
            while at + _NLMSGHDR.size <= len(answer):
                length, kind, *_ = _NLMSGHDR.unpack_from(answer, at)
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR or length < _NLMSGHDR.size + _UNIX_DIAG_MSG.size:
                    raise OSError(errno.EOPNOTSUPP, _DOES_NOT_TELL)
                yield _about(answer[at : at + length])
                at += (length + 3) & ~3


def _about(message: bytes) -> UnixSocket:
    kind, inode, low, high = _UNIX_DIAG_MSG.unpack_from(message, _NLMSGHDR.size)
    name, file, peer, shut = b"", None, 0, False
    for attribute, value in _attributes(message):
        if attribute == _UNIX_DIAG_NAME:
            name = value
        elif attribute == _UNIX_DIAG_VFS and len(value) >= _VFS.size:
            file = _VFS.unpack_from(value)
        elif attribute == _UNIX_DIAG_PEER and len(value) >= _INODE.size:
            (peer,) = _INODE.unpack_from(value)
        elif attribute == _UNIX_DIAG_SHUTDOWN:
            shut = value[0] != 0
    cookie = (high << 32 | low).to_bytes(8, sys.byteorder)
    return UnixSocket(kind, inode, cookie, name, file, peer, shut)


def _attributes(message: bytes) -> Iterator[tuple[int, bytes]]:
    at = _NLMSGHDR.size + _UNIX_DIAG_MSG.size
    while at + _RTATTR.size <= len(message):
        length, kind = _RTATTR.unpack_from(message, at)
        yield kind, message[at + _RTATTR.size : at + length]
        at += max((length + 3) & ~3, _RTATTR.size)


def peer_inode(sock: socket.socket) -> int:
    """The inode of the socket at the other side of a connected one, as /proc shows it.

    0 until that side has accepted it, or when it is gone (net/unix/diag.c, sk_diag_dump_peer). Raises OSError
    where the kernel does not tell.
    """
    answer = _asked(os.fstat(sock.fileno()).st_ino)
    if (
        len(answer) < _NLMSGHDR.size + _UNIX_DIAG_MSG.size
        or _NLMSGHDR.unpack_from(answer)[1] != _SOCK_DIAG_BY_FAMILY
    ):
        raise OSError(_DOES_NOT_TELL)
    return _about(answer).peer


def _asked(inode: int, cookie: tuple[int, int] = (_NO_COOKIE, _NO_COOKIE)) -> bytes:
    """The kernel's answer about one socket of this network namespace."""
    body = _UNIX_DIAG_REQ.pack(socket.AF_UNIX, 0, 0, _ANY_STATE, inode, _UDIAG_SHOW_PEER, *cookie)
    with _sock_diag() as netlink:
        header = _NLMSGHDR.pack(_NLMSGHDR.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
        netlink.send(header + body)
        return netlink.recv(4096)


def exists(inode: int, cookie: bytes) -> bool:
    """Whether there is a unix socket with this inode and cookie (SO_COOKIE) in this network namespace: in a
    process, or in flight. Raises OSError where the kernel does not tell.
    """
    number = int.from_bytes(cookie, sys.byteorder)
    answer = _asked(inode, (number & 0xFFFFFFFF, number >> 32))
    if len(answer) < _NLMSGHDR.size + _ERROR.size:
        raise OSError(_DOES_NOT_TELL)
    kind = _NLMSGHDR.unpack_from(answer)[1]
    if kind == _NLMSG_ERROR:
        (error,) = _ERROR.unpack_from(answer, _NLMSGHDR.size)
        if -error in (errno.ENOENT, errno.ESTALE):  # net/unix/diag.c, unix_diag_get_exact
            return False
        raise OSError(-error, os.strerror(-error))
    return bool(kind == _SOCK_DIAG_BY_FAMILY)


def peer_inode_now(sock: socket.socket) -> int:
    """The same; 0 also where it cannot be asked now, descriptors being short, say."""
    try:
        return peer_inode(sock)
    except OSError:
        return 0
