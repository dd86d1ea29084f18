"""Makes the seed corpora from streams of a real migration, shortened to a few KB each.

    python tests/fuzz/seeds.py NAME FORWARD RETURN [FORWARD RETURN]...

The files are what passed in each direction on each channel of one migration, the first pair on its first
channel (tests/integration/test_tracker.py saves them where REFAULT_SAVE_STREAMS names a directory). Pages
beyond the first of each kind, and device state, are left out.
"""

from __future__ import annotations

import struct
import sys
from collections import Counter
from pathlib import Path

from refault.channel.forward import Command, Event, ForwardDecoder, Kind, Mode

CORPUS = Path(__file__).resolve().parent / "corpus"
PAGES_OF_A_KIND = 1
DEVICE_STATE_KEPT = 80
TAIL = 14


def _kept(event: Event, data: bytes, pages: Counter[int]) -> bytes:
    item = data[event.at : event.end]
    if event.kind is Kind.PAGE:
        pages[event.code] += 1
        return item if pages[event.code] <= PAGES_OF_A_KIND else b""
    if event.kind is Kind.COMMAND and event.code == Command.PACKAGED:
        blob = data[event.end : event.end + event.value]
        short = blob[:DEVICE_STATE_KEPT] + blob[-TAIL:]
        return item[:-4] + struct.pack(">I", len(short)) + short
    return item if not event.packaged else b""


def shortened(data: bytes, mode: Mode) -> bytes:
    """The stream with few pages and little device state, still one that can be decoded."""
    pages: Counter[int] = Counter()
    out, end = b"", 0
    for event in ForwardDecoder(mode).feed(data):
        if event.kind in (Kind.BLOCK, Kind.DISCARD) or event.at > end:
            item = data[end : event.at] if not event.packaged and event.kind is not Kind.PACKAGED_END else b""
            out += item
        out += _kept(event, data, pages)
        end = event.end
    return out


def _records(what: int, data: bytes) -> bytes:
    pieces = [data[i : i + 60000] for i in range(0, len(data), 60000)]
    return b"".join(struct.pack(">BH", what, len(piece)) + piece for piece in pieces)


def main(name: str, files: list[str]) -> None:
    """Writes one seed for each channel and direction, and one of all for the tracker."""
    tracked = b""
    for number, (forward_file, return_file) in enumerate(zip(files[::2], files[1::2], strict=True)):
        mode = Mode.RECOVERED if number else Mode.FRESH
        forward = shortened(Path(forward_file).read_bytes(), mode)
        backward = Path(return_file).read_bytes()
        for target, data in (("forward", bytes([mode]) + forward), ("returnpath", backward)):
            directory = CORPUS / f"fuzz_{target}"
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{name}-{number}").write_bytes(data)
        tracked += (_records(0, b"") if number else b"") + _records(5, forward) + _records(3, backward)
    (CORPUS / "fuzz_tracker").mkdir(parents=True, exist_ok=True)
    (CORPUS / "fuzz_tracker" / name).write_bytes(tracked)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
