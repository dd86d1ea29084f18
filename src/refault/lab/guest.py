"""What the lab's guest (guest.S) is given, and what each page of its memory must hold, computed from its
state.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from mmap import mmap

PAGE = 4096
STATE_BASE = 0x10000
ARENA_BASE = 16 << 20
MAX_VCPUS = 64
_TOP = 1 << 20  # above the arena, so that something is there
_PARAMETERS = 0x1E0
_SLOTS = PAGE // 8
_ODD1, _ODD2 = 0x9E3779B1, 0x85EBCA6B


@dataclass(frozen=True, order=True)
class Progress:
    """A vCPU's next step: ``sweep`` counts from 1, ``rank`` from 0; before the very first both are 0."""

    sweep: int
    rank: int

    @classmethod
    def parse(cls, state_page: bytes) -> Progress:
        """Reads it from the beginning of the vCPU's state page."""
        return cls(*struct.unpack_from("<II", state_page))


@dataclass(frozen=True)
class Mismatch:
    """A page that does not hold what it must.

    ``address`` is guest-physical in bytes and, below 3 GiB, the offset into RAM block pc.ram; ``first`` the
    offset of the first wrong byte in the page.
    """

    address: int
    first: int
    expected: bytes
    found: bytes

    def __str__(self) -> str:
        at = self.address + self.first
        return (
            f"page {self.address // PAGE} (pc.ram offset {self.address:#x}): byte {self.first:#x}"
            f" (at {at:#x}) is {self.found.hex()}, expected {self.expected.hex()}"
        )


@dataclass(frozen=True)
class Guest:
    """A guest with ``vcpus`` vCPUs that each write to 2**``log_pages`` pages of 4 KiB.

    The first sweep fills the memory as fast as it goes. After it ``tick_ns`` is the time between two writes
    of one vCPU, in nanoseconds, kept by its timer while it sleeps; 0 lets it write as fast as it can. (KVM's
    timer does not tick faster than once in 200 us.)
    """

    vcpus: int = 4
    log_pages: int = 12
    tick_ns: int = 1_000_000

    def __post_init__(self) -> None:
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise ValueError(f"the guest has 1 to {MAX_VCPUS} vCPUs, not {self.vcpus}")
        if not 2 <= self.log_pages <= 19 or self.ram_bytes > 3 << 30:
            raise ValueError("the guest writes to 16 KiB to 2 GiB per vCPU, below 3 GiB")
        if not 0 <= self.tick_ns < 1 << 32:
            raise ValueError("the guest's tick is below 4.29 s")

    @classmethod
    def of_size(cls, size: int, vcpus: int = 4, tick_ns: int = 1_000_000) -> Guest:
        """A guest that writes to as much of ``size`` bytes as can be shared by its vCPUs in powers of two.

        Raises ValueError when the size is out of range.
        """
        return cls(vcpus, (size // (vcpus * PAGE)).bit_length() - 1, tick_ns)

    @property
    def arena_bytes(self) -> int:
        """Bytes that one vCPU writes to."""
        return PAGE << self.log_pages

    @property
    def written_bytes(self) -> int:
        """Bytes that all vCPUs write to."""
        return self.vcpus * self.arena_bytes

    @property
    def ram_bytes(self) -> int:
        """Bytes of RAM that the guest needs."""
        return ARENA_BASE + self.written_bytes + _TOP

    def arena(self, vcpu: int) -> int:
        """The guest-physical address of a vCPU's pages."""
        return ARENA_BASE + vcpu * self.arena_bytes

    def firmware(self) -> bytes:
        """The 64 KiB for QEMU's `-bios`: the guest's 512 bytes, with these parameters, at their end."""
        code = bytearray(resources.files(__package__).joinpath("guest.bin").read_bytes())
        struct.pack_into("<IIB", code, _PARAMETERS, self.tick_ns, (1 << self.log_pages) - 1, self.log_pages)
        return bytes(code).rjust(64 << 10, b"\xf4")

    def outside(self) -> list[tuple[int, int]]:
        """(address, length) of the RAM that the guest does not write to once its vCPUs run; without the ROM
        hole.
        """
        state_end = STATE_BASE + self.vcpus * PAGE
        arena_end = ARENA_BASE + self.written_bytes
        return [
            (0, STATE_BASE),
            (state_end, 0xA0000 - state_end),
            (1 << 20, ARENA_BASE - (1 << 20)),
            (arena_end, self.ram_bytes - arena_end),
        ]

    def ranks(self) -> list[int]:
        """The page number that each rank of a sweep visits."""
        mask, half = (1 << self.log_pages) - 1, (self.log_pages + 1) // 2
        folded = ((rank * _ODD1) & mask for rank in range(mask + 1))
        return [((page ^ (page >> half)) * _ODD2) & mask for page in folded]

    def check_arena(self, vcpu: int, progress: Progress, arena: bytes | mmap) -> Iterator[Mismatch]:
        """Compares a stopped vCPU's pages with what they must hold; the one write under way may be there or
        not.
        """
        base, sweep = self.arena(vcpu), progress.sweep
        done, before = _Pages(sweep), _Pages(sweep - 1)
        for rank, number in enumerate(self.ranks()):
            offset = number * PAGE
            found = arena[offset : offset + PAGE]
            tag = base + offset + vcpu + 1
            expected = (done if rank < progress.rank else before).content(tag)
            if found != expected and not (rank == progress.rank and found == done.content(tag)):
                yield mismatch(base + offset, expected, found)


class _Pages:
    """The content of pages whose last visit was in one sweep: only the tag differs between them."""

    def __init__(self, sweep: int) -> None:
        # Slot s holds the last sweep whose number is s modulo 512, as far as there was one.
        last = [sweep - (sweep - slot) % _SLOTS for slot in range(_SLOTS)]
        self._words = array("I", [word for value in last for word in (max(value, 0), 0)])
        if sweep <= 0:
            self._tags = slice(0, 0)
        elif sweep < _SLOTS:
            self._tags = slice(3, 2 * sweep + 2, 2)
        else:
            self._tags = slice(1, None, 2)
        self._count = len(self._words[self._tags])

    def content(self, tag: int) -> bytes:
        self._words[self._tags] = array("I", [tag]) * self._count
        return self._words.tobytes()


def mismatch(address: int, expected: bytes, found: bytes) -> Mismatch:
    """Describes the first difference of two unequal pages, up to the end of its 8-byte slot."""
    pairs = zip(expected, found, strict=False)
    first = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    end = first - first % 8 + 8
    return Mismatch(address, first, expected[first:end], found[first:end])
