"""What the kernel tells of unix sockets without a connection to them (unix_diag, net/unix/diag.c)."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from refault.daemon.address import Address

# <linux/netlink.h>, <linux/sock_diag.h>, <linux/unix_diag.h>
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST = 1
_NLM_F_DUMP = 0x300
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
NO_COOKIE = 0xFFFFFFFF
_UDIAG_SHOW_NAME = 1
_UDIAG_SHOW_VFS = 2
_UNIX_DIAG_NAME = 0
_UNIX_DIAG_VFS = 1
_LISTEN = 1 << 10
"""TCP_LISTEN as a bit of the states that are asked for."""
NLMSGHDR = struct.Struct("=IHHII")
UNIX_DIAG_REQ = struct.Struct("=BBHIIIII")
UNIX_DIAG_MSG_SIZE = 16
RTATTR = struct.Struct("=HH")
_VFS = struct.Struct("=II")
_ANSWER = 64 << 10


@contextmanager
def sock_diag() -> Iterator[socket.socket]:
    """A socket to ask at. Raises OSError where there is none to be had."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1.0)
        yield netlink


def listens(address: Address) -> bool:
    """Whether somebody of this network namespace listens at a unix socket's address.

    Raises OSError where the kernel does not tell.
    """
    if address.abstract:
        return any(name == address.sun_path for name, _ in _listeners())
    try:
        status = os.stat(address.sun_path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    # The low half of the inode's number, and the kernel's own dev_t (linux/kdev_t.h), which is not that of
    # stat(2) on every file system.
    inode = status.st_ino & 0xFFFFFFFF
    device = os.major(status.st_dev) << 20 | os.minor(status.st_dev)
    path = os.fsencode(address.sun_path)
    return any(
        file is not None and file[0] == inode and (file[1] == device or name.rstrip(b"\0") == path)
        for name, file in _listeners()
    )


def _listeners() -> Iterator[tuple[bytes, tuple[int, int] | None]]:
    """The name of each listening unix socket, and inode and device of its file."""
    show = _UDIAG_SHOW_NAME | _UDIAG_SHOW_VFS
    body = UNIX_DIAG_REQ.pack(socket.AF_UNIX, 0, 0, _LISTEN, 0, show, NO_COOKIE, NO_COOKIE)
    size = NLMSGHDR.size + len(body)
    with sock_diag() as netlink:
        netlink.send(NLMSGHDR.pack(size, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | _NLM_F_DUMP, 1, 0) + body)
        while True:
            answer = netlink.recv(_ANSWER)
            at = 0
            while at + NLMSGHDR.size <= len(answer):
                length, kind, *_ = NLMSGHDR.unpack_from(answer, at)
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR or length < NLMSGHDR.size:
                    raise OSError(errno.EOPNOTSUPP, "the kernel does not tell of unix sockets (unix_diag)")
                yield _name_and_file(answer[at : at + length])
                at += (length + 3) & ~3


def _name_and_file(message: bytes) -> tuple[bytes, tuple[int, int] | None]:
    name, file = b"", None
    at = NLMSGHDR.size + UNIX_DIAG_MSG_SIZE
    while at + RTATTR.size <= len(message):
        length, kind = RTATTR.unpack_from(message, at)
        value = message[at + RTATTR.size : at + length]
        if kind == _UNIX_DIAG_NAME:
            name = value
        elif kind == _UNIX_DIAG_VFS and len(value) >= _VFS.size:
            file = _VFS.unpack_from(value)
        at += max((length + 3) & ~3, RTATTR.size)
    return name, file
