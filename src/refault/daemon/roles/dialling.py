"""The recovery of a source that no relay carries: QEMU itself dials the other host.

Before there was `postcopy-recover-setup` it does not tell of that: it stays in `postcopy-paused` while it
dials, for two minutes on a silent network, and takes a second `migrate` with `resume` meanwhile. When both
come through it aborts (migration/migration.c, migrate_fd_connect: !s->cleanup_bh). So it is given a
connection that is made for it, where it takes one, and else is not told again while it may still be dialling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import trio

from refault.daemon.far.dial import REDIAL_TIMEOUT, dial_in_course, outlast
from refault.daemon.kernel.process import same_network
from refault.daemon.kernel.tcp import connects
from refault.daemon.known.course import Course
from refault.daemon.known.vm_state import QUERY_TIMEOUT
from refault.daemon.monitor.monitor import QmpError
from refault.daemon.near.local import Executes, hand_connection
from refault.migration.endpoint import Endpoint, Inet
from refault.migration.recovery import AttemptFailed
from refault.migration.relayable import enabled_capabilities
from refault.migration.versions import abilities
from refault.qmp.replies import is_error

MIGRATE_TIMEOUT = 10.0
DIAL_TIMEOUT = 150.0
"""What a connection that nobody answers takes at most by itself (tcp(7), tcp_syn_retries: 127 s)."""
DIALS = (
    "QEMU still dials for the recovery that it was told of last, and told of another would not survive both"
)
_ADVICE = "look at the route and firewall to the other host, and whether its QEMU listens there"


async def resume(monitor: Executes, uri: str) -> None:
    """Has a source's QEMU recover at an address. Raises what `execute` raises."""
    await monitor.execute("migrate", {"uri": uri, "resume": True}, timeout=MIGRATE_TIMEOUT)


class Dialling:
    """What one migration's source, without a relay, was told to dial."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._told: tuple[float, int] | None = None
        """When it was told last, and how many recoveries there had been."""

    def watch(self, endpoint: Endpoint | None, heard: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        """What hears QEMU's reply to a client's `migrate` with `resume`: `heard` does, and QEMU dials from
        then on."""

        def watch(reply: bytes) -> bytes:
            if isinstance(endpoint, Inet) and not is_error(reply):
                self._is_told()
            return heard(reply)

        return watch

    def _is_told(self) -> None:
        self._told = trio.current_time(), self._course.counters.recoveries

    async def goes_on(self) -> bool:
        """Whether QEMU may still be at the connection that it was told to make."""
        vm, endpoint = self._course.vm, self._course.addresses.last
        if self._told is None or abilities(vm.version).tells_that_it_dials:
            return False
        began, recoveries = self._told
        if recoveries != self._course.counters.recoveries or not isinstance(endpoint, Inet):
            return False
        if vm.qemu_pid is not None and await vm.takes_descriptors():  # else it may be a forwarder's
            with contextlib.suppress(OSError):  # it is another user's, say
                # In a thread: the kernel may take 20 ms for its table of connections.
                return await trio.to_thread.run_sync(connects, vm.qemu_pid, endpoint.port)
        return trio.current_time() - began < DIAL_TIMEOUT

    async def resume(self, endpoint: Endpoint, shield: trio.CancelScope) -> None:
        """Has QEMU recover at an address, or over a connection made for it; `shield`: an attempt's course.

        Raises AttemptFailed where nobody can be reached, and what `execute` raises.
        """
        vm = self._course.vm
        if not isinstance(endpoint, Inet) or not await self._takes_connection():
            await self._resume_at(endpoint.uri)
            return
        try:
            connection, _ = await dial_in_course([endpoint], REDIAL_TIMEOUT, shield)
        except OSError as error:
            raise AttemptFailed(f"{error} ({_ADVICE})") from None
        with connection:
            try:
                name = await hand_connection(vm.monitor, connection.fileno())
            except BaseException:
                vm.start_soon(outlast, connection.dup())  # who listens there may not survive its end
                raise
            await self._resume_at(f"fd:{name}")

    async def _resume_at(self, uri: str) -> None:
        self._is_told()
        try:
            await resume(self._course.vm.monitor, uri)
        except QmpError:
            self._told = None
            raise

    async def _takes_connection(self) -> bool:
        """Whether QEMU is better given a connection, and takes one. Raises what `execute` does."""
        vm = self._course.vm
        if abilities(vm.version).tells_that_it_dials or vm.qemu_pid is None:
            return False
        if not await vm.takes_descriptors():
            return False
        on = enabled_capabilities(
            await vm.monitor.execute("query-migrate-capabilities", timeout=QUERY_TIMEOUT)
        )
        parameters = await vm.query("query-migrate-parameters")
        if on & {"multifd", "postcopy-preempt"} or parameters.get("tls-creds"):
            return False  # further connections, or a name to check
        return same_network(vm.qemu_pid)
