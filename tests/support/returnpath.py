"""Decoder and encoder of the return path, destination to source (cext/returnpath.h)."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from refault.channel._channel import ffi, lib

_REQUEST_MAX = 272


class Kind(enum.IntEnum):
    """What an event tells."""

    SHUT = lib.RF_RETURN_SHUT
    PONG = lib.RF_RETURN_PONG
    REQUEST = lib.RF_RETURN_REQUEST
    BITMAP_BEGIN = lib.RF_RETURN_BITMAP_BEGIN
    BITMAP_DATA = lib.RF_RETURN_BITMAP_DATA
    BITMAP_END = lib.RF_RETURN_BITMAP_END
    RESUME_ACK = lib.RF_RETURN_RESUME_ACK
    SWITCHOVER_ACK = lib.RF_RETURN_SWITCHOVER_ACK
    BAD = lib.RF_RETURN_BAD
    UNKNOWN = lib.RF_RETURN_UNKNOWN


@dataclass(frozen=True, slots=True)
class ReturnEvent:
    """One message, or a part of a received bitmap. Fields without a meaning for it are zero or empty."""

    kind: Kind
    value: int = 0
    name: bytes = b""
    named: bool = False
    start: int = 0
    length: int = 0
    size: int = 0
    data_offset: int = 0
    data: bytes = b""
    reason: int = 0


def _event(raw: object) -> ReturnEvent:
    event = ffi.cast("struct rf_returnpath_event *", raw)
    kind = Kind(event.type)
    match kind:
        case Kind.SHUT | Kind.PONG | Kind.RESUME_ACK:
            return ReturnEvent(kind, value=int(event.value))
        case Kind.SWITCHOVER_ACK:
            return ReturnEvent(kind)
        case Kind.BAD | Kind.UNKNOWN:
            return ReturnEvent(kind, reason=int(event.reason))
    name = bytes(ffi.buffer(event.name, event.name_length))
    if kind is Kind.REQUEST:
        return ReturnEvent(
            kind, name=name, named=bool(event.named), start=int(event.start), length=int(event.length)
        )
    if kind is Kind.BITMAP_DATA:
        data = bytes(ffi.buffer(event.data, event.data_length))
        return ReturnEvent(
            kind, name=name, size=int(event.size), data_offset=int(event.data_offset), data=data
        )
    return ReturnEvent(kind, name=name, size=int(event.size))


class ReturnPathDecoder:
    """Decodes what it is fed, in pieces of any size."""

    def __init__(self) -> None:
        pointer = lib.rf_returnpath_new()
        if pointer == ffi.NULL:
            raise MemoryError("no memory for the decoder")
        self._path = ffi.gc(pointer, lib.rf_returnpath_free)

    def next(self, data: bytes | memoryview) -> tuple[int, ReturnEvent | None]:
        """Consumes up to and including one event; the bytes consumed, and the event if there was one."""
        raw = ffi.new("struct rf_returnpath_event *")
        with ffi.from_buffer("uint8_t[]", data) as buffer:
            consumed = int(lib.rf_returnpath_next(self._path, buffer, len(data), raw))
            return consumed, None if raw.type == lib.RF_RETURN_NONE else _event(raw)

    def feed(self, data: bytes) -> Iterator[ReturnEvent]:
        """The events that these bytes complete. Must be iterated to its end before the next call."""
        view = memoryview(data)
        while len(view) > 0:
            consumed, event = self.next(view)
            view = view[consumed:]
            if event is not None:
                yield event

    def restart(self) -> None:
        """A new channel begins: at a boundary, with no block remembered."""
        lib.rf_returnpath_restart(self._path)

    @property
    def at_boundary(self) -> bool:
        """Between two messages; false for ever after BAD."""
        return bool(lib.rf_returnpath_at_boundary(self._path))


def encode_request(name: bytes, start: int, length: int) -> bytes:
    """A REQ_PAGES_ID message. Raises `ValueError` for a name that is empty or longer than 255 bytes."""
    out = ffi.new("uint8_t[]", _REQUEST_MAX)
    size = lib.rf_returnpath_encode_request_id(out, _REQUEST_MAX, name, len(name), start, length)
    if size == 0:
        raise ValueError(f"a RAM block name of {len(name)} bytes")
    return bytes(ffi.buffer(out, size))
