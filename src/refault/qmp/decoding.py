"""Messages that the splitter found well-formed, decoded: whole, or in parts."""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec

from refault.qmp.splitter import BROKEN, EXTENDED, MAX_NESTING, Message, compact

sys.setrecursionlimit(max(sys.getrecursionlimit(), 1000 + 4 * MAX_NESTING))
"""Decoding, changing and encoding a value takes up to four calls for each of its brackets."""


def strict(message: Message, begin: int, end: int) -> bytes:
    """A part of a message, in strict JSON."""
    raw = message.raw[begin:end]
    return compact(raw) if message.shape & (EXTENDED | BROKEN) else raw


def decode(raw: bytes) -> Any:
    """Decodes a value that the splitter found well-formed: more than msgspec takes, such as 1e400."""
    try:
        return msgspec.json.decode(raw)
    except msgspec.DecodeError:
        return json.loads(raw.decode("utf-8", "replace"), parse_int=_integer)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 100 else float(digits)


def decode_arguments(message: Message) -> dict[str, object]:
    """A command's arguments, decoded; empty without any."""
    if not message.arguments_end:
        return {}
    decoded: dict[str, object] = decode(strict(message, message.arguments, message.arguments_end))
    return decoded


def decode_members(message: Message) -> dict[str, object]:
    """All members of a message that is an object, decoded, in the message's order."""
    decoded: dict[str, object] = decode(strict(message, 0, len(message.raw)))
    return decoded


def verb_name(message: Message) -> bytes:
    """The command's (or event's) name as UTF-8, from a message whose verb is a string."""
    raw = message.raw[message.verb + 1 : message.verb_end - 1]
    if b"\\" in raw:
        text: str = decode(strict(message, message.verb, message.verb_end))
        return text.encode()
    return raw
