"""What the record of page requests takes of the pump while it grows to 2^21 requests, each of another page,
and when all of them end with the migration.

The pump does nothing else meanwhile, so the longest step is what a table that grows costs a page that passes
then. Times are of this thread's CPU, so that other work on the machine does not count; a call from Python is
in them (the first line tells what that takes).

Run: python -m tests.bench.bench_pagemap [--rounds N] [--json]
"""

from __future__ import annotations

import argparse
import json
import time

from refault.channel._channel import ffi, lib

PAGE = 4096
REQUESTS = (1 << 21) + 1
NAME = b"pc.ram"


def a_round() -> dict[str, float]:
    """Seconds of one step in the middle and of the longest, of a call alone and of the end of all, and the
    bytes of the table."""
    page_map = ffi.gc(lib.rf_pagemap_new(1 << 40, PAGE), lib.rf_pagemap_free)
    lib.rf_pagemap_declare(page_map, NAME, len(NAME), REQUESTS * PAGE, 0)
    request, now = lib.rf_pagemap_request, time.thread_time_ns
    calls = []
    for _ in range(1000):
        before = now()
        lib.rf_pagemap_unit(page_map, 0)
        calls.append(now() - before)
    steps = []
    for number in range(REQUESTS):
        # In no order: the pages that vCPUs touch.
        start = number * 7919 % REQUESTS * PAGE
        before = now()
        request(page_map, NAME, len(NAME), start, PAGE, 0)
        steps.append(now() - before)
    stats = ffi.new("struct rf_pagemap_stats *")
    lib.rf_pagemap_stats(page_map, stats)
    if stats.recorded != REQUESTS:
        raise AssertionError(f"{stats.recorded} requests of {REQUESTS}")
    before = now()
    lib.rf_pagemap_complete(page_map)
    end = now() - before
    steps.sort()
    return {
        "call": sorted(calls)[500] / 1e9,
        "step": steps[REQUESTS // 2] / 1e9,
        "longest": steps[-1] / 1e9,
        "end": end / 1e9,
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
    print(f"the end:      {best['end'] * 1e3:.2f} ms")
    print(f"memory:       {best['bytes']:.0f} bytes a request")


if __name__ == "__main__":
    main()
