"""The journal of one monitor's connections, as cext/journal.h writes it: what the next refault reads of it.

A record is one thing that befell the core (`refault.qmp.multiplexer`) or its sockets, in order; fed to a core
that is as the first one was when the log began, they make it what that was at its last moment (replay.py).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

HEADER = 256
RECORD = 16
MAGIC = b"refault2"
GIVEN_UP = b"refault0"
"""In its place: what befell since is not there. What was before tells what QEMU holds."""
_SUM = struct.Struct("=I")
"""CRC-32, ahead of what was before."""
_HEAD = struct.Struct("=8sQQQ")
_CELL = struct.Struct("=QB3xI")
_CELL_AT = 32
_COUNT_AT = 104
_RECORD = struct.Struct("=B3xII4x")


class Kind(IntEnum):
    """What befell whom: 0 is QEMU, others are the numbers of clients."""

    RECEIVED = 1
    """Bytes, with which no descriptor came."""
    SENT = 2
    """So many bytes went; no data."""
    MORE = 3
    """A client's next batch of messages was taken from what had been received."""
    JOINED = 4
    HALF_CLOSED = 5
    LEFT = 6
    ANSWERED = 7
    """A watcher has said what becomes of a command."""
    CALLED = 8
    """A command of refault's own."""
    FORGOTTEN = 9
    """Nobody waits for one any more."""
    CHANGED = 10
    """What a watcher has made of a reply, behind the bytes of QEMU's that it came with."""
    PEEKED = 11
    """Bytes with which a descriptor came. They and it are in the socket yet."""
    CONSUMED = 12
    """The same bytes: they are not there any more, nor is it."""
    HIDING = 13
    """What refault says about pauses (hiding.py)."""
    CAME = 14
    """A client's connection was accepted. It has no number before it joins."""
    URGENT = 15
    """What is out-of-band waits no longer for a descriptor."""


_WITH_DATA = frozenset(Kind) - {Kind.SENT}


class TornError(Exception):
    """It is no journal of this version, or not whole."""


@dataclass(frozen=True)
class Record:
    """One of the log. `count`: bytes, those of `data` where there are some."""

    kind: Kind
    who: int
    count: int
    data: memoryview


@dataclass(frozen=True)
class Journal:
    """`before`: what was when the log began, as it was given."""

    before: memoryview
    records: list[Record]


def before(file: bytes | memoryview) -> memoryview:
    """What was when the log began, whatever is in that. Raises TornError."""
    view = memoryview(file)
    if len(view) < HEADER:
        raise TornError("it is too short")
    magic, log_at, _, _ = _HEAD.unpack_from(view)
    if magic not in (MAGIC, GIVEN_UP):
        raise TornError("it is of another version of refault, or was never finished")
    if not HEADER + _SUM.size <= log_at <= len(view):
        raise TornError("its header is wrong")
    first = view[HEADER + _SUM.size : log_at]
    if magic == MAGIC and _SUM.unpack_from(view, HEADER) != (zlib.crc32(first),):
        raise TornError("it is damaged")
    return first


def checked(first: bytes) -> bytes:
    """What was before the log, as it stands in the file."""
    return _SUM.pack(zlib.crc32(first)) + first


def read(file: bytes | memoryview) -> Journal:
    """Reads a whole file. Raises TornError."""
    first = before(file)
    view = memoryview(file)
    magic, log_at, size, tail = _HEAD.unpack_from(view)
    if magic == GIVEN_UP:
        raise TornError("it was given up, for it could not be written any more")
    if not log_at <= log_at + tail <= size <= len(view):
        raise TornError("its header is wrong")
    records: list[Record] = []
    at = log_at
    while at < log_at + tail:
        record, at = _record(view, at, log_at + tail)
        records.append(record)
    last = _under_way(view, log_at, tail, size)
    if last is not None:
        records.append(last)
    return Journal(first, records)


def _record(view: memoryview, at: int, end: int) -> tuple[Record, int]:
    if at + RECORD > end:
        raise TornError("a record is cut off")
    number, who, count = _RECORD.unpack_from(view, at)
    at += RECORD
    kind = _kind(number)
    length = count if kind in _WITH_DATA else 0
    if length > end - at:
        raise TornError("a record is longer than the log")
    data = view[at : at + length]
    return Record(kind, who, count, data), at + (length + 7 & ~7)


def _under_way(view: memoryview, log_at: int, tail: int, size: int) -> Record | None:
    """The system call that was being made, if the kernel has done it."""
    cell_at, number, who = _CELL.unpack_from(view, _CELL_AT)
    (count,) = struct.unpack_from("=I", view, _COUNT_AT)
    if cell_at != tail or count == 0:
        return None
    kind = _kind(number)
    if kind is Kind.SENT:
        return Record(kind, who, count, view[:0])
    begin = log_at + tail + RECORD
    if begin + count > size:
        raise TornError("what was being received is longer than the log")
    return Record(kind, who, count, view[begin : begin + count])


def _kind(number: int) -> Kind:
    try:
        return Kind(number)
    except ValueError:
        raise TornError(f"it has records of a kind {number}") from None
