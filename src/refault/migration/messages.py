"""Messages of the migration channel that refault itself writes or looks for; the rest is read in cext/.

Forward: section QEMU_VM_COMMAND, command, length (migration/savevm.c, qemu_savevm_command_send). Return path:
type, length (migration/migration.c, migrate_send_rp_message). Big-endian.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from refault.session.wire import MAGIC as SESSION_MAGIC

COMMAND_HEAD = struct.Struct(">BHH")
"""Section, command, length of what follows."""
SECTION_COMMAND = 8
_PING = 2
RESUME = 9
RECV_BITMAP = 10
_MESSAGE_HEAD = struct.Struct(">HH")
_SHUT, _PONG, _REQ_PAGES_ID, _REQ_PAGES, _BITMAP, _RESUME_ACK = range(1, 7)
_MULTIFD_MAGIC = 0x11223344
_BITMAP_END = 0x0123456789ABCDEF
_ASKS = COMMAND_HEAD.pack(SECTION_COMMAND, RECV_BITMAP, 0)[:3]


def command(number: int, payload: bytes) -> bytes:
    """One of the forward stream's."""
    return COMMAND_HEAD.pack(SECTION_COMMAND, number, len(payload)) + payload


def message(kind: int, payload: bytes) -> bytes:
    """One of the return path's."""
    return _MESSAGE_HEAD.pack(kind, len(payload)) + payload


_OURS = struct.pack(">I", 0x72664C54)
"""No value of QEMU's own pings, which are 1 to 4."""
PING = command(_PING, _OURS)
PONG = message(_PONG, _OURS)
REQUESTS = (struct.pack(">H", _REQ_PAGES_ID), struct.pack(">H", _REQ_PAGES))
"""How page requests begin."""
PONG_LOADED = message(_PONG, struct.pack(">I", 0x42))
"""The destination has loaded its device state (savevm.h, QEMU_VM_PING_PACKAGED_LOADED, since 10.2)."""
RESUME_ACK = message(_RESUME_ACK, struct.pack(">I", 1))
SHUT_ERROR = message(_SHUT, struct.pack(">I", 1))
"""The destination's last word: it has failed."""


FIRST_BYTES = 4
"""So many tell what a connection is."""


class Kind(enum.Enum):
    """What the first bytes of a far connection say it is."""

    FRESH = "the beginning of a migration"
    RESUMED = "a recovered channel"
    ENCRYPTED = "a TLS handshake"
    PING = "the question whether a recovered channel would be answered"
    MULTIFD = "a multifd channel"
    FRAME = "a RAM frame, as a preempt channel's"
    SESSION = "a refault's that goes on with a session"
    FOREIGN = "no migration stream"


def classify(first: bytes) -> Kind:
    """Reads the FIRST_BYTES: QEMU_VM_FILE_MAGIC, the command section that opens a recovered channel, our
    PING before it, the magic number of a multifd channel or of a session, or a TLS record with a handshake
    (RFC 8446, 5.1).

    A preempt channel has no magic number and mostly says nothing until it is needed.

    migration/savevm.c: qemu_savevm_state_header, and qemu_savevm_send_recv_bitmap, which is what
    ram_resume_prepare (migration/ram.c) begins a recovery with; migration/multifd.c: MULTIFD_MAGIC.
    """
    if first == b"QEVM":
        return Kind.FRESH
    if first[:3] == _ASKS and first[3:] == b"\0":  # a name has at most 255 bytes
        return Kind.RESUMED
    if first[:2] == b"\x16\x03":
        return Kind.ENCRYPTED
    if first == PING[:4]:
        return Kind.PING
    if first == SESSION_MAGIC[:FIRST_BYTES]:
        return Kind.SESSION
    if first == _MULTIFD_MAGIC.to_bytes(4, "big"):
        return Kind.MULTIFD
    if first[:2] == b"\0\0" and len(first) == FIRST_BYTES:  # an offset below 2^48 (migration/ram.c)
        return Kind.FRAME
    return Kind.FOREIGN


def is_cut_short(first: bytes) -> bool:
    """Whether fewer than FIRST_BYTES are the beginning of what nobody but a refault says."""
    return 0 < len(first) < FIRST_BYTES and SESSION_MAGIC.startswith(first)


_MULTIFD_INIT = struct.Struct(">II16sB7x32x")
MULTIFD_INIT_BYTES = _MULTIFD_INIT.size
_MULTIFD_VERSION = 1


@dataclass(frozen=True)
class MultifdInit:
    """What a multifd channel says first (migration/multifd.c, MultiFDInit_t)."""

    uuid: bytes
    """The VM's: QEMU takes none of another."""
    number: int
    """Which of the source's channels it is, from 0."""


def multifd_init(first: bytes) -> MultifdInit | None:
    """Reads MULTIFD_INIT_BYTES; None where they are not all there, or of another version."""
    if len(first) != MULTIFD_INIT_BYTES:
        return None
    magic, version, uuid, number = _MULTIFD_INIT.unpack(first)
    if magic != _MULTIFD_MAGIC or version != _MULTIFD_VERSION:
        return None
    return MultifdInit(uuid, number)


def recv_bitmaps(begun: bytes) -> tuple[list[bytes], bool]:
    """The RAM blocks that the beginning of a recovered channel asks for, and whether something else follows.

    migration/savevm.c, qemu_savevm_send_recv_bitmap: section type, command and length, then the counted name.
    """
    names: list[bytes] = []
    while len(begun) > 5 and len(begun) >= 6 + begun[5]:
        if not begun.startswith(_ASKS):
            return names, True
        names.append(begun[6 : 6 + begun[5]])
        begun = begun[6 + begun[5] :]
    return names, not begun.startswith(_ASKS[: len(begun)])


def all_received(block: bytes, pages: int) -> bytes:
    """A received bitmap with every page in it (migration/ram.c, ramblock_recv_bitmap_send)."""
    size = (pages + 63) // 64 * 8
    bits = ((1 << pages) - 1).to_bytes(size, "little")
    name = bytes([len(block)]) + block
    return message(_BITMAP, name) + struct.pack(">Q", size) + bits + struct.pack(">Q", _BITMAP_END)
