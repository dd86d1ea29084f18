"""The splitter's rules once more, in slow and plain Python: what the compiled one is compared with."""

from __future__ import annotations

import re

_TOKEN = re.compile(
    rb"""[{}\[\],:] | "(?:[^"\\\x00-\x1f\xfe\xff] | \\[^\x00-\x1f\xfe\xff])*"
    | '(?:[^'\\\x00-\x1f\xfe\xff] | \\[^\x00-\x1f\xfe\xff])*'""",
    re.VERBOSE,
)
_NUMBER = re.compile(
    rb"-?(?:0(?:\.[0-9]+(?:[eE][+-]?[0-9]+)?)?|[1-9][0-9]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)"
)
_KEYWORD = re.compile(rb"[a-z]+")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_SHORT = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "/": "/", "\\": "\\", '"': '"', "'": "'"}


class BadStringError(Exception):
    pass


def string_text(token: bytes) -> str:
    """What a string token says; BadStringError where QEMU's parser refuses it."""
    try:
        inside = token[1:-1].replace(b"\xc0\x80", b"\\u0000").decode()
    except UnicodeDecodeError as error:
        raise BadStringError from error
    at = 0
    pieces = []
    while at < len(inside):
        if inside[at] != "\\":
            pieces.append(inside[at])
            at += 1
            continue
        match = _ESCAPE.match(inside, at)
        if match is None:
            raise BadStringError
        at = match.end()
        if match[1] is None:
            if match[2] not in _SHORT:
                raise BadStringError
            pieces.append(_SHORT[match[2]])
            continue
        unit = int(match[1], 16)
        if 0xD800 <= unit < 0xDC00:
            low = _ESCAPE.match(inside, at)
            if low is None or low[1] is None or not 0xDC00 <= int(low[1], 16) < 0xE000:
                raise BadStringError
            at = low.end()
            unit = 0x10000 + ((unit & 0x3FF) << 10) + (int(low[1], 16) & 0x3FF)
        pieces.append(chr(unit))
    text = "".join(pieces)
    for character in text:
        code = ord(character)
        if 0xD800 <= code < 0xE000 or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE:
            raise BadStringError
    return text


def well_formed(tokens: list[bytes]) -> bool:
    """Whether the tokens are one JSON value, with QEMU's strings and no key twice in an object."""

    def value(at: int) -> int:
        token = tokens[at]
        if token == b"{":
            keys = set()
            at += 1
            if tokens[at] == b"}":
                return at + 1
            while True:
                if tokens[at][:1] not in (b'"', b"'"):
                    raise ValueError
                key = string_text(tokens[at])
                if tokens[at + 1] != b":":
                    raise ValueError
                at = value(at + 2)
                if key in keys:
                    raise ValueError
                keys.add(key)
                if tokens[at] == b"}":
                    return at + 1
                if tokens[at] != b",":
                    raise ValueError
                at += 1
        if token == b"[":
            at += 1
            if tokens[at] == b"]":
                return at + 1
            while True:
                at = value(at)
                if tokens[at] == b"]":
                    return at + 1
                if tokens[at] != b",":
                    raise ValueError
                at += 1
        if token[:1] in (b'"', b"'"):
            string_text(token)
        elif token in b"]},:" or (token[:1].isalpha() and token not in (b"true", b"false", b"null")):
            raise ValueError
        return at + 1

    try:
        return value(0) == len(tokens)
    except (ValueError, IndexError, BadStringError):
        return False


def split(stream: bytes) -> list[tuple[bytes, bool]]:
    """The messages of a whole stream and whether each is well-formed, as far as the stream tells."""
    found: list[tuple[bytes, bool]] = []
    tokens: list[bytes] = []
    begin = braces = brackets = at = 0

    def end(good: bool) -> None:
        nonlocal tokens, braces, brackets
        found.append((stream[begin:at], good))
        tokens, braces, brackets = [], 0, 0

    while at < len(stream):
        if stream[at] in b" \t\r\n":
            at += 1
            continue
        if not tokens:
            begin = at
        match = _TOKEN.match(stream, at) or _NUMBER.match(stream, at) or _KEYWORD.match(stream, at)
        stop, complete = _extent(stream, at)
        if stop == len(stream) and not complete:
            break
        if match is None or match.end() != stop or not complete:
            at = stop + 1 if not complete else stop
            end(False)
            while at < len(stream) and not (
                (stream[at] < 0x20 and stream[at] != 9) or stream[at] >= 0xFE or stream[at] in b"[]{}:,"
            ):
                at += 1
            continue
        tokens.append(match[0])
        at = stop
        braces += (match[0] == b"{") - (match[0] == b"}")
        brackets += (match[0] == b"[") - (match[0] == b"]")
        if braces + brackets > 1024:
            end(False)
        elif not ((braces > 0 or brackets > 0) and braces >= 0 and brackets >= 0):
            end(well_formed(tokens))
    return found


_PREFIXES = [
    # a regular expression for each kind of token that is read so far, and one for when it may end there
    (re.compile(rb"[a-z]*\Z"), re.compile(rb"[a-z]+\Z")),
    (
        re.compile(
            rb"-?(?:0(?:\.(?:[0-9]+(?:[eE][+-]?[0-9]*)?)?)?|[1-9][0-9]*(?:\.[0-9]*)?|[1-9][0-9]*(?:\.[0-9]+)?[eE][+-]?[0-9]*)?\Z"
        ),
        re.compile(_NUMBER.pattern + rb"\Z"),
    ),
    (re.compile(rb"\"(?:[^\"\\\x00-\x1f\xfe\xff]|\\[^\x00-\x1f\xfe\xff])*\\?\Z"), None),
    (re.compile(rb"'(?:[^'\\\x00-\x1f\xfe\xff]|\\[^\x00-\x1f\xfe\xff])*\\?\Z"), None),
]


def _extent(stream: bytes, at: int) -> tuple[int, bool]:
    """Where the token at `at` ends, and whether it is one: (end, True), or (the byte that it does not allow,
    False).
    """
    if stream[at] in b"{}[],:":
        return at + 1, True
    for prefix, whole in _PREFIXES:
        if not prefix.match(stream[at : at + 1]):
            continue
        stop = at + 1
        while stop < len(stream):
            if whole is None and stream[stop] == stream[at] and not _escaped(stream, at, stop):
                return stop + 1, True
            if not prefix.match(stream[at : stop + 1]):
                return stop, whole is not None and bool(whole.match(stream[at:stop])) and not _bad_follow(
                    stream, at, stop
                )
            stop += 1
        return stop, False
    return at, False


def _escaped(stream: bytes, at: int, stop: int) -> bool:
    slashes = 0
    while stop - 1 - slashes > at and stream[stop - 1 - slashes] == 0x5C:
        slashes += 1
    return slashes % 2 == 1


def _bad_follow(stream: bytes, at: int, stop: int) -> bool:
    """After 0 and -0 a digit is an error, where after any other number it goes on."""
    return stream[at:stop] in (b"0", b"-0") and stream[stop : stop + 1].isdigit()
