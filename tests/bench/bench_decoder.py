"""How fast a stream of 4 KiB pages is decoded and noted in the page map, on one core.

It is fed as the relay feeds it, in pieces, all of it in C (rf_tracker_forward: the decoder and what follows
from its events). Page bodies are passed by their length and never read, so the rate is that of the frames.

Run: python -m tests.bench.bench_decoder [--rounds N] [--json]
"""

from __future__ import annotations

import argparse
import json
import struct
import time

from refault.channel._channel import ffi, lib

PAGE = 4096
PAGES = 16384
PIECES = (16 << 10, 256 << 10, 1 << 26)
NAME = b"pc.ram"
COUNTED = bytes([len(NAME)]) + NAME
SECTION = b"\0\0\0\x02"
EOS = struct.pack(">Q", 0x10)
OPENING = (
    struct.pack(">II", 0x5145564D, 3)
    + b"\x01"
    + SECTION
    + b"\x03ram"
    + struct.pack(">IIQ", 0, 4, PAGES * PAGE | 4)
    + COUNTED
    + struct.pack(">Q", PAGES * PAGE)
    + EOS
)


def ram_section() -> bytes:
    """A section with every page of the block."""
    first = struct.pack(">Q", 0x08) + COUNTED + bytes(PAGE)
    rest = b"".join(struct.pack(">Q", number * PAGE | 0x28) + bytes(PAGE) for number in range(1, PAGES))
    return b"\x02" + SECTION + first + rest + EOS


def bytes_per_second(stream: bytes, piece: int) -> float:
    """Of one pass over the stream by a fresh tracker."""
    tracker = ffi.gc(lib.rf_tracker_new(1 << 30), lib.rf_tracker_free)
    lib.rf_tracker_channel_begin(tracker, 0)
    lib.rf_tracker_forward(tracker, OPENING, len(OPENING), 0)
    buffer = ffi.from_buffer("uint8_t[]", stream)
    before = time.perf_counter()
    for at in range(0, len(stream), piece):
        lib.rf_tracker_forward(tracker, buffer + at, min(piece, len(stream) - at), 0)
    seconds = time.perf_counter() - before
    stats = ffi.new("struct rf_pagemap_stats *")
    lib.rf_pagemap_stats(lib.rf_tracker_pagemap(tracker), stats)
    if stats.forwarded != PAGES or lib.rf_tracker_forward_opaque(tracker) != 0:
        raise AssertionError(f"{stats.forwarded} pages of {PAGES}")
    return len(stream) / seconds


def main() -> None:
    """Prints the median rate for each size of piece."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    stream = ram_section()
    rates = {
        piece: sorted(bytes_per_second(stream, piece) for _ in range(options.rounds))[options.rounds // 2]
        for piece in PIECES
    }
    if options.json:
        print(json.dumps({"bytes_per_second": rates}))
        return
    for piece, rate in rates.items():
        print(f"pieces of {piece >> 10:>6} KiB: {rate / 1e9:6.1f} GB/s, {PAGE / rate * 1e9:5.0f} ns a page")


if __name__ == "__main__":
    main()
