"""What refault knows of one client's connection."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from refault.qmp.access import FREE, Rule
from refault.qmp.commands import Request
from refault.qmp.splitter import MAX_MESSAGE, Splitter


@dataclass(frozen=True)
class Limits:
    """What one client may make refault keep. All in bytes, save for the counts.

    A client over one of the `queued` limits is not read from until it is below again. One with more than
    `unsent` bytes that it does not read is disconnected; a single message that is larger still gets through.
    """

    message: int = MAX_MESSAGE
    queued: int = 1 << 20
    queued_commands: int = 256
    queued_fds: int = 16
    out_of_band: int = 64
    unsent: int = 16 << 20
    clients: int = 512


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
