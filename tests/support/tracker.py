"""A tracker of one's own (cext/tracker.h): what the relay's pump uses in C."""

from __future__ import annotations

from collections.abc import Iterator

from refault.channel._channel import ffi, lib

from refault.channel.pagemap import (
    BlockStats,
    Latency,
    PageMapStats,
    read_block_stats,
    read_latency,
    read_stats,
)
from refault.channel.tracker import Fact, Kept, Restored, StateFds

from .pagemap import Request, walk, walk_to_replay


class Tracker:
    """A tracker of one's own. `ceiling`: bytes for its page map. Times are monotonic, in ns."""

    def __init__(self, ceiling: int = 1 << 40, state: StateFds | None = None) -> None:
        state = state or StateFds(-1, b"")
        pointer = lib.rf_tracker_new_kept(ceiling, state.new, state.old, state.key, len(state.key))
        if pointer == ffi.NULL:
            raise MemoryError("the ceiling is too low for a page map")
        self._tracker = ffi.gc(pointer, lib.rf_tracker_free)
        self._map = lib.rf_tracker_pagemap(pointer)

    def channel_begin(self, *, recovered: bool) -> None:
        """A channel begins: the migration's first, or a recovered one."""
        lib.rf_tracker_channel_begin(self._tracker, recovered)

    def channel_lost(self) -> None:
        """The channel broke."""
        lib.rf_tracker_channel_lost(self._tracker)

    def forward(self, data: bytes, now: int) -> None:
        """What passed from the source."""
        lib.rf_tracker_forward(self._tracker, data, len(data), now)

    def preempt_begin(self) -> None:
        """A preempt channel begins beside the main one."""
        lib.rf_tracker_preempt_begin(self._tracker)

    def preempt_forward(self, data: bytes, now: int) -> None:
        """What passed from the source on the preempt channel."""
        lib.rf_tracker_preempt_forward(self._tracker, data, len(data), now)

    def backward(self, data: bytes, now: int) -> None:
        """What passed from the destination, and all that follows from it."""
        event = ffi.new("struct rf_returnpath_event *")
        with ffi.from_buffer("uint8_t[]", data) as buffer:
            position = 0
            while position < len(data):
                position += lib.rf_tracker_return_next(
                    self._tracker, buffer + position, len(data) - position, now, event
                )
        while lib.rf_pagemap_sweep(self._map):
            pass

    def trust_bitmaps(self) -> None:
        """Takes no received bitmap for another VM's."""
        lib.rf_tracker_trust_bitmaps(self._tracker)

    def complete(self) -> None:
        """The migration completed: every record ends."""
        lib.rf_tracker_complete(self._tracker)

    @property
    def facts(self) -> Fact:
        """What has passed in this migration."""
        return Fact(lib.rf_tracker_facts(self._tracker))

    @property
    def channel_facts(self) -> Fact:
        """What has passed on this channel."""
        return Fact(lib.rf_tracker_channel_facts(self._tracker))

    @property
    def forward_opaque(self) -> int:
        """0, or why the forward stream can no longer be read (enum rf_opaque)."""
        return int(lib.rf_tracker_forward_opaque(self._tracker))

    @property
    def restored(self) -> Restored:
        """What was found in the old state file."""
        return Restored(lib.rf_tracker_restored(self._tracker))

    @property
    def kept(self) -> Kept:
        """How much is in the new one."""
        return Kept(lib.rf_tracker_kept(self._tracker))

    @property
    def return_opaque(self) -> int:
        """0, or why the return path can no longer be read (enum rf_opaque)."""
        return int(lib.rf_tracker_return_opaque(self._tracker))

    def stats(self) -> PageMapStats:
        """The counts of page requests."""
        return read_stats(self._map)

    def blocks(self) -> list[BlockStats]:
        """The counts of each RAM block."""
        return read_block_stats(self._map)

    def latency(self) -> Latency:
        """How long answers took."""
        return read_latency(self._map)

    def records(self) -> Iterator[Request]:
        """What is on record, oldest first."""
        yield from walk(self._map)  # which keeps the tracker, and so its map

    def to_replay(self) -> Iterator[Request]:
        """What is to be written to the source again on this channel, oldest first."""
        yield from walk_to_replay(self._map)
