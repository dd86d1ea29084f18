"""The destination's end of a session: who comes for it, and which connection is the one."""

from __future__ import annotations

import hmac
import logging
import socket
from collections.abc import Callable

import trio

from refault.channel.relay import Relay, SessionState, SessionView
from refault.daemon.far import carry
from refault.daemon.far.exchange import answers, send
from refault.daemon.far.session import RelayedSession, Told, Waits
from refault.daemon.host.repeats import repeats
from refault.session.handshake import Answering, Keys, Untrusted
from refault.session.table import Table
from refault.session.wire import Code, Message, Positions

log = logging.getLogger("refault.session")


async def receive(connection: trio.socket.SocketType, session: SessionAnswered | None, name: str) -> None:
    """One who says HELLO at the address of a migration; it is closed, or the session's, afterwards."""
    with socket.socket(fileno=connection.detach()) as sock:
        answering = Answering(Keys())
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            hello = await answers(sock, answering)
            if session is None:
                await send(sock, answering.welcome(hello, Code.UNKNOWN, hello.attempt))
            elif await session.join(sock, answering, hello):
                return
        except (OSError, Untrusted, trio.TooSlowError) as error:
            log.info("%s: one who came for a session is refused: %s", name, error or "it says nothing more",
                     extra=repeats((name, "refused"), str(error)))  # fmt: skip
            return
        await carry.part(sock)


class SessionAnswered(RelayedSession):
    """`session` is its id."""

    def __init__(
        self,
        name: str,
        relay: Relay,
        changed: Callable[[], trio.Event],
        waits: Waits,
        told: Told,
        session: bytes,
    ) -> None:
        super().__init__(name, relay, changed, waits, told)
        self._id = session
        self._table: Table[None] = Table(1)
        self._one = trio.Lock()

    async def _see_to(self, view: SessionView, changed: trio.Event) -> bool:
        """Waits for whoever comes, for as long as that makes sense."""
        if view.state is SessionState.OVER:
            self._table.close(self._id, 0, view.taken if view.complete else 0)
            return False
        left = self._left(view)
        if left <= 0:
            await self._out_of_patience(view)
            return True
        with trio.move_on_after(left):
            await changed.wait()
        return True

    async def join(self, sock: socket.socket, answering: Answering, hello: Message) -> bool:
        """Answers a HELLO; whether the connection is the session's from now on. Raises OSError."""
        async with self._one:
            view = self._view()
            lost_for = view.lost_for if view is not None else None
            code, attempt, at = self._judged(hello)
            await send(sock, answering.welcome(hello, code, attempt, at))
            if code is not Code.OK or not self._relay_adopts(sock):
                return False
            sock.detach()
            self._carried(lost_for or 0.0, hello.attempt)
            return True

    def _relay_adopts(self, sock: socket.socket) -> bool:
        return not self._relay.closed and self._relay.session_adopt(sock.fileno())

    def _judged(self, hello: Message) -> tuple[Code, int, Positions]:
        """The answer; with OK the old connection is closed, and the positions are those that count."""
        if not hmac.compare_digest(hello.session, self._id):
            return Code.UNKNOWN, hello.attempt, Positions()
        view = self._view()
        if view is None:
            return Code.UNKNOWN, hello.attempt, Positions()
        verdict = self._table.judge(hello, proven=False)
        if verdict.code is not Code.OK:
            return verdict.code, verdict.attempt, Positions(written=verdict.taken)
        if view.state is SessionState.OVER or not self._relay.session_rejoin(hello.positions):
            taken = view.taken if view.complete else 0
            return Code.GONE, hello.attempt, Positions(written=taken)
        return Code.OK, hello.attempt, self._relay.session_tell() or Positions()
