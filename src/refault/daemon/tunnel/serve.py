"""`refault tunnel`: many plain connections, each with a session of its own, until a signal ends it.

    client ══plain══▶ refault, which dials ══session══▶ refault, which answers ══plain══▶ target

No connection knows of another: each has a nursery of its own, and an internal error in one ends that one.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from refault.daemon.far.answered import Answered, Reception
from refault.daemon.far.dialled import Dialled
from refault.daemon.far.exchange import HANDSHAKE_TIMEOUT
from refault.daemon.far.lane import LaneEnd
from refault.daemon.host.descriptors import raise_limit
from refault.daemon.host.notify import Notifier
from refault.daemon.host.repeats import repeats
from refault.daemon.monitor import dial, listener
from refault.daemon.monitor.accept import accepted
from refault.daemon.tunnel.options import TunnelOptions
from refault.daemon.tunnel.plain import Plain, break_off
from refault.migration.endpoint import Inet
from refault.session.course import Event, Role
from refault.session.memory import Memory
from refault.session.table import Table

log = logging.getLogger("refault.tunnel")

TARGET_TIMEOUT = 10.0
STOP_PATIENCE = 1.0
"""Seconds for the other refault to hear that this one ends."""
_OTHER_DESCRIPTORS = 256
"""For what is not a connection's own two: handshakes, those that take another's place, the journal."""
_ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class Tunnel:
    """One end, with all of its connections."""

    def __init__(self, options: TunnelOptions) -> None:
        self._options = options
        self._memory = Memory()
        self._most = min(self._memory.most_lanes, max(1, (raise_limit() - _OTHER_DESCRIPTORS) // 2))
        self._table: Table[Answered] = Table(self._most)
        self._reception = Reception(options.keys, self._table, self._begin_answered)
        self._ends: set[LaneEnd] = set()
        self._count = 0
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[listener.Bound]) -> None:
        """Serves until cancelled. Raises OperatorError where it cannot listen."""
        bound = await listener.bind(self._options.listen)
        handle = self._reception.receive if self._options.answers else self._relay
        try:
            async with trio.open_nursery() as self._nursery:
                for sock in bound.socks:
                    self._nursery.start_soon(self._accept, sock, handle)
                task_status.started(bound)
        finally:
            bound.close()

    async def end(self) -> None:
        """Resets every plain connection, and has the other refault do so."""
        for end in list(self._ends):
            end.tell(Event.BROKE_HERE)
        with trio.move_on_after(STOP_PATIENCE):
            for end in list(self._ends):
                await end.over.wait()

    async def _accept(
        self, listening: socket.socket, handle: Callable[[socket.socket], Awaitable[None]]
    ) -> None:
        assert self._nursery is not None  # noqa: S101 - it runs in it
        while True:
            sock = await accepted(listening, _tell_not_accepted)
            sock.setblocking(False)
            self._nursery.start_soon(self._handled, handle, sock)

    @staticmethod
    async def _handled(handle: Callable[[socket.socket], Awaitable[None]], sock: socket.socket) -> None:
        try:
            await handle(sock)
        except Exception:
            break_off(sock)
            log.exception("internal error with a connection that has come: it is closed, the others go on")

    async def _relay(self, sock: socket.socket) -> None:
        """A plain connection that has come: it is dialled for."""
        try:
            dial.prepare(sock)
        except OSError:  # it has gone again
            sock.close()
            return
        end = self._new_end(Role.DIALS)
        if end is None:
            log.warning(
                "no memory, or no descriptors (ulimit -n), for one more connection: it is closed",
                extra=repeats("memory", ""),
            )
            sock.close()
            return
        plain = Plain(sock, end)
        end.attach(plain)
        to = Inet(self._options.to.host, self._options.to.port)
        far = Dialled(end, to, self._options.keys, self._options.patience)
        await self._live(end, plain.run, far.keep)

    def _begin_answered(self, session: bytes) -> Answered | None:
        """A session that begins; None where there is no memory for it."""
        end = self._new_end(Role.ANSWERS)
        if end is None or self._nursery is None:
            return None
        far = Answered(end, self._options.patience)
        self._nursery.start_soon(self._answer, end, far, session)
        return far

    async def _answer(self, end: LaneEnd, far: Answered, session: bytes) -> None:
        try:
            await self._live(end, partial(self._reach_target, end, far), far.keep)
        finally:
            if end.first_heard.is_set():
                self._table.close(session, 0, end.done_at)
            else:  # who has not heard that it began may yet begin it
                self._table.withdraw(session)

    async def _reach_target(self, end: LaneEnd, far: Answered) -> None:
        """Dials the target once the other refault has shown that it goes on with this session: what comes of
        a HELLO that was late is nobody's business there."""
        # Who lost its first connection at once has as long as for any other.
        with trio.move_on_after(max(2 * HANDSHAKE_TIMEOUT, self._options.patience)) as waiting:
            await end.first_heard.wait()
        if waiting.cancelled_caught:
            end.tell(Event.IMPATIENT)
            far.give_up()
            return
        target = self._options.to
        try:
            sock = await dial.dial(target, TARGET_TIMEOUT)
        except (OSError, trio.TooSlowError) as error:
            why = dial.why(error)
            log.warning("%s: %s cannot be reached: %s", end.name, target, why, extra=repeats("target", why))
            end.tell(Event.BROKE_HERE)
            return
        plain = Plain(sock, end)
        end.attach(plain)
        end.said()
        await plain.run()

    def _new_end(self, role: Role) -> LaneEnd | None:
        self._count += 1
        if len(self._ends) >= self._most:
            return None
        try:
            return LaneEnd(role, f"connection {self._count}", self._memory)
        except MemoryError:
            return None

    async def _live(
        self, end: LaneEnd, local: Callable[[], Awaitable[None]], far: Callable[[], Awaitable[None]]
    ) -> None:
        """Runs both sides of one connection until it is over."""
        self._ends.add(end)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(local)
                await far()
                nursery.cancel_scope.cancel()
        except Exception:
            log.exception("%s: internal error: it is reset, the others go on", end.name)
        finally:
            self._ends.discard(end)
            if end.local is not None:
                end.local.reset()
            end.over.set()
            end.release()


def _tell_not_accepted(error: OSError) -> None:
    log.warning("cannot accept a connection: %s", error.strerror, extra=repeats("accept", error.errno))


async def serve(options: TunnelOptions) -> None:
    """Serves until SIGTERM, SIGINT or SIGQUIT. Raises OperatorError where it cannot begin."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that closed, a habit of log rotation
    tunnel, notifier = Tunnel(options), Notifier()
    with trio.open_signal_receiver(*_ENDS) as ends:
        async with trio.open_nursery() as nursery:
            bound: listener.Bound = await nursery.start(tunnel.run)
            where = f"{'session' if options.answers else 'plain'} side at {bound.address}"
            notifier.ready(f"tunnel, {where}")
            log.info("tunnel: %s, to %s", where, options.to)
            async for number in ends:
                log.info("tunnel: %s, ending", signal.Signals(number).name)
                notifier.stopping("ending")
                break
            await tunnel.end()
            nursery.cancel_scope.cancel()
