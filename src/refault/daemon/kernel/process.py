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
MAY_NOT_LOOK = "refault may not look at that process (CAP_SYS_PTRACE)"
_SYS_PIDFD_GETFD = 438  # the same number on every architecture (pidfd_getfd(2), Linux 5.6)
_syscall = ctypes.CDLL(None, use_errno=True).syscall


def start_of(pid: int) -> int | None:
    """Since when a process runs, in clock ticks since boot (/proc/PID/stat, field 22); None where it has
    ended.

    Raises OSError where that cannot be told: PermissionError where it runs and nothing may be known of it
    (hidepid= of proc(5), ProtectProc= of a unit).
    """
    try:
        fields = _stat(pid).rpartition(")")[2].split()
    except OSError as error:
        if _has_ended(pid):
            return None
        if isinstance(error, PermissionError) or not os.path.exists(f"/proc/{pid}"):
            raise PermissionError(errno.EPERM, MAY_NOT_LOOK) from error
        if isinstance(error, (FileNotFoundError, ProcessLookupError)):
            return None  # the number is that of another, who has just come
        raise
    return None if fields[0] in "ZX" else int(fields[19])


def _stat(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text(errors="replace")  # a name may be any bytes, and is cut


def _has_ended(pid: int) -> bool:
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


def process_started(pid: int | None) -> int | None:
    """As `start_of`; None also where that cannot be told, or there is no process."""
    with contextlib.suppress(OSError):
        return start_of(pid) if pid is not None else None
    return None


def still_runs(pid: int | None, started: int | None) -> bool:
    """Whether the process that was `pid`, and had run since `started`, runs yet, as far as can be told: one
    of which nothing may be known, now or when `started` was asked for (then None), has not ended."""
    if pid is None:
        return False
    try:
        now = start_of(pid)
    except OSError:
        return True
    return now is not None and started in (None, now)


def may_be_same(one: tuple[int | None, int | None], other: tuple[int | None, int | None]) -> bool:
    """Whether two, each a pid and since when it runs, may be one process: a start that could not be read may
    be any."""
    return one[0] == other[0] and (one[1] == other[1] or None in (one[1], other[1]))


def user_of(pid: int) -> int:
    """Whose a process is (the real user id). Raises OSError, and ValueError or IndexError on nonsense."""
    lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    [line] = [line for line in lines if line[:4] == "Uid:"]
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
        start_of(pid)  # else it may have one there
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
