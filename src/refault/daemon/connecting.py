"""Whether a QEMU that was told to resume to an address is still at it, as only the kernel tells of old ones.

Before there was `postcopy-recover-setup` a source stays in `postcopy-paused` while it dials, for two minutes
on a silent network, and takes a second `migrate` with `resume` meanwhile. When both come through it aborts
(migration/migration.c, migrate_fd_connect: !s->cleanup_bh).
"""

from __future__ import annotations

import os
from pathlib import Path

from refault.daemon.return_path import holds

_ESTABLISHED = 1
_SYN_SENT = 2


def connects(pid: int, port: int) -> bool:
    """Whether a process dials a TCP port, or has just got through. Raises OSError where one may not look."""
    # Twice: the kernel gives its table in pieces, and where connections come and go a row can be passed over.
    tables = [Path(f"/proc/{pid}/net/{table}") for table in ("tcp", "tcp6")] * 2
    return any(holds(pid, inode) for table in tables for inode in _inodes(table, port))


def same_network(pid: int) -> bool:
    """Whether what we dial is what a process would dial; False where one may not look."""
    try:
        return os.path.samefile(f"/proc/{pid}/ns/net", "/proc/self/ns/net")
    except OSError:
        return False


def _inodes(table: Path, port: int) -> set[int]:
    """proc(5), net/tcp: the sockets on their way to a remote port."""
    try:
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
    except FileNotFoundError:  # a kernel without IPv6, or the process is gone
        return set()
    return {
        int(row[9])
        for row in rows
        if int(row[3], 16) in (_ESTABLISHED, _SYN_SENT) and int(row[2].rpartition(":")[2], 16) == port
    }
