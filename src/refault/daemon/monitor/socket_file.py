"""Socket files: who may connect there, and how the very file is looked at and given away."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from refault.daemon.kernel.giving import ACL, give
from refault.daemon.monitor.address import Address

log = logging.getLogger("refault.qmp")

MODE = 0o600


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


def is_free(address: Address) -> bool:
    """Whether no option says who may connect."""
    return (address.mode, address.owner, address.group) == (None, None, None)


def inode_of(status: os.stat_result) -> tuple[int, int]:
    """By which a file is known."""
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def open_path(path: str | bytes) -> Iterator[int]:
    """The very file that is at `path` now, whatever is put there next."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def by_number(fd: int) -> str:
    """The path of an open file, whatever is at its own."""
    return f"/proc/self/fd/{fd}"


def access_of(fd: int) -> Access:
    """What a file has."""
    status = os.fstat(fd)
    try:
        acl = os.getxattr(by_number(fd), ACL)
    except OSError:  # there is none, or there are none on this file system
        acl = None
    return Access(stat.S_IMODE(status.st_mode) & 0o777, status.st_uid, status.st_gid, acl)


def give_as_said(fd: int, address: Address, plain: Access, access: Access | None) -> None:
    """Has the file at `fd` what the address says, or else what `access` does. Raises OSError."""
    mode, owner, group = address.mode, address.owner, address.group
    if access is not None and is_free(address):
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
            _change(fd, plain, plain.gid, None, MODE, None)
        return
    _change(fd, plain, plain.gid if group is None else group, owner, MODE if mode is None else mode, None)


def _change(fd: int, plain: Access, gid: int, uid: int | None, mode: int, acl: bytes | None) -> None:
    path = by_number(fd)
    owner = None if uid == plain.uid else uid
    group = None if gid == plain.gid else gid
    if acl is None:
        give(path, mode, owner, group)
        return
    # The group first, for its rights; the owner last, for only he can change the rest.
    if group is not None:
        os.chown(path, -1, group)
    os.chmod(path, mode)
    os.setxattr(path, ACL, acl)
    if owner is not None:
        os.chown(path, owner, -1)
