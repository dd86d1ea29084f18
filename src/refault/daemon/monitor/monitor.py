"""One QEMU's monitor: what the rest of the daemon calls. `refault.qmp.multiplexer` has the rules, clients.py
and upstream.py the sockets.

    monitor = Monitor("vm1", qemu, [listen, ...], watch={"migrate": on_migrate}, on_event=..., on_connect=...)
    await nursery.start(monitor.run)            # ListenError before it starts; then serves until cancelled
    value = await monitor.execute("query-migrate", timeout=5)   # QmpError, MonitorLost, trio.TooSlowError

Watched commands: a handler gets a `WatchedCommand` and returns `Forward` (to QEMU, perhaps with other
arguments) or `Answer` (in QEMU's place). It starts when all earlier in-band commands of that client have been
sent; the client's later in-band commands wait until it has answered; nobody else waits, and an out-of-band
command waits for nothing. It may call `execute`. A handler that raises is logged, and the command forwarded
as it was. From the moment the handler starts the command counts as sent: it is forwarded even if its client
leaves. If QEMU goes away, `execute` raises MonitorLost, what the handler returns is dropped, and `on_reply`
is not called.

Addresses: `qemu` with server=on means that QEMU dials us; one of `listen` with server=off that we dial the
manager. With wait=on at one of `listen` QEMU is not connected to before a client has come there, unless
`gone_on`: then it has been before.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import trio

from refault import __version__
from refault.daemon.host.errors import OperatorError
from refault.daemon.host.repeats import repeats
from refault.daemon.kept.left import FORMAT, About, Left, Listening, encode
from refault.daemon.kept.recorder import Recorder
from refault.daemon.kept.taken import free, take, why_anothers
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.clients import Clients
from refault.daemon.monitor.first_client import FirstClient
from refault.daemon.monitor.front import Front
from refault.daemon.monitor.keeper import Keeper
from refault.daemon.monitor.listener import Bound, ListenError
from refault.daemon.monitor.passed import Passed
from refault.daemon.monitor.pauses import Pauses
from refault.daemon.monitor.presence import Presence, Qemu
from refault.daemon.monitor.socket_file import Access
from refault.daemon.monitor.upstream import Upstream
from refault.qmp.access import unknown
from refault.qmp.commands import Answer, Forward
from refault.qmp.decoding import decode_members
from refault.qmp.journal import Kind
from refault.qmp.multiplexer import Counters, Multiplexer
from refault.qmp.replay import Called, Verdict
from refault.qmp.saved import save
from refault.qmp.session import Limits, Request
from refault.qmp.splitter import ERROR, VERB_MASK, Message

__all__ = [
    "Address",
    "Answer",
    "Counters",
    "Forward",
    "Limits",
    "ListenError",
    "Monitor",
    "MonitorLost",
    "QemuInfo",
    "QmpError",
    "WatchedCommand",
    "words",
]

log = logging.getLogger("refault.qmp")

KNOWN_TIMEOUT = 10.0
FIRST_LOOK = 1.0
"""Seconds after which the start is done though it is not known whether QEMU is there."""


class QmpError(Exception):
    """QEMU answered an own command with an error."""

    def __init__(self, class_: str, desc: str) -> None:
        super().__init__(f"{class_}: {desc}")
        self.class_ = class_
        self.desc = desc


class MonitorLost(Exception):  # noqa: N818 - it is no error of the caller's
    """There is no monitor, or it went away while an own command waited."""


def words(error: BaseException) -> str:
    """What `execute` or a connection failed with, as the operator reads it."""
    if isinstance(error, trio.TooSlowError):
        return "QEMU did not answer in time"
    if isinstance(error, MonitorLost):
        return "the monitor was lost"
    return str(error)


@dataclass(frozen=True)
class QemuInfo:
    """The QEMU behind a monitor. `pid` and `uid` are its peer credentials, None on TCP; `version` is
    "7.2.22".
    """

    pid: int | None
    uid: int | None
    version: str
    version_triple: tuple[int, int, int]
    package: str
    oob: bool


@dataclass(frozen=True)
class WatchedCommand:
    """A client's command that a handler is asked about. `raw_arguments`: None if the client sent none."""

    name: str
    oob: bool
    arguments: Mapping[str, object]
    raw_arguments: bytes | None
    client: int


Handler = Callable[[WatchedCommand], Awaitable[Forward | Answer]]


class Monitor:
    """The QMP monitor of one QEMU, for any number of clients. See the module's text."""

    def __init__(
        self,
        name: str,
        qemu: Address,
        listen: Sequence[Address],
        *,
        watch: Mapping[str, Handler] | None = None,
        on_event: Callable[[str, Mapping[str, object]], None] | None = None,
        on_connect: Callable[[QemuInfo], Awaitable[None] | None] | None = None,
        on_disconnect: Callable[[], None] | None = None,
        limits: Limits | None = None,
        gone_on: bool = False,
        journal: Path | None = None,
    ) -> None:
        """`journal`: the file by which the next refault goes on where this one ends; None: it does not."""
        self.name = name
        self._journal = journal
        self._anothers: str | None = None
        """Why the journal is left alone."""
        self.qemu_address = qemu
        self.managers = [address for address in listen if not address.server]
        """Who is connected to, as a client."""
        self.qemu: QemuInfo | None = None
        """The QEMU that commands can go to now, or None."""
        self._watch = dict(watch or {})
        self._on_event = on_event
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._limits = limits or Limits()
        self._listen = tuple(address for address in listen if address.server)
        self.fronts: list[Front] = []
        """Where clients come, in the order of `listen`; then where QEMU does, if it is QEMU who connects."""
        self._fronts_run: dict[Front, trio.CancelScope] = {}
        self._nursery: trio.Nursery
        self._running = self._has_run = False
        self._gone_on = gone_on
        """Whether a QEMU was connected to before."""
        self.presence = Presence()
        """Whether QEMU is there. One for all runs: who waits for it to change waits on."""
        self._make(self._listen)

    def _make(self, listen: Sequence[Address]) -> None:
        self._core = Multiplexer(
            limits=self._limits,
            watch=self._watch,
            ask=self._ask,
            discard=lambda fd: self._recorder.close(fd),
            on_event=self._event,
            on_ready=self._ready,
            audit=lambda request: self._clients.audit(request),
        )
        self._recorder = Recorder(self.name, self._journal, self._before, self._not_recorded)
        self._keeper = Keeper(
            self.name,
            self._core,
            self._recorder,
            flush=self._flush,
            fronts=lambda: [sock for front in self._client_fronts for sock in _socks(front)],
            clients=lambda: [sock for sock, _ in self._clients.connections().values()],
        )
        self._pauses = Pauses(
            self.name,
            self._core,
            self._recorder,
            self._flush,
            lambda task, *args: self._nursery.start_soon(task, *args),
        )
        self.presence.set(Qemu.UNKNOWN)
        all_listen = (*listen, *self.managers)
        first_client = self._first_client = FirstClient(
            self.name, self.qemu_address, all_listen, self.presence, over=self._gone_on
        )
        self._clients = Clients(
            self.name,
            self._core,
            self._limits,
            self.presence,
            first_client,
            self._flush,
            lambda: self._upstream.has_ended,
            self._recorder,
            self._keeper,
            self._keep,
        )
        self._upstream = Upstream(
            self.name,
            self.qemu_address,
            self._core,
            self.presence,
            first_client,
            flush=self._flush,
            lost=self._lost,
            unanswered=self._free_left,
            recorder=self._recorder,
            keeper=self._keeper,
        )
        self.fronts = [self._clients.front(address) for address in listen]
        if self.qemu_address.server:
            self.fronts.append(Front(self.name, self.qemu_address, self._upstream.take))

    def renew(self) -> None:
        """After `run` has failed: it can be run again, and what was counted is counted on."""
        counters, total = self._core.counters, self._clients.total
        may = self._core.hiding.may
        # A port that was chosen stays the same.
        self._make([front.address for front in self.fronts[: len(self._listen)]])
        self._core.counters, self._clients.total = counters, total
        self._core.hiding.may = may

    @property
    def _all_listen(self) -> tuple[Address, ...]:
        """As they were asked for."""
        return (*self._listen, *self.managers)

    @property
    def _client_fronts(self) -> list[Front]:
        return self.fronts[:-1] if self.qemu_address.server else self.fronts

    @property
    def clients_come_to(self) -> list[Address]:
        """Where clients are served: the addresses as they are bound, and the managers that are dialled."""
        return [*(front.address for front in self._client_fronts), *self.managers]

    @property
    def passed(self) -> Passed:
        """Connections that clients passed to QEMU."""
        return self._upstream.passed

    def name_upstream(self, client: int, name: str) -> str:
        """QEMU's name for a descriptor that a client passed as `name`."""
        return self._core.name_upstream(client, name)

    @property
    def counters(self) -> Counters:
        """Totals since the start."""
        return self._core.counters

    @property
    def clients(self) -> int:
        """Clients connected now."""
        return len(self._core.clients)

    @property
    def clients_total(self) -> int:
        """Clients since the start."""
        return self._clients.total

    @property
    def pause_hidden_since(self) -> float | None:
        """Since when a pause is kept from clients, in Unix time; None where none is."""
        return self._pauses.since

    def hide_pauses(self, may: bool | None, why: str) -> None:
        """Whether a pause is kept from the clients that asked for that, for refault recovers it. Where not,
        they are told of the one that there is, and where it is None of that alone; `why` is for the log."""
        if may is None:
            self._pauses.tell(why)
        else:
            self._pauses.may(may, why)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Binds the listeners (ListenError), then serves and reconnects until cancelled. Leaves no socket
        behind. Started when it is known whether QEMU is there, and if it is, clients can come.
        """
        try:
            self._take_over()
            for front in self.fronts:
                await front.prepare(must=not self._has_run)
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._running = self._has_run = True
                await nursery.start(self._clients.run, self.managers)
                for front in self.fronts:
                    nursery.start_soon(self._run_front, front)
                nursery.start_soon(self._upstream.run)
                with trio.move_on_after(FIRST_LOOK):
                    await self.presence.until(lambda qemu: qemu not in (Qemu.UNKNOWN, Qemu.DIALLED))
                for front in self.fronts:
                    await front.settled.wait()
                task_status.started()
        finally:
            if self._upstream.taken is not None:  # nobody has gone on with it yet
                self.hand_over()
                self._upstream.taken.close()
                self._clients.close_taken()
            self._running = False
            self._recorder.end()
            for front in self.fronts:
                front.close()

    # what outlives refault

    def _before(self) -> bytes:
        """All that is so far, for the journal."""
        keeper, clients = self._keeper, self._clients
        assert keeper.upstream is not None  # noqa: S101 - nothing is written down before
        fronts = []
        for front in self._client_fronts:
            cookies = [keeper.cookie(sock) for sock in _socks(front)]
            held = [cookie for cookie in cookies if cookie is not None]
            if front.bound is not None and held and len(held) == len(cookies):
                plain = front.bound.plain
                access = (plain.mode, plain.uid, plain.gid, plain.acl) if plain is not None else None
                port = front.bound.address.port
                fronts.append(Listening(front.key, port, held, front.bound.inode, access))
        about = {
            number: About(str(address), keeper.cookie(sock), self._recorder.peeked_bytes(sock))
            for number, (sock, address) in clients.connections().items()
        }
        core = save(self._core, clients.unsent, self._upstream.unsent, self._recorder.peeked)
        return encode(
            Left(
                FORMAT,
                __version__,
                str(self.qemu_address),
                keeper.pid,
                keeper.started,
                keeper.upstream,
                keeper.lots_held,
                fronts,
                about,
                core,
            )
        )

    def _take_over(self) -> None:
        """Goes on where the last refault ended, if it has left this monitor's connections to us."""
        if self._journal is None or self._journal_is_anothers():
            return
        taken = take(self.name, self._journal, self._core, {front.key for front in self._client_fronts})
        if taken is None:
            if self._core.greeting is not None:
                self.renew()
            return
        known = {str(address): address for address in (*self._listen, *self.managers)}
        held: dict[socket.socket, bytes] = {}
        for client in list(self._core.clients.values()):
            sock, about = taken.clients[client.number]
            address = known.get(about.address) or Address(about.address, server=True)
            if about.cookie is not None:
                held[sock] = about.cookie
            self._clients.take_over(client, sock, address)
        for front in self._client_fronts:
            if (found := taken.fronts.get(front.key)) is not None:
                listening, socks = found
                plain = Access(*listening.access) if listening.access is not None else None
                address = replace(front.address, port=listening.port)
                front.take_over(Bound(socks, address, listening.inode, plain))
                held.update(zip(socks, listening.cookies, strict=True))
        self._keeper.resume(taken.left, taken.lots, held)
        self._upstream.take_over(taken.upstream)
        for fd, (number, count) in taken.peeked.items():
            self._recorder.recovered(fd, taken.clients[number][0], number, count)
        self._recorder.go_on()
        for fd in taken.spent:
            self._recorder.close(fd)
        if taken.of_nobody:
            self._keeper.tidy_if_possible()

    def _not_recorded(self) -> None:
        """The next refault could not go on: QEMU is to hold nothing."""
        self._upstream.give_up_soon()

    def _keep(self) -> None:
        """Has QEMU hold what it does not hold yet, where the next refault could find it."""
        if self._journal is None or self._keeper.on or not self._core.ready:
            return
        if not self._journal_is_anothers():
            self._upstream.keep()

    def _journal_is_anothers(self) -> bool:
        """Whether it is left of a QEMU that is at another address and runs yet: it is not touched."""
        assert self._journal is not None  # noqa: S101 - the callers have looked
        told = self._anothers = why_anothers(self._journal, str(self.qemu_address))
        if told is not None:
            log.error("%s: %s", self.name, told, extra=repeats((self.name, "another's clients"), told))
        return told is not None

    def _free_left(self) -> None:
        """QEMU may have read behind the end of the last refault what that had told it to hold."""
        if self._journal is not None and not self._recorder.on and not self._journal_is_anothers():
            with contextlib.suppress(OperatorError):
                free(self._journal)

    async def let_go(self) -> None:
        """There will be no other refault: QEMU is to hold nothing of this monitor's."""
        await self._keeper.let_go()

    def hand_over(self) -> None:
        """The next refault goes on from this moment, in which this process ends."""
        if self._recorder.leave():
            self._keeper.hand_over()
            self._clients.hand_over()
            for front in self._client_fronts:
                front.hand_over()

    @property
    def kept(self) -> tuple[bool, str | None]:
        """Whether clients outlive refault, and if it is known, why not."""
        if self._journal is None:
            return False, "the state directory is not this refault's"
        return self._keeper.on, self._anothers or self._keeper.trouble

    async def _run_front(self, front: Front) -> None:
        scope = self._fronts_run[front] = trio.CancelScope()
        try:
            with scope:
                await front.run()
        finally:
            del self._fronts_run[front]

    async def listen_at(self, listen: Sequence[Address]) -> None:
        """Has clients come at these listeners and at no others; who has come stays. While it does not
        run, the next run has them.

        Raises ListenError where one of them cannot be bound; the others are.
        """
        kept = dict(zip(self._listen, self.fronts, strict=False))
        for address, front in kept.items():
            if address not in listen:
                self._end_front(front)
        self._first_client.listen_at((*listen, *self.managers))
        rest = self.fronts[len(self._listen) :]
        troubles: list[ListenError] = []
        now: dict[Address, Front] = {}
        for address in listen:
            if address in kept:
                now[address] = kept[address]
                continue
            front = self._clients.front(address)
            try:
                if self._running:
                    await front.prepare()
                    self._nursery.start_soon(self._run_front, front)
            except ListenError as error:
                troubles.append(error)
                continue
            except BaseException:  # its run has ended meanwhile
                front.close()
                raise
            now[address] = front
        self._listen, self.fronts = tuple(now), [*now.values(), *rest]
        if troubles:
            raise troubles[0]

    def _end_front(self, front: Front) -> None:
        if front in self._fronts_run:
            self._fronts_run[front].cancel()
        front.close()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        oob: bool = False,
        fd: int | None = None,
        timeout: float,  # noqa: ASYNC109 - the reply of a command given up is to be dropped
    ) -> object:
        """Runs a command of refault's own and returns what it returns.

        In-band ones run one at a time. `fd` is borrowed. Raises QmpError, MonitorLost, and trio.TooSlowError
        after `timeout` seconds, when the command may yet run.
        """
        core = self._core
        if not core.ready or (oob and not (core.greeting and core.greeting.oob)):
            raise MonitorLost(f"{self.name}: no QEMU to send {command} to")
        event = trio.Event()
        replies: list[Message | None] = []

        def done(reply: Message | None) -> None:
            replies.append(reply)
            event.set()

        members = dict(arguments) if arguments is not None else None
        self._recorder.tell(Kind.CALLED, Called(command, members, oob, fd is not None, False))
        request = core.call(command, arguments, oob=oob, fd=-1 if fd is None else os.dup(fd), done=done)
        self._flush()
        try:
            with trio.fail_after(timeout):
                await event.wait()
        except BaseException:
            self._recorder.tell(Kind.FORGOTTEN, request.call)
            core.forget(request)
            raise
        [reply] = replies
        if reply is None:
            raise MonitorLost(f"{self.name}: QEMU went away while {command} waited")
        members = decode_members(reply)
        if reply.shape & VERB_MASK == ERROR:
            error = msgspec.convert(members["error"], dict[str, str])
            raise QmpError(error["class"], error["desc"])
        return members["return"]

    # what the core calls

    def _event(self, name: str, data: Mapping[str, object]) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(name, data)
        except Exception:
            log.exception("%s: internal error on event %s", self.name, name)

    def _ready(self) -> None:
        greeting = self._core.greeting
        assert greeting is not None  # noqa: S101 - the core is ready
        version = ".".join(map(str, greeting.version))
        peer = self._upstream.peer
        self._gone_on = True
        self.qemu = QemuInfo(peer.pid, peer.uid, version, greeting.version, greeting.package, greeting.oob)
        self._upstream.ready()
        self._keep()
        pid = f", pid {peer.pid}" if peer.pid else ""
        note = "" if greeting.oob else "; it offers no out-of-band commands"
        log.info("%s: connected to QEMU %s%s at %s%s", self.name, version, pid, self.qemu_address, note)
        if any(address.rule.deny for address in self._all_listen):
            self._upstream.start_soon(self._check_denied, version)
        if self._on_connect is not None:
            self._upstream.start_soon(self._tell_connected, self.qemu)

    async def _check_denied(self, version: str) -> None:
        """Tells of what is denied and is no command: a slip there lets through what it meant to stop."""
        try:
            told = await self.execute("query-commands", timeout=KNOWN_TIMEOUT)
            commands = [each["name"] for each in msgspec.convert(told, list[dict[str, str]])]
        except (QmpError, MonitorLost, trio.TooSlowError, msgspec.ValidationError, KeyError):
            return
        for address in self._all_listen:
            if strange := unknown(address.rule.deny, commands):
                log.warning(
                    "%s: at %s is denied what QEMU %s does not have: %s; look at how it is spelt",
                    self.name,
                    address,
                    version,
                    ", ".join(strange),
                )

    async def _tell_connected(self, info: QemuInfo) -> None:
        assert self._on_connect is not None  # noqa: S101
        try:
            result = self._on_connect(info)
            if inspect.isawaitable(result):
                await result
        except MonitorLost:
            pass
        except Exception:
            log.exception("%s: internal error on the connection to QEMU", self.name)

    def _lost(self) -> None:
        was, self.qemu = self.qemu, None
        self._keeper.lost()
        lost = self._core.upstream_lost()
        self._flush()
        if was is None:
            return
        log.info(
            "%s: QEMU %s closed its monitor; clients disconnected: %d", self.name, was.version, len(lost)
        )
        if self._on_disconnect is not None:
            try:
                self._on_disconnect()
            except Exception:
                log.exception("%s: internal error on the loss of QEMU", self.name)

    def _ask(self, request: Request) -> None:
        self._nursery.start_soon(self._handle, request)

    async def _handle(self, request: Request) -> None:
        name = request.name.decode()
        verdict: Forward | Answer = Forward()
        try:
            command = WatchedCommand(
                name, request.oob, request.arguments(), request.raw_arguments(), request.client.number
            )
            verdict = await self._watch[name](command)
        except MonitorLost:
            pass
        except Exception:
            log.exception("%s: internal error on %s; it goes to QEMU as the client sent it", self.name, name)
        if isinstance(verdict, Forward) and verdict.on_reply is not None:
            verdict = Forward(verdict.arguments, self._guard(name, verdict.on_reply))
        self._recorder.tell(Kind.ANSWERED, _as_told(request, verdict))
        self._core.answer(request, verdict)
        self._flush()

    def _guard(self, name: str, on_reply: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        def guarded(reply: bytes) -> bytes:
            try:
                changed = on_reply(reply)
            except Exception:
                log.exception("%s: internal error on the reply to %s; it goes on as it came", self.name, name)
                changed = reply
            self._recorder.note(Kind.CHANGED, 0, changed)
            return changed

        return guarded

    def _flush(self) -> None:
        """Sends what the core has to say, as far as it goes at once; the rest waits for tasks."""
        core = self._core
        self._pauses.look()
        while core.upstream_out or core.dirty:
            self._upstream.flush()
            self._clients.flush()
        if core.spent:
            core.spent = False
            if self._recorder.on:
                self._recorder.begin()
        self._clients.resume()


def _socks(front: Front) -> tuple[socket.socket, ...]:
    """Those that end with us, if they are not kept. One that is somebody else's is neither kept nor ended."""
    bound = front.bound
    return bound.socks if bound is not None and not bound.given and front.address.fd is None else ()


def _as_told(request: Request, verdict: Forward | Answer) -> Verdict:
    if isinstance(verdict, Answer):
        return Verdict(request.asked, True, verdict.error, verdict.value)
    arguments = None if verdict.arguments is None else dict(verdict.arguments)
    return Verdict(request.asked, False, None, None, arguments, verdict.on_reply is not None)
