"""A page map of one's own (cext/pagemap.h), and walks over its records: what the relay's pump does in C."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from refault.channel._channel import ffi, lib

from refault.channel.pagemap import (
    BlockStats,
    Latency,
    PageMapStats,
    read_block_stats,
    read_latency,
    read_stats,
)


class PageMapError(Exception):
    """The map refused something. `status` is one of enum rf_status."""

    def __init__(self, status: int) -> None:
        super().__init__(ffi.string(lib.rf_status_text(status)).decode())
        self.status = status


@dataclass(frozen=True, slots=True)
class Request:
    """A page request as it was made: bytes in the RAM block, `time` in monotonic ns."""

    id: int
    name: bytes
    start: int
    length: int
    time: int
    outstanding: bool


@dataclass(frozen=True, slots=True)
class BitmapReport:
    """What a received bitmap said about its block, in target pages."""

    received: int
    forwarded_not_received: int
    received_not_forwarded: int
    loaded_not_received: int


def walk_to_replay(pointer: Any, looks: int = 1000) -> Iterator[Request]:
    """What is to be replayed of a ``struct rf_pagemap *``, looking at so many records with each call.

    Only for the thread that writes to it.
    """
    left = ffi.new("unsigned *")

    def step(pointer: Any, after: int, raw: Any) -> int:
        left[0] = looks
        return int(lib.rf_pagemap_replay_next(pointer, after, left, raw))

    return walk(pointer, step)


def walk(pointer: Any, step: Any = lib.rf_pagemap_next_record) -> Iterator[Request]:
    """The records that `step`, one of pagemap.h's walks, gives of a ``struct rf_pagemap *``.

    Only for the thread that writes to it.
    """
    raw = ffi.new("struct rf_request *")
    after = 0
    while found := step(pointer, after, raw):
        after = int(raw.id)
        if found == lib.RF_LOOK_ON:
            continue
        name = bytes(ffi.buffer(raw.name, raw.name_length))
        yield Request(after, name, int(raw.start), int(raw.length), int(raw.time), bool(raw.outstanding))


def _checked(status: int) -> int:
    if status < 0:
        raise PageMapError(status)
    return status


class PageMap:
    """A page map of one's own. `ceiling` and `host_page_size` in bytes. Names are bytes, as on the wire."""

    def __init__(self, ceiling: int = 1 << 40, host_page_size: int = 4096) -> None:
        pointer = lib.rf_pagemap_new(ceiling, host_page_size)
        if pointer == ffi.NULL:
            raise MemoryError("the ceiling is too low for a page map")
        self._map = ffi.gc(pointer, lib.rf_pagemap_free)

    def declare(self, name: bytes, used_length: int, page_size: int = 0) -> int:
        """A RAM block from the block list; its index. `page_size` 0 is the host's. Raises `PageMapError`."""
        return _checked(lib.rf_pagemap_declare(self._map, name, len(name), used_length, page_size))

    def request(self, name: bytes, start: int, length: int, now: int) -> bool:
        """A request passed; whether it is a new record. Raises `PageMapError` where it is refused."""
        return _checked(lib.rf_pagemap_request(self._map, name, len(name), start, length, now)) == 0

    def arrived(self, block: int, offset: int, length: int, now: int) -> None:
        """Target pages passed towards the destination. Raises `PageMapError` where none could be noted."""
        _checked(lib.rf_pagemap_arrived(self._map, block, offset, length, now))

    def discarded(self, block: int, start: int, length: int) -> None:
        """RAM_DISCARD: what had passed is to be sent again. Raises `PageMapError`."""
        _checked(lib.rf_pagemap_discarded(self._map, block, start, length))

    def channel_lost(self) -> None:
        """The channel broke."""
        lib.rf_pagemap_channel_lost(self._map)

    def channel_begin(self) -> None:
        """A recovered channel begins."""
        lib.rf_pagemap_channel_begin(self._map)

    def ping_passed(self) -> None:
        """A PING behind all discards has passed."""
        lib.rf_pagemap_ping_passed(self._map)

    def pong_passed(self) -> None:
        """Its PONG has: what passed before the PING is loaded."""
        lib.rf_pagemap_pong_passed(self._map)

    def handshake_over(self, *, sweep: bool = True) -> None:
        """RESUME_ACK has passed: the received bitmaps hold, though the channel be lost."""
        lib.rf_pagemap_handshake_over(self._map)
        while sweep and self.sweep():
            pass

    def received_in_part(self, name: bytes, dense: bytes, chunk: int = 1 << 16) -> None:
        """A received bitmap but for its end, fed in chunks of so many bytes. Raises `PageMapError`."""
        _checked(lib.rf_pagemap_bitmap_begin(self._map, name, len(name), len(dense)))
        for offset in range(0, len(dense), chunk):
            part = dense[offset : offset + chunk]
            _checked(lib.rf_pagemap_bitmap_data(self._map, offset, part, len(part)))

    def received(self, name: bytes, dense: bytes, chunk: int = 1 << 16) -> BitmapReport:
        """A whole received bitmap. Raises `PageMapError`."""
        self.received_in_part(name, dense, chunk)
        raw = ffi.new("struct rf_bitmap_report *")
        _checked(lib.rf_pagemap_bitmap_end(self._map, raw))
        return BitmapReport(*(int(getattr(raw, field)) for field in BitmapReport.__slots__))

    def disown(self) -> None:
        """The received bitmap that has come but for its end is another VM's."""
        _checked(lib.rf_pagemap_bitmap_disown(self._map))

    def sweep(self) -> bool:
        """Judges some more records by the received bitmaps; whether some are left."""
        return bool(lib.rf_pagemap_sweep(self._map))

    def records(self) -> Iterator[Request]:
        """What is on record, oldest first."""
        return walk(self._map)

    def to_replay(self, looks: int = 1000) -> Iterator[Request]:
        """What is to be written to the source again on this channel, oldest first."""
        return walk_to_replay(self._map, looks)

    def replayed(self, request_id: int) -> None:
        """The record was written to the source. Raises `PageMapError` if there is none."""
        _checked(lib.rf_pagemap_replayed(self._map, request_id))

    def complete(self) -> None:
        """The migration is over: every record ends."""
        lib.rf_pagemap_complete(self._map)

    def stats(self) -> PageMapStats:
        """The counts."""
        return read_stats(self._map)

    def blocks(self) -> list[BlockStats]:
        """The counts of each RAM block."""
        return read_block_stats(self._map)

    def latency(self) -> Latency:
        """How long answers took."""
        return read_latency(self._map)
