"""What refault knows of one client's connection, and of each of its commands on their way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from refault.qmp.access import FREE, Rule
from refault.qmp.decoding import decode_arguments, decode_members, strict
from refault.qmp.secrets import may_have_secret
from refault.qmp.splitter import EXEC_OOB, MAX_MESSAGE, UNUSUAL, VERB_MASK, Message, Splitter


@dataclass(frozen=True)
class Limits:
    """What one client may make refault keep. All in bytes, save for the counts.

    A client over one of the `queued` limits is not read from until it is below again. One with more than
    `unsent` bytes that it does not read is disconnected; a single message that is larger still gets through.
    """

    message: int = MAX_MESSAGE
    queued: int = 256 << 10
    queued_commands: int = 256
    queued_fds: int = 16
    out_of_band: int = 64
    unsent: int = 16 << 20
    clients: int = 512


GONE = -2
"""In place of a descriptor: it came, and was lost with an earlier refault."""

_READ_AHEAD = 16
_NEARLY_USED_UP = 4


class Client:
    """One connection of a client: its own negotiation, its commands in their order, what is still to be sent
    to it.

    `out` and `unsent` are the transport's to empty: it takes messages from `out` and lowers `unsent` (bytes,
    those that it has taken but not sent included) as they leave.
    """

    __slots__ = (
        "closing",
        "connected",
        "fd",
        "greeted",
        "half_closed",
        "held",
        "in_flight",
        "limits",
        "line",
        "negotiated",
        "number",
        "oob",
        "oob_bytes",
        "oob_in_flight",
        "out",
        "overflow",
        "queue",
        "queued",
        "queued_fds",
        "ready",
        "rule",
        "splitter",
        "transport",
        "unsent",
    )

    def __init__(self, number: int, limits: Limits, *, transport: object = None, rule: Rule = FREE) -> None:
        self.number = number
        self.limits = limits
        self.rule = rule
        """Of the listener where it came."""
        self.transport = transport
        self.splitter = Splitter(max_bytes=limits.message)
        self.connected = True
        self.greeted = False
        self.negotiated = False
        self.oob = False
        """The right to send out-of-band commands."""
        self.queue: deque[Request] = deque()
        """In-band commands not yet sent or answered."""
        self.queued = 0
        self.queued_fds = 0
        self.held: Request | None = None
        """The in-band command that a watcher thinks about; the later ones wait."""
        self.in_flight = 0
        """In-band commands that QEMU has."""
        self.oob_in_flight = 0
        self.oob_bytes = 0
        """Of these commands: QEMU may read them slower than they come."""
        self.line: deque[Request] = deque()
        """They, in its order, until each is answered."""
        self.ready = False
        """Has its turn coming to send."""
        self.fd = -1
        """A descriptor that came and no command has taken yet."""
        self.out: list[bytes] = []
        self.unsent = 0
        self.overflow = False
        """Does not read: to be disconnected."""
        self.half_closed = False
        """Will send nothing more, and wants its replies."""
        self.closing = False
        """To be disconnected once everything is sent."""

    def carried_by(self, transport: object) -> None:
        """It has come by that one."""
        self.transport = transport

    def sent(self, count: int) -> None:
        """So many bytes of what was taken from `out` are sent."""
        self.unsent -= count

    @property
    def hears(self) -> bool:
        """Whether it is told of events."""
        return self.negotiated and not self.closing

    @property
    def paused(self) -> bool:
        """Whether no more should be read from it for now.

        Of one that has not the right to send out-of-band commands nothing can be urgent, so a few in advance
        are enough, and the others can be read together when these are nearly used up: see `resumable`.
        """
        limits = self.limits
        return (
            len(self.queue) >= (limits.queued_commands if self.oob else _READ_AHEAD)
            or self.queued > limits.queued
            or self.queued_fds >= limits.queued_fds
            or self.oob_in_flight >= limits.out_of_band
            or self.oob_bytes > limits.queued
        )

    @property
    def resumable(self) -> bool:
        """Whether one that was paused should be read from again."""
        return len(self.queue) <= _NEARLY_USED_UP and not self.paused

    @property
    def idle(self) -> bool:
        """Whether nothing of what it sent is still to be answered."""
        return not (self.queue or self.in_flight or self.oob_in_flight or self.held)


class Request:
    """One command from the moment it was read until it is answered."""

    __slots__ = (
        "answer",
        "asked",
        "begun",
        "call",
        "cleared",
        "client",
        "data",
        "done",
        "fd",
        "message",
        "name",
        "names",
        "negotiates",
        "new_name",
        "on_reply",
        "oob",
        "prefixes",
        "purpose",
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
        self.begun = False
        """An out-of-band command that has been answered, sent, or asked about."""
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
        self.asked = 0
        """Which of all that watchers were asked about, from 1; 0 for one that none was."""
        self.call = 0
        """Which of refault's own commands, from 1; 0 for another."""
        self.negotiates = False
        """A qmp_capabilities whose arguments QEMU looks at."""
        self.purpose = ""
        """Of a command about fd sets: what it is for."""
        self.names: dict[str, str] = {}
        """How QEMU knows the descriptors of a client that has left."""
        self.prefixes: frozenset[bytes] = frozenset()
        """Of descriptors' names, where QEMU knows them by longer ones than the client."""
        self.spelling = strict(message, message.id, message.id_end) if message.id_end else b""
        """The client's id as it goes back, which is as QEMU would be allowed to spell it: on one line, in
        strict JSON. Empty without one."""

    def asks_oob(self) -> bool:
        """QEMU's qmp_is_oob(): has exec-oob and has not execute."""
        message = self.message
        if not message.shape & UNUSUAL:
            return message.shape & VERB_MASK == EXEC_OOB
        if self.answer is not None:
            return False
        members = decode_members(message)
        return "exec-oob" in members and "execute" not in members

    @property
    def may_have_secret(self) -> bool:
        """Whether nothing of it is to be kept when it is over. What is malformed may be anything."""
        return may_have_secret(
            self.name, has_arguments=self.message.arguments_end > 0, arguments=self.arguments
        )

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
                strict(message, message.arguments, message.arguments_end), type=dict[str, msgspec.Raw]
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
            strict(message, message.verb, message.verb_end),
            msgspec.json.encode(members),
        )
