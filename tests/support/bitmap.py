"""A sparse bitmap of one's own (cext/bitmap.h): what the page map in C stands on."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from refault.channel._channel import ffi, lib

_LISTED_AT_ONCE = 4096


class Bitmap:
    """A bit for each of `bits` pages, all clear; memory and search time follow what is set.

    Not for more than one thread at a time. Raises `MemoryError` where memory runs out and `ValueError` for
    more than 2^44 bits.
    """

    def __init__(self, bits: int) -> None:
        if not 0 <= bits <= 1 << 44:
            raise ValueError(f"a bitmap of {bits} bits")
        pointer = lib.rf_bitmap_new(bits)
        if pointer == ffi.NULL:
            raise MemoryError("no memory for the bitmap")
        self._map = ffi.gc(pointer, lib.rf_bitmap_free)
        self._bits = bits

    def __len__(self) -> int:
        """How many bits are set."""
        return int(lib.rf_bitmap_count(self._map))

    def __contains__(self, index: int) -> bool:
        return index >= 0 and bool(lib.rf_bitmap_test(self._map, index))

    def __iter__(self) -> Iterator[int]:
        """The set bits, lowest first. Changes made meanwhile may or may not be seen."""
        position = ffi.new("uint64_t *", 0)
        out = ffi.new("uint64_t[]", _LISTED_AT_ONCE)
        while found := lib.rf_bitmap_list(self._map, position, out, _LISTED_AT_ONCE):
            yield from ffi.unpack(out, found)

    @property
    def bits(self) -> int:
        """The size of the map in bits."""
        return self._bits

    @property
    def memory(self) -> int:
        """Bytes held now."""
        return int(lib.rf_bitmap_memory(self._map))

    def set(self, index: int) -> bool:
        """Sets a bit; the old value. Raises `IndexError` outside the map."""
        old = lib.rf_bitmap_set(self._map, self._inside(index))
        if old < 0:
            raise MemoryError("no memory for the bitmap")
        return bool(old)

    def clear(self, index: int) -> bool:
        """Clears a bit; the old value. Raises `IndexError` outside the map."""
        return bool(lib.rf_bitmap_clear(self._map, self._inside(index)))

    def _inside(self, index: int) -> int:
        if not 0 <= index < self._bits:
            raise IndexError(f"bit {index} of a bitmap of {self._bits} bits")
        return index

    def set_range(self, first: int, count: int) -> int:
        """Sets `count` bits from `first` on, cut to the map; how many changed."""
        changed = lib.rf_bitmap_set_range(self._map, first, count)
        if changed < 0:
            raise MemoryError("no memory for the bitmap")
        return int(changed)

    def clear_range(self, first: int, count: int) -> int:
        """Clears `count` bits from `first` on, cut to the map; how many changed."""
        return int(lib.rf_bitmap_clear_range(self._map, first, count))

    def count_range(self, first: int, count: int) -> int:
        """How many of `count` bits from `first` on are set."""
        return int(lib.rf_bitmap_count_range(self._map, first, count))

    def clear_all(self) -> None:
        """Clears every bit and gives the memory back."""
        lib.rf_bitmap_clear_all(self._map)

    def next(self, start: int) -> int | None:
        """The first set bit at or after `start`."""
        index = int(lib.rf_bitmap_next(self._map, start))
        return None if index == (1 << 64) - 1 else index

    def drain(self, out: array[int]) -> int:
        """Takes out and clears set bits, lowest first, as many as `out` (of type "Q") has room for.

        How many they were; what stands behind them in `out` is left as it was.
        """
        return int(lib.rf_bitmap_drain(self._map, ffi.from_buffer("uint64_t[]", out, True), len(out)))

    def and_not(self, dense: bytes | bytearray | memoryview, first_byte: int = 0) -> int:
        """Clears the bits set in `dense`, least significant first, whose first byte stands for bit
        ``first_byte * 8``; how many were cleared."""
        return int(
            lib.rf_bitmap_and_not(self._map, first_byte, ffi.from_buffer("uint8_t[]", dense), len(dense))
        )

    def intersect(self, dense: bytes | bytearray | memoryview, first_byte: int = 0) -> int:
        """Clears, within the bytes given, the bits clear in `dense`; how many were cleared."""
        return int(lib.rf_bitmap_and(self._map, first_byte, ffi.from_buffer("uint8_t[]", dense), len(dense)))

    def compare(self, dense: bytes | bytearray | memoryview, first_byte: int = 0) -> tuple[int, int]:
        """How many bits are set in this map alone and in `dense` alone, within the bytes and the map."""
        only_map, only_dense = ffi.new("uint64_t *", 0), ffi.new("uint64_t *", 0)
        buffer = ffi.from_buffer("uint8_t[]", dense)
        lib.rf_bitmap_compare(self._map, first_byte, buffer, len(dense), only_map, only_dense)
        return int(only_map[0]), int(only_dense[0])
