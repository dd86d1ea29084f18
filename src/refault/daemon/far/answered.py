"""The end of a lane that answers: who may connect to it, and which connection is the one."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import trio

from refault.daemon.far import carry
from refault.daemon.far.bell import Bell
from refault.daemon.far.exchange import answers, send
from refault.daemon.far.lane import LaneEnd
from refault.daemon.far.patience import Patience
from refault.daemon.host.repeats import repeats
from refault.session.course import Event
from refault.session.handshake import Answering, Keys, Untrusted
from refault.session.stream import Wrong
from refault.session.table import Table, Verdict
from refault.session.wire import Code, Message, Positions

log = logging.getLogger("refault.session")

MOST_STRANGERS = 128
"""Connections in the handshake at once. One more ends the oldest of the host that has the most."""
_NETWORK = 64
"""Bits of an IPv6 address that tell hosts apart: the others are a host's own to choose."""


@dataclass(frozen=True)
class _Offer:
    sock: socket.socket
    answering: Answering
    hello: Message


class _Stranger(NamedTuple):
    scope: trio.CancelScope
    host: str


def host_of(peer: str) -> str:
    """What stands for a peer's host, of its address as the kernel gives it."""
    address = ipaddress.ip_address(peer.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, _NETWORK), strict=False))


def who_goes(strangers: deque[_Stranger]) -> _Stranger:
    """The oldest of the host that has the most: so no host takes the places of others."""
    count = Counter(each.host for each in strangers)
    most = max(count.values())
    return next(each for each in strangers if count[each.host] == most)


class Answered:
    """One lane's connections, of which the last that was let in counts."""

    def __init__(self, end: LaneEnd, patience: float) -> None:
        """`patience`: seconds for which there may be no connection."""
        self._end = end
        self._patience = patience
        self._rest = Patience(end.position)
        self._offer: _Offer | None = None
        self._offered = Bell()
        self._scope = trio.CancelScope()
        self._has_ended = False

    def offer(self, offer: _Offer) -> None:
        """A connection that takes the place of the one before, which is closed with what is unread there."""
        if self._has_ended:
            offer.sock.close()  # who comes again is told so by the table
            return
        if self._offer is not None:
            self._offer.sock.close()
        self._offer = offer
        self._offered.ring()
        self._scope.cancel()

    def give_up(self) -> None:
        """The lane is over, and nobody needs to hear of it: `keep` ends."""
        self._scope.cancel()
        self._offered.ring()

    async def keep(self) -> None:
        """Carries the lane on whichever connection is offered, until it is over."""
        end, rest, lost, began = self._end, self._rest, "", trio.current_time()
        rest.lost()
        try:
            while not end.over.is_set():
                with trio.move_on_after(rest.left_of(self._patience)) as patience:
                    await self._offered.wait()
                if patience.cancelled_caught:
                    log.warning(
                        "%s: the other refault has not come again for %g s: reset; see there whether it runs,"
                        " and why it cannot reach this host",
                        end.name,
                        self._patience,
                    )
                    end.tell(Event.IMPATIENT)
                    return
                offer, self._offer = self._offer, None
                if offer is None:
                    continue
                rest.connected()
                with offer.sock, trio.CancelScope() as self._scope:
                    if lost:
                        took = trio.current_time() - began
                        log.info("%s: resumed after %.3f s, attempt %d", end.name, took, offer.hello.attempt)
                    lost = "the other refault connects anew"
                    lost = await self._carried(offer)
                began = trio.current_time()
                end.stream.lost()
                rest.lost(silent=carry.is_silence(lost))
                if not end.over.is_set():
                    log.info("%s: the connection of the other refault is lost: %s", end.name, lost)
        finally:
            self._has_ended = True
            if self._offer is not None:
                self._offer.sock.close()

    async def _carried(self, offer: _Offer) -> str:
        end, sock, hello = self._end, offer.sock, offer.hello
        # The connection before is closed: what is told now is so.
        end.stream.lost()
        try:
            end.stream.resume(hello.positions)
        except Wrong as error:
            await tell(sock, offer.answering.welcome(hello, Code.GONE, hello.attempt))
            return f"the other refault is not to be believed: {error}"
        try:
            at = end.stream.tell()
            await send(sock, offer.answering.welcome(hello, Code.OK, hello.attempt, at))
        except OSError as error:
            return str(error.strerror)
        reason = await carry.carry(sock, end)
        if end.over.is_set():
            await carry.part(sock)
        return reason


class Reception:
    """Where who dials comes: the handshake, the table, and the lane that is meant."""

    def __init__(
        self,
        keys: Keys,
        table: Table[Answered],
        begin: Callable[[bytes], Answered | None],
    ) -> None:
        """`begin` makes the end of a new session of that id, or says that there is no room."""
        self._keys = keys
        self._table = table
        self._begin = begin
        self._strangers: deque[_Stranger] = deque()

    async def receive(self, sock: socket.socket) -> None:
        """One connection; it is closed, or belongs to a lane afterwards."""
        try:
            carry.prepare(sock)
            peer = sock.getpeername()[0]
        except OSError:  # it has gone again
            sock.close()
            return
        if len(self._strangers) >= MOST_STRANGERS:
            leaving = who_goes(self._strangers)
            self._strangers.remove(leaving)
            leaving.scope.cancel()
        stranger = _Stranger(trio.CancelScope(), host_of(peer))
        self._strangers.append(stranger)
        given = False
        try:
            with stranger.scope:
                given = await self._received(sock, peer)
        finally:
            if stranger in self._strangers:
                self._strangers.remove(stranger)
            if not given:
                sock.close()

    async def _received(self, sock: socket.socket, peer: str) -> bool:
        answering = Answering(self._keys)
        try:
            hello = await answers(sock, answering)
            verdict = self._judged(sock, answering, hello)
            if verdict.code is Code.OK:
                return True
            at = Positions(written=verdict.taken)
            await send(sock, answering.welcome(hello, verdict.code, verdict.attempt, at))
        except Untrusted as error:
            log.warning("%s is refused: %s", peer, error, extra=repeats("refused", ""))
            if error.answer:
                await tell(sock, error.answer)
            return False
        except (OSError, trio.TooSlowError) as error:
            log.debug("%s came to nothing: %s", peer, error)
            return False
        await carry.part(sock)
        return False

    def _judged(self, sock: socket.socket, answering: Answering, hello: Message) -> Verdict[Answered]:
        """With OK the connection is the lane's."""
        verdict = self._table.judge(hello, proven=answering.proven)
        lane = verdict.lane
        if verdict.code is not Code.OK or lane is None:
            return verdict
        owner = lane.owner
        if owner is None:
            owner = self._begin(hello.session)
            if owner is None:
                self._table.withdraw(hello.session)
                return Verdict(Code.AGAIN, verdict.attempt)
            lane.belongs_to(owner)
        owner.offer(_Offer(sock, answering, hello))
        return verdict


async def tell(sock: socket.socket, answer: bytes) -> None:
    """Sends the last message of a connection, which the peer gets if it is still there."""
    try:
        await send(sock, answer)
    except OSError:
        return
    await carry.part(sock)
