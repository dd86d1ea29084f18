"""Builds migration streams, after migration/savevm.c and ram.c, for tests."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

HEADER = struct.pack(">II", 0x5145564D, 3)
EOF = b"\x00"
PAGE = 4096
EOS = struct.pack(">Q", 0x10)
RUN = b"\x08\x00\x05\x00\x00"
END_MARK = 0x0123456789ABCDEF

Item = TypeVar("Item")


def counted(name: bytes) -> bytes:
    return bytes([len(name)]) + name


def configuration(
    machine: bytes = b"pc-q35-7.2",
    *,
    page_bits: int | None = None,
    capabilities: Sequence[bytes] = (),
    uuid: bytes = b"",
) -> bytes:
    out = b"\x07" + struct.pack(">I", len(machine)) + machine
    if page_bits is not None:
        out += b"\x05" + counted(b"configuration/target-page-bits") + struct.pack(">II", 1, page_bits)
    if capabilities:
        out += b"\x05" + counted(b"configuration/capabilities") + struct.pack(">II", 1, len(capabilities))
        out += b"".join(counted(name) for name in capabilities)
    if uuid:
        out += b"\x05" + counted(b"configuration/uuid") + struct.pack(">I", 1) + uuid
    return out


def start(name: bytes, number: int = 2, version: int = 4, kind: int = 1) -> bytes:
    return bytes([kind]) + struct.pack(">I", number) + counted(name) + struct.pack(">II", 0, version)


def part(number: int = 2, kind: int = 2) -> bytes:
    return bytes([kind]) + struct.pack(">I", number)


def footer(number: int = 2) -> bytes:
    return b"\x7e" + struct.pack(">I", number)


def command(number: int, payload: bytes = b"") -> bytes:
    return b"\x08" + struct.pack(">HH", number, len(payload)) + payload


def ping(value: int) -> bytes:
    return command(2, struct.pack(">I", value))


def advise(sizes: int = 4096, target: int = 4096) -> bytes:
    return command(3, struct.pack(">QQ", sizes, target))


def discard(name: bytes, ranges: Iterable[tuple[int, int]]) -> bytes:
    pairs = b"".join(struct.pack(">QQ", first, length) for first, length in ranges)
    return command(6, b"\x00" + counted(name) + b"\x00" + pairs)


def packaged(blob: bytes) -> bytes:
    return command(7, struct.pack(">I", len(blob))) + blob


def recv_bitmap(name: bytes) -> bytes:
    return command(10, counted(name))


def block_list(blocks: Sequence[tuple[bytes, int, bytes]]) -> bytes:
    """Name, used length, and what else stands behind the length."""
    total = sum(length for _, length, _ in blocks)
    out = struct.pack(">Q", total | 0x04)
    return out + b"".join(counted(name) + struct.pack(">Q", length) + extra for name, length, extra in blocks)


def frame(flags: int, offset: int, name: bytes | None, body: bytes = b"") -> bytes:
    """A page; without a name it continues the block before."""
    word = offset | flags | (0x20 if name is None else 0)
    return struct.pack(">Q", word) + (b"" if name is None else counted(name)) + body


def page(offset: int, name: bytes | None = None, size: int = PAGE) -> bytes:
    return frame(0x08, offset, name, b"\xa5" * size)


def zero(offset: int, name: bytes | None = None) -> bytes:
    return frame(0x02, offset, name, b"\x00")


def xbzrle(offset: int, data: bytes, name: bytes | None = None) -> bytes:
    return frame(0x40, offset, name, b"\x01" + struct.pack(">H", len(data)) + data)


def compressed(offset: int, data: bytes, name: bytes | None = None) -> bytes:
    return frame(0x100, offset, name, struct.pack(">I", len(data)) + data)


def message(kind: int, payload: bytes) -> bytes:
    return struct.pack(">HH", kind, len(payload)) + payload


def request(start: int, length: int, name: bytes | None = None) -> bytes:
    if name is None:
        return message(4, struct.pack(">QI", start, length))
    return message(3, struct.pack(">QI", start, length) + counted(name))


def received(name: bytes, bitmap: bytes, mark: int = END_MARK) -> bytes:
    return message(5, counted(name)) + struct.pack(">Q", len(bitmap)) + bitmap + struct.pack(">Q", mark)


def chunks(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """The bytes, cut at these places."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def fed(feed: Callable[[bytes], Iterable[Item]], pieces: Iterable[bytes]) -> list[Item]:
    return [event for piece in pieces for event in feed(piece)]


def tail() -> bytes:
    """With what a package ends."""
    return ping(3) + RUN


def postcopy_stream(name: bytes = b"pc.ram", length: int = 64 * PAGE) -> bytes:
    """A whole migration that turns to postcopy, as QEMU 10.0 sends it."""
    opening = HEADER + configuration() + command(1) + ping(1) + advise()
    setup = start(b"ram") + block_list([(name, length, b""), (b"pc.bios", PAGE, b"")]) + EOS + footer()
    precopy = part() + page(0, name) + zero(PAGE) + zero(0, b"pc.bios") + EOS + footer()
    switchover = discard(name, [(0, PAGE), (2 * PAGE, PAGE)]) + ping(2)
    device = start(b"timer", 0, 2, kind=4) + b"\x00" * 40 + footer(0)
    package = packaged(command(4) + device + tail()) + ping(4)
    postcopy = part() + page(0, name) + page(2 * PAGE) + EOS + footer() + part(kind=3) + EOS + footer()
    return opening + setup + precopy + switchover + package + postcopy + EOF
