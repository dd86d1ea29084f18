"""Decoder of the forward stream, source to destination (cext/forward.h)."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from refault.channel._channel import ffi, lib


class Mode(enum.IntEnum):
    """What kind of channel the stream comes from."""

    FRESH = lib.RF_FORWARD_FRESH
    RECOVERED = lib.RF_FORWARD_RECOVERED
    PREEMPT = lib.RF_FORWARD_PREEMPT


class Kind(enum.IntEnum):
    """What an event tells; `Event` says which fields have a meaning for which kind."""

    HEADER = lib.RF_FORWARD_HEADER
    CONFIGURATION = lib.RF_FORWARD_CONFIGURATION
    TARGET_PAGE_BITS = lib.RF_FORWARD_TARGET_PAGE_BITS
    CAPABILITY = lib.RF_FORWARD_CAPABILITY
    UUID = lib.RF_FORWARD_UUID
    SECTION = lib.RF_FORWARD_SECTION
    FOOTER = lib.RF_FORWARD_FOOTER
    BLOCK = lib.RF_FORWARD_BLOCK
    BLOCK_PAGE_SIZE = lib.RF_FORWARD_BLOCK_PAGE_SIZE
    PAGE = lib.RF_FORWARD_PAGE
    RAM_EOS = lib.RF_FORWARD_RAM_EOS
    MULTIFD_FLUSH = lib.RF_FORWARD_MULTIFD_FLUSH
    DIRTY_BITMAP = lib.RF_FORWARD_DIRTY_BITMAP
    COMMAND = lib.RF_FORWARD_COMMAND
    DISCARD = lib.RF_FORWARD_DISCARD
    PACKAGED_END = lib.RF_FORWARD_PACKAGED_END
    EOF = lib.RF_FORWARD_EOF
    VMDESCRIPTION = lib.RF_FORWARD_VMDESCRIPTION
    OPAQUE = lib.RF_FORWARD_OPAQUE


class Section(enum.IntEnum):
    """`Event.code` of a section."""

    START = lib.RF_SECTION_START
    PART = lib.RF_SECTION_PART
    END = lib.RF_SECTION_END
    FULL = lib.RF_SECTION_FULL


class Frame(enum.IntEnum):
    """`Event.code` of a page: how it is carried."""

    ZERO = lib.RF_FRAME_ZERO
    PAGE = lib.RF_FRAME_PAGE
    XBZRLE = lib.RF_FRAME_XBZRLE
    COMPRESS = lib.RF_FRAME_COMPRESS


class Command(enum.IntEnum):
    """`Event.code` of a command."""

    OPEN_RETURN_PATH = lib.RF_COMMAND_OPEN_RETURN_PATH
    PING = lib.RF_COMMAND_PING
    POSTCOPY_ADVISE = lib.RF_COMMAND_POSTCOPY_ADVISE
    POSTCOPY_LISTEN = lib.RF_COMMAND_POSTCOPY_LISTEN
    POSTCOPY_RUN = lib.RF_COMMAND_POSTCOPY_RUN
    RAM_DISCARD = lib.RF_COMMAND_RAM_DISCARD
    PACKAGED = lib.RF_COMMAND_PACKAGED
    ENABLE_COLO = lib.RF_COMMAND_ENABLE_COLO
    POSTCOPY_RESUME = lib.RF_COMMAND_POSTCOPY_RESUME
    RECV_BITMAP = lib.RF_COMMAND_RECV_BITMAP
    SWITCHOVER_START = lib.RF_COMMAND_SWITCHOVER_START


@dataclass(frozen=True, slots=True)
class Event:
    """One item of the stream. Fields that cext/forward.h names for no such kind are zero or empty.

    `at` and `end` are byte positions in this channel: of the item's first byte, and behind its last. Offsets
    and lengths are bytes in the RAM block.
    """

    kind: Kind
    at: int
    end: int
    code: int = 0
    id: int = 0
    block: int = 0
    offset: int = 0
    length: int = 0
    value: int = 0
    name: bytes = b""
    packaged: bool = False


_NAMED = frozenset(
    {
        Kind.CONFIGURATION,
        Kind.CAPABILITY,
        Kind.UUID,
        Kind.SECTION,
        Kind.BLOCK,
        Kind.BLOCK_PAGE_SIZE,
        Kind.PAGE,
        Kind.COMMAND,
        Kind.DISCARD,
        Kind.OPAQUE,
    }
)
# Which fields the decoder fills for which kind; the others hold what was there before.
_FIELDS: dict[Kind, tuple[str, ...]] = {
    Kind.HEADER: ("value",),
    Kind.CONFIGURATION: (),
    Kind.TARGET_PAGE_BITS: ("value",),
    Kind.CAPABILITY: (),
    Kind.UUID: (),
    Kind.SECTION: ("code", "id"),
    Kind.FOOTER: ("id",),
    Kind.BLOCK: ("block", "length"),
    Kind.BLOCK_PAGE_SIZE: ("block", "value"),
    Kind.PAGE: ("block", "code", "offset", "length", "value"),
    Kind.RAM_EOS: (),
    Kind.MULTIFD_FLUSH: (),
    Kind.DIRTY_BITMAP: ("code", "value"),
    Kind.COMMAND: ("code", "length"),
    Kind.DISCARD: ("block", "offset", "length"),
    Kind.PACKAGED_END: ("value",),
    Kind.EOF: (),
    Kind.VMDESCRIPTION: ("value",),
    Kind.OPAQUE: ("code", "id"),
}
_VALUED_COMMANDS = frozenset({Command.PING, Command.PACKAGED})


def _event(raw: Any) -> Event:
    kind = Kind(raw.type)
    fields: dict[str, Any] = {name: int(getattr(raw, name)) for name in _FIELDS[kind]}
    if kind is Kind.COMMAND:
        if raw.code in _VALUED_COMMANDS:
            fields["value"] = int(raw.value)
        elif raw.code == Command.POSTCOPY_ADVISE and raw.length == 16:
            fields["value"], fields["offset"] = int(raw.value), int(raw.offset)
        elif raw.code == Command.RAM_DISCARD:
            fields["block"] = int(raw.block)
    elif kind is Kind.SECTION and raw.code in (Section.START, Section.FULL):
        fields["value"] = int(raw.value)
    if kind in _NAMED and raw.name != ffi.NULL:
        fields["name"] = bytes(ffi.buffer(raw.name, raw.name_length))
    return Event(kind, int(raw.at), int(raw.end), packaged=bool(raw.packaged), **fields)


class ForwardDecoder:
    """Decodes what it is fed, in pieces of any size."""

    def __init__(self, mode: Mode = Mode.FRESH) -> None:
        pointer = lib.rf_forward_new(mode)
        if pointer == ffi.NULL:
            raise MemoryError("no memory for the decoder")
        self._decoder = ffi.gc(pointer, lib.rf_forward_free)

    def feed(self, data: bytes | memoryview) -> Iterator[Event]:
        """The events that these bytes complete. Must be iterated to its end before the next call."""
        raw = ffi.new("struct rf_forward_event *")
        with ffi.from_buffer("uint8_t[]", data) as buffer:
            position = 0
            while position < len(data):
                position += lib.rf_forward_next(self._decoder, buffer + position, len(data) - position, raw)
                if raw.type != lib.RF_FORWARD_NONE:
                    yield _event(raw)

    def restart(self, mode: Mode) -> None:
        """A new channel of the same migration begins."""
        lib.rf_forward_restart(self._decoder, mode)

    @property
    def position(self) -> int:
        """Bytes of this channel that were fed."""
        return int(lib.rf_forward_position(self._decoder))

    @property
    def opaque(self) -> int:
        """0, or why the stream can no longer be read (enum rf_opaque); `reason_text` puts it in words."""
        return int(lib.rf_forward_opaque(self._decoder))


def reason_text(reason: int) -> str:
    """A phrase that goes on after "cannot be read: ", for either direction's reason."""
    return str(ffi.string(lib.rf_forward_reason_text(reason)).decode())
