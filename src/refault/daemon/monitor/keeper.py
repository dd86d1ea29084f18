"""What outlives every end of refault: our end of the connection to QEMU's monitor, the sockets where
clients come, and their connections. QEMU's own end ends them all.

QEMU is passed the first with `getfd`, and the ends of the pairs in which the others are kept (kept/lot.py).
It never uses them; it makes them blocking.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import socket
from collections.abc import Callable, Iterable, Sequence

import msgspec
import trio

from refault.daemon.host.fd_store import FdStore
from refault.daemon.host.handed import claim_stored, spare_stored
from refault.daemon.host.repeats import repeats
from refault.daemon.kept.left import Left
from refault.daemon.kept.lot import Lot
from refault.daemon.kept.orphans import claim
from refault.daemon.kept.recorder import Recorder
from refault.daemon.kept.sockets import Identity, cookie_of, end_for_all, may_take, named
from refault.daemon.kept.taken import forget_stored
from refault.daemon.kernel.process import file_limit, holds, start_of, user_of
from refault.qmp.decoding import decode_members
from refault.qmp.journal import Kind
from refault.qmp.multiplexer import Multiplexer, nobody
from refault.qmp.replay import Called, Came
from refault.qmp.splitter import ERROR, VERB_MASK, Message

log = logging.getLogger("refault.qmp")

KEPT_TIMEOUT = 10.0
RELEASE_TIMEOUT = 1.0
WELCOME_AFTER = 0.1
"""Seconds after which a client is greeted though it is not known whether its connection is kept."""
_ASK_AGAIN = 1.0
"""Seconds after which a QEMU that refused may be asked again: it may have made its machine (preconfig)."""
_STORE_AGAIN = 0.02
"""Seconds after which a service manager is told again whose queue had no room."""
_LEFT_OVER = 64
"""Connections that have ended and are kept yet, above which they are cleared away."""


class Keeper:
    """Of one monitor. `fronts` gives the sockets where clients come, `clients` those of clients; `borrows`
    tells whether clients come to a socket that is another process's."""

    def __init__(
        self,
        name: str,
        core: Multiplexer,
        recorder: Recorder,
        *,
        flush: Callable[[], None],
        fronts: Callable[[], Iterable[socket.socket]],
        clients: Callable[[], Iterable[socket.socket]],
        borrows: Callable[[], bool],
    ) -> None:
        self.on = False
        """Whether QEMU holds our end of its monitor, without which nothing else need be kept."""
        self.trouble: str | None = None
        """Why it does not."""
        self.pid = self.started = 0
        """Of QEMU's process."""
        self.upstream: Identity | None = None
        self.stored = False
        """Whether the service manager holds all this, for it cannot be taken out of QEMU's process."""
        self._store = FdStore()
        self.lots_held: list[Identity] = []
        """By which QEMU holds the ends of the lots."""
        self._name = name
        self._core = core
        self._recorder = recorder
        self._flush = flush
        self._fronts = fronts
        self._clients = clients
        self._borrows = borrows
        self._lots: list[Lot] = []
        """Two: the first has all that is kept, the other takes over what is still of use."""
        self._kept: dict[socket.socket, bytes] = {}
        self._came: dict[socket.socket, str] = {}
        """Of those the clients that have not joined, and where they came."""
        self._claim: socket.socket | None = None
        """By which another refault sees that this connection of QEMU's is ours."""
        self._left_over = 0
        self._most: float = math.inf
        """Connections that may be kept, those of other VMs included."""
        self._asked_at = -_ASK_AGAIN
        self._asking = False
        self._ends = False
        """Whether QEMU is to hold nothing after all, which is being asked to."""
        self._told = False
        """Whether QEMU has been told to let go of all, and will when it comes to that."""
        self._settled = trio.Event()

    async def settled(self) -> None:
        """Waits, not for long, until it is known whether connections are kept, where QEMU is being asked."""
        if self._asking:
            with trio.move_on_after(WELCOME_AFTER):
                await self._settled.wait()

    def ask_again(self) -> None:
        """QEMU may take by now what it has refused."""
        self._asked_at = -_ASK_AGAIN

    async def begin(self, sock: socket.socket, pid: int | None) -> None:
        """Has QEMU hold our end of its monitor, `sock`; from then on all else is kept."""
        if self._asking or self.on or trio.current_time() < self._asked_at + _ASK_AGAIN:
            return
        self._asked_at = trio.current_time()
        self._asking, self._ends, self._told = True, False, False
        self._settled = trio.Event()
        asked: list[Identity] = []
        try:
            self._look_at(pid, local=sock.family == socket.AF_UNIX)
            self._close_lots()
            self._lots = [Lot(), Lot()]
            ends = [end for lot in self._lots for end in lot.ends]
            upstream, self.lots_held = named(sock), [named(end) for end in ends]
            self.upstream = upstream
            self._claims(upstream)
            if not self._recorder.begin():  # whoever follows must find what QEMU may hold from here on
                raise OSError("what clients do cannot be written down")
            await self._hold_now(sock, upstream, asked)
            if not self.stored and not holds(self.pid, upstream.inode):
                raise OSError("what is behind its monitor is not its process")
            for end, identity in zip(ends, self.lots_held, strict=True):
                await self._hold_now(end, identity, asked)
        except (OSError, trio.TooSlowError) as error:
            if self._ends:
                return
            self.trouble = (
                error.strerror or str(error) if isinstance(error, OSError) else "it does not answer"
            )
            log.info(
                "%s: the end of refault will disconnect clients, for QEMU holds no connections: %s",
                self._name,
                self.trouble,
                extra=repeats((self._name, "kept"), self.trouble),
            )
            self._settled.set()
            await self._give_back(asked)
            return
        finally:
            self._asking = False
            self._settled.set()
        self.on, self.trouble = True, None
        for each in (*self._fronts(), *self._clients()):
            self.hold(each)
        if not self._recorder.begin():
            await self.give_up()

    def _look_at(self, pid: int | None, *, local: bool) -> None:
        self.pid, self.started = pid or 0, 0
        try:
            if pid is None or (started := start_of(pid)) is None:
                raise OSError("its process is not known")
            self.started = started
            may_take(pid)
        except OSError as error:
            self.stored = local and self._store.offered and not self._borrows()  # nor could that be had again
            if not self.stored:
                raise
            log.info(
                "%s: systemd keeps clients' connections over the end of refault, for QEMU cannot: %s",
                self._name,
                error.strerror or error,
                extra=repeats((self._name, "kept"), "systemd"),
            )
        else:
            self.stored = False
        self._most = _most_in_flight(self.pid)

    def _claims(self, upstream: Identity | None) -> None:
        if self._claim is not None:
            self._claim.close()
            self._claim = None
        if upstream is not None:
            with contextlib.suppress(OSError):
                self._claim = claim(upstream.cookie)

    async def _hold_now(self, sock: socket.socket, identity: Identity, asked: list[Identity]) -> None:
        """Raises OSError where QEMU refuses, trio.TooSlowError where it does not answer."""
        asked.append(identity)
        if self.stored:
            await self._store_now(sock, identity)
            return
        answered = trio.Event()
        told: list[Message | None] = []

        def done(reply: Message | None) -> None:
            told.append(reply)
            answered.set()

        self._call("getfd", identity, done, sock)
        with trio.fail_after(KEPT_TIMEOUT):
            await answered.wait()
        [reply] = told
        sock.setblocking(False)
        if reply is None:
            raise OSError("it went away")
        if self._ends:
            raise OSError("refault ends")
        if reply.shape & VERB_MASK == ERROR:
            raise OSError(msgspec.convert(decode_members(reply)["error"], dict[str, str])["desc"])

    async def _store_now(self, sock: socket.socket, identity: Identity) -> None:
        """Raises OSError where the manager does not keep it, also where it reads nothing."""
        until = trio.current_time() + KEPT_TIMEOUT
        while True:
            try:
                self._store.put(identity.name, sock)
                return
            except BlockingIOError as error:
                if trio.current_time() > until:
                    raise OSError("systemd does not read what it is told") from error
            await trio.sleep(_STORE_AGAIN)
            if self._ends:
                raise OSError("refault ends")

    def resume(
        self,
        left: Left,
        lots: list[Lot],
        kept: dict[socket.socket, bytes],
        came: dict[socket.socket, str],
    ) -> None:
        """An earlier refault has begun, and this is kept. `came`: clients that are yet to join."""
        self.pid, self.started, self.stored = left.pid, left.started, left.stored
        spare_stored(left.held)
        self.upstream, self.lots_held = left.upstream, left.lots
        self._claims(left.upstream)
        self._most = _most_in_flight(left.pid)
        self._lots, self._kept, self._came = lots, dict(kept), dict(came)
        self.on, self.trouble = True, None

    def goes_on(self) -> None:
        """The connection of an earlier refault is served: it is in nobody else's hands any more."""
        if self.stored and self.upstream is not None:
            claim_stored([each.name for each in (self.upstream, *self.lots_held)])

    def cookie(self, sock: socket.socket) -> bytes | None:
        """By which it is found again; None where it is not kept."""
        return self._kept.get(sock)

    @property
    def came(self) -> dict[bytes, str]:
        """Clients that are kept and have not joined, by their cookies, and where they came."""
        return {self._kept[sock]: where for sock, where in self._came.items() if sock in self._kept}

    def comes(self, sock: socket.socket, where: str) -> None:
        """Keeps a client that was just accepted: the next refault serves it, if this one does not come to."""
        if self.on and sock not in self._kept:
            cookie = cookie_of(sock)
            self._recorder.tell(Kind.CAME, Came(cookie, where))
            self._came[sock] = where
            self.hold(sock, cookie)

    def joins(self, sock: socket.socket) -> bytes | None:
        """It is a client of the core now: it is kept, if it can be. Its cookie."""
        self._came.pop(sock, None)
        return self.hold(sock)

    def hold(self, sock: socket.socket, cookie: bytes | None = None) -> bytes | None:
        """Keeps it, if it can be; its cookie."""
        if not self.on:
            return None
        if sock not in self._kept:
            try:
                self._put(sock)
            except OSError as error:
                log.info(
                    "%s: a connection is not kept over the end of refault: %s",
                    self._name,
                    error.strerror,
                    extra=repeats((self._name, "a connection"), error.errno),
                )
                return None
            self._kept[sock] = cookie or cookie_of(sock)
        return self._kept[sock]

    def _put(self, sock: socket.socket) -> None:
        if Lot.in_flight >= self._most:
            raise OSError(errno.ETOOMANYREFS, "QEMUs of this user are to be able to pass descriptors, too")
        try:
            self._lots[0].put([sock])
        except BlockingIOError:  # it is full
            self.tidy()
            self._lots[0].put([sock])

    def tidy(self) -> None:
        """Clears away what is kept and has ended. Raises OSError."""
        now, then = self._lots
        try:
            then.empty()  # a refault that was killed may have left something
            then.put(self._kept)
        except OSError:
            then.empty()
            raise
        self._lots = [then, now]
        now.empty()
        self._left_over = 0

    def tidy_if_possible(self) -> None:
        """The same, where it can be now."""
        try:
            self.tidy()
        except OSError as error:
            log.info("%s: what is kept for nobody stays: %s", self._name, error.strerror)
            self._left_over = 0

    def hold_fronts(self) -> None:
        """Keeps the sockets where clients come, which are new."""
        if self.on and self._recorder.on:
            for sock in self._fronts():
                self.hold(sock)
            self._recorder.begin()

    def end(self, sock: socket.socket) -> None:
        """It is about to be closed: it ends for all who have it."""
        self._came.pop(sock, None)
        if self._kept.pop(sock, None) is None:
            return
        listens = end_for_all(sock)
        self._left_over += 1
        if self.on and (listens or self._left_over > _LEFT_OVER):  # its address is to be free
            self.tidy_if_possible()

    def end_upstream(self, sock: socket.socket, *, unsent: bool) -> None:
        """The connection to QEMU is about to be closed. `unsent`: not all that it was told has gone there.

        A QEMU that has been told to let go, and is stopped or busy, does so when it comes to that, and with
        our end of it the connection ends. Were that shut down now, QEMU would read nothing more of it
        (chardev/char-socket.c, tcp_chr_hup), and hold what it holds for as long as it runs.
        """
        if self.upstream is not None and (unsent or not self._told):
            end_for_all(sock)

    def hand_over(self) -> None:
        """All that is kept is the next refault's."""
        self._kept.clear()
        self._came.clear()
        self.upstream = None
        self._claims(None)
        self.on = False
        self._close_lots()

    def lost(self) -> None:
        """The connection to QEMU is over."""
        self.on = False
        if self.stored and self.upstream is not None:
            forget_stored([each.name for each in (self.upstream, *self.lots_held)])
        self.upstream = None
        self._claims(None)
        self.ask_again()  # the next one has refused nothing
        self._recorder.end()
        self._empty_lots()

    async def let_go(self) -> None:
        """Nothing is kept any more: there will be no other refault. What is ours alone then ends with us."""
        self._ends = self._asking
        if self.upstream is None or not (self.on or self._asking):
            return
        self.on = False
        with trio.move_on_after(RELEASE_TIMEOUT) as waits:
            await self._give_back([self.upstream, *self.lots_held])
        if waits.cancelled_caught and self._core.ready:
            self._recorder.end()  # it could not tell of what comes now
            self._core.call_all()
            self._flush()
            self._told = True

    async def _give_back(self, held: Sequence[Identity]) -> None:
        """Has QEMU close what it holds, and waits for it. What it holds is known to who comes after a kill
        until it does: else nobody could get at the monitor any more."""
        self._empty_lots()
        if self.stored:
            forget_stored([each.name for each in held])
        elif held and self._core.ready:
            answered = trio.Event()
            for identity in held[:0:-1]:
                self._call("closefd", identity, nobody)
            self._call("closefd", held[0], lambda _: answered.set())  # the last one: all else hangs on it
            await answered.wait()
        self._recorder.end()
        self.upstream = None
        self._claims(None)

    async def give_up(self) -> None:
        """The next refault would find nothing written down. Waits until QEMU has let go, however long that
        takes: asked anew before, it would come to hold more and more."""
        self.trouble = "what clients do cannot be written down"
        if self.upstream is None or not self.on:
            return
        self.on, self._asking = False, True
        try:
            await self._give_back([self.upstream, *self.lots_held])
        finally:
            self._asking = False

    def _empty_lots(self) -> None:
        """Nobody but us has any of it from now on."""
        self._kept.clear()
        self._came.clear()
        for lot in self._lots:
            lot.empty()
        self._close_lots()

    def _close_lots(self) -> None:
        for lot in self._lots:
            lot.close()
        self._lots = []

    def _call(
        self,
        command: str,
        identity: Identity,
        done: Callable[[Message | None], None],
        sock: socket.socket | None = None,
    ) -> None:
        arguments: dict[str, object] = {"fdname": identity.name}
        self._recorder.tell(Kind.CALLED, Called(command, arguments, False, sock is not None, True))
        fd = sock.dup().detach() if sock is not None else -1
        self._core.call(command, arguments, oob=False, fd=fd, done=done, beside=True)
        self._flush()


def _most_in_flight(pid: int) -> float:
    """How many connections may be kept beside a QEMU. The kernel counts what is in flight for each user, and
    refuses to pass descriptors who may have fewer than that (net/core/scm.c, too_many_unix_fds): a QEMU of
    our own user could pass none to vhost-user back ends.
    """
    try:
        return file_limit(pid) // 2 if user_of(pid) == os.getuid() != 0 else math.inf
    except (OSError, ValueError, IndexError):
        return math.inf
