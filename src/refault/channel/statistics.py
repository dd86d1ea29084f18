"""What a running pump's tracker has counted, read beside it: page requests by RAM block, and their
latencies."""

from __future__ import annotations

from dataclasses import dataclass

from refault.channel._channel import ffi, lib

LATENCY_BOUNDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    30.0,
)  # fmt: skip
"""Upper bounds, in seconds, of the buckets that the metrics show; a page fault takes about 1 ms, a starved
one minutes."""


@dataclass(frozen=True)
class BlockPages:
    """Page requests of one RAM block."""

    name: str
    size_bytes: int
    page_size_bytes: int
    requested: int
    arrived: int
    replayed: int
    outstanding: int


@dataclass(frozen=True)
class Pages:
    """Page requests of the migration, each counted once."""

    requested: int
    arrived: int
    replayed: int
    outstanding: int
    recorded: int
    refused: int


@dataclass(frozen=True)
class Latency:
    """Time from a page request passing the relay to the page passing it, in seconds; None before the
    first."""

    p50: float | None
    p99: float | None
    max: float | None
    count: int
    sum: float
    buckets: tuple[tuple[float, int], ...]
    """Cumulative, by LATENCY_BOUNDS."""


class Statistics:
    """Reads one tracker's counters, without making its writer wait."""

    def __init__(self, tracker: ffi.CData) -> None:
        self._map = lib.rf_tracker_pagemap(tracker)

    def pages(self) -> Pages:
        """The sums over all RAM blocks."""
        raw = ffi.new("struct rf_pagemap_stats *")
        lib.rf_pagemap_stats(self._map, raw)
        return Pages(
            requested=raw.requested,
            arrived=raw.arrived + raw.crossed,
            replayed=raw.replayed,
            outstanding=raw.outstanding,
            recorded=raw.recorded,
            refused=raw.refused,
        )

    def blocks(self) -> tuple[BlockPages, ...]:
        """Each RAM block that is known, in the stream's order."""
        raw = ffi.new("struct rf_pagemap_block_stats *")
        found: list[BlockPages] = []
        while lib.rf_pagemap_block_stats(self._map, len(found), raw) == lib.RF_OK:
            found.append(
                BlockPages(
                    name=ffi.string(raw.name).decode(errors="replace"),
                    size_bytes=raw.used_length,
                    page_size_bytes=raw.page_size,
                    requested=raw.requested,
                    arrived=raw.arrived,
                    replayed=raw.replayed,
                    outstanding=raw.outstanding,
                )
            )
        return tuple(found)

    def latency(self) -> Latency:
        """The latencies of the requests that were answered."""
        raw = ffi.new("struct rf_histogram_snapshot *")
        lib.rf_pagemap_latency(self._map, raw)
        some = raw.count > 0
        return Latency(
            p50=lib.rf_histogram_quantile(raw, 0.5) / 1e9 if some else None,
            p99=lib.rf_histogram_quantile(raw, 0.99) / 1e9 if some else None,
            max=raw.max / 1e9 if some else None,
            count=raw.count,
            sum=raw.sum / 1e9,
            buckets=tuple(
                (bound, lib.rf_histogram_at_most(raw, int(bound * 1e9))) for bound in LATENCY_BOUNDS
            ),
        )
