"""The forward stream: every item, any chunking, and a reason wherever it cannot be read."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refault.channel.forward import Command, Event, ForwardDecoder, Frame, Kind, Mode, Section, reason_text

from . import streams as s
from .streams import PAGE

RAM = b"pc.ram"


def decode(data: bytes, mode: Mode = Mode.FRESH) -> list[Event]:
    return list(ForwardDecoder(mode).feed(data))


def opening(blocks: list[tuple[bytes, int, bytes]] | None = None, *, advise: bool = True) -> bytes:
    """Up to inside the ram section, behind the block list."""
    listed = [(RAM, 64 * PAGE, b""), (b"pc.bios", 2 * PAGE, b"")] if blocks is None else blocks
    return (
        s.HEADER
        + s.configuration()
        + (s.advise() if advise else b"")
        + s.start(b"ram")
        + s.block_list(listed)
        + s.EOS
        + s.footer()
        + s.part()
    )


OPENING = opening()

FRAMES = st.one_of(
    st.builds(s.page, st.integers(0, 63).map(lambda n: n * PAGE), st.just(RAM)),
    st.builds(s.zero, st.integers(0, 1).map(lambda n: n * PAGE), st.sampled_from([RAM, b"pc.bios", None])),
    st.builds(s.xbzrle, st.integers(0, 1).map(lambda n: n * PAGE), st.binary(max_size=64)),
    st.builds(s.compressed, st.integers(0, 1).map(lambda n: n * PAGE), st.binary(max_size=64)),
    st.just(struct.pack(">Q", 0x200)),
)
SECTIONS = st.builds(
    lambda frames, foot: s.part() + s.zero(0, RAM) + b"".join(frames) + s.EOS + (s.footer() if foot else b""),
    st.lists(FRAMES, max_size=4),
    st.booleans(),
)
COMMANDS = st.one_of(
    st.builds(s.ping, st.integers(0, (1 << 32) - 1)),
    st.sampled_from([s.command(1), s.command(4), s.command(5), s.command(9), s.command(11)]),
    st.builds(s.recv_bitmap, st.sampled_from([RAM, b"pc.bios"])),
    st.builds(
        s.discard,
        st.just(RAM),
        st.lists(st.tuples(st.just(0), st.integers(1, 64).map(lambda n: n * PAGE)), min_size=1, max_size=3),
    ),
    st.builds(lambda blob: s.packaged(s.command(4) + blob + s.tail()), st.binary(max_size=60)),
    st.builds(s.packaged, st.binary(min_size=1, max_size=30)),
)


@settings(deadline=None)
@given(
    st.lists(st.one_of(SECTIONS, COMMANDS, COMMANDS, st.binary(max_size=20)), max_size=6),
    st.lists(st.integers(0, 1 << 30), max_size=40),
)
def test_any_chunking_gives_the_same_events(items: list[bytes], cuts: list[int]) -> None:
    data = OPENING + s.EOS + s.footer() + b"".join(items) + s.EOF
    whole = decode(data)
    assert s.fed(ForwardDecoder().feed, s.chunks(data, cuts)) == whole


@settings(deadline=None, max_examples=30)
@given(st.binary(max_size=300), st.sampled_from(list(Mode)), st.lists(st.integers(0, 1 << 30)))
def test_any_bytes_in_any_chunking(data: bytes, mode: Mode, cuts: list[int]) -> None:
    assert s.fed(ForwardDecoder(mode).feed, s.chunks(data, cuts)) == decode(data, mode)


@settings(deadline=None, max_examples=50)
@given(st.lists(FRAMES, max_size=6), st.lists(st.integers(0, 1 << 30), max_size=40))
def test_a_preempt_channel_in_any_chunking(frames: list[bytes], cuts: list[int]) -> None:
    data = s.zero(0, RAM) + b"".join(frames) + s.EOS + s.page(PAGE, RAM)
    assert s.fed(ForwardDecoder(Mode.PREEMPT).feed, s.chunks(data, cuts)) == decode(data, Mode.PREEMPT)


def test_byte_by_byte() -> None:
    data = s.postcopy_stream()
    decoder = ForwardDecoder()
    events = s.fed(decoder.feed, [data[i : i + 1] for i in range(len(data))])
    assert events == decode(data)
    assert decoder.position == len(data)


def in_line(events: list[Event]) -> None:
    for before, after in pairwise(events):
        assert before.end <= after.at
        assert after.at < after.end


def test_events_lie_one_behind_the_other() -> None:
    data = s.postcopy_stream()
    events = decode(data)
    in_line(events)
    assert events[-1] == Event(Kind.EOF, len(data) - 1, len(data))


def test_two_page_sizes_behind_one_length_lie_in_line_too() -> None:
    extra = struct.pack(">QQ", PAGE, PAGE)
    in_line(decode(opening([(RAM, PAGE, extra), (b"pc.bios", PAGE, extra)])))


def test_a_whole_postcopy_migration() -> None:
    events = decode(s.postcopy_stream())
    told = [(event.kind, event.code if event.kind is Kind.COMMAND else None) for event in events]
    commands = [Command(code) for kind, code in told if kind is Kind.COMMAND and code is not None]
    assert commands == [
        Command.OPEN_RETURN_PATH,
        Command.PING,
        Command.POSTCOPY_ADVISE,
        Command.RAM_DISCARD,
        Command.PING,
        Command.PACKAGED,
        Command.POSTCOPY_LISTEN,
        Command.PING,
    ]
    assert [event.value for event in events if event.code == Command.PING and event.kind is Kind.COMMAND] == [
        1,
        2,
        4,
    ]
    (end,) = [event for event in events if event.kind is Kind.PACKAGED_END]
    assert end.value == 1
    (inside,) = [event for event in events if event.kind is Kind.SECTION and event.packaged]
    assert inside.name == b"timer"
    assert [(e.offset, e.length) for e in events if e.kind is Kind.DISCARD] == [(0, PAGE), (2 * PAGE, PAGE)]
    pages = [(e.name, e.offset, Frame(e.code)) for e in events if e.kind is Kind.PAGE]
    assert pages == [
        (RAM, 0, Frame.PAGE),
        (RAM, PAGE, Frame.ZERO),
        (b"pc.bios", 0, Frame.ZERO),
        (RAM, 0, Frame.PAGE),
        (RAM, 2 * PAGE, Frame.PAGE),
    ]


def test_the_configuration() -> None:
    uuid = bytes(range(16))
    data = s.HEADER + s.configuration(b"virt-9.0", page_bits=14, capabilities=[b"x-ignore-shared"], uuid=uuid)
    events = decode(data + s.ping(1))
    assert [(e.kind, e.name, e.value) for e in events[:5]] == [
        (Kind.HEADER, b"", 3),
        (Kind.CONFIGURATION, b"virt-9.0", 0),
        (Kind.TARGET_PAGE_BITS, b"", 14),
        (Kind.CAPABILITY, b"x-ignore-shared", 0),
        (Kind.UUID, uuid, 0),
    ]


def test_a_stream_without_configuration_and_footers() -> None:
    data = s.HEADER + s.start(b"ram") + s.block_list([(RAM, PAGE, b"")]) + s.EOS
    events = decode(data + s.part() + s.page(0, RAM) + s.EOS + s.part(kind=3) + s.EOS + s.EOF)
    assert events[-1].kind is Kind.EOF
    assert Kind.FOOTER not in {event.kind for event in events}


def test_pages_of_another_size() -> None:
    size = 1 << 14
    data = (
        s.HEADER
        + s.configuration(page_bits=14)
        + s.start(b"ram")
        + s.block_list([(RAM, 4 * size, b"")])
        + s.EOS
    )
    events = decode(data + s.part() + s.page(size, RAM, size) + s.EOS + s.EOF)
    (page,) = [event for event in events if event.kind is Kind.PAGE]
    assert (page.offset, page.length) == (size, size)
    assert events[-1].kind is Kind.EOF


SIZE_2M = struct.pack(">Q", 2 << 20)
ADDRESS = struct.pack(">Q", 0x1_0000_0000)
ADDRESS_LIKE_A_SIZE = struct.pack(">Q", 1 << 30)
ROM = struct.pack(">Q", 0xFFFC0000)


@pytest.mark.parametrize(
    ("shared", "extras", "sizes"),
    [
        (False, [b"", b""], [0, 0]),
        (False, [SIZE_2M, b""], [2 << 20, 0]),
        (False, [b"", SIZE_2M], [0, 2 << 20]),
        (True, [ADDRESS, ROM], [0, 0]),
        (True, [SIZE_2M + ADDRESS, ROM], [2 << 20, 0]),
        (True, [ROM, SIZE_2M + ADDRESS], [0, 2 << 20]),
        (True, [ADDRESS_LIKE_A_SIZE, ADDRESS_LIKE_A_SIZE], [0, 0]),
        (True, [SIZE_2M + ADDRESS_LIKE_A_SIZE, bytes(8)], [2 << 20, 0]),
    ],
)
@pytest.mark.parametrize("after", [s.EOS, struct.pack(">Q", 0x200) + s.EOS])
def test_what_stands_behind_the_lengths_of_blocks(
    *, shared: bool, extras: list[bytes], sizes: list[int], after: bytes
) -> None:
    capabilities = [b"x-ignore-shared"] if shared else []
    blocks = [(RAM, 8 << 20, extras[0]), (b"mem1", 4 << 20, extras[1])]
    data = s.HEADER + s.configuration(capabilities=capabilities) + s.advise(0x201000) + s.start(b"ram")
    data += s.block_list(blocks) + after + s.footer() + s.EOF
    events = decode(data)
    found = {event.name: 0 for event in events if event.kind is Kind.BLOCK}
    found |= {event.name: event.value for event in events if event.kind is Kind.BLOCK_PAGE_SIZE}
    assert list(found.values()) == sizes
    assert [e.length for e in events if e.kind is Kind.BLOCK] == [8 << 20, 4 << 20]
    assert events[-1].kind is Kind.EOF
    assert s.fed(ForwardDecoder().feed, s.chunks(data, range(len(data)))) == events


def test_a_recovered_channel_is_read_from_its_first_byte() -> None:
    decoder = ForwardDecoder()
    list(decoder.feed(OPENING + s.page(0, RAM)[:100]))
    decoder.restart(Mode.RECOVERED)
    data = s.recv_bitmap(RAM) + s.recv_bitmap(b"pc.bios") + s.command(9)
    events = list(decoder.feed(data + s.part() + s.page(PAGE, RAM) + s.EOS + s.footer()))
    assert [event.name for event in events[:2]] == [RAM, b"pc.bios"]
    assert events[2].code == Command.POSTCOPY_RESUME
    assert [event.offset for event in events if event.kind is Kind.PAGE] == [PAGE]
    assert events[-1].kind is Kind.FOOTER


def test_a_recovered_channel_forgets_the_block_before() -> None:
    decoder = ForwardDecoder()
    list(decoder.feed(OPENING + s.page(0, RAM)))
    decoder.restart(Mode.RECOVERED)
    events = list(decoder.feed(s.part() + s.page(PAGE)))
    assert reason_text(events[-1].code) == "a page of a RAM block that was not declared"


def test_a_recovered_channel_whose_beginning_was_not_seen() -> None:
    events = decode(
        s.recv_bitmap(RAM) + s.command(9) + s.part(7) + s.page(PAGE, RAM) + s.page(0), Mode.RECOVERED
    )
    assert [event.offset for event in events if event.kind is Kind.PAGE] == [PAGE, 0]


def test_a_preempt_channel() -> None:
    events = decode(
        s.page(PAGE, RAM) + s.page(0) + s.zero(0, b"pc.bios") + s.EOS + s.page(0, RAM), Mode.PREEMPT
    )
    assert [(event.kind, event.name) for event in events] == [
        (Kind.PAGE, RAM),
        (Kind.PAGE, RAM),
        (Kind.PAGE, b"pc.bios"),
        (Kind.RAM_EOS, b""),
        (Kind.PAGE, RAM),
    ]


def dirty_bitmap() -> bytes:
    bits = struct.pack(">QI", 0, 8)
    return b"".join(
        (
            b"\x1c" + s.counted(b"drive0") + s.counted(b"bitmap0") + struct.pack(">IB", 65536, 1),
            b"\x40" + bits + struct.pack(">Q", 32) + b"\x11" * 32,
            b"\x42" + bits,
            b"\x20",
            b"\x01",
        )
    )


def test_a_dirty_bitmap_section() -> None:
    data = OPENING + s.EOS + s.footer() + s.start(b"dirty-bitmap", 5, 1) + b"\x01" + s.footer(5)
    data += s.part(5) + dirty_bitmap() + s.footer(5) + s.part() + s.zero(0, RAM) + s.EOS + s.footer() + s.EOF
    events = decode(data)
    assert [event.code for event in events if event.kind is Kind.DIRTY_BITMAP] == [
        1,
        0x1C,
        0x40,
        0x42,
        0x20,
        1,
    ]
    assert events[-1].kind is Kind.EOF


def test_a_vmdescription_follows_the_end() -> None:
    events = decode(OPENING + s.EOS + s.footer() + s.EOF + b"\x06" + struct.pack(">I", 7) + b'{"a":1}')
    assert [event.kind for event in events[-2:]] == [Kind.EOF, Kind.VMDESCRIPTION]


@given(st.binary(min_size=1, max_size=80))
def test_a_package_of_anything_is_passed_by_its_length(blob: bytes) -> None:
    data = OPENING + s.EOS + s.footer()
    events = decode(data + s.packaged(blob) + s.ping(4) + s.EOF)
    assert [event.kind for event in events[-3:]] == [Kind.PACKAGED_END, Kind.COMMAND, Kind.EOF]
    assert not events[-1].packaged


AFTER_SETUP = OPENING + s.EOS + s.footer()
WRONG = {
    "device state, which carries no length (normal where a precopy migration ends)": [
        AFTER_SETUP + s.start(b"timer", 0, 2, kind=4)
    ],
    "device state before RAM, which carries no length (virtio-mem)": [
        s.HEADER + s.configuration() + s.start(b"virtio-mem-early", 0, 1, kind=4)
    ],
    "a section of a kind that carries no length": [AFTER_SETUP + s.start(b"block", 9, 1)],
    "it is encrypted (TLS)": [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"],
    "a multifd channel": [struct.pack(">II", 0x11223344, 1) + bytes(20)],
    "it does not begin as a QEMU migration stream": [b"GET / HTTP/1.1\r\n"],
    "a version of the migration stream other than 3": [struct.pack(">II", 0x5145564D, 2)],
    "an unknown part in the configuration section": [
        s.HEADER + b"\x07" + struct.pack(">I", 100_000),
        s.HEADER + s.configuration(page_bits=60),
        s.HEADER + s.configuration() + b"\x05" + s.counted(b"configuration/new") + struct.pack(">I", 1),
        s.HEADER + s.configuration() + b"\x05" + s.counted(b"configuration/uuid") + struct.pack(">I", 2),
    ],
    "an unknown section type": [
        AFTER_SETUP + b"\x55",
        AFTER_SETUP + b"\x07",
        AFTER_SETUP + s.ping(1) + s.footer(),
    ],
    "a section that was never started": [AFTER_SETUP + s.part(77)],
    "a section footer of another section": [OPENING + s.EOS + s.footer(3)],
    "an unknown combination of RAM flags": [
        OPENING + struct.pack(">Q", 0x01),
        OPENING + struct.pack(">Q", 0x0A),
        OPENING + struct.pack(">Q", 0x30),
        OPENING + struct.pack(">Q", 0),
    ],
    "an inconsistent list of RAM blocks": [
        opening([(RAM, PAGE, b""), (RAM, PAGE, b"")]),
        opening([(RAM, PAGE + 1, b""), (b"pc.bios", PAGE - 1, b"")]),
        opening([(RAM, PAGE, struct.pack(">Q", 3 * PAGE))]),
        s.HEADER + s.start(b"ram") + struct.pack(">Q", PAGE | 4) + struct.pack(">Q", PAGE) + s.EOS,
        opening([(RAM, PAGE, struct.pack(">QQQ", PAGE, PAGE, PAGE))]),
        opening([(RAM, PAGE, struct.pack(">QQQ", PAGE, PAGE, PAGE)), (b"pc.bios", PAGE, b"")]),
        s.HEADER
        + s.start(b"ram")
        + struct.pack(">Q", PAGE | 4)
        + s.counted(RAM)
        + struct.pack(">Q", 2 * PAGE),
    ],
    "a page of a RAM block that was not declared": [
        OPENING + s.page(0, b"other"),
        OPENING + s.page(0),
        AFTER_SETUP + s.discard(b"other", [(0, PAGE)]),
    ],
    "a page beyond the end of its RAM block": [
        OPENING + s.page(64 * PAGE, RAM),
        OPENING + s.zero((1 << 64) - PAGE, RAM),
        AFTER_SETUP + s.discard(RAM, [(63 * PAGE, 2 * PAGE)]),
        AFTER_SETUP + s.discard(RAM, [(PAGE, (1 << 64) - PAGE)]),
    ],
    "a compressed page longer than it can be": [
        OPENING + s.xbzrle(0, b"x" * 4097, RAM),
        OPENING + s.frame(0x40, 0, RAM, b"\x02\x00\x01x"),
        OPENING + s.compressed(0, b"x" * 8193, RAM),
    ],
    "a version of the RAM section other than 4": [s.HEADER + s.start(b"ram", version=3)],
    "the mapped-ram format": [s.HEADER + s.configuration(capabilities=[b"mapped-ram"])],
    "RDMA": [OPENING + struct.pack(">Q", 0x80)],
    "an unknown or malformed command": [
        AFTER_SETUP + s.command(0),
        AFTER_SETUP + s.command(12),
        AFTER_SETUP + s.command(2, b"\0\0\0"),
        AFTER_SETUP + s.command(1, b"\0"),
        AFTER_SETUP + s.command(3, b"\0" * 8),
        AFTER_SETUP + s.advise(4096, 12345),
        AFTER_SETUP + s.command(6, b"\0" * 19),
        AFTER_SETUP + s.command(6, b"\x01" + s.counted(RAM) + b"\0" + b"\0" * 16),
        AFTER_SETUP + s.command(6, b"\0" + s.counted(RAM) + b"\0" + b"\0" * 17),
        AFTER_SETUP + s.command(6, b"\0" + s.counted(RAM) + b"x" + b"\0" * 16),
        AFTER_SETUP + s.command(10, b"\x05abc"),
    ],
    "COLO": [AFTER_SETUP + s.command(8)],
    "a malformed dirty-bitmap section": [
        AFTER_SETUP + s.start(b"dirty-bitmap", 5, 1) + b"\x80",
        AFTER_SETUP + s.start(b"dirty-bitmap", 5, 1) + b"\x40" + struct.pack(">QIQ", 0, 1, 1 << 40),
    ],
    "bytes after the end of the stream": [AFTER_SETUP + s.EOF + b"\x01"],
}


@pytest.mark.parametrize(
    ("text", "data"), [(text, data) for text, all_of in WRONG.items() for data in all_of]
)
def test_what_cannot_be_read_says_why_and_passes_on(text: str, data: bytes) -> None:
    decoder = ForwardDecoder()
    events = list(decoder.feed(data))
    assert events[-1].kind is Kind.OPAQUE
    assert reason_text(events[-1].code) == text == reason_text(decoder.opaque)
    assert s.fed(ForwardDecoder().feed, s.chunks(data, range(len(data)))) == events
    assert list(decoder.feed(s.postcopy_stream())) == []
    assert decoder.position == len(data) + len(s.postcopy_stream())


def test_a_section_that_cannot_be_read_is_named() -> None:
    event = decode(AFTER_SETUP + s.start(b"0000:00:02.0/vfio", 9, 1))[-1]
    assert (event.name, event.id) == (b"0000:00:02.0/vfio", 9)


def test_a_recovered_channel_starts_clean() -> None:
    decoder = ForwardDecoder()
    list(decoder.feed(OPENING + b"\xff" * 20))
    assert decoder.opaque
    decoder.restart(Mode.RECOVERED)
    assert not decoder.opaque
    assert [event.kind for event in decoder.feed(s.ping(1))] == [Kind.COMMAND]


@pytest.mark.parametrize("mode", [Mode.RECOVERED, Mode.PREEMPT])
@pytest.mark.parametrize(
    ("data", "text"),
    [(b"\x16\x03\x01\x00" * 4, "it is encrypted (TLS)"), (b"\x11\x22\x33\x44" * 4, "a multifd channel")],
)
def test_opaque_channels_of_every_kind(mode: Mode, data: bytes, text: str) -> None:
    assert reason_text(decode(data, mode)[0].code) == text


def test_section_types_are_told() -> None:
    events = decode(s.postcopy_stream())
    types = [Section(event.code) for event in events if event.kind is Kind.SECTION and not event.packaged]
    assert types == [Section.START, Section.PART, Section.PART, Section.END]
