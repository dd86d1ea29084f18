"""The clients of one QEMU's monitor: accepted or dialled, read from, sent to, and let go.

Who comes while there is no QEMU has it looked for, and is closed at once if there is none. While one is
being connected to, clients wait for it to greet; where wait=on asks for it, as long as it takes.
"""

from __future__ import annotations

import logging
import math
import operator
import socket
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import trio

from refault.daemon.host.descriptors import why_few
from refault.daemon.host.repeats import repeats
from refault.daemon.host.turns import Turns
from refault.daemon.kept.left import About
from refault.daemon.kept.recorder import TAKEN_WITHIN, Recorder
from refault.daemon.kernel.polled import hung_up
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.audit import Recorded
from refault.daemon.monitor.caller import caller_of, may_speak
from refault.daemon.monitor.dial import CONNECT_TIMEOUT, dial, pauses, prepare, why
from refault.daemon.monitor.first_client import FirstClient
from refault.daemon.monitor.front import Front
from refault.daemon.monitor.keeper import Keeper
from refault.daemon.monitor.presence import Presence, Qemu
from refault.daemon.monitor.wire import Wire
from refault.qmp.journal import Kind
from refault.qmp.multiplexer import Multiplexer
from refault.qmp.replay import Joined
from refault.qmp.session import Client, Limits, Request

log = logging.getLogger("refault.qmp")

_READ = 4 << 10
_READ_MORE = 64 << 10
"""Bytes to read from a client at a time, and while it is in the midst of a longer message."""
_GREETED_WITHIN = 10.0
_END_READ_WITHIN = 1.0
_CLOSE_TIMEOUT = 5.0
_FINISH_TIMEOUT = 0.3
_HANG_UP_CHECK = 1.0


class Clients:
    """Every client of one monitor. `flush` sends what the core has to say, to whomever."""

    def __init__(
        self,
        name: str,
        core: Multiplexer,
        limits: Limits,
        presence: Presence,
        first_client: FirstClient,
        flush: Callable[[], None],
        qemu_has_ended: Callable[[], bool],
        recorder: Recorder,
        keeper: Keeper,
        seek_keeper: Callable[[], None],
    ) -> None:
        self.total = 0
        """Clients since the start."""
        self._name = name
        self._core = core
        self._limits = limits
        self._presence = presence
        self._first_client = first_client
        self._flush_all = flush
        self._qemu_has_ended = qemu_has_ended
        """Whether its end is there to be read, behind what else is."""
        self._recorder = recorder
        self._keeper = keeper
        self._seek_keeper = seek_keeper
        self._taken: list[tuple[Client, Wire, Address]] = []
        """Those of an earlier refault."""
        self._came: list[tuple[Address, socket.socket]] = []
        """Those that it had accepted and not served."""
        self._of: dict[int, Address] = {}
        self._early: dict[Client, bool] = {}
        """Who has not been greeted, and whether he came where wait=on is."""
        self._paused: set[Client] = set()
        self._recorded: dict[Client, Recorded] = {}
        self._late: dict[Client, int] = {}
        """Who is yet to be sent bytes that are written down and may be a secret, and how many."""
        self.late_sent = False
        """Set when such bytes were sent, or are not to be."""
        self._turns = Turns(name)
        self._nursery: trio.Nursery

    async def run(
        self, managers: Sequence[Address], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serves those who come by `fronts`, and dials `managers`, until cancelled."""
        taken, self._taken = self._taken, []
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for address in managers:
                mine = [each for each in taken if each[2] == address]
                nursery.start_soon(self._dial_manager, address, mine)
            for each in taken:
                if each[2] not in managers:
                    nursery.start_soon(self._go_on, *each)
            came, self._came = self._came, []
            for address, sock in came:
                nursery.start_soon(self._take_again, address, sock)
            task_status.started()
            await self._turn_away()

    def take_over(self, client: Client, sock: socket.socket, address: Address) -> None:
        """Goes on, in `run`, with a client of an earlier refault."""
        wire = Wire(sock, trio.CancelScope(), self._recorder, client.number)
        client.carried_by(wire)
        self._of[client.number] = address
        if address.rule.audit:
            self._recorded[client] = Recorded(self._name, address, caller_of(sock))
        if client.unsent > 0:
            self._late[client] = client.unsent
        self._taken.append((client, wire, address))

    def comes_again(self, sock: socket.socket, address: Address) -> None:
        """Serves, in `run`, a client that an earlier refault had accepted."""
        self._came.append((address, sock))

    def close_taken(self) -> None:
        """There will be no `run`: another refault is to go on."""
        for _, sock in self._came:
            sock.close()
        for _, wire, _ in self._taken:
            wire.sock.close()

    def hand_over(self) -> None:
        """What is unsent is the next refault's to send."""
        for client in self._core.clients.values():
            _wire(client).send_no_more()

    def unsent(self, client: Client) -> list[bytes | memoryview]:
        """What was taken from its `out` and is not sent yet."""
        wire = client.transport
        return [data for data, _ in wire.backlog] if isinstance(wire, Wire) else []

    def forget_when_sent(self) -> None:
        """What clients have not been sent yet may be a secret that is written down: see `late_sent`."""
        self._late = {client: client.unsent for client in self._core.clients.values() if client.unsent > 0}

    def forgotten(self) -> None:
        """What was written down is gone: see `late_sent`."""
        self.late_sent = False

    def goes_on_from(self, earlier: Clients) -> None:
        """Counts on where `earlier` ends, in whose place it is."""
        self.total = earlier.total

    def connections(self) -> dict[int, tuple[socket.socket, Address]]:
        """Those that are served, by their numbers."""
        core = self._core
        return {
            number: (_wire(core.clients[number]).sock, address)
            for number, address in self._of.items()
            if number in core.clients
        }

    def audit(self, request: Request) -> None:
        """A command of a client that is put on record; in the midst of its way to QEMU, which goes on."""
        try:
            self._recorded[request.client].tell(request)
        except Exception:
            log.exception("%s: internal error; a command is not on record", self._name)

    def front(self, address: Address) -> Front:
        """Where clients come to `address`."""
        if not _is_local(address) and not address.rule.read_only:
            log.warning("%s: whoever can reach %s controls the VM; prefer a unix socket", self._name, address)
        when = partial(self._presence.until, partial(operator.is_, Qemu.THERE))
        return Front(
            self._name,
            address,
            partial(self._take, address),
            when if address.fd is not None else None,
            why_not=why_few,
            bound=self._new_sockets,
            end=self._keeper.end,
        )

    def _new_sockets(self) -> None:
        """A front listens anew: QEMU is to hold its sockets too."""
        self._keeper.hold_fronts()

    def flush(self) -> None:
        """Sends what goes at once of what the core has for clients; the rest waits for tasks."""
        core = self._core
        dirty = core.dirty.copy()
        core.dirty.clear()
        for client in dirty:
            self._flush(client)

    def resume(self) -> None:
        """Those who sent too much are read from again, where their queue is short enough by now."""
        if not self._paused:
            return
        for client in [client for client in self._paused if client.resumable]:
            self._paused.discard(client)
            _wire(client).resume()

    def _flush(self, client: Client) -> None:
        wire = _wire(client)
        if client.overflow:
            if client.connected and not wire.broken:
                wire.send_no_more()
                log.warning(
                    "%s: client %d does not read its events and replies: disconnected with %d bytes unread",
                    self._name,
                    client.number,
                    client.unsent,
                )
            wire.scope.cancel()
            return
        if out := client.out:
            data = out[0] if len(out) == 1 else b"".join(out)
            out.clear()
            waiting = bool(wire.backlog)
            wire.backlog.append((data, -1))
            if not waiting:
                self._send(client, wire)
                if wire.backlog:
                    self._nursery.start_soon(self._drain, client, wire)
        if client.closing:
            if not wire.backlog:
                wire.scope.cancel()
            elif wire.scope.deadline == math.inf:
                wire.ends_within(_CLOSE_TIMEOUT)

    def _send(self, client: Client, wire: Wire) -> None:
        sent = wire.flush()
        client.sent(sent)
        if client in self._late:
            self._late[client] -= sent
            if self._late[client] <= 0:
                del self._late[client]
                self.late_sent = True

    async def _drain(self, client: Client, wire: Wire) -> None:
        while wire.backlog and not wire.broken:
            if not await wire.writable():
                return
            turn = self._turns.begin()
            self._send(client, wire)
            if self.late_sent:
                self._flush_all()  # it need not be on record any longer
            await self._turns.end(turn, more=False)
        self._core.dirty.append(client)
        self._flush_all()

    async def _take(self, address: Address, sock: socket.socket) -> None:
        self._keeper.comes(sock, str(address))
        await self._turns.come()
        if not self._may_speak(address, sock):
            self._keeper.end(sock)
            sock.close()
            return
        if self._qemu_has_ended():  # who comes now comes for the next one
            with trio.move_on_after(_END_READ_WITHIN):
                await self._presence.change()
        self._presence.seek()
        self._seek_keeper()
        if _came_and_went(sock):  # QEMU need not take a copy of it
            self.total += 1
            self._keeper.end(sock)
            sock.close()
        else:
            self._nursery.start_soon(self._serve, prepare(sock), address)
        if address.wait:
            self._first_client.came(address)

    async def _take_again(self, address: Address, sock: socket.socket) -> None:
        try:
            await self._take(address, sock)
        except BaseException:
            self._keeper.end(sock)
            sock.close()
            raise

    def _may_speak(self, address: Address, sock: socket.socket) -> bool:
        if may_speak(sock, address.callers):
            return True
        caller = caller_of(sock)
        log.warning(
            "%s: who is at %s (%s) is not one of its allowed users and groups: closed",
            self._name,
            address,
            caller,
            extra=repeats((self._name, str(address), caller.uid), "not allowed"),
        )
        return False

    def _may_stay(self, *, waits: bool) -> bool:
        """Whether a client that has not been greeted is left to wait. `waits`: it came where wait=on is."""
        qemu = self._presence.qemu
        return qemu is not Qemu.AWAY and (waits or qemu is not Qemu.WAITING)

    async def _turn_away(self) -> None:
        """Closes those who came in vain, until cancelled."""
        while True:
            for client, waits in list(self._early.items()):
                wire = _wire(client)
                if client.greeted:
                    del self._early[client]
                    if not client.closing:
                        wire.ends_within(math.inf)
                elif not self._may_stay(waits=waits):
                    wire.scope.cancel()
            await self._presence.change()

    async def _dial_manager(self, address: Address, taken: Sequence[tuple[Client, Wire, Address]]) -> None:
        """Connects to a manager while there is a QEMU, as that would, once the one that is `taken` over is
        gone."""
        for each in taken:
            await self._go_on(*each)
        shortest, longest = pauses(address)
        delay = shortest
        complained = False
        while True:
            await self._presence.until(partial(operator.is_, Qemu.THERE))
            try:
                sock = await dial(address, CONNECT_TIMEOUT)
            except (OSError, trio.TooSlowError) as error:
                if not complained:
                    log.warning("%s: no manager at %s yet: %s", self._name, address, why(error))
                    complained = True
                await trio.sleep(delay)
                delay = min(2 * delay, longest)
                continue
            complained = False
            if self._may_speak(address, sock):
                delay = shortest
                await self._serve(sock, address)
            else:
                delay = longest
                sock.close()
            await trio.sleep(delay)

    async def _serve(self, sock: socket.socket, address: Address) -> None:
        """One client's connection, from greeting to close."""
        with sock, trio.CancelScope() as scope:
            try:
                if self._may_join(address):
                    await self._keeper.settled()
                    client, wire = self._join(sock, scope, address)
                    await self._serve_client(client, wire)
            finally:
                self._keeper.end(sock)

    def _may_join(self, address: Address) -> bool:
        if not self._core.greeting and not self._may_stay(waits=address.wait):
            return False
        if len(self._core.clients) >= self._limits.clients:
            log.warning(
                "%s: a client more than the %d allowed is refused",
                self._name,
                self._limits.clients,
                extra=repeats((self._name, "clients"), self._limits.clients),
            )
            return False
        return True

    def _join(self, sock: socket.socket, scope: trio.CancelScope, address: Address) -> tuple[Client, Wire]:
        """A client of the core. Once it is greeted its connection outlives us, if it can."""
        core, rule = self._core, address.rule
        wire = Wire(sock, scope, self._recorder, core.last_client + 1)
        cookie = self._keeper.joins(sock)
        if self._recorder.on:
            about = msgspec.Raw(msgspec.msgpack.encode(About(str(address), cookie)))
            joined = Joined(rule.read_only, sorted(rule.deny), rule.audit, about, rule.hide_pause)
            self._recorder.note(Kind.JOINED, wire.who, msgspec.msgpack.encode(joined))
        client = core.join(wire, rule)
        self._of[client.number] = address
        self.total += 1
        if rule.audit:
            self._recorded[client] = Recorded(self._name, address, caller_of(sock))
        if not client.greeted:
            self._early[client] = address.wait
            if not address.wait:
                wire.ends_within(_GREETED_WITHIN)
        return client, wire

    async def _go_on(self, client: Client, wire: Wire, address: Address) -> None:
        """A client of an earlier refault, to its close."""
        with wire.sock, wire.scope:
            await self._serve_client(client, wire)

    async def _serve_client(self, client: Client, wire: Wire) -> None:
        try:
            self._flush_all()
            await self._read_client(client, wire)
        except OSError:
            pass
        except Exception:
            log.exception("%s: internal error; client %d is disconnected", self._name, client.number)
        finally:
            if wire.backlog and not wire.broken:
                await self._finish(client, wire)
            self._leave(client, wire)

    def _leave(self, client: Client, wire: Wire) -> None:
        """Its connection is about to be closed."""
        self._paused.discard(client)
        self._early.pop(client, None)
        wire.send_no_more()
        self._recorder.note(Kind.LEFT, client.number)
        self._core.leave(client)
        self._of.pop(client.number, None)
        self._recorded.pop(client, None)
        self.late_sent |= self._late.pop(client, None) is not None
        trio.lowlevel.notify_closing(wire.sock)
        self._keeper.end(wire.sock)
        self._flush_all()

    async def _finish(self, client: Client, wire: Wire) -> None:
        """Has a message that is sent in part sent whole, if the client reads it at all."""
        with trio.move_on_after(_FINISH_TIMEOUT, shield=True):
            while wire.backlog and not wire.broken and await wire.writable():
                self._send(client, wire)

    async def _read_client(self, client: Client, wire: Wire) -> None:
        sock, core, splitter, recorder = wire.sock, self._core, client.splitter, self._recorder
        takes = sock.family == socket.AF_UNIX
        await self._until_taken(client, sock)
        while not client.half_closed:
            if client.paused and not client.closing and not await self._until_resumable(client, wire):
                return
            if splitter.more and not client.closing:
                turn = self._turns.begin()
                recorder.note(Kind.MORE, client.number)
                data, fd = b"", -1
            else:
                await trio.lowlevel.wait_readable(sock)
                turn = self._turns.begin()
                size = _READ if splitter.held < _READ else _READ_MORE
                if client.greeted and not core.ready and (size := _before_line_end(sock, size)) == 0:
                    if not await self._until_resumable(client, wire):
                        return
                    continue
                try:
                    data, fd = recorder.receive(sock, client.number, size, takes=takes)
                except BlockingIOError:
                    continue
                if not data:
                    if hung_up(sock):
                        return
                    recorder.note(Kind.HALF_CLOSED, client.number)
                    core.half_close(client)
                    self._flush_all()
                    break
            core.receive(client, data, fd)
            self._flush_all()
            if fd >= 0:
                await self._until_taken(client, sock)
            await self._turns.end(turn, more=splitter.more)
        while not hung_up(sock):  # noqa: ASYNC110 - nothing tells of it
            await trio.sleep(_HANG_UP_CHECK)

    async def _until_taken(self, client: Client, sock: socket.socket) -> None:
        """Leaves a descriptor in the client's socket, and what is behind it, until QEMU has it. Not where its
        command is yet to come, nor for long where that could hold up something urgent."""
        if client.fd < 0:
            within = TAKEN_WITHIN if client.oob else _HANG_UP_CHECK
            while not await self._recorder.taken(sock, within) and not client.oob and not hung_up(sock):
                pass
        self._recorder.consume(sock)

    async def _until_resumable(self, client: Client, wire: Wire) -> bool:
        """Waits; False if the client is gone meanwhile, which reading would have told."""
        self._paused.add(client)
        resumed = wire.paused()
        while True:
            with trio.move_on_after(_HANG_UP_CHECK):
                await resumed.wait()
                return True
            if hung_up(wire.sock):
                return False


def _came_and_went(sock: socket.socket) -> bool:
    """Whether a client has closed its connection and said nothing."""
    if not hung_up(sock):
        return False
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:  # reset: nothing of it can be read any more
        return True


def _before_line_end(sock: socket.socket, size: int) -> int:
    """How many of the bytes to read that are there, but for white space at their end.

    A QEMU that takes no commands yet reads nothing behind its first (monitor/qmp.c, handle_qmp_command). One
    that ends then, for it cannot start, leaves the end of that line unread, which is a reset to who sent it.
    """
    try:
        data = sock.recv(size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:  # receiving it tells more
        return size
    return len(data.rstrip(b" \t\r\n")) if data else size


def _wire(client: Client) -> Wire:
    wire = client.transport
    assert isinstance(wire, Wire)  # noqa: S101 - nobody else gives clients one
    return wire


def _is_local(address: Address) -> bool:
    return address.path is not None or address.host in ("localhost", "::1") or address.host.startswith("127.")
