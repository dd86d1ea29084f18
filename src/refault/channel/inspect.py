"""What a saved migration stream consists of, summed up for people."""

from __future__ import annotations

import itertools
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from refault.channel.forward import Command, Event, Frame, Kind, Mode, Section, reason_text

_SECTION_TYPES = (0x01, 0x02, 0x03, 0x04, 0x08)
_FRAME_NAMES = {
    Frame.PAGE: "whole",
    Frame.ZERO: "zero",
    Frame.XBZRLE: "xbzrle",
    Frame.COMPRESS: "compressed",
}


def guess_mode(first: bytes) -> Mode:
    """What kind of channel a stream comes from, by its first byte: a recovered one has no header."""
    return Mode.RECOVERED if first[:1] and first[0] in _SECTION_TYPES else Mode.FRESH


@dataclass
class Block:
    """A RAM block: bytes declared, pages carried by kind, target pages discarded."""

    name: bytes
    length: int = 0
    page_size: int = 0
    pages: Counter[Frame] = field(default_factory=Counter)
    discarded_bytes: int = 0


@dataclass
class SectionUse:
    """A section: how often each of its types came, and the bytes from its headers to its ends."""

    name: bytes
    types: Counter[Section] = field(default_factory=Counter)
    size: int = 0


@dataclass
class Summary:
    """All of it, gathered by `add` in the order of the stream."""

    version: int | None = None
    machine: bytes = b""
    uuid: bytes = b""
    target_page_size: int = 4096
    capabilities: list[bytes] = field(default_factory=list)
    blocks: dict[int, Block] = field(default_factory=dict)
    sections: dict[int, SectionUse] = field(default_factory=dict)
    commands: list[tuple[int, str]] = field(default_factory=list)
    ended: int | None = None
    opaque: Event | None = None
    _open: int | None = None

    def add(self, event: Event) -> None:
        """Takes in the next event."""
        match event.kind:
            case Kind.PAGE:
                self._block(event).pages[Frame(event.code)] += 1
            case Kind.HEADER:
                self.version = event.value
            case Kind.CONFIGURATION:
                self.machine = event.name
            case Kind.UUID:
                self.uuid = event.name
            case Kind.TARGET_PAGE_BITS:
                self.target_page_size = 1 << event.value
            case Kind.CAPABILITY:
                self.capabilities.append(event.name)
            case Kind.BLOCK:
                self._block(event).length = event.length
            case Kind.BLOCK_PAGE_SIZE:
                self._block(event).page_size = event.value
            case Kind.DISCARD:
                self._block(event).discarded_bytes += event.length
            case Kind.SECTION:
                self._section(event)
            case Kind.COMMAND:
                self._command(event)
            case Kind.PACKAGED_END:
                told = "with" if event.value else "WITHOUT"
                self.commands.append((event.end, f"end of the package, {told} POSTCOPY_RUN"))
            case Kind.EOF:
                self.ended = event.at
            case Kind.OPAQUE:
                self.opaque = event
            case _:
                pass
        if self._open is not None and event.kind is not Kind.COMMAND and not event.packaged:
            self.sections[self._open].size += event.end - event.at
            if event.kind is Kind.FOOTER:
                self._open = None

    def _block(self, event: Event) -> Block:
        return self.blocks.setdefault(event.block, Block(event.name))

    def _section(self, event: Event) -> None:
        if event.packaged:
            told = f"device state from {printable(event.name)} on, to the end of the package"
            self.commands.append((event.at, told))
            return
        section = self.sections.setdefault(event.id, SectionUse(event.name or b"(not started here)"))
        section.types[Section(event.code)] += 1
        self._open = event.id

    def _command(self, event: Event) -> None:
        self._open = None
        command = Command(event.code)
        told = command.name
        if command is Command.PING:
            told += f" {event.value}"
        elif command is Command.PACKAGED:
            told += f" of {event.value} bytes"
        elif command is Command.POSTCOPY_ADVISE and event.length:
            self.target_page_size = event.offset
            told += f" (target page {event.offset} bytes, page sizes {event.value:#x})"
        elif event.name:
            told += f" {printable(event.name)}"
        self.commands.append((event.at, f"{told}, in the package" if event.packaged else told))


def printable(name: bytes) -> str:
    """A name from the stream, safe for a terminal."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Lines with columns: the first to the left, the others to the right."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)),
        ]
        yield "  " + "  ".join(cells)


def render(summary: Summary, size: int, *, more_may_come: bool = False) -> Iterator[str]:
    """The lines that tell of a stream of `size` bytes, or of at least as many."""
    if summary.version is not None:
        kind = f", version {summary.version}"
    else:
        kind = ", a recovered channel" if summary.commands else ""
    yield f"stream: {size} bytes{' or more' if more_may_come else ''}{kind}"
    if summary.machine:
        yield f"machine: {printable(summary.machine)}"
    if summary.uuid:
        yield f"uuid: {uuid.UUID(bytes=summary.uuid)}"
    yield f"target page: {summary.target_page_size} bytes"
    if summary.capabilities:
        yield "capabilities: " + ", ".join(printable(name) for name in summary.capabilities)
    if summary.blocks:
        yield from ("", "RAM blocks (pages are target pages)")
        yield from table(_BLOCK_HEADER, (_block_row(block) for block in summary.blocks.values()))
    if summary.sections:
        yield from ("", "sections")
        yield from table(("name", "id", *(s.name.lower() for s in Section), "bytes"), _section_rows(summary))
    if summary.commands:
        yield from ("", "commands")
        yield from _command_lines(summary.commands)
    yield ""
    if summary.opaque is not None:
        section = f" (section {printable(summary.opaque.name)})" if summary.opaque.name else ""
        reason = reason_text(summary.opaque.code)
        yield f"cannot be read from byte {summary.opaque.at} on: {reason}{section}"
    elif summary.ended is not None:
        yield f"read to its end: EOF at byte {summary.ended}"
    else:
        yield "read to the last byte; the stream has no end: it was cut, or more was to come"


_BLOCK_HEADER = ("name", "bytes", "page size", *_FRAME_NAMES.values(), "discarded bytes")


def _block_row(block: Block) -> tuple[str, ...]:
    counts = (str(block.pages[frame]) for frame in _FRAME_NAMES)
    length, page_size = str(block.length), str(block.page_size) if block.page_size else "host's"
    if not block.length:  # a recovered channel declares none
        length = page_size = "-"
    return (printable(block.name), length, page_size, *counts, str(block.discarded_bytes))


def _command_lines(commands: Iterable[tuple[int, str]]) -> Iterator[str]:
    """A RAM_DISCARD has room for 12 ranges, so a block takes many of them: what repeats has one line."""
    for told, group in itertools.groupby(commands, key=lambda command: command[1]):
        [(at, _), *more] = group
        yield f"  {at:>12}  {told}" + (f" ({len(more) + 1} times)" if more else "")


def _section_rows(summary: Summary) -> Iterator[tuple[str, ...]]:
    for number, section in summary.sections.items():
        counts = (str(section.types[kind]) for kind in Section)
        yield (printable(section.name), str(number), *counts, str(section.size))
