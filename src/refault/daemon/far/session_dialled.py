"""The source's end of a session: dials, when the destination has offered it and when a connection is lost."""

from __future__ import annotations

import errno
import logging
import math
import socket
from collections.abc import Callable, Sequence

import trio

from refault.channel.relay import Relay, SessionState, SessionView
from refault.daemon.far.connection import growing_pauses
from refault.daemon.far.dial import FIRST_PATIENCE, connect
from refault.daemon.far.exchange import dials
from refault.daemon.far.session import RelayedSession, Told, Waits
from refault.daemon.host.repeats import repeats
from refault.migration.endpoint import Inet
from refault.session.handshake import Dialling, Keys, Untrusted
from refault.session.wire import Code, Flag, Kind, Message

log = logging.getLogger("refault.session")

DIAL_TIMEOUT = 1.0
WELCOME_TIMEOUT = 2.0
"""A HELLO that the network swallowed is sent again ever later: dialling anew is sooner."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.25
"""A longer pause would be most of a resumption: an attempt that is lost in the handshake took some ms."""
OFFER_MARGIN = 0.5
"""Seconds before its end at which an offer is not taken up any more, for the destination counts too."""
_LAST_ATTEMPT = (1 << 32) - 1


class NotYet(Exception):  # noqa: N818 - it says what is
    """An attempt came to nothing, for the reason given."""


class SessionDialled(RelayedSession):
    """`addresses` gives where the other host is, the likeliest first."""

    def __init__(
        self,
        name: str,
        relay: Relay,
        changed: Callable[[], trio.Event],
        waits: Waits,
        told: Told,
        addresses: Callable[[], Sequence[Inet]],
    ) -> None:
        super().__init__(name, relay, changed, waits, told)
        self._addresses = addresses
        self._attempt = 0

    async def _see_to(self, view: SessionView, changed: trio.Event) -> bool:
        """Connects it where it has no connection."""
        if view.state is SessionState.OVER:
            return False
        if view.state in (SessionState.OFFERED, SessionState.BETWEEN):
            await self._connect(view)
        else:
            await changed.wait()
        return True

    async def _connect(self, view: SessionView) -> None:
        """Until there is a connection, or none is waited for."""
        if view.state is SessionState.BETWEEN:
            log.info("%s: the connection to the other refault is lost: %s; resuming", self.name, view.why(),
                     extra=repeats((self.name, "lost"), view.why()))  # fmt: skip
        pauses = growing_pauses(_FIRST_PAUSE, _LONGEST_PAUSE)
        turn = 0
        while True:
            now = self._view()
            if now is None or now.state not in (SessionState.OFFERED, SessionState.BETWEEN):
                return
            left = self._left(now)
            if left <= 0 or (now.state is SessionState.OFFERED and left <= OFFER_MARGIN):
                await self._out_of_patience(now)
                continue
            # What a destination has taken up is not given up in the midst.
            with trio.move_on_after(left if now.state is SessionState.BETWEEN else math.inf):
                try:
                    if await self._attempted(now, turn):
                        return
                except (NotYet, OSError, Untrusted, trio.TooSlowError) as error:
                    why = str(error) or f"no answer in the handshake for {WELCOME_TIMEOUT:g} s"
                    log.info(
                        "%s: no session yet: %s", self.name, why, extra=repeats((self.name, "not yet"), why)
                    )
                turn += 1
                await trio.sleep(next(pauses))

    async def _attempted(self, view: SessionView, turn: int) -> bool:
        """One attempt. False where the pump has nothing to resume any more."""
        addresses = self._addresses()
        if not addresses or self._attempt >= _LAST_ATTEMPT:
            raise NotYet("there is no address to dial")
        endpoint = addresses[turn % len(addresses)]
        connection = await connect(endpoint, FIRST_PATIENCE if len(addresses) > 1 else DIAL_TIMEOUT)
        with socket.socket(fileno=connection.detach()) as sock:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._attempt += 1
            at = None if self._relay.closed else self._relay.session_tell()
            if at is None:
                return False
            flags = Flag(0) if self._began else Flag.NEW
            hello = Message(Kind.HELLO, view.id, 0, self._attempt, flags=flags, positions=at)
            with trio.fail_after(WELCOME_TIMEOUT):
                welcome = await dials(sock, Dialling(Keys(), hello, proven=False))
            if welcome.code is Code.OK:
                return self._welcomed(sock, welcome)
        self._refused(welcome)
        return False

    def _welcomed(self, sock: socket.socket, welcome: Message) -> bool:
        before = self._view()
        if before is None:
            return False
        if not self._relay.session_adopt(sock.fileno(), welcome.positions):
            again = self._view()
            if again is None or again.state is SessionState.OVER:
                return False
            raise NotYet("what the other refault says of its positions cannot be")
        sock.detach()
        self._carried(before.lost_for, self._attempt)
        return True

    def _refused(self, welcome: Message) -> None:
        if welcome.code is Code.STALE:
            self._attempt = max(self._attempt, welcome.attempt)
        if welcome.code not in (Code.UNKNOWN, Code.GONE):
            raise NotYet(f"the other refault says {welcome.code.name}")
        view = self._view()
        if view is None:
            return
        if view.state is SessionState.OFFERED:
            self._relay.session_withdraw()
            return
        in_order = view.complete or (welcome.code is Code.GONE and welcome.positions.written == view.end)
        if view.has_leg:
            log.warning("%s: the other refault knows this session no more: the channel is lost", self.name)
        self._relay.session_give_up(0 if in_order else errno.ECONNRESET)
