"""The messages of the handshake, all of one size: HELLO, CHALLENGE and WELCOME (docs/session.md).

Behind WELCOME with `Code.OK` come frames, which cext/session.h has.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, replace

MAGIC = b"\xf5refault"
"""Nothing of QEMU's begins with 0xf5."""
VERSION = 1
ID_BYTES = 16
NONCE_BYTES = 32
TAG_BYTES = 32
_LAYOUT = struct.Struct(f">8sHHBBHI{ID_BYTES}s5Q{NONCE_BYTES}s{TAG_BYTES}s")
MESSAGE_BYTES = _LAYOUT.size
_NO_NONCE = bytes(NONCE_BYTES)
_NO_TAG = bytes(TAG_BYTES)


class Kind(enum.IntEnum):
    """Who says it, and why."""

    HELLO = 1
    """From who dials."""
    CHALLENGE = 2
    """From who answers and has a key: say HELLO again, with a proof for my nonce."""
    WELCOME = 3
    """From who answers: `Code` tells whether it goes on."""


class Code(enum.IntEnum):
    """What WELCOME says. All but OK end the connection."""

    OK = 0
    STALE = 1
    """An attempt as high or higher was seen; `attempt` is the highest."""
    AGAIN = 2
    """Not now: lane 0 is not there yet, or there is no memory. Come again."""
    UNKNOWN = 3
    """There is no such session, and this HELLO begins none."""
    GONE = 4
    """The lane is over, or its two ends do not fit together any more."""
    KEY = 5
    """Who answers wants a proof of a key, and there was none, or of another key."""


class Flag(enum.IntFlag):
    """Of HELLO."""

    NEW = 1
    """Who dials was never welcomed: the session may begin with this."""
    KEYED = 2
    """It has a key; its nonce is one for who answers to prove itself by."""
    PROOF = 4
    """The tag is a proof for the nonce of CHALLENGE; in WELCOME: for that of HELLO."""


_NO_FLAG = Flag(0)
_FLAGS = int(Flag.NEW | Flag.KEYED | Flag.PROOF)


@dataclass(frozen=True)
class Positions:
    """What an end has of both streams, as struct rf_positions explains it; in bytes from a stream's begin."""

    received: int = 0
    written: int = 0
    first_kept: int = 0
    end: int = 0
    window: int = 0


@dataclass(frozen=True)
class Message:
    """One message."""

    kind: Kind
    session: bytes
    lane: int
    attempt: int
    code: Code = Code.OK
    flags: Flag = _NO_FLAG
    positions: Positions = Positions()
    nonce: bytes = _NO_NONCE
    tag: bytes = _NO_TAG

    def encode(self) -> bytes:
        """The message on the wire, `MESSAGE_BYTES` long."""
        at = self.positions
        return _LAYOUT.pack(
            MAGIC,
            VERSION,
            self.lane,
            self.kind,
            self.code,
            self.flags,
            self.attempt,
            self.session,
            at.received,
            at.written,
            at.first_kept,
            at.end,
            at.window,
            self.nonce,
            self.tag,
        )

    def untagged(self) -> bytes:
        """What the tag is made of."""
        return replace(self, tag=_NO_TAG).encode()


class NoMessage(ValueError):  # noqa: N818 - it says what is there
    """Bytes that are no message of the handshake, for the reason given."""


def decode(data: bytes) -> Message:
    """The message in `MESSAGE_BYTES` bytes. Raises `NoMessage`."""
    magic, version, lane, kind, code, flags, attempt, session, *rest = _LAYOUT.unpack(data)
    *positions, nonce, tag = rest
    if magic != MAGIC:
        raise NoMessage("it does not speak refault's session protocol")
    if version != VERSION:
        raise NoMessage(f"it speaks version {version} of the session protocol, this refault {VERSION}")
    try:
        kind, code = Kind(kind), Code(code)
    except ValueError as error:
        raise NoMessage(f"{error} of the session protocol") from None
    if flags & ~_FLAGS or (code is not Code.OK and kind is not Kind.WELCOME):
        raise NoMessage("a field of the handshake has a value that it cannot have")
    return Message(kind, session, lane, attempt, code, Flag(flags), Positions(*positions), nonce, tag)
