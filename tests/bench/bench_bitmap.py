"""The sparse bitmap beside pyroaring and bitarray, on a guest of 1 TiB: 2^28 bits, 10 to 10^6 of them set.

"iterate and clear" hands over every set bit and leaves the map empty, each by the fastest way it offers:
drain, to an array; to_array and clear; search and setall. "take one by one" finds the lowest bit and clears
it, in Python, for up to 1000 bits. "and-not" takes away a received bitmap, 90 % ones: ours and bitarray are
given the 32 MiB of bytes that come over the wire, pyroaring a BitMap made beforehand. "set", "test" and
"clear" are single calls from Python and mostly measure the call; the relay makes them in C.

Run: python tests/bench/bench_bitmap.py [--rounds N] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from array import array
from collections.abc import Callable, Sequence
from functools import partial

import bitarray
import pyroaring

from refault.channel.bitmap import Bitmap

BITS = 1 << 28
COUNTS = (10, 1_000, 10_000, 100_000, 1_000_000)
CALLS = 2_000
TAKEN = 1_000


class Ours:
    name = "refault"

    def __init__(self, indexes: Sequence[int], received: bytes) -> None:
        self.map = Bitmap(BITS)
        for index in indexes:
            self.map.set(index)
        self.received = received

    def iterate_and_clear(self) -> int:
        return len(self.map.drain(BITS))

    def and_not(self) -> None:
        self.map.and_not(self.received)

    def take(self, room: int) -> None:
        while room and (index := self.map.next(0)) is not None:
            self.map.clear(index)
            room -= 1

    def set(self, index: int) -> None:
        self.map.set(index)

    def clear(self, index: int) -> None:
        self.map.clear(index)

    def test(self, index: int) -> bool:
        return index in self.map

    def __len__(self) -> int:
        return len(self.map)


class Roaring:
    name = "pyroaring"
    _received: tuple[bytes, pyroaring.BitMap] | None = None

    def __init__(self, indexes: Sequence[int], received: bytes) -> None:
        self.map = pyroaring.BitMap(array("I", indexes))
        if Roaring._received is None or Roaring._received[0] is not received:
            ones = bitarray.bitarray(buffer=received, endian="little").search(1)
            Roaring._received = (received, pyroaring.BitMap(array("I", ones)))
        self.received = Roaring._received[1]

    def iterate_and_clear(self) -> int:
        found = self.map.to_array()
        self.map.clear()
        return len(found)

    def and_not(self) -> None:
        self.map -= self.received

    def take(self, room: int) -> None:
        while room and self.map:
            self.map.discard(self.map.min())
            room -= 1

    def set(self, index: int) -> None:
        self.map.add(index)

    def clear(self, index: int) -> None:
        self.map.discard(index)

    def test(self, index: int) -> bool:
        return index in self.map

    def __len__(self) -> int:
        return len(self.map)


class Dense:
    name = "bitarray"

    def __init__(self, indexes: Sequence[int], received: bytes) -> None:
        self.map = bitarray.bitarray(BITS, endian="little")
        self.map.setall(0)
        for index in indexes:
            self.map[index] = 1
        self.received = received

    def iterate_and_clear(self) -> int:
        found = list(self.map.search(1))
        self.map.setall(0)
        return len(found)

    def and_not(self) -> None:
        self.map &= ~bitarray.bitarray(buffer=self.received, endian="little")

    def take(self, room: int) -> None:
        index = -1
        while room and (index := self.map.find(1, index + 1)) >= 0:
            self.map[index] = 0
            room -= 1

    def set(self, index: int) -> None:
        self.map[index] = 1

    def clear(self, index: int) -> None:
        self.map[index] = 0

    def test(self, index: int) -> bool:
        return bool(self.map[index])

    def __len__(self) -> int:
        return self.map.count(1)


KINDS: tuple[type[Ours | Roaring | Dense], ...] = (Ours, Roaring, Dense)


def timed(action: Callable[[], object]) -> float:
    before = time.perf_counter()
    action()
    return time.perf_counter() - before


def calls(operation: Callable[[int], object], indexes: Sequence[int]) -> float:
    """Seconds for one call."""
    before = time.perf_counter()
    for index in indexes:
        operation(index)
    return (time.perf_counter() - before) / len(indexes)


def measure(count: int, rounds: int, received: bytes) -> dict[str, dict[str, float]]:
    """The best of the rounds in seconds, by operation and kind; the kinds take turns."""
    best: dict[str, dict[str, float]] = {}

    def note(operation: str, name: str, seconds: float) -> None:
        row = best.setdefault(operation, {})
        row[name] = min(seconds, row.get(name, seconds))

    for number in range(rounds):
        indexes = random.Random(number).sample(range(BITS), count)
        some = random.Random(-number).sample(range(BITS), CALLS)
        left: set[int] = set()
        for kind in KINDS:
            subject = kind(indexes, received)
            note("and-not", kind.name, timed(subject.and_not))
            left.add(len(subject))
            for operation in (subject.set, subject.test, subject.clear):
                note(operation.__name__, kind.name, calls(operation, some))
            subject = kind(indexes, received)
            note("take one by one", kind.name, timed(partial(subject.take, TAKEN)))
            subject = kind(indexes, received)
            note("iterate and clear", kind.name, timed(subject.iterate_and_clear))
            if len(subject) != 0:
                raise AssertionError(f"{kind.name} is not empty")
        if len(left) != 1:
            raise AssertionError(f"and-not gave {left}")
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    received = bytes(random.Random(1).choices([0xFF, 0x3F, 0xFF, 0x7F], k=BITS // 8))
    idle = Bitmap(BITS).memory
    results = {count: measure(count, options.rounds, received) for count in COUNTS}
    if options.json:
        print(json.dumps({"idle_bytes": idle, "seconds": results}))
        return
    print(f"an idle map of 2^28 bits holds {idle} bytes")
    print(f"{'set':>9}  {'operation':<18} {'refault':>12} {'pyroaring':>20} {'bitarray':>20}")
    for count, table in results.items():
        for operation, row in table.items():
            ours = row["refault"]
            others = "".join(
                f" {row[name] * 1e6:>11.1f} us {row[name] / ours:>4.1f}x"
                for name in ("pyroaring", "bitarray")
            )
            print(f"{count:>9}  {operation:<18} {ours * 1e6:>9.1f} us{others}")


if __name__ == "__main__":
    main()
