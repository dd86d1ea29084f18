"""What outlives a VM's migrations and is shared by them: its monitor, its counters, and the ends of pairs
that its QEMU may still listen on."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import trio

from refault.daemon.host import subjects
from refault.daemon.host.paths import short_name
from refault.daemon.kernel.peer import Peer
from refault.daemon.kernel.process import still_runs
from refault.daemon.known.counters import Counters
from refault.daemon.known.owed import Owed
from refault.daemon.known.patience import Patience
from refault.daemon.monitor.monitor import MonitorLost, QmpError, words
from refault.daemon.near.local import give_back, has_ended
from refault.daemon.near.local_unix import PATH_BYTES, PrivateSockets
from refault.daemon.near.reach import comes, takes_descriptor
from refault.daemon.record.owed_file import OwedFile
from refault.daemon.record.state_file import MigrationRecord, StateFile
from refault.migration.endpoint import Endpoint, parse_uri
from refault.migration.phase import Role
from refault.migration.relayable import (
    NO_LANES,
    Lanes,
    enabled_capabilities,
    lanes_of,
    why_not,
    why_not_recoverable,
)

if TYPE_CHECKING:
    from refault.daemon.monitor.monitor import Monitor, QemuInfo

log = logging.getLogger("refault.migration")

QUERY_TIMEOUT = 5.0
NO_DESCRIPTORS = (
    "descriptors do not reach QEMU: what forwards its monitor does not pass them, or a security module"
    " (SELinux, AppArmor) keeps them away"
)


class VmState:
    """Of one VM, for as long as it is served."""

    def __init__(
        self,
        name: str,
        monitor: Monitor,
        *,
        relay_allowed: bool,
        recover_uris: Sequence[str],
        state_file: StateFile,
        patience: Patience | None = None,
        session_allowed: bool = False,
    ) -> None:
        self.name = name
        subjects.served(name)
        self.monitor = monitor
        self.counters = Counters()
        self.state_file = state_file
        self.owed = Owed(name, lambda: self.monitor, OwedFile(state_file, name), self.start_soon)
        self.qemu_pid: int | None = None
        """The process behind the monitor, also while the monitor is lost; None where it is not known."""
        self.qemu_threads: tuple[int, ...] = ()
        """The threads of its vCPUs, as it was last asked; none where the process is known."""
        self.qemu_started: int | None = None
        """Since when it runs (kernel/process.py), for pids are used again; None where that is not told."""
        self.encrypted = False
        """Whether QEMU's channels speak TLS, as it was last asked."""
        self.nameless = False
        """Whether they do and the client has told it no name of the other host, as it was last asked."""
        self.set_options(
            relay_allowed=relay_allowed,
            recover_uris=recover_uris,
            patience=patience or Patience(),
            session_allowed=session_allowed,
        )
        self._reached: dict[str, tuple[QemuInfo | None, bool]] = {}
        """What reaches QEMU, and of which QEMU that was found."""
        self._nursery: trio.Nursery | None = None
        self._not_given: list[socket.socket] = []
        """Ends that QEMU did not take back: they stay open for as long as refault runs."""

    def set_options(
        self, *, relay_allowed: bool, recover_uris: Sequence[str], patience: Patience, session_allowed: bool
    ) -> None:
        """What the operator says of migrations: from the next one on."""
        self._relay_allowed = relay_allowed
        self.session_allowed = session_allowed
        self.alternatives = tuple(parse_uri(uri) for uri in recover_uris)
        self.patience = patience

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs what `start_soon` is given, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def start_soon(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        """Runs a task for as long as this VM is served; later, nothing. Its failure is logged, and nothing
        else is lost.
        """
        if self._nursery is not None:
            self._nursery.start_soon(self._guarded, task, *args)

    async def _guarded(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        try:
            await task(*args)
        except Exception:
            log.exception("%s: internal error in %s", self.name, task.__qualname__)

    def met(self, pid: int | None, started: int | None) -> None:
        """A QEMU was connected to."""
        if started is None and pid == self.qemu_pid:
            started = self.qemu_started
        self.qemu_pid, self.qemu_started = pid, started
        self.owed.met(pid, started)

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version; the oldest, and so the most careful, while it is not known."""
        return self.monitor.qemu.version_triple if self.monitor.qemu else (0, 0, 0)

    @property
    def qemu_lives(self) -> bool:
        """Whether QEMU may still look at what it was given."""
        if self.monitor.qemu is not None:
            return True
        return still_runs(self.qemu_pid, self.qemu_started)

    async def query(self, command: str) -> Mapping[str, object]:
        """One of refault's own in-band queries; the empty mapping where QEMU does not answer with one."""
        reply = await self.monitor.execute(command, timeout=QUERY_TIMEOUT)
        return reply if isinstance(reply, Mapping) else {}

    async def query_both(self, first: str, second: str) -> tuple[Mapping[str, object], Mapping[str, object]]:
        """Two queries in one round trip, in this order."""
        replies: dict[str, Mapping[str, object]] = {}
        errors: list[Exception] = []

        async def ask(command: str) -> None:
            try:
                replies[command] = await self.query(command)
            except (QmpError, MonitorLost, trio.TooSlowError) as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, second)
            await ask(first)
        if errors:
            raise errors[0]
        return replies[first], replies[second]

    async def ask_encrypted(self) -> Mapping[str, object]:
        """QEMU's migration parameters as clients see them, of which `encrypted` and `nameless` are noted."""
        parameters = await self.query("query-migrate-parameters")
        if parameters.get("tls-hostname") == self.owed.tls_hostname:
            parameters = {**parameters, "tls-hostname": ""}
        self.encrypted = bool(parameters.get("tls-creds"))
        self.nameless = self.encrypted and not parameters.get("tls-hostname")
        return parameters

    async def ask_settings(self) -> tuple[frozenset[str], Mapping[str, object]]:
        """QEMU's migration capabilities that are on, and its parameters as `ask_encrypted` gives them."""
        capabilities = await self.monitor.execute("query-migrate-capabilities", timeout=QUERY_TIMEOUT)
        return enabled_capabilities(capabilities), await self.ask_encrypted()

    async def judge(
        self, endpoint: Endpoint | None, role: Role, *, given: bool = False
    ) -> tuple[str | None, Lanes]:
        """Why the relay cannot carry a migration to `endpoint`, None where it can; and the lanes that it has.
        `given`: over a connection that the client has made.

        Warns of what QEMU could not recover. Raises MonitorLost.
        """
        try:
            return await self._judge(endpoint, role, given)
        except (QmpError, trio.TooSlowError) as error:
            return f"what QEMU would do with it could not be asked: {words(error)}", NO_LANES

    async def _judge(self, endpoint: Endpoint | None, role: Role, given: bool) -> tuple[str | None, Lanes]:
        capabilities = enabled_capabilities(
            await self.monitor.execute("query-migrate-capabilities", timeout=QUERY_TIMEOUT)
        )
        hopeless = why_not_recoverable(capabilities)
        if hopeless:
            log.warning(
                "%s: QEMU cannot recover this migration once postcopy has begun: %s", self.name, hopeless
            )
        if not self._relay_allowed:
            return "switched off (--relay off)", NO_LANES
        parameters = await self.ask_encrypted()
        info = self.monitor.qemu
        seen = info is not None and info.pid is not None
        reason = why_not(
            endpoint,
            capabilities,
            parameters,
            role=role,
            version=self.version,
            process_is_seen=seen,
            given=given,
        )
        try:
            if reason is None and not await self.takes_descriptors():
                reason = NO_DESCRIPTORS
                log.warning("%s: %s: a loss is recovered over QMP alone, by its address", self.name, reason)
        except OSError as error:
            reason = f"no descriptor could be made: {error}"
        return reason, lanes_of(capabilities, parameters)

    async def ask_lanes(self) -> Lanes:
        """The lanes that QEMU's next channel has. Raises what `execute` raises."""
        return lanes_of(*await self.ask_settings())

    async def takes_descriptors(self) -> bool:
        """Whether descriptors that are passed to QEMU reach it. Raises OSError where there is none to pass,
        MonitorLost and trio.TooSlowError."""
        return await self._reaches("descriptors", lambda: takes_descriptor(self.monitor))

    async def comes_to_sockets(self) -> bool:
        """Whether QEMU can connect to the sockets made for it. Raises OSError where none can be made, and as
        `takes_descriptors`."""
        return await self._reaches("sockets", lambda: comes(self.monitor, self.sockets))

    async def _reaches(self, what: str, ask: Callable[[], Awaitable[bool]]) -> bool:
        qemu, answer = self._reached.get(what, (None, False))
        if qemu is None or qemu is not self.monitor.qemu:
            qemu = self.monitor.qemu
            answer = await ask()
            self._reached[what] = qemu, answer
        return answer

    @property
    def sockets(self) -> PrivateSockets:
        """Where sockets for this QEMU may lie."""
        info = self.monitor.qemu
        qemu = Peer(info.pid, info.uid) if info is not None else Peer(self.qemu_pid, None)
        files = self.state_file
        directory = files.directory / short_name(files.directory, self.name, ".legs", PATH_BYTES)
        return PrivateSockets(directory, qemu, files.usable(self.qemu_pid))

    async def record(self) -> MigrationRecord | None:
        """What the state file says of a migration of this QEMU."""
        await self.ask_threads()
        info = self.monitor.qemu
        record = self.state_file.load(info.pid if info else None, self.qemu_threads)
        if record is not None and self.qemu_started is None:  # one of the two may not have been told
            self.qemu_started = record.qemu_started
        return record

    async def ask_threads(self) -> None:
        """Has QEMU name the threads of its vCPUs, where nothing else tells its process from another."""
        self.qemu_threads = ()
        if self.monitor.qemu is None or self.monitor.qemu.pid is not None:
            return
        with contextlib.suppress(QmpError, MonitorLost, trio.TooSlowError):
            match await self.monitor.execute("query-cpus-fast", timeout=QUERY_TIMEOUT):
                case [*cpus]:
                    told = (cpu.get("thread-id") for cpu in cpus if isinstance(cpu, Mapping))
                    self.qemu_threads = tuple(thread for thread in told if isinstance(thread, int))

    async def let_go(self, end: socket.socket) -> bool:
        """Closes our end of a pair on which QEMU may listen, once QEMU holds both; False if it stays open."""
        # A QEMU that has ended has closed its end, though there may be another behind the monitor.
        if has_ended(end) or not self.qemu_lives or await give_back(self.monitor, end):
            end.close()
            return True
        self._not_given.append(end)
        return False

    async def let_go_all(self) -> bool:
        """Tries again with the ends that stayed open; False where one still does."""
        ends, self._not_given = self._not_given, []
        return all([await self.let_go(end) for end in ends])
