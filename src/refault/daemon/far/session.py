"""The session that a migration's channel may become: how long its next connection is waited for.

The pump (cext/link.h) carries it; who dials is session_dialled.py, who answers session_answered.py.
"""

from __future__ import annotations

import errno
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from refault.channel.relay import Relay, SessionState, SessionView
from refault.daemon.far.patience import Patience
from refault.daemon.host.repeats import repeats

log = logging.getLogger("refault.session")

OFFER_PATIENCE = 3.0
"""A session that was offered and never came to be; the plain connection may be lost by then."""
COMPLETE_PATIENCE = 2.0
"""Both streams are over, and all is taken: the other end is told so if it asks."""
DELIVERED_PATIENCE = 30.0
"""The other QEMU has taken all that ours said, and its stream does not end: of that nobody needs anything."""
LANES_PATIENCE = 30.0
"""The main connection has ended in order: what the others of the channel carry yet nobody waits for."""
HOLDS_FOR = 1.0
"""Seconds until QEMU is asked again whether it has sent all."""


class Waits(Protocol):
    """How long a channel waits for its next connection."""

    def seconds(self) -> float:
        """As things stand now; infinite for no end."""

    def delivers_for(self) -> float:
        """The same once QEMU has ended its side."""

    async def has_sent_all(self) -> bool:
        """Whether it is to wait on all the same."""

    async def ended_without_guest(self) -> bool:
        """Of a destination whose QEMU has ended its side without a word: waits until it is known what became
        of it; whether its process has ended, and never had the guest."""


class Told(Protocol):
    """Who hears of it."""

    def session_began(self, session: bytes) -> None:
        """The channel has become one, of that id."""

    def session_resumed(self, seconds: float) -> None:
        """It goes on with another connection, so long after the loss of the last."""


@dataclass(frozen=True)
class Around:
    """What all lanes of a migration's sessions have around them."""

    name: str
    relay: Relay
    changed: Callable[[], trio.Event]
    """What is set when the pump tells of something next."""
    waits: Waits
    told: Told


class RelayedSession(ABC):
    """One lane of one channel of a relay.

    Lane 0 is the channel's main connection. Each of the others comes and goes by itself, but with the end of
    lane 0 all end.
    """

    def __init__(self, around: Around, lane: int = 0) -> None:
        self.name = f"{around.name}: lane {lane}" if lane else around.name
        self._lane = lane
        self.over = trio.Event()
        """Set when it has ended, or never came to be."""
        self._relay = around.relay
        self._changed = around.changed
        self._waits = around.waits
        self._told = around.told
        self._began = False
        """Whether it has been carried."""
        self._moved = 0
        self._rest = Patience(self._position)
        self._channel = around.relay.attached
        self._offered_at = math.inf
        self._delivered_at = math.inf
        self._holds_until = 0.0

    async def run(self, channel: int) -> None:
        """Sees to `channel` until it is over, if it becomes a session at all."""
        try:
            await self._run(channel)
        finally:
            self.over.set()

    async def _run(self, channel: int) -> None:
        self._channel = channel
        try:
            while not self._relay.closed:
                changed = self._changed()
                if self._relay.look().channel < channel:
                    await changed.wait()
                    continue
                view = self._view()
                if view is None or not await self._see_to(view, changed):
                    return
        except Exception:
            self.give_up()  # QEMU is not to wait for what nobody sees to
            raise

    def goes_on(self) -> None:
        """An earlier refault has begun it."""
        self._began = True

    @abstractmethod
    async def _see_to(self, view: SessionView, changed: trio.Event) -> bool:
        """Does what is to be done as things stand, or waits for a change; False where it is over."""

    @property
    def is_lost(self) -> bool:
        """Whether there is no connection now."""
        view = self._view()
        return view is not None and view.state is SessionState.BETWEEN

    def give_up(self) -> None:
        """Its next connection is not waited for: the channel is lost."""
        if self._is_newest:
            self._relay.session_withdraw(self._lane)
            self._relay.session_give_up(errno.ETIMEDOUT, self._lane)

    @property
    def _is_newest(self) -> bool:
        """Whether what the relay has of a session is of this channel."""
        return not self._relay.closed and self._relay.attached == self._channel

    def _view(self) -> SessionView | None:
        return self._relay.session(self._lane) if self._is_newest else None

    def _position(self) -> int:
        view = self._view()
        if view is not None:
            self._moved = view.moved
        return self._moved

    def _lost(self, view: SessionView) -> None:
        """It has no connection; nothing where that is known."""
        self._rest.lost(view.lost_for or 0.0, silent=view.error == errno.ETIMEDOUT)

    def _left(self, view: SessionView) -> float:
        """Seconds for which its next connection is waited for yet; infinite where none is."""
        if view.state is SessionState.OFFERED:
            self._offered_at = min(self._offered_at, trio.current_time())
            return max(self._offered_at + self._stands(), self._holds_until) - trio.current_time()
        if view.delivered:
            self._delivered_at = min(self._delivered_at, trio.current_time())
        if view.state is not SessionState.BETWEEN:
            return self._delivered_at + DELIVERED_PATIENCE - trio.current_time()
        self._lost(view)
        if not view.has_leg:
            limit = COMPLETE_PATIENCE if view.complete else self._waits.delivers_for()
            limit = min(limit, DELIVERED_PATIENCE) if view.delivered else limit
        elif not self._began and self._lane == 0:
            limit = min(OFFER_PATIENCE, self._waits.seconds())
        else:
            limit = self._waits.seconds()
        return max(limit - self._rest.spent, self._holds_until - trio.current_time())

    def _stands(self) -> float:
        """Seconds for which an offer does. A lane's plain connection takes no more than the ring holds, until
        the session comes to it."""
        return self._waits.seconds() if self._lane else OFFER_PATIENCE

    async def _out_of_patience(self, view: SessionView) -> None:
        if view.state is SessionState.OFFERED and not self._lane:
            self._relay.session_withdraw(self._lane)
            return
        if view.has_leg and (self._began or self._lane) and await self._waits.has_sent_all():
            self._holds_until = trio.current_time() + HOLDS_FOR
            return
        again = self._view()
        if again is None or again.state is not view.state:
            return
        if view.state is SessionState.CARRIED:
            log.warning(
                "%s: the other refault has all, and has not ended the session in %g s: it is given up",
                self.name,
                DELIVERED_PATIENCE,
            )
        elif view.has_leg:
            is_lost = view.state is SessionState.BETWEEN
            spent = self._rest.spent if is_lost else trio.current_time() - self._offered_at
            log.warning(
                "%s: no connection to the other refault for %.1f s: the channel is lost",
                self.name,
                spent,
            )
        self._relay.session_give_up(0 if view.complete else errno.ETIMEDOUT, self._lane)

    def _carried(self, session: bytes, lost_for: float | None, attempt: int) -> None:
        """It has a connection, by this attempt; so long after the loss of the last, where that is known."""
        self._rest.connected()
        if not self._began and self._lane:
            log.info("%s: it is one of the session from here on", self.name)
        elif not self._began:
            log.info("%s: the channel is a session from here on: a lost connection is resumed", self.name)
            self._told.session_began(session)
        elif lost_for is not None:
            log.info("%s: resumed after %.3f s, attempt %d", self.name, lost_for, attempt,
                     extra=repeats((self.name, "resumed"), ""))  # fmt: skip
            self._told.session_resumed(lost_for)
        self._began = True
