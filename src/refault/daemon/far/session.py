"""The session that a migration's channel may become: how long its next connection is waited for.

The pump (cext/link.h) carries it; who dials is session_dialled.py, who answers session_answered.py.
"""

from __future__ import annotations

import errno
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import trio

from refault.channel.relay import Relay, SessionState, SessionView
from refault.daemon.host.repeats import repeats

log = logging.getLogger("refault.session")

OFFER_PATIENCE = 3.0
"""A session that was offered and never came to be; the plain connection may be lost by then."""
COMPLETE_PATIENCE = 2.0
"""Both streams are over, and all is taken: the other end is told so if it asks."""
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


class Told(Protocol):
    """Who hears of it."""

    def session_began(self) -> None:
        """The channel has become one."""

    def session_resumed(self, seconds: float) -> None:
        """It goes on with another connection, so long after the loss of the last."""


class RelayedSession(ABC):
    """Of one channel of `relay`; `changed` gives what is set when the pump tells of something next."""

    def __init__(
        self, name: str, relay: Relay, changed: Callable[[], trio.Event], waits: Waits, told: Told
    ) -> None:
        self.name = name
        self.over = trio.Event()
        """Set when it has ended, or never came to be."""
        self._relay = relay
        self._changed = changed
        self._waits = waits
        self._told = told
        self._began = False
        """Whether it has been carried."""
        self._offered_at = math.inf
        self._holds_until = 0.0

    async def run(self, channel: int) -> None:
        """Sees to `channel` until it is over, if it becomes a session at all."""
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
        finally:
            self.over.set()

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
        if not self._relay.closed:
            self._relay.session_withdraw()
            self._relay.session_give_up(errno.ETIMEDOUT)

    def _view(self) -> SessionView | None:
        return None if self._relay.closed else self._relay.session()

    def _left(self, view: SessionView) -> float:
        """Seconds for which its next connection is waited for yet; infinite where none is."""
        if view.state is SessionState.OFFERED:
            self._offered_at = min(self._offered_at, trio.current_time())
            return self._offered_at + OFFER_PATIENCE - trio.current_time()
        if view.state is not SessionState.BETWEEN:
            return math.inf
        if not view.has_leg:
            limit = COMPLETE_PATIENCE if view.complete else self._waits.delivers_for()
        elif not self._began:
            limit = OFFER_PATIENCE
        else:
            limit = self._waits.seconds()
        return max(limit - (view.lost_for or 0.0), self._holds_until - trio.current_time())

    async def _out_of_patience(self, view: SessionView) -> None:
        if view.state is SessionState.OFFERED:
            self._relay.session_withdraw()
            return
        if view.has_leg and self._began and await self._waits.has_sent_all():
            self._holds_until = trio.current_time() + HOLDS_FOR
            return
        again = self._view()
        if again is None or again.state is not SessionState.BETWEEN:
            return
        if view.has_leg:
            log.warning(
                "%s: no connection to the other refault for %.1f s: the channel is lost",
                self.name,
                view.lost_for or 0.0,
            )
        self._relay.session_give_up(0 if view.complete else errno.ETIMEDOUT)

    def _carried(self, lost_for: float | None, attempt: int) -> None:
        """It has a connection, by this attempt; so long after the loss of the last, where that is known."""
        if not self._began:
            log.info("%s: the channel is a session from here on: a lost connection is resumed", self.name)
            self._told.session_began()
        elif lost_for is not None:
            log.info("%s: resumed after %.3f s, attempt %d", self.name, lost_for, attempt,
                     extra=repeats((self.name, "resumed"), ""))  # fmt: skip
            self._told.session_resumed(lost_for)
        self._began = True
