"""The source's end of a session: dials, when the destination has offered it and when a connection is lost."""

from __future__ import annotations

import errno
import logging
import math
import socket
from collections.abc import Callable, Sequence

import trio

from refault.channel.relay import SessionState, SessionView
from refault.daemon.far.dial import FIRST_PATIENCE, connect
from refault.daemon.far.exchange import dials
from refault.daemon.far.session import Around, RelayedSession
from refault.daemon.far.whereto import Whereto
from refault.daemon.host.repeats import repeats
from refault.migration.endpoint import Inet
from refault.session.handshake import Dialling, Keys, Untrusted
from refault.session.wire import Code, Flag, Kind, Message

log = logging.getLogger("refault.session")

DIAL_TIMEOUT = 1.0
WELCOME_TIMEOUT = 2.0
"""A HELLO that the network swallowed is sent again ever later: dialling anew is sooner."""
OFFER_MARGIN = 0.5
"""Seconds before its end at which an offer is not taken up any more, for the destination counts too."""
_LAST_ATTEMPT = (1 << 32) - 1


class NotYet(Exception):  # noqa: N818 - it says what is
    """An attempt came to nothing, for the reason given."""


class SessionDialled(RelayedSession):
    """`addresses` gives where the other host is, the likeliest first."""

    def __init__(
        self,
        around: Around,
        addresses: Callable[[], Sequence[Inet]],
        leave: Callable[[trio.socket.SocketType], None],
        lane: int = 0,
    ) -> None:
        """`leave` keeps a connection of no more use until its peer ends it."""
        super().__init__(around, lane)
        self._addresses = addresses
        self._leave = leave
        self._where = Whereto()
        self._attempt = 0
        self._patience = FIRST_PATIENCE
        """Seconds until the next address is dialled, where there are several."""

    async def _see_to(self, view: SessionView, changed: trio.Event) -> bool:
        """Connects it where it has no connection."""
        if view.state is SessionState.OVER:
            return False
        if view.state in (SessionState.OFFERED, SessionState.BETWEEN) and self._may_come():
            await self._connect(view)
        else:
            await changed.wait()
        return True

    def _may_come(self) -> bool:
        """Whether the session has begun, as far as it must have."""
        first = self._relay.session() if self._lane else None
        return not self._lane or (first is not None and first.state > SessionState.OFFERED)

    async def _connect(self, view: SessionView) -> None:
        """Until there is a connection, or none is waited for."""
        pause = 0.0
        if view.state is SessionState.BETWEEN:
            if view.error or self._began:  # else a lane that begins
                log.info("%s: the connection to the other refault is lost: %s; resuming",
                         self.name, view.why(), extra=repeats((self.name, "lost"), view.why()))  # fmt: skip
            self._lost(view)
            if self._rest.is_fresh:
                self._where.of_use()
            else:
                pause = self._rest.pause()
        while True:
            now = self._view()
            if now is None or now.state not in (SessionState.OFFERED, SessionState.BETWEEN):
                return
            left = self._left(now)
            margin = OFFER_MARGIN if now.state is SessionState.OFFERED and not self._lane else 0.0
            if left <= margin:
                await self._out_of_patience(now)
                continue
            # What a destination has taken up is not given up in the midst.
            with trio.move_on_after(left if now.state is SessionState.BETWEEN else math.inf):
                await trio.sleep(pause)
                try:
                    if await self._attempted():
                        return
                except (NotYet, OSError, Untrusted, trio.TooSlowError) as error:
                    why = str(error) or f"no answer in the handshake for {WELCOME_TIMEOUT:g} s"
                    log.info(
                        "%s: no session yet: %s", self.name, why, extra=repeats((self.name, "not yet"), why)
                    )
            pause = self._rest.pause()

    async def _attempted(self) -> bool:
        """One attempt. False where the pump has nothing to resume any more."""
        addresses = self._addresses()
        if not addresses or self._attempt >= _LAST_ATTEMPT:
            raise NotYet("there is no address to dial")
        endpoint = self._where.next(addresses)
        connection = await self._connection(endpoint, addresses)
        self._where.connected()
        self._attempt += 1
        view = self._view()
        at = None if view is None else self._relay.session_tell(self._lane)
        # QEMU may have paused since: from then on who takes connections there may be another QEMU, which
        # survives no HELLO, and no connection that comes to nothing.
        if view is None or at is None or self._left(view) <= 0:
            self._leave(connection)
            return False
        with socket.socket(fileno=connection.detach()) as sock:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            flags = Flag(0) if self._began else Flag.NEW
            hello = Message(Kind.HELLO, view.id, self._lane, self._attempt, flags=flags, positions=at)
            try:
                with trio.fail_after(WELCOME_TIMEOUT):
                    welcome = await dials(sock, Dialling(Keys(), hello, proven=False))
            except trio.TooSlowError:
                self._where.silent()
                raise
            if welcome.code is Code.OK:
                return self._welcomed(sock, welcome)
        self._refused(welcome, addresses)
        return False

    async def _connection(self, endpoint: Inet, addresses: Sequence[Inet]) -> trio.socket.SocketType:
        """To one of several the longer in each round, for it may be far away."""
        if len(addresses) == 1:
            return await connect(endpoint, DIAL_TIMEOUT)
        try:
            return await connect(endpoint, self._patience, found_within=self._patience)
        except OSError:
            if endpoint == addresses[-1]:
                self._patience = min(2 * self._patience, DIAL_TIMEOUT)
            raise

    def _welcomed(self, sock: socket.socket, welcome: Message) -> bool:
        before = self._view()
        if before is None:
            return False
        if not self._relay.session_adopt(sock.fileno(), welcome.positions, self._lane):
            again = self._view()
            if again is None or again.state is SessionState.OVER:
                return False
            raise NotYet("what the other refault says of its positions cannot be")
        sock.detach()
        self._where.carried()
        self._patience = FIRST_PATIENCE
        self._carried(before.id, before.lost_for, self._attempt)
        return True

    def _refused(self, welcome: Message, addresses: Sequence[Inet]) -> None:
        if welcome.code is Code.STALE:
            self._attempt = max(self._attempt, welcome.attempt)
        if welcome.code not in (Code.UNKNOWN, Code.GONE):
            raise NotYet(f"the other refault says {welcome.code.name}")
        # Who says that it is gone has had it.
        if welcome.code is Code.UNKNOWN and not self._where.unknown(addresses):
            raise NotYet("it is not known at one of the addresses")
        view = self._view()
        if view is None:
            return
        if view.state is SessionState.OFFERED:
            self._relay.session_withdraw(self._lane)
            return
        in_order = view.complete or 0 < welcome.positions.written == view.end
        if view.has_leg:
            log.warning("%s: the other refault knows this session no more: the channel is lost", self.name)
        self._relay.session_give_up(0 if in_order else errno.ECONNRESET, self._lane)
