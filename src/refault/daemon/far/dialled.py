"""The end of a lane that dials: a lost connection is dialled again, until all is over or patience is."""

from __future__ import annotations

import logging
import secrets
import socket

import trio

from refault.daemon.far import carry
from refault.daemon.far.dial import connect
from refault.daemon.far.exchange import HANDSHAKE_TIMEOUT, dials
from refault.daemon.far.lane import LaneEnd
from refault.daemon.far.patience import Patience
from refault.daemon.host.repeats import repeats
from refault.migration.endpoint import Inet
from refault.session.course import Event
from refault.session.handshake import Dialling, Keys, Untrusted
from refault.session.stream import Wrong
from refault.session.wire import ID_BYTES, Code, Flag, Kind, Message

log = logging.getLogger("refault.session")

DIAL_TIMEOUT = 1.0
"""The kernel repeats a SYN ever later: dialling anew finds a path that is back sooner."""
_LAST_ATTEMPT = (1 << 32) - 1
"""The field has no higher one."""


class NotYet(Exception):  # noqa: N818 - it says what is
    """An attempt came to nothing, for the reason given."""


class Dialled:
    """One lane's connections, one after the other."""

    def __init__(self, end: LaneEnd, to: Inet, keys: Keys, patience: float) -> None:
        """`patience`: seconds for which there may be no connection."""
        self._end = end
        self._to = to
        self._keys = keys
        self._patience = patience
        self._rest = Patience(end.position)
        self._session = secrets.token_bytes(ID_BYTES)
        self._attempt = 0
        self._welcomed = False
        self._proven = False

    async def keep(self) -> None:
        """Keeps the lane connected until it is over."""
        end, lost = self._end, ""
        self._rest.lost()
        while not end.over.is_set():
            sock = await self._connected(lost)
            if sock is None:
                return
            with sock:
                self._rest.connected()
                lost = await carry.carry(sock, end)
            end.stream.lost()
            self._rest.lost(silent=carry.is_silence(lost))
            if not end.over.is_set():
                log.info("%s: the connection to the other refault is lost: %s; resuming", end.name, lost)

    async def _connected(self, lost: str) -> socket.socket | None:
        """A connection that carries on from where the last one ended; None where the lane is over."""
        end, began, rest = self._end, trio.current_time(), self._rest
        with trio.move_on_after(rest.left_of(self._patience)):
            if not rest.is_fresh:
                await trio.sleep(rest.pause())
            while True:
                try:
                    sock = await self._attempted()
                except (NotYet, OSError, Untrusted, trio.TooSlowError) as error:
                    self._say(error)
                    await trio.sleep(rest.pause())
                    continue
                took = trio.current_time() - began
                if sock is not None and lost:
                    log.info("%s: resumed after %.3f s, attempt %d", end.name, took, self._attempt)
                return sock
        log.warning(
            "%s: no connection to the other refault at %s for %g s: reset; see there whether it runs, and why"
            " it cannot be reached",
            end.name,
            self._to.uri,
            self._patience,
        )
        end.tell(Event.IMPATIENT)
        return None

    def _say(self, error: Exception) -> None:
        text = str(error) or f"no answer in the handshake for {HANDSHAKE_TIMEOUT:g} s"
        log.info("%s: not connected yet: %s", self._end.name, text, extra=repeats(self._to, text))

    async def _attempted(self) -> socket.socket | None:
        """One attempt. None where the lane is over; raises where it came to nothing."""
        if self._attempt >= _LAST_ATTEMPT:
            self._forgotten(0)
            return None
        self._attempt += 1
        connection = await connect(self._to, DIAL_TIMEOUT)
        sock = socket.socket(fileno=connection.detach())
        try:
            carry.prepare(sock)
            if await self._welcomed_on(sock):
                return sock
        except BaseException:
            sock.close()
            raise
        sock.close()
        return None

    async def _welcomed_on(self, sock: socket.socket) -> bool:
        """The handshake. False where the lane is over; raises where the attempt came to nothing."""
        end = self._end
        flags = Flag(0) if self._welcomed else Flag.NEW
        at = end.stream.tell()
        hello = Message(Kind.HELLO, self._session, 0, self._attempt, flags=flags, positions=at)
        dialling = Dialling(self._keys, hello, proven=self._proven)
        welcome = await dials(sock, dialling)
        if welcome.code in (Code.UNKNOWN, Code.GONE):
            self._forgotten(welcome.positions.written)
            return False
        if welcome.code is not Code.OK:
            if welcome.code is Code.STALE:
                self._attempt = max(self._attempt, welcome.attempt)
            raise NotYet(f"the other refault says {welcome.code.name}")
        try:
            end.stream.resume(welcome.positions)
        except Wrong as error:
            raise NotYet(f"the other refault is not to be believed: {error}") from error
        self._welcomed = True
        self._proven = self._proven or dialling.proven
        return True

    def _forgotten(self, taken: int) -> None:
        """The other end knows the lane no more; of ours it had `taken` all before, if it ended in order."""
        end = self._end
        facts = end.stream.facts()
        if facts.finished and facts.taken and taken == facts.here.end:
            end.tell(Event.DONE)  # all is delivered on both sides, and only END was lost
        elif not end.is_done:
            log.warning("%s: the other refault knows this session no more: reset", end.name)
        end.tell(Event.FORGOTTEN)
