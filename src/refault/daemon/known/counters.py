"""What is counted of a VM over the daemon's life, and what became of its last losses."""

from __future__ import annotations

import bisect
import time
import uuid
from collections import deque
from dataclasses import dataclass, field

from refault.migration.phase import Role

RECOVERY_BOUNDS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0,
)  # fmt: skip
"""Upper bounds of the buckets, in seconds: a recovery takes some ms, or as long as the network is gone."""
_RECENT = 32


@dataclass
class Loss:
    """A lost channel. Times are Unix time, in seconds."""

    id: str
    number: int
    role: Role
    lost_at: float
    attempts: int = 0
    error: str | None = None
    """What the last failed attempt failed with."""
    given_up_at: float | None = None
    over_at: float | None = None
    """When it was recovered, or the migration ended without."""
    seconds: float | None = None
    """From the loss until it was recovered; None where it was not."""


@dataclass
class Durations:
    """How long recoveries took."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(RECOVERY_BOUNDS) + 1))
    """By bucket, the last for what is longer than all bounds."""
    sum: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect.bisect_left(RECOVERY_BOUNDS, seconds)] += 1
        self.sum += seconds


@dataclass
class PageCounts:
    """Page requests of migrations whose relays have ended, in host pages."""

    requested: int = 0
    repeated: int = 0
    arrived: int = 0
    replayed: int = 0


@dataclass
class Counters:
    """What is counted over the daemon's life, and the last recovery's seconds."""

    losses: int = 0
    attempts: int = 0
    recoveries: int = 0
    last_seconds: float | None = None
    last_error: str | None = None
    bytes_forward: int = 0
    """What the relays of ended migrations passed."""
    bytes_return: int = 0
    pages: PageCounts = field(default_factory=PageCounts)
    durations: Durations = field(default_factory=Durations)
    sessions: int = 0
    """Channels that became sessions."""
    resumptions: Durations = field(default_factory=Durations)
    """From a session's loss of a connection until it went on with the next."""
    retransmitted: int = 0
    """Bytes that sessions of ended relays sent more than once."""
    recent: deque[Loss] = field(default_factory=lambda: deque(maxlen=_RECENT))
    """The last losses, the newest at the end."""

    @property
    def open_loss(self) -> Loss | None:
        """The loss that has been neither recovered nor ended otherwise."""
        return self.recent[-1] if self.recent and self.recent[-1].over_at is None else None

    def lose(self, role: Role, ago: float) -> Loss:
        """A channel was lost, so many seconds ago."""
        self.over()
        self.losses += 1
        loss = Loss(uuid.uuid4().hex, self.losses, role, time.time() - ago)
        self.recent.append(loss)
        return loss

    def attempt(self) -> None:
        """A recovery is tried."""
        self.attempts += 1
        if (loss := self.open_loss) is not None:
            loss.attempts += 1

    def recover(self, seconds: float | None) -> None:
        """One came to its end, so long after its loss, where that is known."""
        self.recoveries += 1
        self.last_error = None
        if seconds is not None:
            self.last_seconds = seconds
            self.durations.add(seconds)
        if (loss := self.open_loss) is not None:
            loss.seconds = seconds
            loss.over_at = time.time()

    def fail(self, why: str | None) -> None:
        """What went wrong last; None: what did is of no interest any more."""
        self.last_error = why
        if why is not None and (loss := self.open_loss) is not None:
            loss.error = why

    def give_up(self) -> None:
        """No further attempt is made for the loss."""
        if (loss := self.open_loss) is not None:
            loss.given_up_at = time.time()

    def over(self) -> None:
        """The migration has ended, whatever became of its loss."""
        if (loss := self.open_loss) is not None:
            loss.over_at = time.time()

    def session_began(self) -> None:
        """A channel has become a session."""
        self.sessions += 1

    def session_resumed(self, seconds: float) -> None:
        """A session goes on, so long after it lost its connection."""
        self.resumptions.add(seconds)

    def add_bytes(self, forward: int, backward: int) -> None:
        """A relay that has ended passed so many."""
        self.bytes_forward += forward
        self.bytes_return += backward

    def add_retransmitted(self, count: int) -> None:
        """Of its session, so many bytes were sent more than once."""
        self.retransmitted += count

    def add_pages(self, requested: int, repeated: int, arrived: int, replayed: int) -> None:
        """A relay that has ended counted so many."""
        self.pages.requested += requested
        self.pages.repeated += repeated
        self.pages.arrived += arrived
        self.pages.replayed += replayed
