from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.unit.qmp import reference

from refault.qmp.decoding import decode_arguments, decode_members, verb_name
from refault.qmp.splitter import (
    BROKEN,
    EVENT,
    EXEC_OOB,
    EXECUTE,
    EXTENDED,
    NOT_OBJECT,
    RETURN,
    UNUSUAL,
    VERB_MASK,
    Message,
    Splitter,
    compact,
)


def feed(stream: bytes, cuts: list[int] | None = None, **options: Any) -> list[Message]:
    splitter = Splitter(**options)
    messages = []
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts or []), len(stream)]
    for begin, end in pairwise(edges):
        messages += splitter.feed(stream[begin:end])
    return messages


def one(stream: bytes, **options: Any) -> Message:
    [message] = feed(stream, **options)
    return message


def seen(messages: list[Message]) -> list[object]:
    return [
        (
            m.raw,
            m.problem,
            m.shape,
            m.verb,
            m.verb_end,
            m.arguments,
            m.arguments_end,
            m.id,
            m.id_end,
            m.cut,
            m.cut_end,
        )
        for m in messages
    ]


# streams that look like QMP, and streams that do not

fragments = st.sampled_from(
    [
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b" ",
        b"\n",
        b"\t",
        b'"',
        b"'",
        b"\\",
        b'"execute"',
        b"'exec-oob'",
        b'"id"',
        b'"a"',
        b"true",
        b"null",
        b"nul",
        b"0",
        b"-",
        b"-0",
        b"01",
        b"12",
        b"1.5",
        b"1.",
        b"1e5",
        b"1e+",
        b"0e1",
        b"0.5e3",
        b"\\u0041",
        b'"\\u0041"',
        b'"A"',
        b'"\\ud83d\\ude00"',
        b'"\\ud800"',
        b'"\\q"',
        b'"\\\'"',
        b'"\xc3\xa9"',
        b'"\xc0\x80"',
        b'"\xed\xa0\x80"',
        b'"\xef\xbf\xbf"',
        b"\xff",
        b"\xfe",
        b"\x00",
        b"\x01",
        b"\x7f",
        b"%",
        b"{}",
        b'{"a":1}',
    ]
)
garbage = st.lists(fragments | st.binary(min_size=1, max_size=2), max_size=25).map(b"".join)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="￾￿"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abcé\n'", max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


def acceptable(value: object) -> bool:
    """No noncharacters: QEMU refuses them."""
    return reference.well_formed([json.dumps(json.dumps(value, ensure_ascii=False)).encode()])


spellings = st.tuples(json_values.filter(acceptable), st.booleans(), st.sampled_from([None, 2])).map(
    lambda given: json.dumps(given[0], ensure_ascii=given[1], indent=given[2]).encode()
)
streams = st.one_of(
    garbage, st.lists(spellings, max_size=6).map(b"\n".join), st.tuples(spellings, garbage).map(b"".join)
)


@given(streams, st.lists(st.integers(0, 400)), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_chunking_gives_the_same_messages(stream: bytes, cuts: list[int], lenient: bool) -> None:
    whole = seen(feed(stream, lenient=lenient))
    assert seen(feed(stream, cuts, lenient=lenient)) == whole
    assert seen(feed(stream, list(range(len(stream))), lenient=lenient)) == whole


@given(streams)
@example(b"{]\n")
@example(b'{"a": 1, "\\u0061": 2}')
@example(b"0123,")
@example(b"-0.5e+7]")
@example(b"'it''s'")
@example(b'"\\')
@settings(max_examples=400, deadline=None)
def test_agrees_with_the_reference(stream: bytes) -> None:
    assert [(m.raw, m.problem is None) for m in feed(stream)] == reference.split(stream)


@given(st.lists(spellings.map(lambda value: b'{"execute": ' + value + b', "id": 1}')))
@settings(deadline=None)
def test_values_come_out_as_they_went_in(values: list[bytes]) -> None:
    assert [message.raw for message in feed(b" ".join(values))] == values


@given(spellings)
@settings(deadline=None)
def test_compact_keeps_the_value(value: bytes) -> None:
    small = compact(value)
    assert json.loads(small) == json.loads(value)
    assert b"\n" not in small


def test_compact_makes_strict_json_of_qemus_dialect() -> None:
    assert compact(b"""{ 'it\\'s' : "\xc0\x80 ' x", 'say "no"' :\n[ 1.50 , -0 ] }""") == (
        b'{"it\'s":"\\u0000 \' x","say \\"no\\"":[1.50,-0]}'
    )


def test_nothing_is_lost_of_numbers_and_escapes() -> None:
    raw = b'{"execute":"x","arguments":{"n":18446744073709551615,"f":1.0e+02,"s":"\\u00e9"},"id":0.10}'
    message = one(raw)
    assert message.raw == raw
    assert message.with_id(b"7") == raw.replace(b"0.10", b"7")
    assert message.raw[message.arguments : message.arguments_end] == raw[27:78]


@pytest.mark.parametrize(
    ("raw", "without"),
    [
        (b'{"return": {}, "id": 1}', b'{"return": {}}'),
        (b'{"id": 1, "return": {}}', b'{"return": {}}'),
        (b'{"id": 1}', b"{}"),
        (b'{"id":{"a":[1,"}"]}  ,  "error": {}}', b'{"error": {}}'),
        (b'{\r\n    "return": {\r\n    },\r\n    "id": 1\r\n}', b'{\r\n    "return": {\r\n    }\r\n}'),
        (b'{"a": 1, "id": 2, "b": 3}', b'{"a": 1, "b": 3}'),
        (b'{"return": {"id": 5}}', b'{"return": {"id": 5}}'),
    ],
)
def test_an_id_is_taken_out(raw: bytes, without: bytes) -> None:
    assert one(raw, lenient=True).without_id() == without


@pytest.mark.parametrize(
    ("raw", "with_id"),
    [
        (b"{}", b'{"id": 9}'),
        (b'{"execute":"a"}', b'{"execute":"a", "id": 9}'),
        (b"{'id' :'x' }", b"{'id' :9 }"),
    ],
)
def test_an_id_is_put_in(raw: bytes, with_id: bytes) -> None:
    assert one(raw).with_id(b"9") == with_id


@pytest.mark.parametrize(
    ("raw", "shape"),
    [
        (b'{"execute": "a", "id": 1, "arguments": {}}', EXECUTE),
        (b'{"exec-oob": "a"}', EXEC_OOB),
        (b'{"e\\u0078ecute": "a"}', EXECUTE),
        (b"{'execute': 'a'}", EXECUTE | EXTENDED),
        (b'{"execute": "it\\\'s"}', EXECUTE | EXTENDED),
        (b'{"execute": "it\'s \\u0027"}', EXECUTE),
        (b'{"execute":\n"a"}', EXECUTE | BROKEN),
        (b'{"execute": 1}', EXECUTE | UNUSUAL),
        (b'{"execute": "a", "exec-oob": "a"}', EXECUTE | UNUSUAL),
        (b'{"execute": "a", "arguments": []}', EXECUTE | UNUSUAL),
        (b'{"execute": "a", "extra": 1}', EXECUTE | UNUSUAL),
        (b'{"event": "A", "data": {"return": 1}}', EVENT | UNUSUAL),
        (b'{"return": [{"id": 1}]}', RETURN),
        (b"[1]", NOT_OBJECT),
        (b"null ", NOT_OBJECT),
    ],
)
def test_shapes(raw: bytes, shape: int) -> None:
    message = one(raw)
    assert message.problem is None
    assert message.shape == shape


def test_names_and_arguments_are_decoded() -> None:
    message = one(
        b"""{'exec\\u0075te': "qu\\u0065ry", 'arguments': {'a': 1e400, "b": 'x"y', 'c':
        123456789012345678901}}"""
    )
    assert message.shape & VERB_MASK == EXECUTE
    assert verb_name(message) == b"query"
    assert decode_arguments(message) == {"a": float("inf"), "b": 'x"y', "c": 123456789012345678901}
    assert list(decode_members(message)) == ["execute", "arguments"]


@pytest.mark.parametrize(
    ("stream", "problems"),
    [
        (b"{]", ["JSON parse error, expecting value"]),
        (b"{\xff", ["JSON parse error, stray '\ufffd'"]),
        (b'{"a":1,"a":2}', ["JSON parse error, duplicate key"]),
        (b"[" * 1025, ["JSON nesting depth limit exceeded"]),
        (b"[" * 1024 + b"]" * 1024, [None]),
    ],
)
def test_problems_in_qemus_words(stream: bytes, problems: list[str | None]) -> None:
    assert [message.problem for message in feed(stream)] == problems


def test_equal_keys_among_many_are_found() -> None:
    keys = [b'"key%d": %d' % (i, i) for i in range(100)]
    assert one(b"{" + b", ".join(keys) + b"}").problem is None
    assert (
        one(b"{" + b", ".join([*keys, b'"k\\u0065y57": 0']) + b"}").problem
        == "JSON parse error, duplicate key"
    )


@pytest.mark.parametrize("alike", [b"k" * 1000, b"\xc3\xa9" * 500, b"\\\\" * 500])
def test_many_keys_that_begin_alike_keep_nobody_waiting(alike: bytes) -> None:
    splitter = Splitter()
    splitter.feed(b"{" + b",".join(b'"%b%d":0' % (alike, number) for number in range(60_000)))
    began = time.process_time()
    [message] = splitter.feed(b"}")
    assert time.process_time() - began < 0.5
    assert message.problem is None


@pytest.mark.parametrize("filler", [b" ", b'"', b"1", b"[1],"])
def test_size_is_bounded(filler: bytes) -> None:
    splitter = Splitter(max_bytes=1000)
    messages = splitter.feed(b"[")
    for _ in range(100):
        messages += splitter.feed(filler * 100)
        assert splitter.held <= 1000
    assert messages
    assert messages[0].problem == "JSON token size limit exceeded"


def test_token_count_is_bounded() -> None:
    messages = feed(b"[" + b"1," * (1 << 20) + b"1]\n{}", max_bytes=64 << 20)
    assert messages[0].problem == "JSON token count limit exceeded"
    assert messages[-1].raw == b"{}"


def test_qemus_infinities_pass_the_lenient_one() -> None:
    message = one(b'{"return": {"a": inf, "b": -inf, "c": -nan}, "id": 3}', lenient=True)
    assert message.problem is None
    assert message.raw[message.id : message.id_end] == b"3"
    assert feed(b"[-inf]")[0].problem is not None


def test_a_value_in_small_pieces_does_not_cost_all_its_keys_at_each() -> None:
    def seconds(keys: int) -> float:
        splitter = Splitter()
        splitter.feed(b'{"x": {' + b"".join(b'"%d": 1, ' % number for number in range(keys)) + b'"last": "')
        began = time.thread_time()
        for _ in range(1000):
            splitter.feed(b"y")
        return time.thread_time() - began

    # More than once, for what else this process does may fall on the one alone.
    assert any(seconds(400_000) < 5 * seconds(10) for _ in range(5))
