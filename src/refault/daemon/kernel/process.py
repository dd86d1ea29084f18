"""Another process: since when it runs, what it holds, and where it is. proc(5)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import socket
from collections.abc import Set
from pathlib import Path

from refault.daemon.kernel.polled import readable

_A_THREAD = (errno.EINVAL, errno.ENOENT)
"""What pidfd_open(2) says of a number that a thread has by now, and no process."""
_SYS_PIDFD_GETFD = 438  # the same number on every architecture (pidfd_getfd(2), Linux 5.6)
_syscall = ctypes.CDLL(None, use_errno=True).syscall


def process_started(pid: int | None) -> int | None:
    """The start time of a process, in clock ticks since boot (/proc/PID/stat, field 22); None where it has
    ended or cannot be read: `still_runs` tells these apart."""
    if pid is None:
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def has_ended(pid: int) -> bool:
    """Whether a process has ended, though nobody may have waited for it yet.

    To ask that needs no right to look at it (pidfd_open(2), Linux 5.3); where it cannot be asked, for want of
    a descriptor, say, it has not.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        return error.errno in (errno.ESRCH, *_A_THREAD)
    try:
        return readable(pidfd)
    finally:
        os.close(pidfd)


def hidden(pid: int) -> bool:
    """Whether a process runs of which nothing may be known (hidepid= of proc(5), ProtectProc= of a unit)."""
    if os.path.exists(f"/proc/{pid}") or has_ended(pid):
        return False
    return not os.path.exists(f"/proc/{pid}")  # else it has just come


def still_runs(pid: int | None, started: int | None) -> bool:
    """Whether the process that was `pid`, and had run since `started`, runs yet, as far as can be told: one
    of which nothing may be known, now or when `started` was asked for (then None), has not ended."""
    if pid is None:
        return False
    now = process_started(pid)
    if now is None:
        return not has_ended(pid)
    return started in (None, now)


def may_be_same(one: tuple[int | None, int | None], other: tuple[int | None, int | None]) -> bool:
    """Whether two, each a pid and since when it runs, may be one process: a start that could not be read may
    be any."""
    return one[0] == other[0] and (one[1] == other[1] or None in (one[1], other[1]))


def user_of(pid: int) -> int:
    """Whose a process is (the real user id). Raises OSError, and ValueError or IndexError on nonsense."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line[:4] == "Uid:"]
    return int(line.split()[1])


def file_limit(pid: int) -> int:
    """How many descriptors a process may have (the soft RLIMIT_NOFILE). Raises as `user_of`."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("Max open files")]
    return int(line.split()[3])


def names_of(pid: int) -> tuple[bytes, bytes]:
    """What a process calls itself, and its program's file; each empty where it cannot be read."""
    comm = exe = b""
    with contextlib.suppress(OSError):
        comm = Path(f"/proc/{pid}/comm").read_bytes().removesuffix(b"\n")
    with contextlib.suppress(OSError):  # it may be another user's
        exe = os.readlink(f"/proc/{pid}/exe".encode())
    return comm, exe


def holds(pid: int, inode: int) -> bool:
    """Whether a process has a socket open. Raises OSError where one may not look, or it is gone."""
    return _number_of(pid, inode) is not None


def socket_at(pid: int, number: int) -> int | None:
    """The inode of the socket that a process has at a number; None where it has none there, or is gone.

    Raises OSError where one may not look.
    """
    try:
        target = os.readlink(f"/proc/{pid}/fd/{number}")
    except (FileNotFoundError, ProcessLookupError):
        if hidden(pid):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) from None
        return None
    found = re.fullmatch(r"socket:\[(\d+)\]", target)
    return int(found[1]) if found else None


def borrowed(pid: int, inode: int) -> socket.socket:
    """A duplicate of a process's socket. Raises OSError."""
    process = os.pidfd_open(pid)
    try:
        number = _number_of(pid, inode)
        if number is None:
            raise FileNotFoundError(f"process {pid} has no socket {inode}")
        return socket.socket(fileno=duplicate_of(process, number))
    finally:
        os.close(process)


def duplicate_of(process: int, number: int) -> int:
    """A duplicate of a descriptor of a process's, which a pidfd names. Raises OSError."""
    duplicate = _syscall(_SYS_PIDFD_GETFD, process, number, 0)
    if duplicate < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(duplicate)


def sockets_of(pid: int) -> dict[int, int]:
    """The sockets that a process has open: one of its numbers by each inode. Raises as `holds`."""
    found = {}
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # closed while we look
                link = os.readlink(entry.path)
                if link.startswith("socket:["):
                    found[int(link[8:-1])] = int(entry.name)
    return found


def socket_holders(inodes: Set[int]) -> dict[int, set[int]]:
    """The processes that have sockets open, of those that we may look at, by the sockets' inodes."""
    holders: dict[int, set[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):  # another's, or it has ended meanwhile
                for inode in inodes & sockets_of(int(entry)).keys():
                    holders.setdefault(inode, set()).add(int(entry))
    return holders


def _number_of(pid: int, inode: int) -> int | None:
    """By which a process knows a socket; None where it has none such. Raises as `holds`."""
    wanted = f"socket:[{inode}]"
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            try:
                if os.readlink(entry.path) == wanted:
                    return int(entry.name)
            except FileNotFoundError:
                continue  # closed while we looked
    return None


def resident_pages(pid: int) -> int:
    """The pages of its memory that are there. Raises OSError, and ValueError or IndexError on nonsense."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def same_network(pid: int) -> bool:
    """Whether what we dial is what a process would dial; False where one may not look."""
    try:
        return os.path.samefile(f"/proc/{pid}/ns/net", "/proc/self/ns/net")
    except OSError:
        return False
