"""One QEMU's monitor: the sockets around `refault.qmp.multiplexer`, and what the rest of the daemon calls.

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
manager.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import logging
import os
import select
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import trio

from refault.daemon.address import Address
from refault.daemon.dial import Peer, dial, peer_of, prepare
from refault.daemon.listener import Bound, ListenError, bind
from refault.qmp.commands import Answer, Forward, Request, decode_members
from refault.qmp.multiplexer import Counters, Multiplexer, NotQmpError
from refault.qmp.session import Client, Limits
from refault.qmp.splitter import ERROR, VERB_MASK, Message

if TYPE_CHECKING:
    from collections.abc import Iterator

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
]

log = logging.getLogger("refault.qmp")

_READ = 4 << 10
_READ_MORE = 64 << 10
"""Bytes to read from a client at a time, and while it is in the midst of a longer message."""
_UPSTREAM_READ = 64 << 10
_ONE_FD = socket.CMSG_LEN(4)
"""Room for one descriptor: the kernel closes the others, as QEMU would."""
_CONNECT_TIMEOUT = 10.0
_GREETING_TIMEOUT = 10.0
_CLOSE_TIMEOUT = 5.0
_FINISH_TIMEOUT = 0.3
_HANG_UP_CHECK = 1.0
_BACKOFF = (0.05, 1.0)
_FLAGS = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT


class QmpError(Exception):
    """QEMU answered an own command with an error."""

    def __init__(self, class_: str, desc: str) -> None:
        super().__init__(f"{class_}: {desc}")
        self.class_ = class_
        self.desc = desc


class MonitorLost(Exception):  # noqa: N818 - it is no error of the caller's
    """There is no monitor, or it went away while an own command waited."""


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


class _Wire:
    """A socket's sending side: what does not go at once waits here for a task that drains it."""

    __slots__ = ("backlog", "broken", "scope", "sock", "wake")

    def __init__(self, sock: socket.socket, scope: trio.CancelScope) -> None:
        self.sock = sock
        self.scope = scope
        self.backlog: deque[memoryview] = deque()
        self.broken = False
        self.wake: trio.Event | None = None
        """Set when a paused client may be read from again."""

    def send(self, data: bytes | memoryview) -> int:
        """Sends what goes at once; the number of bytes. A broken connection takes everything."""
        try:
            return self.sock.send(data, _FLAGS)
        except BlockingIOError:
            return 0
        except OSError:
            self.broken = True
            self.scope.cancel()
            return len(data)


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
    ) -> None:
        self.name = name
        self.qemu_address = qemu
        self.listen = tuple(listen)
        self.qemu: QemuInfo | None = None
        """The QEMU that commands can go to now, or None."""
        self.bound: list[Address] = []
        """The addresses of the listeners, with the TCP ports that they really have."""
        self.clients_total = 0
        self._watch = dict(watch or {})
        self._on_event = on_event
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._limits = limits or Limits()
        self._core = Multiplexer(
            limits=self._limits,
            watch=self._watch,
            ask=self._ask,
            discard=os.close,
            on_event=self._event,
            on_ready=self._ready,
        )
        self._paused: set[Client] = set()
        self._upstream: _Wire | None = None
        self._upstream_backlog: deque[tuple[memoryview, int]] = deque()
        self._connection: trio.Nursery | None = None
        self._peer = Peer(None, None)
        self._listeners: list[Bound] = []
        self._nursery: trio.Nursery
        self._last_complaint = ""

    @property
    def counters(self) -> Counters:
        """Totals since the start."""
        return self._core.counters

    @property
    def clients(self) -> int:
        """Clients connected now."""
        return len(self._core.clients)

    # running

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Binds the listeners (ListenError), then serves and reconnects until cancelled. Leaves no socket
        behind.
        """
        with self._bind() as bound:
            try:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    for listener in bound:
                        if not _is_local(listener.address):
                            log.warning(
                                "%s: whoever can reach %s controls the VM; prefer a unix socket",
                                self.name,
                                listener.address,
                            )
                        nursery.start_soon(self._accept, listener)
                    for address in self.listen:
                        if not address.server:
                            nursery.start_soon(self._dial_manager, address)
                    nursery.start_soon(self._keep_upstream)
                    task_status.started()
            finally:
                for _, fd in self._upstream_backlog:
                    if fd >= 0:
                        os.close(fd)
                self._upstream_backlog.clear()

    @contextlib.contextmanager
    def _bind(self) -> Iterator[list[Bound]]:
        with contextlib.ExitStack() as stack:
            bound = []
            for address in self.listen:
                if address.server:
                    listener = bind(address)
                    stack.callback(listener.close)
                    bound.append(listener)
                    self.bound.append(listener.address)
            if self.qemu_address.server:
                listener = bind(self.qemu_address)
                stack.callback(listener.close)
                self._qemu_listener = listener
            yield bound
            self.bound.clear()

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

        request = core.call(command, arguments, oob=oob, fd=-1 if fd is None else os.dup(fd), done=done)
        self._flush()
        try:
            with trio.fail_after(timeout):
                await event.wait()
        except BaseException:
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
        assert self._connection is not None  # noqa: S101
        version = ".".join(map(str, greeting.version))
        self.qemu = QemuInfo(
            self._peer.pid, self._peer.uid, version, greeting.version, greeting.package, greeting.oob
        )
        self._last_complaint = ""
        pid = f", pid {self._peer.pid}" if self._peer.pid else ""
        note = "" if greeting.oob else "; it offers no out-of-band commands"
        log.info("%s: connected to QEMU %s%s at %s%s", self.name, version, pid, self.qemu_address, note)
        if self._on_connect is not None:
            self._connection.start_soon(self._tell_connected, self.qemu)

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
        self._core.answer(request, verdict)
        self._flush()

    def _guard(self, name: str, on_reply: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        def guarded(reply: bytes) -> bytes:
            try:
                return on_reply(reply)
            except Exception:
                log.exception("%s: internal error on the reply to %s; it goes on as it came", self.name, name)
                return reply

        return guarded

    # sending

    def _flush(self) -> None:
        """Sends what the core has to say, as far as it goes at once; the rest waits for tasks."""
        core = self._core
        while core.upstream_out or core.dirty:
            if core.upstream_out:
                self._flush_upstream()
            if core.dirty:
                dirty, core.dirty = core.dirty, []
                for client in dirty:
                    self._flush_client(client)
        if self._paused:
            for client in [client for client in self._paused if client.resumable]:
                self._paused.discard(client)
                wire = client.transport
                assert isinstance(wire, _Wire)  # noqa: S101
                if wire.wake is not None:
                    wire.wake.set()

    def _flush_client(self, client: Client) -> None:
        wire = client.transport
        assert isinstance(wire, _Wire)  # noqa: S101
        if client.overflow:
            if client.connected and not wire.broken:
                wire.broken = True
                log.warning(
                    "%s: client %d does not read its events and replies: disconnected with %d bytes unread",
                    self.name,
                    client.number,
                    client.unsent,
                )
            wire.scope.cancel()
            return
        if out := client.out:
            data = out[0] if len(out) == 1 else b"".join(out)
            out.clear()
            if wire.backlog:
                wire.backlog.append(memoryview(data))
            else:
                sent = wire.send(data)
                client.unsent -= sent
                if sent < len(data):
                    wire.backlog.append(memoryview(data)[sent:])
                    self._nursery.start_soon(self._drain_client, client, wire)
        if client.closing:
            if not wire.backlog:
                wire.scope.cancel()
            elif wire.scope.deadline == float("inf"):
                wire.scope.deadline = trio.current_time() + _CLOSE_TIMEOUT

    async def _drain_client(self, client: Client, wire: _Wire) -> None:
        backlog = wire.backlog
        while backlog and not wire.broken:
            try:
                await trio.lowlevel.wait_writable(wire.sock)
            except (trio.ClosedResourceError, trio.BusyResourceError):
                return  # it is closed, or somebody else does this
            sent = wire.send(backlog[0])
            client.unsent -= sent
            if sent == len(backlog[0]):
                backlog.popleft()
            else:
                backlog[0] = backlog[0][sent:]
        self._core.dirty.append(client)
        self._flush()

    def _flush_upstream(self) -> None:
        core = self._core
        out, core.upstream_out = core.upstream_out, []
        wire = self._upstream
        if wire is None:
            for _, fd in out:
                if fd >= 0:
                    os.close(fd)
            return
        backlog = self._upstream_backlog
        waiting = bool(backlog)
        if len(out) == 1 or any(fd >= 0 for _, fd in out):
            backlog.extend((memoryview(data), fd) for data, fd in out)
        else:
            backlog.append((memoryview(b"".join([data for data, _ in out])), -1))
        if not waiting and not self._send_upstream(wire):
            assert self._connection is not None  # noqa: S101
            self._connection.start_soon(self._drain_upstream, wire)

    def _send_upstream(self, wire: _Wire) -> bool:
        """Sends what goes at once; whether that was all."""
        backlog = self._upstream_backlog
        while backlog:
            data, fd = backlog[0]
            sent = wire.send(data) if fd < 0 else self._send_fd(wire, data, fd)
            if sent == len(data):
                backlog.popleft()
                continue
            if sent:
                backlog[0] = (data[sent:], -1)
            return False
        return True

    def _send_fd(self, wire: _Wire, data: memoryview, fd: int) -> int:
        if wire.sock.family != socket.AF_UNIX:
            os.close(fd)  # QEMU says to the client that there is none
            return wire.send(data)
        try:
            sent = socket.send_fds(wire.sock, [data], [fd], _FLAGS)
        except BlockingIOError:
            return 0
        except OSError:
            wire.broken = True
            wire.scope.cancel()
            sent = len(data)
        os.close(fd)
        return sent

    async def _drain_upstream(self, wire: _Wire) -> None:
        while not wire.broken:
            await trio.lowlevel.wait_writable(wire.sock)
            if self._send_upstream(wire):
                return

    # clients

    async def _accept(self, listener: Bound) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener.sock)
            try:
                sock, _ = listener.sock.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.error(
                        "%s: cannot accept a client at %s: %s", self.name, listener.address, error.strerror
                    )
                    await trio.sleep(0.5)
                continue
            self._nursery.start_soon(self._serve, prepare(sock))

    async def _dial_manager(self, address: Address) -> None:
        delay, most = _BACKOFF
        complained = False
        while True:
            try:
                sock = await dial(address, _CONNECT_TIMEOUT)
            except (OSError, trio.TooSlowError) as error:
                if not complained:
                    log.warning("%s: no manager at %s yet: %s", self.name, address, _why(error))
                    complained = True
                await trio.sleep(delay)
                delay = min(2 * delay, most)
                continue
            delay, complained = _BACKOFF[0], False
            await self._serve(sock)
            await trio.sleep(delay)

    async def _serve(self, sock: socket.socket) -> None:
        """One client's connection, from greeting to close."""
        with sock, trio.CancelScope() as scope:
            if len(self._core.clients) >= self._limits.clients:
                log.warning(
                    "%s: a client more than the %d allowed is refused", self.name, self._limits.clients
                )
                return
            wire = _Wire(sock, scope)
            client = self._core.join(wire)
            self.clients_total += 1
            try:
                self._flush()
                await self._read_client(client, wire)
            except OSError:
                pass
            except Exception:
                log.exception("%s: internal error; client %d is disconnected", self.name, client.number)
            finally:
                self._paused.discard(client)
                if wire.backlog and not wire.broken:
                    await self._finish(client, wire)
                wire.broken = True
                self._core.leave(client)
                trio.lowlevel.notify_closing(sock)
                self._flush()

    async def _finish(self, client: Client, wire: _Wire) -> None:
        """Has a message that is sent in part sent whole, if the client reads it at all."""
        with trio.move_on_after(_FINISH_TIMEOUT, shield=True):
            await self._drain_client(client, wire)

    async def _read_client(self, client: Client, wire: _Wire) -> None:
        sock, core, splitter = wire.sock, self._core, client.splitter
        passes_fds = sock.family == socket.AF_UNIX
        while True:
            await trio.lowlevel.wait_readable(sock)
            fd = -1
            size = _READ if splitter.held < _READ else _READ_MORE
            try:
                if passes_fds:
                    data, ancillary, _, _ = sock.recvmsg(size, _ONE_FD, socket.MSG_CMSG_CLOEXEC)
                    if ancillary:
                        fd = _descriptor(ancillary)
                else:
                    data = sock.recv(size)
            except BlockingIOError:
                continue
            if not data:
                if _hung_up(sock):
                    return
                core.half_close(client)
                self._flush()
                while True:
                    await trio.sleep(_HANG_UP_CHECK)
                    if _hung_up(sock):
                        return
            core.receive(client, data, fd)
            self._flush()
            while splitter.more or client.paused:
                if client.paused:
                    if not await self._until_resumable(client, wire):
                        return
                else:
                    await trio.lowlevel.checkpoint()
                    core.receive(client, b"")
                    self._flush()

    async def _until_resumable(self, client: Client, wire: _Wire) -> bool:
        """Waits; False if the client is gone meanwhile, which reading would have told."""
        self._paused.add(client)
        wire.wake = trio.Event()
        while True:
            with trio.move_on_after(_HANG_UP_CHECK):
                await wire.wake.wait()
                return True
            if _hung_up(wire.sock):
                return False

    # QEMU

    async def _keep_upstream(self) -> None:
        delay, most = _BACKOFF
        while True:
            try:
                sock = await self._reach_qemu()
                await self._converse(sock)
                delay = _BACKOFF[0]
            except NotQmpError as error:
                self._complain(f"what answers at {self.qemu_address} is no QMP monitor: {error}")
                delay = most
            except trio.TooSlowError:
                self._complain(
                    f"nothing answers at {self.qemu_address}: another client may hold the monitor; detach it,"
                    " or name a monitor of its own for refault"
                )
            except OSError as error:
                self._complain(f"no QEMU at {self.qemu_address} yet: {_why(error)}")
            await trio.sleep(delay)
            delay = min(1.5 * delay, most)

    def _complain(self, text: str) -> None:
        """One line for each new trouble, not for each attempt."""
        if text != self._last_complaint:
            log.warning("%s: %s", self.name, text)
            self._last_complaint = text

    async def _reach_qemu(self) -> socket.socket:
        if not self.qemu_address.server:
            return await dial(self.qemu_address, _CONNECT_TIMEOUT)
        while True:
            await trio.lowlevel.wait_readable(self._qemu_listener.sock)
            with contextlib.suppress(BlockingIOError):
                sock, _ = self._qemu_listener.sock.accept()
                return prepare(sock)

    async def _converse(self, sock: socket.socket) -> None:
        """One connection to QEMU, from its greeting to its end."""
        core = self._core
        try:
            with sock:
                self._peer = peer_of(sock)
                core.upstream_connected(b'"refault-%s"' % os.urandom(6).hex().encode())
                trouble: Exception | None = None
                async with trio.open_nursery() as nursery:
                    self._connection = nursery
                    self._upstream = _Wire(sock, nursery.cancel_scope)
                    try:
                        with trio.fail_after(_GREETING_TIMEOUT) as greeting:
                            await self._read_upstream(sock, greeting)
                    except (NotQmpError, trio.TooSlowError) as error:
                        trouble = error  # outside of the nursery, which would wrap it
                    except Exception:
                        log.exception("%s: internal error; the connection to QEMU is made anew", self.name)
                    finally:
                        trio.lowlevel.notify_closing(sock)
                        nursery.cancel_scope.cancel()
                if trouble:
                    raise trouble
        finally:
            self._lose_upstream()

    async def _read_upstream(self, sock: socket.socket, greeting: trio.CancelScope) -> None:
        core = self._core
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                data = sock.recv(_UPSTREAM_READ)
            except BlockingIOError:
                continue
            except ConnectionError:
                return
            if not data:
                return
            core.receive_upstream(data)
            if core.greeting:
                greeting.deadline = float("inf")
            self._flush()

    def _lose_upstream(self) -> None:
        was = self.qemu
        self.qemu = None
        self._upstream = None
        self._connection = None
        for _, fd in self._upstream_backlog:
            if fd >= 0:
                os.close(fd)
        self._upstream_backlog.clear()
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


def _is_local(address: Address) -> bool:
    return address.path is not None or address.host in ("localhost", "::1") or address.host.startswith("127.")


def _why(error: BaseException) -> str:
    if isinstance(error, trio.TooSlowError):
        return "it does not accept"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


def _descriptor(ancillary: list[tuple[int, int, bytes]]) -> int:
    """The descriptor in what recvmsg returned, or -1."""
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS and len(data) >= 4:
            return int.from_bytes(data[:4], "little" if _LITTLE else "big", signed=True)
    return -1


_LITTLE = socket.htons(1) != 1


def _hung_up(sock: socket.socket) -> bool:
    """Whether the peer, having closed its sending side, has closed altogether."""
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))
