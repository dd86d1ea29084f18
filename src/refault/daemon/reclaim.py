"""A source whose device state never left it whole takes its guest back: no destination can run it.

Cut in the switchover, QEMU up to 10.0 has no way out of its own: paused it refuses `cont` ("Migration is
not finalized yet") and `migrate_cancel`, and 10.0 whose socket ends while it writes the package stays in
`device` for good. So it is let write on, into nothing, until it can pause, and is then resumed to refault
itself, which answers as a destination would that has every page and fails:

    source QEMU    RECV_BITMAP, for each RAM block ──▶
                                                   ◀── received bitmap, all ones
                   RESUME ──▶
                                                   ◀── RESUME_ACK
                   nothing more of `ram`, EOF ──▶
                                                   ◀── SHUT with an error

The migration is `failed` then, as one that is lost in precopy (migration/migration.c,
source_return_path_thread and close_return_path_on_source). 10.0 runs the guest again; before, it is left in
`postmigrate` or without its disks, and `cont` gives it both. 11.1 fails by itself as soon as it is cut.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import trio

from refault.daemon.channels import AttemptFailed
from refault.daemon.local import Executes, hand_over, take_back
from refault.daemon.monitor import MonitorLost, QmpError
from refault.daemon.vm_state import QUERY_TIMEOUT, words
from refault.migration.messages import (
    COMMAND_HEAD,
    RECV_BITMAP,
    RESUME,
    RESUME_ACK,
    SECTION_COMMAND,
    SHUT_ERROR,
    all_received,
)
from refault.migration.phase import Role
from refault.migration.recovery import Event
from refault.migration.versions import abilities

if TYPE_CHECKING:
    from refault.daemon.migration import Migration

log = logging.getLogger("refault.migration")

PATIENCE = 60.0
"""For the whole of it: QEMU may still have much device state to write."""
RESUME_TIMEOUT = 10.0
_LOOK = 0.005
_NOT_FINAL = "not finalized"
_WRITING = ("active", "device")
"""The statuses of a QEMU that has not done with the package; before 8.2 there is none of its own."""
TARGET_PAGE = 4096
"""Bytes that one bit stands for, on all that KVM runs on."""

_LAST = re.compile(rb"\0{7}\x10\x7e.{4}\0\Z", re.DOTALL)
"""The end of a section `ram`, its footer, QEMU_VM_EOF; another section would not begin with 0."""
_LAST_BYTES = 14


async def reclaim(migration: Migration) -> None:
    """Until the guest is the source's again. The far leg is lost, and nothing goes there any more."""
    channels = migration.channels
    if channels is None:
        return
    log.error(
        "%s: ALERT: the channel was lost before all device state had left QEMU, so the guest cannot run at"
        " the destination: the migration is made to fail, and the guest goes on here. What to do: end the"
        " destination's QEMU, and migrate again",
        migration.name,
    )
    sizes = {block.name: block.used_length for block in channels.relay.blocks()}
    try:
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channels.swallow)
                await _when(migration, lambda status: status not in _WRITING)
                nursery.cancel_scope.cancel()
            await channels.closing.close_return_path_first(channels.channel)
            migration.look_soon()
            await _when(migration, lambda status: status in ("postcopy-paused", "failed"))
            if migration.status == "postcopy-paused":
                await trio.sleep(abilities(migration.vm.version).resume_after)
                await _resume_to_us(migration, sizes)
            if migration.stopped_by_switchover:
                await go_on(migration.vm.monitor)
    except* (AttemptFailed, QmpError, MonitorLost, trio.TooSlowError, OSError) as errors:
        _say_why_not(migration, words(_first(errors)))
        migration.feed(Event.ATTEMPT_FAILED)
    else:
        log.warning("%s: the migration has failed, and the guest goes on here", migration.name)


def _say_why_not(migration: Migration, why: str) -> None:
    if not migration.under_way and migration.status != "failed":
        log.warning("%s: %s: the guest is not taken back", migration.name, why)
    else:
        log.error(
            "%s: ALERT: the guest could not be taken back: %s; it stays paused here, whole: do not quit this"
            " QEMU",
            migration.name,
            why,
        )


async def _when(migration: Migration, holds: Callable[[str | None], bool]) -> None:
    while not holds(migration.status):  # events and the poller both tell it
        if not migration.under_way:
            raise AttemptFailed(f"the migration has ended: {migration.status}")
        await trio.sleep(_LOOK)


async def go_on(monitor: Executes) -> None:
    """`cont`, which QEMU refuses for the moment between the event and the end of its migration thread."""
    while True:
        try:
            await monitor.execute("cont", timeout=QUERY_TIMEOUT)
        except QmpError as error:
            if _NOT_FINAL not in error.desc:
                raise
            await trio.sleep(_LOOK)
        else:
            return


def _first(errors: BaseException) -> BaseException:
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors


async def _resume_to_us(migration: Migration, sizes: Mapping[bytes, int]) -> None:
    monitor = migration.vm.monitor
    leg = await hand_over(monitor, Role.SOURCE)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(leg.socket))
    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(fail_as_destination, stream, sizes)
        command = {"uri": f"fd:{leg.name}", "resume": True}
        try:
            await monitor.execute("migrate", command, timeout=RESUME_TIMEOUT)
        except QmpError:
            await take_back(monitor, leg.name)
            raise
        await _when(migration, lambda status: status == "failed")
        nursery.cancel_scope.cancel()


async def fail_as_destination(stream: trio.SocketStream, sizes: Mapping[bytes, int]) -> None:
    """Answers a source's resume, and reads what it sends until it ends. `sizes`: bytes, by RAM block.

    Raises AttemptFailed where it is not one.
    """
    command = None
    while command != RESUME:
        section, command, length = COMMAND_HEAD.unpack(await _exactly(stream, COMMAND_HEAD.size))
        payload = await _exactly(stream, length)
        if section != SECTION_COMMAND or command not in (RECV_BITMAP, RESUME):
            raise AttemptFailed(f"QEMU began its recovery with section {section}, command {command}")
        if command == RECV_BITMAP:
            if payload[1:] not in sizes:
                raise AttemptFailed(f"QEMU asks for a RAM block that is not known: {payload[1:]!r}")
            await stream.send_all(all_received(payload[1:], sizes[payload[1:]] // TARGET_PAGE))
    await stream.send_all(RESUME_ACK)
    end = b""
    while not _LAST.search(end):  # an error that comes sooner makes it pause once more
        more = await stream.receive_some(1 << 16)
        if not more:
            raise AttemptFailed("QEMU ended its recovery")
        end = (end + more)[-_LAST_BYTES:]
    await stream.send_all(SHUT_ERROR)
    while await stream.receive_some(1 << 16):
        pass


async def _exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = await stream.receive_some(count - len(data))
        if not more:
            raise AttemptFailed("QEMU ended its recovery")
        data += more
    return data
