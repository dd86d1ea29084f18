"""The destination's end of a session: who comes for it, and which connection is the one."""

from __future__ import annotations

import hmac
import logging
import socket

import trio

from refault.channel.relay import SessionState, SessionView
from refault.daemon.far import carry
from refault.daemon.far.exchange import answers, send
from refault.daemon.far.session import LANES_PATIENCE, OFFER_PATIENCE, Around, RelayedSession
from refault.daemon.host.repeats import repeats
from refault.session.handshake import Answering, Keys, Untrusted
from refault.session.table import Table
from refault.session.wire import Code, Message, Positions

log = logging.getLogger("refault.session")


async def receive(
    connection: trio.socket.SocketType, session: SessionAnswered | None, had: bytes | None, name: str
) -> None:
    """One who says HELLO at the address of a migration; it is closed, or the session's, afterwards. `had`:
    the id of the last session that there was."""
    with socket.socket(fileno=connection.detach()) as sock:
        answering = Answering(Keys())
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            hello = await answers(sock, answering)
            if session is None or not session.is_meant(hello):
                # Another host would not know it, so nothing is to be hoped for anywhere else.
                was_here = had is not None and hmac.compare_digest(hello.session, had)
                code = Code.GONE if was_here else Code.UNKNOWN
                await send(sock, answering.welcome(hello, code, hello.attempt))
            elif await session.join(sock, answering, hello):
                return
        except (OSError, Untrusted, trio.TooSlowError) as error:
            log.info("%s: one who came for a session is refused: %s", name, error or "it says nothing more",
                     extra=repeats((name, "refused"), str(error)))  # fmt: skip
            return
        await carry.part(sock)


class SessionAnswered(RelayedSession):
    """`session` is its id; in TLS it has another once it is offered (cext/tls.h)."""

    def __init__(
        self,
        around: Around,
        session: bytes,
        *,
        lane: int = 0,
        lanes: int = 0,
        table: Table[None] | None = None,
    ) -> None:
        """`lanes`: how many further ones there are; `table`: of a further `lane`, the session's."""
        super().__init__(around, lane)
        self._id = session
        self._table = Table(1, 1 + lanes) if table is None else table
        self._one = trio.Lock()
        self._further = tuple(
            SessionAnswered(around, session, lane=number, table=self._table) for number in range(1, 1 + lanes)
        )

    def goes_on(self) -> None:
        """An earlier refault has begun it, and the attempts that it let in are over."""
        super().goes_on()
        self._table.resume(self._id)

    async def _run(self, channel: int) -> None:
        async with trio.open_nursery() as nursery:
            for each in self._further:
                nursery.start_soon(each.run, channel)
            await super()._run(channel)
            with trio.move_on_after(LANES_PATIENCE):
                for each in self._further:
                    await each.over.wait()
            for each in self._further:
                each.give_up()

    def _stands(self) -> float:
        """A lane's for longer than at the source, which is the first to give it up."""
        return super()._stands() + (OFFER_PATIENCE if self._lane else 0.0)

    async def _see_to(self, view: SessionView, changed: trio.Event) -> bool:
        """Waits for whoever comes, for as long as that makes sense."""
        self._learn_id(view)
        if view.state is SessionState.OVER:
            self._table.close(self._id, self._lane, view.taken if view.complete else 0)
            return False
        if view.word_due:
            broke = await self._waits.ended_without_guest()
            if self._is_newest:
                self._relay.session_last_word(broke=broke, lane=self._lane)
            return True
        left = self._left(view)
        if left <= 0:
            await self._out_of_patience(view)
            return True
        with trio.move_on_after(left):
            await changed.wait()
        return True

    def is_meant(self, hello: Message) -> bool:
        """Whether it is of this session."""
        self._learn_id(self._view())
        return hmac.compare_digest(hello.session, self._id)

    def _learn_id(self, view: SessionView | None) -> None:
        if view is not None and view.channel == self._channel:
            self._id = view.id

    async def join(self, sock: socket.socket, answering: Answering, hello: Message) -> bool:
        """Answers a HELLO; whether the connection is the session's from now on. Raises OSError."""
        if 0 < hello.lane <= len(self._further):
            return await self._further[hello.lane - 1].join(sock, answering, hello)
        async with self._one:
            # Who ends here may have left the session to the next refault: it is not gone. A lock that is free
            # is had without a look at that.
            await trio.lowlevel.checkpoint_if_cancelled()
            view = self._view()
            lost_for = view.lost_for if view is not None else None
            code, attempt, at = self._judged(hello)
            await send(sock, answering.welcome(hello, code, attempt, at))
            if code is not Code.OK or not self._relay_adopts(sock):
                return False
            sock.detach()
            self._carried(self._id, lost_for or 0.0, hello.attempt)
            return True

    def _relay_adopts(self, sock: socket.socket) -> bool:
        return self._is_newest and self._relay.session_adopt(sock.fileno(), lane=self._lane)

    def _judged(self, hello: Message) -> tuple[Code, int, Positions]:
        """The answer; with OK the old connection is closed, and the positions are those that count."""
        verdict = self._table.judge(hello, proven=False)
        if verdict.code is not Code.OK:
            return verdict.code, verdict.attempt, Positions(written=verdict.taken)
        view = self._view()
        if view is None:
            return Code.GONE, hello.attempt, Positions()
        if view.state is SessionState.OVER or not self._relay.session_rejoin(hello.positions, self._lane):
            taken = view.taken if view.complete else 0
            return Code.GONE, hello.attempt, Positions(written=taken)
        return Code.OK, hello.attempt, self._relay.session_tell(self._lane) or Positions()
