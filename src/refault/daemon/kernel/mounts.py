"""What a directory lies on (proc(5), mountinfo)."""

from __future__ import annotations

import os
from pathlib import Path


def file_system(directory: Path) -> str:
    """The type of the file system that a directory is on; empty where the kernel does not tell."""
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", errors="surrogateescape") as mounts:
        for mount in mounts:
            fields, _, kind = mount.partition(" - ")
            if fields.split()[2] == wanted:
                return kind.split()[0]
    return ""
