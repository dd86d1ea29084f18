"""Page requests: what was asked for, what has passed, what the destination has (cext/pagemap.h).

The relay's pump owns a page map in C; the functions here take its pointer and may be called from any thread
while the pump runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refault.channel._channel import ffi, lib


@dataclass(frozen=True, slots=True)
class PageMapStats:
    """Counts since the map was made, as struct rf_pagemap_stats explains them; `memory` in bytes.

    `consistent` is false where the writer was busy all the time: the counts may then be an event apart.
    """

    requested: int
    repeated: int
    refused: int
    torn: int
    arrived: int
    crossed: int
    outstanding: int
    recorded: int
    confirmed: int
    reopened: int
    replayed: int
    evicted: int
    forwarded: int
    discarded: int
    losses: int
    memory: int
    blocks: int
    consistent: bool


@dataclass(frozen=True, slots=True)
class BlockStats:
    """The same for one RAM block. `used_length` and `page_size` in bytes, 0 where not known."""

    name: bytes
    declared: bool
    used_length: int
    page_size: int
    requested: int
    arrived: int
    outstanding: int
    recorded: int
    replayed: int
    forwarded: int
    present: int
    """Bytes."""
    cells: tuple[int, ...]
    """Outstanding requests, by the 64th of the block that they begin in."""


class Latency:
    """A snapshot of the latencies of answered requests: from a request's passing to that of its last page."""

    def __init__(self, snapshot: Any) -> None:
        self._snapshot = snapshot

    @property
    def count(self) -> int:
        """Requests answered."""
        return int(self._snapshot.count)

    @property
    def sum_ns(self) -> int:
        """All latencies together, ns."""
        return int(self._snapshot.sum)

    @property
    def max_ns(self) -> int:
        """The longest, ns; 0 if there is none."""
        return int(self._snapshot.max)

    def quantile_ns(self, share: float) -> int:
        """The latency that this share (0 to 1) of requests stayed within, at most 1/32 above the truth."""
        return int(lib.rf_histogram_quantile(ffi.addressof(self._snapshot), share))

    def at_most(self, ns: int) -> int:
        """How many requests surely took no longer than this."""
        return int(lib.rf_histogram_at_most(ffi.addressof(self._snapshot), ns))


def read_stats(pointer: Any) -> PageMapStats:
    """The counts of a ``struct rf_pagemap *``, from any thread."""
    raw = ffi.new("struct rf_pagemap_stats *")
    consistent = bool(lib.rf_pagemap_stats(pointer, raw))
    counts = {name: int(getattr(raw, name)) for name in PageMapStats.__slots__[:-1]}
    return PageMapStats(**counts, consistent=consistent)


def read_block_stats(pointer: Any) -> list[BlockStats]:
    """The RAM blocks of a ``struct rf_pagemap *``, from any thread, in the order they became known."""
    raw = ffi.new("struct rf_pagemap_block_stats *")
    blocks: list[BlockStats] = []
    while lib.rf_pagemap_block_stats(pointer, len(blocks), raw) == lib.RF_OK:
        name = bytes(ffi.buffer(raw.name, raw.name_length))
        counts = {field: int(getattr(raw, field)) for field in BlockStats.__slots__[2:-1]}
        blocks.append(BlockStats(name, bool(raw.declared), **counts, cells=tuple(raw.cells)))
    return blocks


def read_latency(pointer: Any) -> Latency:
    """The latencies of a ``struct rf_pagemap *``, from any thread."""
    raw = ffi.new("struct rf_histogram_snapshot *")
    lib.rf_pagemap_latency(pointer, raw)
    return Latency(raw[0])
