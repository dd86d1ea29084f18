"""Prometheus metrics: the published status as metric families, and the HTTP server that they are read from.

docs/metrics.md lists the names. A scrape runs in a thread of the server and reads one immutable `Status`; it
touches nothing of the daemon's or the pump's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import select
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import trio
from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from refault.daemon.host.errors import OperatorError
from refault.daemon.host.repeats import repeats
from refault.daemon.kernel.inotify import until_gone
from refault.daemon.monitor.address import Address, host_port
from refault.daemon.monitor.caller import caller_of, may_speak
from refault.daemon.monitor.listener import Bound, ListenError, bind
from refault.daemon.telling.snapshot import MigrationRole, Snapshot, Status
from refault.qmp.access import Callers

_log = logging.getLogger(__name__)

_REQUEST_SECONDS = 10.0
"""How long a scraper may take over all of its request before its thread is freed."""
_CONNECTIONS = 32
"""Scrapers at a time: each takes a thread and a descriptor, of which recovery needs some too."""
_LOOK_SECONDS = 1.0
"""Between two looks whether a scraper's time is over."""
_NO_DESCRIPTOR_SECONDS = 0.1


_STATES = (
    "none",
    "setup",
    "cancelling",
    "cancelled",
    "active",
    "device",
    "pre-switchover",
    "postcopy-device",
    "postcopy-active",
    "postcopy-paused",
    "postcopy-recover-setup",
    "postcopy-recover",
    "completed",
    "failing",
    "failed",
    "colo",
    "wait-unplug",
)
"""QEMU's words (qapi/migration.json, MigrationStatus); another one has a series while it is so."""
_ROLES: tuple[MigrationRole, ...] = ("source", "destination")


class StatusCollector(Collector):
    """The metric families of the last published status."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        """All families, of one and the same picture."""
        return families(self._snapshot())


def families(status: Status) -> list[Metric]:
    """The metric families of one picture, each with a sample for each VM."""
    info = InfoMetricFamily("refault", "The running refault; refault_build_info takes its place")
    info.add_metric([], {"version": status.version})
    build = InfoMetricFamily("refault_build", "The running refault and its Python")
    build.add_metric([], {"version": status.version, "python": platform.python_version()})
    dropped = CounterMetricFamily("refault_log_lines_dropped", "Lines of the log that nobody will read")
    dropped.add_metric([], status.log_lines_dropped)
    troubles = GaugeMetricFamily("refault_troubles", "Things refault itself cannot have now and tries to get")
    troubles.add_metric([], len(status.troubles))
    collected: list[Metric] = [info, build, dropped, troubles]

    def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"refault_{name}", text, labels=["vm", *labels])
        collected.append(family)
        return family

    def counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
        family = CounterMetricFamily(f"refault_{name}", text, labels=["vm", *labels])
        collected.append(family)
        return family

    def histogram(name: str, text: str) -> HistogramMetricFamily:
        family = HistogramMetricFamily(f"refault_{name}", text, labels=["vm"])
        collected.append(family)
        return family

    qemu_connected = gauge("qemu_connected", "1 while QMP with QEMU is negotiated")
    clients_connected = gauge("clients_connected", "QMP clients connected now")
    clients = counter("clients", "QMP clients accepted")
    slow = counter("clients_slow_disconnected", "QMP clients dropped because they did not read")
    undecided = counter("clients_undecided", "What an earlier refault's end left in doubt")
    outlive = gauge(
        "clients_kept", "1 while QEMU holds its clients' connections, so that they outlive refault"
    )
    commands = counter("commands", "Commands taken from clients")
    events = counter("events", "Events delivered to clients")
    hidden = counter("hidden_pauses", "Pauses kept from clients, for a time at least")
    hides = gauge("pause_hidden", "1 while a pause is kept from clients")
    migration_status = gauge(
        "migration_status", "1 for the status QEMU reports and the VM's role", "role", "status"
    )
    state = gauge("migration_state", "1 for the status QEMU reports, 0 for the others", "state")
    role = gauge("migration_role", "1 for the VM's role in its migration, 0 for the others", "role")
    relay_state = gauge("relay_state", "1 for the relay's state: tracking, opaque or off", "state")
    held = gauge("leg_held", "1 while a local leg is held open though its other side is lost")
    channel = counter("channel_bytes", "Bytes of the migration channel relayed", "direction")
    losses = counter("losses", "Migration channels lost from the switchover to postcopy on")
    attempts = counter("recovery_attempts", "Recoveries tried")
    recoveries = counter("recoveries", "Recoveries that brought QEMU back to postcopy-active")
    last = gauge("recovery_last_seconds", "The last recovery, from the noticed loss until postcopy-active")
    durations = histogram("recovery_seconds", "Recoveries, from the noticed loss until postcopy-active")
    last_loss = gauge("last_loss_timestamp_seconds", "When the last channel was lost")
    given_up = gauge("recovery_given_up", "1 while a loss is given up: no further attempt is made for it")
    requested = counter("pages_requested", "Pages requested by the destination")
    repeated = counter("pages_repeated", "Requests that the destination QEMU made again by itself")
    arrived = counter("pages_arrived", "Requested pages that have passed the relay")
    replayed = counter("pages_replayed", "Page requests written to the source again after a loss")
    recorded = gauge("pages_recorded", "Page requests that no received bitmap has confirmed")
    kernel = gauge("kernel_waiting_threads", "The kernel's count of threads that wait for a page")
    outstanding = gauge("pages_outstanding", "Requested pages that have not passed the relay", "block")
    latency = histogram(
        "page_request_latency_seconds", "From a page request passing the relay until its page has passed"
    )

    resuming = gauge("session_resuming", "1 while a connection of a session is missing, and QEMU waits")
    sessions = counter("sessions", "Channels that became sessions between two refaults")
    resumptions = histogram(
        "session_resumption_seconds",
        "From the loss of a session's connection until bytes went on over the next",
    )
    again = counter("session_retransmitted_bytes", "Bytes that sessions sent more than once")
    kept = gauge("session_kept_bytes", "What a session's rings hold: not acknowledged, or not taken")
    incomplete = gauge("state_incomplete", "1 while a restarted refault would not know all of the migration")
    state_errors = counter("state_errors", "Files in the state directory not written, read or removed")
    torn = counter("torn_requests", "Page requests that were torn in an earlier refault's file")

    for vm in status.vms:
        qemu_connected.add_metric([vm.name], vm.qemu.connected)
        clients_connected.add_metric([vm.name], vm.clients.connected)
        clients.add_metric([vm.name], vm.clients.total)
        slow.add_metric([vm.name], vm.clients.slow_disconnected)
        undecided.add_metric([vm.name], vm.clients.undecided)
        outlive.add_metric([vm.name], vm.clients.kept)
        commands.add_metric([vm.name], vm.clients.commands)
        events.add_metric([vm.name], vm.clients.events)
        hidden.add_metric([vm.name], vm.clients.hidden_pauses)
        hides.add_metric([vm.name], vm.migration.pause_hidden_since is not None)
        if vm.migration.status is not None:
            migration_status.add_metric([vm.name, vm.migration.role, vm.migration.status], 1)
        for each in dict.fromkeys((*_STATES, vm.migration.status or "none")):
            state.add_metric([vm.name, each], each == (vm.migration.status or "none"))
        for each in _ROLES:
            role.add_metric([vm.name, each], each == vm.migration.role)
        relay_state.add_metric([vm.name, vm.migration.relay], 1)
        held.add_metric([vm.name], vm.migration.held is not None)
        channel.add_metric([vm.name, "forward"], vm.channel.bytes_forward)
        channel.add_metric([vm.name, "return"], vm.channel.bytes_return)
        losses.add_metric([vm.name], vm.recovery.losses)
        attempts.add_metric([vm.name], vm.recovery.attempts)
        recoveries.add_metric([vm.name], vm.recovery.recoveries)
        if vm.recovery.last_seconds is not None:
            last.add_metric([vm.name], vm.recovery.last_seconds)
        taken = vm.recovery.durations
        _add_histogram(durations, vm.name, taken.buckets, taken.count, taken.sum)
        if vm.recovery.recent:
            last_loss.add_metric([vm.name], vm.recovery.recent[-1].lost_at)
        given_up.add_metric([vm.name], vm.recovery.given_up)
        resuming.add_metric([vm.name], vm.session.resuming_seconds is not None)
        sessions.add_metric([vm.name], vm.session.sessions)
        resumed = vm.session.resumptions
        _add_histogram(resumptions, vm.name, resumed.buckets, resumed.count, resumed.sum)
        again.add_metric([vm.name], vm.session.retransmitted_bytes)
        kept.add_metric([vm.name], vm.session.kept_bytes)
        incomplete.add_metric([vm.name], vm.state.error is not None)
        state_errors.add_metric([vm.name], vm.state.errors)
        torn.add_metric([vm.name], vm.state.torn)
        requested.add_metric([vm.name], vm.pages_total.requested)
        repeated.add_metric([vm.name], vm.pages_total.repeated)
        arrived.add_metric([vm.name], vm.pages_total.arrived)
        replayed.add_metric([vm.name], vm.pages_total.replayed)
        recorded.add_metric([vm.name], vm.pages.recorded)
        if vm.pages.kernel_waiting is not None:
            kernel.add_metric([vm.name], vm.pages.kernel_waiting)
        for block in vm.pages.blocks:
            outstanding.add_metric([vm.name, block.name], block.outstanding)
        answered = vm.latency_seconds
        _add_histogram(latency, vm.name, answered.buckets, answered.count, answered.sum)
    return collected


def _add_histogram(
    family: HistogramMetricFamily,
    name: str,
    upto: Sequence[tuple[float, int]],
    count: int,
    total: float,
) -> None:
    buckets = [(str(bound), float(within)) for bound, within in upto]
    family.add_metric([name], buckets=[*buckets, ("+Inf", float(count))], sum_value=total)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        _log.debug("metrics: " + format, *args)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, listeners: Sequence[socket.socket], callers: Callers) -> None:
        """Serves `callers` at all of `listeners`: a host's name has addresses in both families."""
        self._callers = callers
        self._lock = threading.Lock()
        self._until: dict[Any, float] = {}
        """The open connections, of which none may be closed without the lock, and their deadlines."""
        super().__init__(listeners[0].getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._any = select.epoll()
        for listener in listeners:
            self._any.register(listener, select.EPOLLIN)
        self._end = os.eventfd(0)
        self._any.register(self._end, select.EPOLLIN)
        # Without HTTPServer's look-up of its own host name, which can wait for a name server.
        self.server_name, self.server_port = "localhost", 0
        if listeners[0].family != socket.AF_UNIX:
            self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def fileno(self) -> int:
        """What is readable while somebody waits at one of the listeners."""
        return self._any.fileno()

    def get_request(self) -> Any:
        """The next connection. Where there is no descriptor for it, it waits as long as the next look."""
        for fd, _ in self._any.poll(0, 1):
            if fd == self._end:
                break
            try:
                request, where = self._listeners[fd].accept()
                return request, where or ("unix", 0)  # who connects by a socket file has no address
            except BlockingIOError:
                break
            except OSError:
                time.sleep(_NO_DESCRIPTOR_SECONDS)
                raise
        raise BlockingIOError

    def shutdown(self) -> None:
        """Ends `serve_forever`, without waiting for its next look."""
        os.eventfd_write(self._end, 1)
        super().shutdown()

    def server_close(self) -> None:
        """Closes the listeners; what was accepted goes on."""
        os.close(self._end)
        self._any.close()
        for listener in self._listeners.values():
            listener.close()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether he may ask, and there is room for one more."""
        if not may_speak(request, self._callers):
            caller = caller_of(request)
            _log.warning(
                "metrics: refused a process (%s): it is not one of the allowed users and groups",
                caller,
                extra=repeats(("metrics", caller.uid), "refused"),
            )
            return False
        with self._lock:
            if len(self._until) >= _CONNECTIONS:
                return False
            self._until[request] = time.monotonic() + _REQUEST_SECONDS
            return True

    def service_actions(self) -> None:
        """Ends the connections whose time is over: their threads see the end of file."""
        now = time.monotonic()
        with self._lock:
            for request, until in self._until.items():
                if now >= until:
                    with contextlib.suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        """Called once for each connection, at its end."""
        with self._lock:
            self._until.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that goes away is no news."""
        error = sys.exception()
        level = logging.DEBUG if isinstance(error, OSError) else logging.ERROR
        _log.log(level, "metrics: a scrape from %s failed: %s", client_address, error, exc_info=error)


def _server(listeners: Sequence[socket.socket], callers: Callers, snapshot: Snapshot) -> _Server:
    registry = CollectorRegistry()
    registry.register(StatusCollector(snapshot))
    ProcessCollector(registry=registry)
    server = _Server(listeners, callers)
    server.set_app(make_wsgi_app(registry))
    return server


async def serve_metrics(
    address: Address,
    snapshot: Snapshot,
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves the metrics at `address` until cancelled; started with the port, chosen where that is 0.

    `snapshot` is called in the server's threads. Raises `OperatorError` where the address cannot be bound, or
    its socket file has been removed, and what the server fails with.
    """
    where = str(address) if address.path is not None else host_port(address.host, address.port)
    try:
        bound = await bind(address)
    except ListenError as error:
        raise OperatorError(
            f"cannot serve metrics on {where}: {error.reason}; choose another --metrics"
        ) from error
    server = _server(bound.socks, address.callers, snapshot)
    ended, token = trio.Event(), trio.lowlevel.current_trio_token()
    failures: list[Exception] = []

    def serve() -> None:
        try:
            server.serve_forever(_LOOK_SECONDS)
        except Exception as error:
            failures.append(error)
            token.run_sync_soon(ended.set)

    threading.Thread(target=serve, name="metrics", daemon=True).start()
    try:
        if address.path is None:
            where = f"http://{host_port(address.host, server.server_port)}/metrics"
        _log.info("metrics on %s", where)
        task_status.started(server.server_port)
        async with trio.open_nursery() as nursery:
            if address.path is not None:
                nursery.start_soon(_until_removed, address.path, bound, ended)
            await ended.wait()
            nursery.cancel_scope.cancel()
        if failures:
            raise failures[0]
        raise OperatorError(f"{where} was removed or replaced; leave it, the metrics are asked for there")
    finally:
        server.shutdown()
        bound.close()
        server.server_close()


async def _until_removed(path: str, bound: Bound, ended: trio.Event) -> None:
    await until_gone(path, lambda: bound.in_place)
    ended.set()
