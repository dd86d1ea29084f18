"""The kernel's view of page faults: how many threads of a destination QEMU wait for a page.

`fdinfo` of a userfaultfd shows `pending`, the faults that QEMU has not read yet, and `total`, all threads
that wait (Linux, fs/userfaultfd.c, userfaultfd_show_fdinfo).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_LINK = "anon_inode:[userfaultfd]"


@dataclass(frozen=True)
class Waiting:
    """Threads that wait: `pending` of them for QEMU to read the fault, `total` in all."""

    pending: int
    total: int


def waiting(pid: int, proc: Path = Path("/proc")) -> Waiting | None:
    """The sums over the process's userfaultfds; None where it has none or we lack CAP_SYS_PTRACE."""
    found = None
    try:
        for name in os.listdir(proc / str(pid) / "fd"):
            if os.readlink(proc / str(pid) / "fd" / name) == _LINK:
                one = _parse((proc / str(pid) / "fdinfo" / name).read_text())
                found = Waiting(one.pending + found.pending, one.total + found.total) if found else one
    except (OSError, ValueError, KeyError):
        return None
    return found


def _parse(text: str) -> Waiting:
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return Waiting(int(fields["pending"]), int(fields["total"]))
