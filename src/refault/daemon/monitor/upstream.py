"""The connection to one QEMU's monitor: made, kept, read from, sent to, and made again."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable

import trio

from refault.daemon.host.turns import Turns
from refault.daemon.kept.recorder import Recorder
from refault.daemon.kernel.inotify import watched
from refault.daemon.kernel.peer import Peer, peer_of
from refault.daemon.kernel.polled import hung_up
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.dial import CONNECT_TIMEOUT, dial, pauses, prepare, why
from refault.daemon.monitor.first_client import FirstClient
from refault.daemon.monitor.keeper import Keeper
from refault.daemon.monitor.passed import Passed
from refault.daemon.monitor.presence import Presence, Qemu
from refault.daemon.monitor.wire import Wire
from refault.qmp.greeting import NotQmpError
from refault.qmp.journal import Kind
from refault.qmp.multiplexer import Multiplexer

log = logging.getLogger("refault.qmp")

_READ = 64 << 10
_GREETING_TIMEOUT = 10.0
NOT_TOLD = 30.0
"""Seconds after which a socket's file is looked for where the kernel has not told of it: it may lie behind a
mount that was made since."""
URGENT_AFTER = 0.1
_LISTENS_WITHIN = 1.0
"""Seconds from when a QEMU has bound its socket, within which it listens however busy the host is."""
_LISTENS_SOON = 0.005
_STEADY_AFTER = 1.0
"""Seconds a connection has lasted of a QEMU that does not end again as soon as it has come."""


class Upstream:
    """One connection at a time. `flush` sends what the core has to say, to whomever; `lost` is called once
    for each connection, when it is over; `unanswered` where somebody else seems to hold the monitor.
    """

    def __init__(
        self,
        name: str,
        address: Address,
        core: Multiplexer,
        presence: Presence,
        first_client: FirstClient,
        *,
        flush: Callable[[], None],
        lost: Callable[[], None],
        unanswered: Callable[[], None],
        recorder: Recorder,
        keeper: Keeper,
    ) -> None:
        self.peer = Peer(None, None)
        """Who is at the other end."""
        self.passed = Passed()
        self._name = name
        self._address = address
        self._core = core
        self._presence = presence
        self._first_client = first_client
        self._flush_all = flush
        self._lost = lost
        self._unanswered = unanswered
        self._comes, self._came = trio.open_memory_channel[socket.socket](0)
        self._recorder = recorder
        self._keeper = keeper
        self.taken: socket.socket | None = None
        """The connection of an earlier refault, which `run` is to go on with."""
        self._wire: Wire | None = None
        self._connection: trio.Nursery | None = None
        self._last_complaint = ""
        self._turns = Turns(name)
        self._urgent_waits: object = None
        """The command because of which what is out-of-band waits, and a task for that."""

    async def run(self) -> None:
        """Connects, or is connected to, again and again, until cancelled."""
        shortest, longest = pauses(self._address)
        delay = after_end = shortest
        while True:
            pause = self._presence.pause
            try:
                taken, self.taken = self.taken, None
                if taken is None:
                    await self._first_client.wait()
                sock = taken or await self._reach()
                began = trio.current_time()
                await self._converse(sock, goes_on=taken is not None)
                # To meet a QEMU is much work, which who ends again and again is not to make for all others.
                steady = trio.current_time() - began >= _STEADY_AFTER
                delay = after_end = shortest if steady else min(2 * after_end, longest)
            except NotQmpError as error:
                self._complain(f"what answers at {self._address} is no QMP monitor: {error}")
                delay, pause = longest, trio.sleep
            except trio.TooSlowError:
                self._complain(
                    f"nothing answers at {self._address}: another client may hold the monitor; detach it,"
                    " or name a monitor of its own for refault"
                )
                self._unanswered()
                pause = trio.sleep
            except ConnectionRefusedError as error:
                if self._has_just_bound():  # who comes now waits, as for one that is being connected to
                    await trio.sleep(_LISTENS_SOON)
                    continue
                self._complain(f"no QEMU at {self._address} yet: {why(error)}")
            except FileNotFoundError as error:
                self._complain(f"no QEMU at {self._address} yet: {why(error)}")
                if delay == longest:
                    self._presence.set(self._nobody)
                    await self._until_it_comes(self._address.path or "")
                    delay = shortest
                    continue
            except OSError as error:
                self._complain(f"no QEMU at {self._address} yet: {why(error)}")
            self._presence.set(self._nobody)
            await pause(delay)
            delay = min(1.5 * delay, longest)

    def _has_just_bound(self) -> bool:
        """Whether a QEMU has made its socket right now, on which it does not listen yet."""
        try:
            bound = os.stat(self._address.path or "").st_mtime
        except OSError:  # also a name that is in no file system
            return False
        return abs(time.time() - bound) < _LISTENS_WITHIN

    def take_over(self, sock: socket.socket) -> None:
        """Goes on, in `run`, with the connection that an earlier refault has made and negotiated."""
        self.taken = sock
        self._wire = Wire(sock, trio.CancelScope(), self._recorder)  # clients may speak before `run`

    @property
    def unsent(self) -> list[tuple[bytes | memoryview, int]]:
        """What was flushed and is not there yet."""
        return list(self._wire.backlog) if self._wire is not None else []

    def keep(self) -> None:
        """Has QEMU hold our end of the connection, and what clients use."""
        if self._wire is not None and self._connection is not None:
            self.start_soon(self._keeper.begin, self._wire.sock, self.peer.pid)

    def give_up_soon(self) -> None:
        """Has QEMU hold nothing: at once, or where an earlier refault's connection is gone on with, as soon
        as it is."""
        if self._connection is not None:
            self.start_soon(self._keeper.give_up)

    async def take(self, sock: socket.socket) -> None:
        """A QEMU has connected to us: its turn comes when the one before it is gone."""
        try:
            await self._comes.send(prepare(sock))
        except BaseException:
            sock.close()
            raise

    @property
    def _nobody(self) -> Qemu:
        return Qemu.WAITING if self._first_client.holds else Qemu.AWAY

    @property
    def has_ended(self) -> bool:
        """Whether the connection's end is there to be read, behind what QEMU said before."""
        return self._wire is not None and hung_up(self._wire.sock)

    def ready(self) -> None:
        """Commands can be sent: what was complained of before is over."""
        self._last_complaint = ""

    @property
    def converses(self) -> bool:
        """Whether there is a connection, with which tasks can end."""
        return self._connection is not None

    def start_soon(self, task: Callable[..., Awaitable[object]], *args: object) -> None:
        """Starts a task that ends with the connection."""
        assert self._connection is not None  # noqa: S101 - there is one
        self._connection.start_soon(task, *args)

    def flush(self) -> None:
        """Sends what goes at once of what the core has for QEMU; the rest waits for a task."""
        core = self._core
        out = core.take_upstream()
        if not out:
            return
        wire = self._wire
        if wire is None:
            for _, fd in out:
                if fd >= 0:
                    self._recorder.close(fd)
            return
        self.passed.sends(out)
        waiting = bool(wire.backlog)
        if len(out) == 1 or any(fd >= 0 for _, fd in out):
            wire.backlog.extend(out)
        else:
            wire.backlog.append((b"".join([data for data, _ in out]), -1))
        if not waiting:
            wire.flush()
            if wire.backlog and self._connection is not None:
                self.start_soon(self._drain, wire)

    def mind_urgent(self) -> None:
        """What is out-of-band waits for no descriptor for long."""
        descriptor = self._core.descriptors.request
        if self._core.urgent and self._urgent_waits is not descriptor and self._connection is not None:
            self._urgent_waits = descriptor
            self.start_soon(self._pass_urgent, descriptor)

    async def _pass_urgent(self, descriptor: object) -> None:
        try:
            await trio.sleep(URGENT_AFTER)
        finally:
            if self._urgent_waits is descriptor:
                self._urgent_waits = None
        if self._core.urgent and self._core.descriptors.request is descriptor:
            self._recorder.note(Kind.URGENT, 0)
            self._core.pass_urgent()
        self._flush_all()

    async def _drain(self, wire: Wire) -> None:
        while wire.backlog and await wire.writable():
            wire.flush()

    async def _until_it_comes(self, path: str) -> None:
        """Between two looks for a QEMU whose socket's file is not there: the kernel tells when it comes."""
        with watched(path) as changes:
            if os.path.lexists(path):  # noqa: ASYNC240 - it waits for nothing
                return
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._ends_with, changes.wait, nursery.cancel_scope)
                await self._presence.pause(NOT_TOLD)
                nursery.cancel_scope.cancel()

    @staticmethod
    async def _ends_with(wait: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        await wait()
        scope.cancel()

    def _complain(self, text: str) -> None:
        """One line for each new trouble, not for each attempt."""
        if text != self._last_complaint:
            log.warning("%s: %s", self._name, text)
            self._last_complaint = text

    async def _reach(self) -> socket.socket:
        if self._address.server:
            self._presence.set(self._nobody)
            sock = await self._came.receive()
            self._presence.set(Qemu.DIALLED)
            return sock
        self._presence.set(Qemu.DIALLED)
        return await dial(self._address, CONNECT_TIMEOUT)

    async def _converse(self, sock: socket.socket, *, goes_on: bool = False) -> None:
        """One connection to QEMU, from its greeting to its end. One that `goes_on` is greeted already."""
        core = self._core
        try:
            with sock:
                self.peer = peer_of(sock)
                if not goes_on:
                    core.upstream_connected(b'"refault-%s"' % os.urandom(8).hex().encode())
                trouble: Exception | None = None
                async with trio.open_nursery() as nursery:
                    self._connection = nursery
                    try:
                        if self._wire is not None:
                            self._wire.ends_with(nursery.cancel_scope)
                            self._go_on(self._wire)
                        else:
                            self._wire = Wire(sock, nursery.cancel_scope, self._recorder)
                        with trio.fail_after(_GREETING_TIMEOUT) as greeting:
                            await self._read(sock, greeting)
                    except (NotQmpError, trio.TooSlowError) as error:
                        trouble = error  # outside of the nursery, which would wrap it
                    except Exception:
                        log.exception("%s: internal error; the connection to QEMU is made anew", self._name)
                    finally:
                        self._connection = None  # no task may come to a nursery that is about to close
                        trio.lowlevel.notify_closing(sock)
                        self._keeper.end_upstream(sock, unsent=bool(self.unsent))
                        nursery.cancel_scope.cancel()
                if core.ungreeted and not core.greeting:
                    raise NotQmpError(f"it sent {core.ungreeted!r} and no greeting") from trouble
                if trouble:
                    raise trouble
        finally:
            self._lose()

    def _go_on(self, wire: Wire) -> None:
        core = self._core
        self._keeper.goes_on()
        if wire.backlog:
            self.start_soon(self._drain, wire)
        self._first_client.connected()
        self._presence.set(Qemu.THERE)
        core.on_ready()
        for request in list(core.asked.values()):
            core.ask(request)
        for client in list(core.clients.values()):  # what waited for a descriptor that is lost goes on
            self._recorder.note(Kind.MORE, client.number)
            core.receive(client, b"")
        self._recorder.note(Kind.MORE, 0)
        core.receive_upstream(b"")
        self._flush_all()
        if not self._recorder.on:
            self.start_soon(self._keeper.give_up)

    async def _read(self, sock: socket.socket, greeting: trio.CancelScope) -> None:
        core = self._core
        if core.greeting:
            greeting.deadline = float("inf")
        while True:
            if core.upstream_more:
                turn = self._turns.begin()
                self._recorder.note(Kind.MORE, 0)
                data = b""
            else:
                await trio.lowlevel.wait_readable(sock)
                turn = self._turns.begin()
                try:
                    data, _ = self._recorder.receive(sock, 0, _READ, takes=False)
                except BlockingIOError:
                    continue
                except OSError:  # reset, or over TCP nobody there any more (keepalive)
                    return
                if not data:
                    return
            core.receive_upstream(data)
            if core.greeting and self._presence.qemu is not Qemu.THERE:
                greeting.deadline = float("inf")
                self._first_client.connected()
                self._presence.set(Qemu.THERE)
            self._flush_all()
            await self._turns.end(turn, more=core.upstream_more)

    def _lose(self) -> None:
        wire, self._wire, self._connection = self._wire, None, None
        if wire is not None:
            wire.discard()
        self.passed.clear()
        self._lost()
