"""What one refault leaves to the next of a monitor's connections, beside what they have said."""

from __future__ import annotations

import msgspec

from refault import __version__
from refault.daemon.kept.sockets import Identity

FORMAT = 1
"""Of all that is in the journal: another one is not read."""


class About(msgspec.Struct, array_like=True, frozen=True):
    """A client: where it came, its connection's cookie, if that was kept, and how many bytes are in that yet
    with a descriptor, though they were received."""

    address: str
    cookie: bytes | None
    peeked: int = 0


class Listening(msgspec.Struct, array_like=True, frozen=True):
    """A front: the address as it was asked for, and as it is; its sockets' cookies; its socket file, and what
    that had before it was given to anybody."""

    key: str
    port: int
    cookies: list[bytes]
    inode: tuple[int, int] | None
    access: tuple[int, int, int, bytes | None] | None


class Left(msgspec.Struct, array_like=True, frozen=True):
    """All of it when a log begins. `core`: refault.qmp.saved."""

    format: int
    version: str
    qemu: str
    """Where its monitor is, as it was asked for."""
    pid: int
    started: int
    upstream: Identity
    lots: list[Identity]
    fronts: list[Listening]
    clients: dict[int, About]
    core: bytes
    came: dict[bytes, str] = {}
    """By their cookies, clients that are not among these yet, and where they came."""
    stored: bool = False
    """Whether the service manager holds all this, and not QEMU."""

    @property
    def held(self) -> list[str]:
        """The names of what is held."""
        return [each.name for each in (self.upstream, *self.lots)]


class OtherVersionError(Exception):
    """What was left is another version's."""


def encode(left: Left) -> bytes:
    """As it is written."""
    return msgspec.msgpack.encode(left)


def decode(data: bytes | memoryview, *, records: bool) -> Left:
    """Raises OtherVersionError, also where `records` follow that only the version that wrote them can put in,
    and msgspec.MsgspecError."""
    head = msgspec.msgpack.decode(data, type=list[msgspec.Raw])
    numbers = [msgspec.msgpack.decode(head[0], type=int), msgspec.msgpack.decode(head[1], type=str)]
    if numbers[0] != FORMAT or (records and numbers[1] != __version__):
        raise OtherVersionError(f"it was written by refault {numbers[1]}")
    return msgspec.msgpack.decode(data, type=Left)
