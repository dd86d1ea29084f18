"""Files of ours for others: given to them, or, by who may not do that, opened to them (acl(5))."""

from __future__ import annotations

import os
import stat
import struct

ACL = "system.posix_acl_access"

# linux/posix_acl_xattr.h: a version, then entries of tag, rights and whom they are about, in this order.
_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NOBODY = 0xFFFFFFFF


def give(path: str | os.PathLike[str], mode: int, uid: int | None = None, gid: int | None = None) -> None:
    """Has a file of ours be a user's, a group's or both, with `mode`.

    Without the right to give files away (CAP_CHOWN) it stays ours, and an access list gives that user what
    `mode` gives to the owner, and that group what it gives to the group. Raises OSError.
    """
    denied: PermissionError | None = None
    listed: dict[str, int] = {}
    if gid is not None:  # first, for its rights
        try:
            os.chown(path, -1, gid)
        except PermissionError as error:
            denied, listed["gid"] = error, gid
    os.chmod(path, mode)
    if uid is not None:  # last, for only the owner can change the rest
        try:
            os.chown(path, uid, -1)
        except PermissionError as error:
            denied, listed["uid"] = error, uid
    if denied is not None:
        try:
            os.setxattr(path, ACL, _access_list(mode, **listed))
        except OSError:
            raise denied from None


def is_given(path: str | os.PathLike[str], mode: int, uid: int) -> bool:
    """Whether a file is as `give` makes it for a user. Raises OSError."""
    status = os.lstat(path)
    if status.st_uid == uid:
        return stat.S_IMODE(status.st_mode) == mode
    try:
        return status.st_uid == os.geteuid() and os.getxattr(path, ACL) == _access_list(mode, uid)
    except OSError:  # it has none
        return False


def _access_list(mode: int, uid: int | None = None, gid: int | None = None) -> bytes:
    """What `mode` says, with the user beside the owner, and the group in place of the file's own."""
    owner, group, others = mode >> 6 & 7, mode >> 3 & 7, mode & 7
    own_group = group if gid is None else 0
    entries = [(_USER_OBJ, owner, _NOBODY), (_GROUP_OBJ, own_group, _NOBODY), (_OTHER, others, _NOBODY)]
    mask = own_group
    if uid is not None:
        entries.append((_USER, owner, uid))
        mask |= owner
    if gid is not None:
        entries.append((_GROUP, group, gid))
        mask |= group
    entries.append((_MASK, mask, _NOBODY))
    return _VERSION + b"".join(_ENTRY.pack(*entry) for entry in sorted(entries))
