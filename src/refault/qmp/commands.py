"""A client's command on its way, and what a watcher may say about it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from refault.qmp.splitter import BROKEN, EXTENDED, MAX_NESTING, Message, compact

if TYPE_CHECKING:
    from refault.qmp.session import Client

sys.setrecursionlimit(max(sys.getrecursionlimit(), 1000 + 4 * MAX_NESTING))
"""Decoding, changing and encoding a value takes up to four calls for each of its brackets."""


@dataclass(frozen=True)
class Forward:
    """The command goes to QEMU: as the client sent it, or with other arguments.

    Of `arguments`, members that equal those decoded from the client's command go as the client spelt them.
    `on_reply` gets the reply object's bytes without an id and gives what the client gets, without an id too;
    a pure function, called once when the reply comes, also where the client has left meanwhile, and never if
    QEMU goes away.
    """

    arguments: Mapping[str, object] | None = None
    on_reply: Callable[[bytes], bytes] | None = None


@dataclass(frozen=True)
class Answer:
    """The command is answered in QEMU's place: `error` is (class, desc), else the command returns `value`."""

    error: tuple[str, str] | None = None
    value: object = None


class Request:
    """One command from the moment it was read until it is answered."""

    __slots__ = (
        "answer",
        "cleared",
        "client",
        "data",
        "done",
        "fd",
        "message",
        "name",
        "names",
        "new_name",
        "on_reply",
        "oob",
        "prefixes",
        "read",
        "rebuilt",
        "refusal",
        "size",
        "spelling",
    )

    def __init__(self, client: Client, message: Message) -> None:
        self.client = client
        self.message = message
        self.size = len(message.raw)
        self.name = b""
        self.oob = False
        self.fd = -1
        self.read = 0
        """How many commands had been read from all clients, this one included."""
        self.refusal: str | None = None
        """Why the client's listener does not let it pass (`refault.qmp.access`)."""
        self.answer: bytes | None = None
        """The reply, without an id, if it is answered in QEMU's place."""
        self.cleared = False
        """A watcher has answered, or none need be asked."""
        self.data: bytes | None = None
        """What to send instead of the message: a command without an id."""
        self.rebuilt = False
        """A watcher has changed the arguments."""
        self.new_name: str | None = None
        """The name that a getfd gives, if the client had none such before."""
        self.on_reply: Callable[[bytes], bytes] | None = None
        self.done: Callable[[Message | None], None] | None = None
        """For refault's own commands: called with the reply, or None if QEMU went away."""
        self.names: dict[str, str] = {}
        """How QEMU knows the descriptors of a client that has left."""
        self.prefixes: frozenset[bytes] = frozenset()
        """Of descriptors' names, where QEMU knows them by longer ones than the client."""
        self.spelling = _id_spelling(message) if message.id_end else b""
        """The client's id as it goes back; empty without one."""

    def raw_arguments(self) -> bytes | None:
        """The arguments as the client sent them; None if it sent none."""
        message = self.message
        if self.data is not None or not message.arguments_end:
            return None
        return message.raw[message.arguments : message.arguments_end]

    def arguments(self) -> dict[str, object]:
        """The arguments, decoded."""
        return decode_arguments(self.message)

    def rebuild(self, arguments: Mapping[str, object]) -> None:
        """Makes this the same command with other arguments. What does not change keeps its spelling."""
        message = self.message
        old: dict[str, msgspec.Raw] = {}
        if message.arguments_end:
            old = msgspec.json.decode(
                _strict(message, message.arguments, message.arguments_end), type=dict[str, msgspec.Raw]
            )
        decoded = self.arguments()
        members = {
            name: old[name]
            if name in old and decoded[name] == value and type(decoded[name]) is type(value)
            else value
            for name, value in arguments.items()
        }
        verb = b"exec-oob" if self.oob else b"execute"
        self.data = b'{"%s": %s, "arguments": %s}' % (
            verb,
            _strict(message, message.verb, message.verb_end),
            msgspec.json.encode(members),
        )


def _strict(message: Message, begin: int, end: int) -> bytes:
    raw = message.raw[begin:end]
    return compact(raw) if message.shape & (EXTENDED | BROKEN) else raw


def _id_spelling(message: Message) -> bytes:
    """The client's id as QEMU would be allowed to spell it: on one line, in strict JSON."""
    return _strict(message, message.id, message.id_end)


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
    decoded: dict[str, object] = decode(_strict(message, message.arguments, message.arguments_end))
    return decoded


def decode_members(message: Message) -> dict[str, object]:
    """All members of a message that is an object, decoded, in the message's order."""
    decoded: dict[str, object] = decode(_strict(message, 0, len(message.raw)))
    return decoded


def verb_name(message: Message) -> bytes:
    """The command's (or event's) name as UTF-8, from a message whose verb is a string."""
    raw = message.raw[message.verb + 1 : message.verb_end - 1]
    if b"\\" in raw:
        text: str = decode(_strict(message, message.verb, message.verb_end))
        return text.encode()
    return raw
