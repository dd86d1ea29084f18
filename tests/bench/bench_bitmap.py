"""The sparse bitmap beside pyroaring and bitarray, on a guest of 1 TiB: 2^28 bits, 10 to 10^6 of them set.

"iterate and clear" hands over every set bit and leaves the map empty, each by the fastest way it offers:
drain through one array of 2^15 (8 bytes a bit), to_array (4 bytes a bit) and clear, search and setall; "to a
new array" is drain where none is kept. "64 at a time" takes out the lowest 64 until nothing is left or 16384
are taken: drain; a slice and all below its end; search and slices. "one by one" finds the lowest
and clears it, in Python, for up to 1000.

"and-not" takes away a received bitmap, 90 % ones, as it comes over the wire: 32 MiB of bytes. pyroaring's
must be made a BitMap first; beside it, "and-not, prepared", where that was done beforehand and does not
count (nothing is to be prepared for the others). Caches are cold for both. The last line tells what it takes
to read these bytes once, by memchr, which no and-not that needs most of their cache lines can beat.

"set", "test" and "clear" are single calls from Python and mostly measure the call; the relay makes them in C.

Run: python -m tests.bench.bench_bitmap [--rounds N] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import time
from array import array
from collections.abc import Callable, Sequence

import bitarray
import pyroaring
from tests.support.bitmap import Bitmap

BITS = 1 << 28
COUNTS = (10, 1_000, 10_000, 100_000, 1_000_000)
CALLS = 2_000
ONES = 1_000
BATCH = 64
BATCHES = 256


class Ours:
    name = "refault"
    buffer = array("Q", [0]) * (1 << 15)
    batch = array("Q", [0]) * BATCH

    def __init__(self, indexes: Sequence[int], received: bytes) -> None:
        self.map = Bitmap(BITS)
        for index in indexes:
            self.map.set(index)
        self.received = received

    def iterate_and_clear(self) -> None:
        while self.map.drain(self.buffer) == len(self.buffer):
            pass

    def to_a_new_array(self) -> array[int]:
        out = array("Q", [0]) * len(self.map)
        self.map.drain(out)
        return out

    def in_batches(self) -> None:
        for _ in range(BATCHES):
            if self.map.drain(self.batch) < BATCH:
                break

    def one_by_one(self) -> None:
        for _ in range(ONES):
            if (index := self.map.next(0)) is None:
                break
            self.map.clear(index)

    def and_not(self) -> None:
        self.map.and_not(self.received)

    def and_not_prepared(self) -> None:
        self.map.and_not(self.received)

    def set(self, index: int) -> None:
        self.map.set(index)

    def clear(self, index: int) -> None:
        self.map.clear(index)

    def test(self, index: int) -> bool:
        return index in self.map

    def __len__(self) -> int:
        return len(self.map)


def roaring_from_bytes(dense: bytes) -> pyroaring.BitMap:
    """The fastest way: a bitmap container of its serialized form (RoaringFormatSpec) is 8 KiB of the dense
    bytes as they are. Only where each container has more than 4096 ones, as here."""
    containers = len(dense) // 8192
    bits = bitarray.bitarray(buffer=dense, endian="little")
    head = struct.pack("<II", 12346, containers)
    for key in range(containers):
        head += struct.pack("<HH", key, bits.count(1, key << 16, (key + 1) << 16) - 1)
    data = len(head) + 4 * containers
    head += struct.pack(f"<{containers}I", *range(data, data + len(dense), 8192))
    return pyroaring.BitMap.deserialize(head + dense)


class Roaring:
    name = "pyroaring"
    prepared: tuple[bytes, pyroaring.BitMap] | None = None

    def __init__(self, indexes: Sequence[int], received: bytes) -> None:
        self.map = pyroaring.BitMap(array("I", indexes))
        self.received = received
        if Roaring.prepared is None or Roaring.prepared[0] is not received:
            Roaring.prepared = (received, roaring_from_bytes(received))
        self.ready = Roaring.prepared[1]

    def iterate_and_clear(self) -> None:
        self.to_a_new_array()

    def to_a_new_array(self) -> array[int]:
        out: array[int] = self.map.to_array()
        self.map.clear()
        return out

    def in_batches(self) -> None:
        for _ in range(BATCHES):
            if not (out := self.map[:BATCH].to_array()):
                break
            self.map.remove_range(0, out[-1] + 1)

    def one_by_one(self) -> None:
        for _ in range(ONES):
            if not self.map:
                break
            self.map.discard(self.map.min())

    def and_not(self) -> None:
        self.map -= roaring_from_bytes(self.received)

    def and_not_prepared(self) -> None:
        self.map -= self.ready

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

    def iterate_and_clear(self) -> None:
        self.to_a_new_array()

    def to_a_new_array(self) -> list[int]:
        out = list(self.map.search(1))
        self.map.setall(0)
        return out

    def in_batches(self) -> None:
        end = 0
        for _ in range(BATCHES):
            out = [index for index, _ in zip(self.map.search(1, end), range(BATCH), strict=False)]
            if not out:
                break
            self.map[end : out[-1] + 1] = 0
            end = out[-1] + 1

    def one_by_one(self) -> None:
        index = -1
        for _ in range(ONES):
            if (index := self.map.find(1, index + 1)) < 0:
                break
            self.map[index] = 0

    def and_not(self) -> None:
        received = bitarray.bitarray(buffer=self.received, endian="little")
        self.map |= received  # faster than & with a copy turned over
        self.map ^= received

    def and_not_prepared(self) -> None:
        self.and_not()

    def set(self, index: int) -> None:
        self.map[index] = 1

    def clear(self, index: int) -> None:
        self.map[index] = 0

    def test(self, index: int) -> bool:
        return bool(self.map[index])

    def __len__(self) -> int:
        return self.map.count(1)


Kind = type[Ours | Roaring | Dense]
KINDS: tuple[Kind, ...] = (Ours, Roaring, Dense)
# What is called once for each map, and how many bits it takes out of so many.
WHOLE: dict[str, tuple[str, Callable[[int], int]]] = {
    "iterate and clear": ("iterate_and_clear", lambda count: count),
    "  to a new array": ("to_a_new_array", lambda count: count),
    "  64 at a time": ("in_batches", lambda count: min(count, BATCH * BATCHES)),
    "  one by one": ("one_by_one", lambda count: min(count, ONES)),
}
AND_NOT = {"and-not": "and_not", "and-not, prepared": "and_not_prepared"}
SINGLE = ("set", "test", "clear")
# Read before each and-not, so that nobody finds in the cache what the operation before has left there.
SWEPT = bytearray(128 << 20)


def seconds_of(action: Callable[[], object]) -> float:
    before = time.perf_counter()
    action()
    return time.perf_counter() - before


def seconds_a_call(operation: Callable[[int], object], indexes: Sequence[int]) -> float:
    before = time.perf_counter()
    for index in indexes:
        operation(index)
    return (time.perf_counter() - before) / len(indexes)


def seconds_to_read(received: bytes, rounds: int) -> float:
    """The best of the rounds."""

    def cold() -> float:
        SWEPT.count(1)
        return seconds_of(lambda: received.find(b"\0"))  # there is none

    return min(cold() for _ in range(rounds))


def measure(kind: Kind, count: int, rounds: int, received: bytes) -> tuple[dict[str, float], list[int]]:
    """The best of the rounds in seconds by operation, and how many bits and-not left in each round."""
    best: dict[str, float] = {}
    left = []

    def note(operation: str, seconds: float) -> None:
        best[operation] = min(seconds, best.get(operation, seconds))

    for number in range(rounds):
        indexes = random.Random(number).sample(range(BITS), count)
        for operation, (method, taken) in WHOLE.items():
            subject = kind(indexes, received)
            note(operation, seconds_of(getattr(subject, method)))
            if len(subject) != count - taken(count):
                raise AssertionError(f"{kind.name}: {len(subject)} left by {method}")
        for operation, method in AND_NOT.items():
            subject = kind(indexes, received)
            SWEPT.count(1)
            note(operation, seconds_of(getattr(subject, method)))
            left.append(len(subject))
        some = random.Random(-number).sample(range(BITS), CALLS)
        for name in SINGLE:
            note(name, seconds_a_call(getattr(subject, name), some))
    return best, left


def table(count: int, rounds: int, received: bytes) -> dict[str, dict[str, float]]:
    """Seconds by operation and kind."""
    measured = {kind.name: measure(kind, count, rounds, received) for kind in KINDS}
    if len({tuple(left) for _, left in measured.values()}) != 1:
        raise AssertionError(f"and-not left {[left for _, left in measured.values()]}")
    operations = next(iter(measured.values()))[0]
    return {
        operation: {name: best[operation] for name, (best, _) in measured.items()} for operation in operations
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    received = bytes(random.Random(1).choices([0xFF, 0x3F, 0xFF, 0x7F], k=BITS // 8))
    idle = Bitmap(BITS).memory
    read_once = seconds_to_read(received, options.rounds)
    results = {count: table(count, options.rounds, received) for count in COUNTS}
    if options.json:
        print(json.dumps({"idle_bytes": idle, "read_once": read_once, "seconds": results}))
        return
    print(f"an idle map of 2^28 bits holds {idle} bytes")
    print(f"{'set':>9}  {'operation':<18} {'refault':>12} {'pyroaring':>20} {'bitarray':>20}")
    for count, rows in results.items():
        for operation, row in rows.items():
            ours = row["refault"]
            others = "".join(
                f" {row[name] * 1e6:>11.1f} us {row[name] / ours:>4.1f}x"
                for name in ("pyroaring", "bitarray")
            )
            print(f"{count:>9}  {operation:<18} {ours * 1e6:>9.1f} us{others}")
    print(f"           {'reading once':<18} {read_once * 1e6:>9.1f} us")


if __name__ == "__main__":
    main()
