"""A monitor that was handed over, for the refault that comes after this one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from refault.daemon.host.whole import whole
from refault.daemon.record.replaced import replace

_NAME = "handed.json"


class HandOver(msgspec.Struct, frozen=True, kw_only=True):
    """Whose it is, and which sockets."""

    name: str
    """The VM's."""
    pid: int
    started: int
    """Its start time (kernel/process.py), for pids are used again."""
    number: int
    """At which number of that process the socket lies that it was given."""
    given: int
    """That one's inode."""
    libvirt: int
    """And that of libvirt's own."""
    path: str
    """libvirt's."""

    def save(self, directory: Path) -> None:
        """On record before anything is given. Raises OSError."""
        replace(directory / _NAME, msgspec.json.encode(self))


def remove(directory: Path) -> None:
    """It is over."""
    with contextlib.suppress(OSError):
        (directory / _NAME).unlink()


def load_all(state_dir: Path) -> Iterator[HandOver]:
    """Those of an earlier refault; what cannot be read is none."""
    with contextlib.suppress(OSError):
        for file in sorted(state_dir.glob(f"*/{_NAME}")):
            with contextlib.suppress(OSError, msgspec.DecodeError):
                hand_over = msgspec.json.decode(whole(file), type=HandOver)
                if hand_over.name == file.parent.name:
                    yield hand_over
