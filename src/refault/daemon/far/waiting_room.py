"""Who has come to the addresses of one migration, and in what order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from refault.daemon.far.connection import detached
from refault.daemon.kernel.tcp import alive, is_whole


@dataclass(eq=False)
class Arrival:
    """A connection, from when it came until it has been dealt with."""

    connection: trio.socket.SocketType
    peer: str
    number: int
    silent: trio.CancelScope | None = field(default_factory=trio.CancelScope)
    """What ends the wait for its first bytes; None once they are there, or it is not waited for."""
    frames: bool = False
    """Whether they are those of a preempt channel that is in use already."""
    taken: trio.Event | None = None
    """Whether somebody takes it; set when its waiting has ended."""
    handed: trio.socket.SocketType | None = None
    """The connection, out of the listener's hands."""

    def hand(self, connection: trio.socket.SocketType) -> None:
        """Gives the connection to who takes it."""
        self.handed = detached(connection)

    def speaks(self, *, frames: bool = False) -> None:
        """Its first bytes are waited for no longer; whether they are a preempt channel's `frames`."""
        self.silent = None
        self.frames |= frames


MOST = 512
"""Connections at a time: more than a migration has, and not so many that descriptors run short."""


class WaitingRoom:
    """The connections at all addresses of one migration, numbered as they came.

    A preempt channel has no first bytes of its own: who said nothing yet may be one.
    """

    def __init__(self) -> None:
        self._arrivals: list[Arrival] = []
        self._patience: list[tuple[int, str]] = []
        self._count = 0
        self.changed = trio.Event()
        """Set when one more has come, and replaced."""

    def tell(self) -> None:
        """Sets `changed`."""
        self.changed.set()
        self.changed = trio.Event()

    def enter(self, connection: trio.socket.SocketType) -> Arrival:
        """One has come."""
        self._count += 1
        arrival = Arrival(connection, connection.getpeername()[0], self._count)
        self._arrivals.append(arrival)
        self.tell()
        return arrival

    def make_room(self, arrival: Arrival) -> bool:
        """Sends away who has waited longest without a word, where too many are there; False where nobody
        can be sent, so that the newest, `arrival`, must go."""
        if len(self._arrivals) <= MOST:
            return True
        for other in self._arrivals:
            if other is arrival or other.taken is not None or self._is_expected(other):
                continue
            if other.silent is not None and not other.silent.cancel_called:
                other.silent.cancel()
                return True
        return False

    def leave(self, arrival: Arrival) -> None:
        """It has been dealt with."""
        self._arrivals.remove(arrival)

    def arrival_of(self, connection: trio.socket.SocketType) -> Arrival:
        """What is known of a connection that waits."""
        return next(arrival for arrival in self._arrivals if arrival.connection is connection)

    @contextmanager
    def patient(self, number: int, peer: str) -> Iterator[None]:
        """What comes after `number` may be silent for as long as it likes; who comes from that host is not
        sent away for others either."""
        self._patience.append((number, peer))
        try:
            yield
        finally:
            self._patience.remove((number, peer))

    def may_stay(self, arrival: Arrival) -> bool:
        """Whether it may go on saying nothing."""
        return any(arrival.number > number for number, _ in self._patience)

    def is_behind_another(self, arrival: Arrival) -> bool:
        """Whether one is still there that came before it, to which it may belong."""
        return any(other.number < arrival.number for other in self._arrivals)

    def _is_expected(self, arrival: Arrival) -> bool:
        return any(arrival.number > number and arrival.peer == peer for number, peer in self._patience)

    def preempt_after(self, number: int, peer: str | None = None, *, ended: bool = False) -> Arrival | None:
        """The newest connection, of that host if one is named, that came after `number`, may be a preempt
        channel, and lives; where none lives and `ended` is said, one that its peer has closed in order."""
        found = [
            arrival
            for arrival in reversed(self._arrivals)
            if arrival.number > number
            and peer in (None, arrival.peer)
            and (arrival.silent is not None or arrival.frames)
            and arrival.taken is None
        ]
        living = [arrival for arrival in found if alive(arrival.connection)]
        closed = [arrival for arrival in found if ended and is_whole(arrival.connection)]
        return next(iter(living + closed), None)

    async def take(self, arrival: Arrival) -> trio.socket.SocketType:
        """Takes a connection out of its wait; it is the caller's then.

        Raises OSError where the address was given up meanwhile.
        """
        arrival.taken = trio.Event()
        if arrival.silent is not None:
            arrival.silent.cancel()
        await arrival.taken.wait()
        if arrival.handed is None:
            raise OSError("the address was given up")
        return arrival.handed
