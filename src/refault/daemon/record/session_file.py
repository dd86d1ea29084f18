"""What the next refault needs to go on with a channel that is a session: written by a planned restart alone,
and read once."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from refault.daemon.host.paths import make_again
from refault.daemon.host.whole import NEW, OPEN, is_ours_alone

log = logging.getLogger("refault.state")

_MAGIC = b"refault channel\x01"
_HEAD = struct.Struct(f">{len(_MAGIC)}sQQ32s")
NO_LEG = b""
"""In place of the leg where QEMU has ended its side, and what it said last is to be delivered."""
_MOST = 128 << 20
"""Bytes: more than the rings of a migration have."""


class HandedChannel(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the channel besides what its pump has (cext/handed.h)."""

    generation: str
    """Of its migration (state_file.MigrationRecord)."""
    leg: bytes
    """The kernel's cookie of our end of its leg, which no other socket ever has; or NO_LEG."""
    handed: str = ""
    """Of all hand-overs of that leg, which one; the record says which is to be gone on with."""
    peer_inode: int
    """Of QEMU's end."""
    session: bytes
    recovered: bool
    """Whether it follows a lost one."""
    runs_told: bool
    """Whether it is known that the destination runs its guest."""
    status: str | None
    """QEMU's word."""
    may_end: bool = False
    """Whether its leg could be ended then, and what QEMU may have said since, unheard, changes nothing."""
    laid: tuple[str, ...] = ()
    """The names of what QEMU holds for later recoveries. It has been told of none, and nobody tells it of one
    any more: an end that it was told of must never be closed."""
    guest_stopped: bool = False
    stopped_by_switchover: bool = False
    never_postcopy: bool = False


class SessionFile:
    """The file of one VM, `NAME.session`, of this user alone: it has guest memory."""

    def __init__(self, directory: Path, vm: str) -> None:
        self._vm = vm
        self.path = directory / f"{vm}.session"
        self.half = directory / f"{vm}.session.new"
        """While it is written, and what a kill leaves of it."""

    @contextlib.contextmanager
    def reserved(self, most: int) -> Iterator[Callable[[HandedChannel, bytes], None]]:
        """Room for `most` bytes of a channel, and what writes them down: the file is there when that returns.
        Raises OSError where there is no room; so does the writing, which has it."""
        make_again(self.path.parent)
        self.half.unlink(missing_ok=True)
        descriptor = os.open(self.half, NEW, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, most)

            def write(about: HandedChannel, channel: bytes) -> None:
                told = msgspec.json.encode(about)
                head = _HEAD.pack(_MAGIC, len(told), len(channel), _digest(told, channel))
                with open(descriptor, "wb", closefd=False) as file:
                    file.writelines((head, told, channel))
                    file.truncate()
                self.half.replace(self.path)

            yield write
        finally:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                self.half.unlink(missing_ok=True)

    def take(self, generation: str, leg: bytes, handed: str) -> tuple[HandedChannel, bytes] | None:
        """What was written of this channel, and its pump's part. It is removed first: who goes on with it
        changes it, so it is good for once. None where there is none, or it is torn, old or another's, or
        cannot be removed."""
        with contextlib.suppress(OSError):
            self.half.unlink(missing_ok=True)
        return self._read((generation, leg, handed), remove=True)

    def look(self, generation: str, leg: bytes, handed: str) -> HandedChannel | None:
        """The same, but that it stays."""
        found = self._read((generation, leg, handed), remove=False)
        return found[0] if found is not None else None

    def _read(self, which: tuple[str, bytes, str], *, remove: bool) -> tuple[HandedChannel, bytes] | None:
        try:
            descriptor = os.open(self.path, OPEN)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s: ignoring %s: %s", self._vm, self.path, error)
            return None
        with open(descriptor, "rb") as file:
            try:
                if remove:
                    self.path.unlink()
                data = file.read(_MOST) if is_ours_alone(os.fstat(descriptor)) else b""
                about, channel = _decode(data)
                if (about.generation, about.leg, about.handed) != which:
                    raise ValueError("it is of another channel")
            except (OSError, ValueError, struct.error, msgspec.MsgspecError) as error:
                log.warning("%s: ignoring %s: %s", self._vm, self.path, error)
                return None
        return about, channel


def _digest(about: bytes, channel: bytes) -> bytes:
    digest = hashlib.blake2b(about, digest_size=32)
    digest.update(channel)
    return digest.digest()


def _decode(data: bytes) -> tuple[HandedChannel, bytes]:
    """Raises ValueError, struct.error, msgspec.MsgspecError."""
    magic, told, length, digest = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError("it is none of this version of refault, or not of this user alone")
    about, channel = data[_HEAD.size : _HEAD.size + told], data[_HEAD.size + told :]
    if len(channel) != length or _digest(about, channel) != digest:
        raise ValueError("it is torn")
    return msgspec.json.decode(about, type=HandedChannel), channel
