"""One QEMU's monitor: what the rest of the daemon calls. `refault.qmp.multiplexer` has the rules, clients.py
and upstream.py the sockets.

    monitor = Monitor("vm1", qemu, [listen, ...], watch={"migrate": on_migrate}, on_event=..., on_connect=...)
    await nursery.start(monitor.run)            # ListenError before it starts; then serves until cancelled
    value = await monitor.execute("query-migrate", timeout=5)   # QmpError, MonitorLost, trio.TooSlowError

Watched commands: a handler gets a `WatchedCommand` and returns `Forward` (to QEMU, perhaps with other
arguments) or `Answer` (in QEMU's place). It starts when all earlier in-band commands of that client have been
sent; the client's later in-band commands wait until it has answered; nobody else waits. Of out-of-band
commands those wait that the same client sent behind an out-of-band one, as at QEMU, and no others. It may
call `execute`. A handler that raises is logged, and the command forwarded as it was. From the moment the
handler starts the command counts as sent: it is forwarded even if its client leaves. If QEMU goes away,
`execute` raises MonitorLost, what the handler returns is dropped, and `on_reply` is not called.

Addresses: `qemu` with server=on means that QEMU dials us; one of `listen` with server=off that we dial the
manager. With wait=on at one of `listen` QEMU is not connected to before a client has come there, unless
`gone_on`: then it has been before.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from refault.daemon.kept.recorder import Recorder
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.clients import Clients
from refault.daemon.monitor.commands import Commands, Handler, MonitorLost, QmpError, WatchedCommand, words
from refault.daemon.monitor.first_client import FirstClient
from refault.daemon.monitor.front import Front
from refault.daemon.monitor.inheritance import Inheritance, ending_with_us
from refault.daemon.monitor.keeper import Keeper
from refault.daemon.monitor.listener import ListenError
from refault.daemon.monitor.passed import Passed
from refault.daemon.monitor.pauses import Pauses
from refault.daemon.monitor.presence import Presence, Qemu
from refault.daemon.monitor.upstream import Upstream
from refault.qmp.access import unknown
from refault.qmp.commands import Answer, Forward
from refault.qmp.delivery import Counters
from refault.qmp.multiplexer import Multiplexer
from refault.qmp.session import Limits, Request

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
        self.qemu_address = qemu
        self.managers = [address for address in listen if not address.server]
        """Who is connected to, as a client."""
        self.qemu: QemuInfo | None = None
        """The QEMU that commands can go to now, or None."""
        self._watch = {"x-exit-preconfig": self._exit_preconfig, **(watch or {})}
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
        self._forgets_later = False
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
        self._recorder = Recorder(
            self.name,
            self._journal,
            lambda: self._inheritance.before(),
            lambda: self._upstream.give_up_soon(),
        )
        self._commands = Commands(self.name, self._core, self._recorder, self._watch, self._flush)
        self._keeper = Keeper(
            self.name,
            self._core,
            self._recorder,
            flush=self._flush,
            fronts=lambda: [sock for front in self._client_fronts for sock in ending_with_us(front)],
            clients=lambda: [sock for sock, _ in self._clients.connections().values()],
            borrows=lambda: any(front.address.fd is not None for front in self._client_fronts),
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
            lambda: self._inheritance.keep(),
        )
        self._upstream = Upstream(
            self.name,
            self.qemu_address,
            self._core,
            self.presence,
            first_client,
            flush=self._flush,
            lost=self._lost,
            unanswered=lambda: self._inheritance.free_left(),
            recorder=self._recorder,
            keeper=self._keeper,
        )
        self._inheritance = Inheritance(
            self.name,
            self.qemu_address,
            self._journal,
            self._core,
            self._recorder,
            self._keeper,
            self._clients,
            self._upstream,
            fronts=lambda: self._client_fronts,
            addresses=lambda: self._all_listen,
        )
        self.fronts = [self._clients.front(address) for address in listen]
        if self.qemu_address.server:
            self.fronts.append(Front(self.name, self.qemu_address, self._upstream.take))

    def renew(self) -> None:
        """After `run` has failed: it can be run again, and what was counted is counted on."""
        core, clients = self._core, self._clients
        # A port that was chosen stays the same.
        self._make([front.address for front in self.fronts[: len(self._listen)]])
        self._core.goes_on_from(core)
        self._clients.goes_on_from(clients)

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
            self._inheritance.take_over(self.renew)
            for front in self.fronts:
                await self._prepare(front)
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
                self._inheritance.hand_over()
                self._upstream.taken.close()
                self._clients.close_taken()
            self._running = False
            self._recorder.end()
            for front in self.fronts:
                front.close()

    async def _prepare(self, front: Front) -> None:
        must = not self._has_run
        try:
            await front.prepare(must=must)
        except ListenError:
            if self._inheritance.end_orphans() == 0:
                raise
            await front.prepare(must=must)

    async def let_go(self) -> None:
        """There will be no other refault: QEMU is to hold nothing of this monitor's."""
        await self._keeper.let_go()

    def hand_over(self) -> None:
        """The next refault goes on from this moment, in which this process ends."""
        self._inheritance.hand_over()

    @property
    def kept(self) -> tuple[bool, str | None]:
        """Whether clients outlive refault, and if it is known, why not."""
        return self._inheritance.kept

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
        return await self._commands.execute(command, arguments, oob=oob, fd=fd, timeout=timeout)

    # what the core calls

    async def _exit_preconfig(self, command: WatchedCommand) -> Forward | Answer:
        """With its machine QEMU takes descriptors, which it has refused before."""

        def keep(reply: bytes) -> bytes:
            self._keeper.ask_again()
            self._inheritance.keep()
            return reply

        return Forward(on_reply=keep)

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
        self._inheritance.keep()
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
        if trio.current_effective_deadline() == -math.inf:  # it is we who end
            log.info("%s: left the monitor of QEMU %s", self.name, was.version)
        else:
            log.info(
                "%s: QEMU %s closed its monitor; clients disconnected: %d", self.name, was.version, len(lost)
            )
        if self._on_disconnect is not None:
            try:
                self._on_disconnect()
            except Exception:
                log.exception("%s: internal error on the loss of QEMU", self.name)

    def _ask(self, request: Request) -> None:
        self._nursery.start_soon(self._commands.handle, request)

    def _flush(self) -> None:
        """Sends what the core has to say, as far as it goes at once; the rest waits for tasks."""
        core = self._core
        self._pauses.look()
        while core.upstream_out or core.dirty:
            self._upstream.flush()
            self._clients.flush()
        self._upstream.mind_urgent()
        if core.spent or self._clients.late_sent:
            self._forget_spent()
        self._clients.resume()

    def _forget_spent(self) -> None:
        """What is written down of commands that are over goes: at once, unless so much is written down, or so
        often, that this would be all that is done."""
        recorder = self._recorder
        if recorder.on and (rests := recorder.rests) > 0:
            if not self._forgets_later and self._upstream.converses:
                self._forgets_later = True
                self._upstream.start_soon(self._forget_later, rests)
            return
        if self._core.spent:
            self._clients.forget_when_sent()
        self._core.forgotten()
        self._clients.forgotten()
        if recorder.on:
            recorder.begin()

    async def _forget_later(self, seconds: float) -> None:
        try:
            await trio.sleep(seconds)
        finally:
            self._forgets_later = False
        self._flush()
