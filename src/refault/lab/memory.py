"""Guest memory seen from outside: a running QEMU's, without asking it, and a stopped one's, compared page by
page.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from .guest import PAGE, STATE_BASE, Guest, Mismatch, Progress, mismatch
from .qmp_client import QmpClient

_PRESENT_OR_SWAPPED = 3 << 62
_KEPT = 20
_STEPS = 4
_PATIENCE = 10.0
"""A vCPU that runs takes a step within so many of its pauses and so many seconds, on a busy machine too."""


_libc = ctypes.CDLL(None, use_errno=True)
_PIECES = (ctypes.c_void_p, ctypes.c_ulong)
_libc.process_vm_readv.argtypes = (ctypes.c_int, *_PIECES, *_PIECES, ctypes.c_ulong)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


class _Piece(ctypes.Structure):
    """A `struct iovec`."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class ProcessMemory:
    """The guest memory of a QEMU process through /proc, for whoever may trace it (its parent, root).

    A page that the destination of a postcopy migration has not received yet reads as None: reading it would
    be a page request.
    """

    def __init__(self, pid: int, base: int) -> None:
        self._pid = pid
        self._base = base

    def read(self, address: int, length: int) -> bytes | None:
        """Reads within one page; None when it is not there. Raises OSError when not permitted or QEMU is
        gone.
        """
        where = self._base + address
        with open(f"/proc/{self._pid}/pagemap", "rb", buffering=0) as pagemap:
            entry = os.pread(pagemap.fileno(), 8, where // mmap.PAGESIZE * 8)
        if len(entry) < 8 or not struct.unpack("=Q", entry)[0] & _PRESENT_OR_SWAPPED:
            return None
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
            try:
                return os.pread(memory.fileno(), length, where)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                return None  # QEMU has discarded it since that look, as it does at the switchover

    def fault(self, address: int, length: int) -> bytes:
        """Reads what may not be there: a page request, and this thread waits for the answer as a vCPU would.

        Raises OSError when not permitted or QEMU is gone.
        """
        buffer = ctypes.create_string_buffer(length)
        here, there = _Piece(ctypes.addressof(buffer), length), _Piece(self._base + address, length)
        # /proc/PID/mem gives EIO there: it does not wait for a userfaultfd.
        read = _libc.process_vm_readv(self._pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if read != length:
            raise OSError(ctypes.get_errno(), f"process_vm_readv: {read} of {length} bytes")
        return buffer.raw

    def write(self, address: int, data: bytes) -> None:
        """Writes behind the guest's back. Raises OSError when not permitted or QEMU is gone."""
        with open(f"/proc/{self._pid}/mem", "r+b", buffering=0) as memory:
            os.pwrite(memory.fileno(), data, self._base + address)

    def flip(self, address: int) -> None:
        """Changes one byte of a page that is there; raises ValueError where it is not."""
        if (old := self.read(address, 1)) is None:
            raise ValueError(f"the page of {address:#x} is not there")
        self.write(address, bytes([old[0] ^ 0xFF]))

    def progress(self, guest: Guest) -> list[Progress | None]:
        """How far each vCPU has come; None for one whose state page is not there."""
        states = (self.read(STATE_BASE + vcpu * PAGE, 8) for vcpu in range(guest.vcpus))
        return [None if state is None else Progress.parse(state) for state in states]


@dataclass(frozen=True)
class Verdict:
    """What the comparison found: ``pages`` compared, how many were ``wrong``, the first of them, who stood
    still.
    """

    pages: int
    wrong: int
    mismatches: tuple[Mismatch, ...]
    progress: tuple[Progress, ...]
    stuck_vcpus: tuple[int, ...] = ()

    @property
    def right(self) -> bool:
        """Whether every page is right and every vCPU went on."""
        return self.wrong == 0 and not self.stuck_vcpus

    def __str__(self) -> str:
        if self.right:
            return f"{self.pages} pages compared, all right"
        text = f"{self.pages} pages compared, {self.wrong} wrong"
        if self.stuck_vcpus:
            text += f"; vCPUs {', '.join(map(str, self.stuck_vcpus))} did not go on after the migration"
        return "\n  ".join([text, *map(str, self.mismatches)])


@dataclass
class _Count:
    pages: int = 0
    wrong: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)

    def add(self, found: Iterator[Mismatch]) -> None:
        for each in found:
            self.wrong += 1
            if len(self.mismatches) < _KEPT:
                self.mismatches.append(each)


async def dump(qmp: QmpClient, address: int, length: int, path: Path) -> None:
    """Has a stopped QEMU write ``length`` bytes of guest-physical memory to ``path``."""
    arguments = {"val": address, "size": length, "filename": str(path)}
    await qmp.execute("pmemsave", arguments, timeout=60)


async def compare(
    guest: Guest, destination: QmpClient, source: QmpClient | None = None, *, patience: float = _PATIENCE
) -> Verdict:
    """Stops ``destination`` and compares every page of the guest's memory with what it must hold.

    What the guest wrote is computed; the rest of its RAM is compared with that of ``source`` (stopped,
    postmigrate) where there is one. Its vCPUs must go further than they had there, and are given time to.
    """
    count = _Count()
    with tempfile.TemporaryDirectory(prefix="refault-") as directory:
        here, there = Path(directory, "here"), Path(directory, "there")
        left = await _states(guest, source, there) if source is not None else ()
        with trio.move_on_after(patience + _STEPS * guest.tick_ns / 1e9):
            while _stuck(await _states(guest, destination, here), left):
                await trio.sleep(0.01)
        await destination.execute("stop", timeout=30)
        progress = await _states(guest, destination, here)
        for vcpu in range(guest.vcpus):
            await dump(destination, guest.arena(vcpu), guest.arena_bytes, here)
            await trio.to_thread.run_sync(_check_arena, guest, vcpu, progress[vcpu], here, count)
        if source is None:
            return Verdict(count.pages, count.wrong, tuple(count.mismatches), progress)
        for address, length in guest.outside():
            await dump(destination, address, length, here)
            await dump(source, address, length, there)
            await trio.to_thread.run_sync(_check_equal, address, there, here, count)
    return Verdict(count.pages, count.wrong, tuple(count.mismatches), progress, _stuck(progress, left))


def _stuck(progress: tuple[Progress, ...], left: tuple[Progress, ...]) -> tuple[int, ...]:
    """The vCPUs that have not gone on from where they were left."""
    return tuple(vcpu for vcpu, (now, then) in enumerate(zip(progress, left, strict=False)) if now <= then)


async def _states(guest: Guest, qmp: QmpClient, path: Path) -> tuple[Progress, ...]:
    await dump(qmp, STATE_BASE, guest.vcpus * PAGE, path)
    data = path.read_bytes()
    return tuple(Progress.parse(data[vcpu * PAGE :]) for vcpu in range(guest.vcpus))


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _check_arena(guest: Guest, vcpu: int, progress: Progress, path: Path, count: _Count) -> None:
    with _mapped(path) as arena:
        count.pages += len(arena) // PAGE
        count.add(guest.check_arena(vcpu, progress, arena))


def _check_equal(address: int, expected: Path, found: Path, count: _Count) -> None:
    with _mapped(expected) as wanted, _mapped(found) as got:
        count.pages += len(wanted) // PAGE
        pages = ((at, wanted[at : at + PAGE], got[at : at + PAGE]) for at in range(0, len(wanted), PAGE))
        count.add(mismatch(address + at, a, b) for at, a, b in pages if a != b)
