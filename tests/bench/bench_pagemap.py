"""What the record of page requests takes of the pump with 2^21 requests, each of another page: while it
grows, when what a received bitmap says is made of them, and when all end with the migration; and what
stopping a relay with so many takes of the event loop.

The pump does nothing else meanwhile, so the longest step is what a page that passes then waits. Times are of
this thread's CPU, so that other work on the machine does not count; a call from Python is in them (the first
line tells what that takes).

Run: python -m tests.bench.bench_pagemap [--rounds N] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from refault.channel._channel import ffi, lib

PAGE = 4096
REQUESTS = (1 << 21) + 64
NAME = b"pc.ram"
PIECE = 4096
"""Bytes of a received bitmap that the pump reads at once."""
RELAY_CEILING = 1 << 40


def timed(step: Callable[[], object]) -> float:
    """Seconds of this thread's CPU."""
    before = time.thread_time_ns()
    step()
    return (time.thread_time_ns() - before) / 1e9


def grow(page_map: Any) -> list[float]:
    """Fills the map; the seconds of each request, sorted."""
    lib.rf_pagemap_declare(page_map, NAME, len(NAME), REQUESTS * PAGE, 0)
    request, now = lib.rf_pagemap_request, time.thread_time_ns
    steps = []
    for number in range(REQUESTS):
        # In no order: the pages that vCPUs touch.
        start = number * 7919 % REQUESTS * PAGE
        before = now()
        request(page_map, NAME, len(NAME), start, PAGE, 0)
        steps.append((now() - before) / 1e9)
    stats = ffi.new("struct rf_pagemap_stats *")
    lib.rf_pagemap_stats(page_map, stats)
    if stats.recorded != REQUESTS:
        raise AssertionError(f"{stats.recorded} requests of {REQUESTS}")
    return sorted(steps)


def judge(page_map: Any, byte: bytes) -> list[float]:
    """A loss, and a received bitmap of such bytes: the seconds of each step that follows from it."""
    lib.rf_pagemap_arrived(page_map, 0, 0, REQUESTS * PAGE, 0)
    lib.rf_pagemap_channel_lost(page_map)
    lib.rf_pagemap_channel_begin(page_map)
    size = REQUESTS // 8
    report = ffi.new("struct rf_bitmap_report *")
    piece = byte * PIECE
    steps = [timed(lambda: lib.rf_pagemap_bitmap_begin(page_map, NAME, len(NAME), size))]
    for offset in range(0, size, PIECE):
        length = min(PIECE, size - offset)
        steps.append(
            timed(lambda at=offset, of=length: lib.rf_pagemap_bitmap_data(page_map, at, piece, of))  # type: ignore[misc]
        )
    steps.append(timed(lambda: lib.rf_pagemap_bitmap_end(page_map, report)))
    lib.rf_pagemap_handshake_over(page_map)
    more = True
    while more:
        before = time.thread_time_ns()
        more = lib.rf_pagemap_sweep(page_map)
        steps.append((time.thread_time_ns() - before) / 1e9)
    return steps


def stop() -> float:
    """Seconds of stopping a relay with such a map, which nothing passes through."""
    relay = lib.rf_relay_start(lib.RF_RELAY_SOURCE, RELAY_CEILING, 5, -1, -1, b"", 0)
    grow(lib.rf_tracker_pagemap(lib.rf_relay_tracker(relay)))
    return timed(lambda: lib.rf_relay_stop(relay, False))


def a_round() -> dict[str, float]:
    """Seconds, and the bytes of a record."""
    page_map = ffi.gc(lib.rf_pagemap_new(1 << 40, PAGE), lib.rf_pagemap_free)
    calls = sorted(timed(lambda: lib.rf_pagemap_unit(page_map, 0)) for _ in range(1000))
    steps = grow(page_map)
    stats = ffi.new("struct rf_pagemap_stats *")
    lib.rf_pagemap_stats(page_map, stats)
    none = judge(page_map, b"\0")
    end = timed(lambda: lib.rf_pagemap_complete(page_map))
    grow(page_map)
    everything = judge(page_map, b"\xff")
    return {
        "call": calls[500],
        "step": steps[REQUESTS // 2],
        "longest": steps[-1],
        "none confirmed": sum(none),
        "none confirmed, longest": max(none),
        "all confirmed": sum(everything),
        "all confirmed, longest": max(everything),
        "end": end,
        "stop": stop(),
        "bytes": int(stats.memory) / REQUESTS,
    }


def main() -> None:
    """Prints the best of each over the rounds: what is longer only once was not the table's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rounds = [a_round() for _ in range(options.rounds)]
    best = {name: min(each[name] for each in rounds) for name in rounds[0]}
    if options.json:
        print(json.dumps(best))
        return
    print(f"a call alone: {best['call'] * 1e6:.2f} us")
    print(f"a request:    {best['step'] * 1e6:.2f} us, the longest {best['longest'] * 1e3:.2f} ms")
    for judged in ("none confirmed", "all confirmed"):
        longest = best[f"{judged}, longest"] * 1e3
        print(f"a bitmap:     {best[judged] * 1e3:.0f} ms, the longest step {longest:.2f} ms ({judged})")
    print(f"the end:      {best['end'] * 1e3:.2f} ms")
    print(f"a stop:       {best['stop'] * 1e3:.2f} ms of who stops it")
    print(f"memory:       {best['bytes']:.0f} bytes a request")


if __name__ == "__main__":
    main()
