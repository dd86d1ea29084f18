"""The return path: byte-exact for any chunking, and what the source would refuse is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.returnpath import Kind, ReturnEvent, ReturnPathDecoder, encode_request

from refault.channel.forward import reason_text

from .streams import chunks, counted, fed, message, received, request

NAMES = st.binary(min_size=1, max_size=255)
MESSAGES = st.one_of(
    st.builds(request, st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1), st.none() | NAMES),
    st.builds(lambda value: message(2, struct.pack(">I", value)), st.integers(0, (1 << 32) - 1)),
    st.builds(lambda value: message(6, struct.pack(">I", value)), st.just(1)),
    st.builds(lambda value: message(1, struct.pack(">I", value)), st.integers(0, 1)),
    st.just(message(7, b"")),
    st.builds(lambda name, words: received(name, b"\x5a" * 8 * words), NAMES, st.integers(0, 40)),
)


def joined(events: list[ReturnEvent]) -> list[ReturnEvent]:
    """With the pieces of each received bitmap, and of what is unknown, put together."""
    out: list[ReturnEvent] = []
    for event in events:
        last = out[-1] if out else None
        if event.kind is Kind.BITMAP_DATA and last is not None and last.kind is Kind.BITMAP_DATA:
            assert event.data_offset == last.data_offset + len(last.data)
            out[-1] = ReturnEvent(
                Kind.BITMAP_DATA, name=event.name, size=event.size, data_offset=0, data=last.data + event.data
            )
        elif event.kind is Kind.UNKNOWN and event == last:
            continue
        else:
            out.append(event)
    return out


@given(st.lists(st.one_of(MESSAGES, st.binary(max_size=40)), max_size=8), st.lists(st.integers(0, 1 << 30)))
def test_any_chunking_gives_the_same_events(messages: list[bytes], cuts: list[int]) -> None:
    data = b"".join(messages)
    whole = fed(ReturnPathDecoder().feed, [data])
    assert joined(fed(ReturnPathDecoder().feed, chunks(data, cuts))) == joined(whole)
    assert joined(fed(ReturnPathDecoder().feed, chunks(data, range(len(data))))) == joined(whole)


@given(st.lists(MESSAGES, max_size=8))
def test_it_stops_exactly_after_each_message(messages: list[bytes]) -> None:
    decoder = ReturnPathDecoder()
    data = b"".join(messages)
    ends = {sum(map(len, messages[: i + 1])) for i in range(len(messages))}
    position, boundaries = 0, set()
    assert decoder.at_boundary
    while position < len(data):
        consumed, _ = decoder.next(data[position:])
        position += consumed
        if decoder.at_boundary:
            boundaries.add(position)
    assert boundaries == ends


@given(NAMES, st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1))
def test_what_is_encoded_is_decoded(name: bytes, start: int, length: int) -> None:
    encoded = encode_request(name, start, length)
    assert encoded == request(start, length, name)
    (event,) = ReturnPathDecoder().feed(encoded)
    assert event == ReturnEvent(Kind.REQUEST, name=name, named=True, start=start, length=length)


@pytest.mark.parametrize("name", [b"", b"x" * 256])
def test_names_that_cannot_be_encoded(name: bytes) -> None:
    with pytest.raises(ValueError, match="RAM block name"):
        encode_request(name, 0, 4096)


def test_a_request_without_a_name_means_the_block_before_on_this_channel() -> None:
    decoder = ReturnPathDecoder()
    first, second = decoder.feed(request(0, 4096, b"pc.ram") + request(8192, 4096))
    assert (first.named, second.named, second.name) == (True, False, b"pc.ram")
    decoder.restart()
    (third,) = decoder.feed(request(0, 4096))
    assert third.name == b""


def test_a_bitmap_comes_without_being_copied_together() -> None:
    data = received(b"pc.ram", bytes(range(64)))
    events = fed(ReturnPathDecoder().feed, chunks(data, [30, 50]))
    assert next(event.kind for event in events) is Kind.BITMAP_BEGIN
    assert b"".join(event.data for event in events) == bytes(range(64))
    assert events[-1].kind is Kind.BITMAP_END
    assert all(event.size == 64 and event.name == b"pc.ram" for event in events)


UNKNOWN = {
    "an unknown return path message": [
        message(0, b""),
        message(8, b""),
        message(0x1604, b"\x01" * 200),
        message(99, bytes(0xFFFF)),
    ],
    "a return path message of a wrong length": [
        message(2, b"\0\0\0"),
        message(1, b"\0" * 5),
        message(4, b"\0" * 13),
        message(3, b"\0" * 12),
        message(3, b"\0" * 12 + b"\x03ab"),
        message(3, b"\0" * 12 + b"\x00"),
        message(3, b"\0" * 600),
        message(7, b"\0"),
    ],
}
BAD = {
    "it is encrypted (TLS)": [message(0x1603, b"\x01")],
    "a return path message of a wrong length": [
        message(5, b""),
        message(5, b"\x00"),
        message(5, b"\x05abc"),
        message(5, b"\0" * 300),
    ],
    "a received bitmap of another size than its RAM block": [
        message(5, counted(b"a")) + struct.pack(">Q", 7) + b"\0" * 7
    ],
    "a received bitmap with a wrong end mark": [received(b"a", b"\0" * 8, mark=1)],
}


@pytest.mark.parametrize(
    ("text", "data"), [(text, data) for text, all_of in UNKNOWN.items() for data in all_of]
)
def test_a_message_that_is_not_known_ends_with_its_length(text: str, data: bytes) -> None:
    decoder = ReturnPathDecoder()
    events = joined(list(decoder.feed(request(0, 4096, b"a") + data + request(0, 4096, b"b"))))
    assert [event.kind for event in events] == [Kind.REQUEST, Kind.UNKNOWN, Kind.REQUEST]
    assert reason_text(events[1].reason) == text
    assert decoder.at_boundary


@pytest.mark.parametrize(("text", "data"), [(text, data) for text, all_of in BAD.items() for data in all_of])
def test_what_has_no_known_end_ends_the_decoding_and_passes_on(text: str, data: bytes) -> None:
    decoder = ReturnPathDecoder()
    events = list(decoder.feed(request(0, 4096, b"a") + data + request(0, 4096, b"b") * 3))
    assert events[-1].kind is Kind.BAD
    assert reason_text(events[-1].reason) == text
    assert not decoder.at_boundary
    assert list(decoder.feed(request(0, 4096, b"c"))) == []
