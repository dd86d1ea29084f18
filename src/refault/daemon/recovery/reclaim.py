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
`postmigrate` or without its disks, and `cont` gives it both. 11.1 fails by itself as soon as it is cut. So it
is with postcopy-preempt, whose second connection has no part in it: the package goes over the main one.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

import trio

from refault.daemon.known.course import Course
from refault.daemon.known.vm_state import QUERY_TIMEOUT
from refault.daemon.monitor.monitor import MonitorLost, QmpError, words
from refault.daemon.near.local import Executes, take_back
from refault.daemon.recovery.failing_destination import fail_as_destination, offered
from refault.daemon.relayed.channels import Channels
from refault.migration.legs import WAITS_FOR_PONG
from refault.migration.phase import cannot_have_left
from refault.migration.recovery import AttemptFailed, Event
from refault.migration.versions import abilities

log = logging.getLogger("refault.migration")

PATIENCE = 60.0
"""For the whole of it: QEMU may still have much device state to write."""
RESUME_TIMEOUT = 10.0
_LOOK = 0.005
_NOT_FINAL = "not finalized"
_WRITING = ("active", "device")
"""The statuses of a QEMU that has not done with the package; before 8.2 there is none of its own."""


def say_cannot_have_left(name: str) -> None:
    """Why the guest is taken back, where refault knows it by itself."""
    log.error(
        "%s: ALERT: the channel was lost before all device state had left QEMU, so the guest cannot run at"
        " the destination: the migration is made to fail, and the guest goes on here. What to do: end the"
        " destination's QEMU, and migrate again",
        name,
    )


def say_as_told(name: str) -> None:
    """The same, where it was told."""
    log.warning("%s: told that the destination has ended without the guest: taking it back", name)


async def reclaim(
    course: Course, channels: Callable[[], Channels | None], attempts_over: Callable[[], Awaitable[None]]
) -> None:
    """Until the guest is the source's again. The far leg is lost, and nothing goes there any more.
    `channels` gives the relay's, if there is one; `attempts_over` waits for the end of the last attempt."""
    try:
        with trio.fail_after(PATIENCE):
            await attempts_over()  # QEMU may have its command
            if (relayed := channels()) is not None:
                await _end_and_fail(course, relayed)
            else:
                await _let_go(course)
            if course.stopped_by_switchover:
                await go_on(course.vm.monitor)
    except* (AttemptFailed, QmpError, MonitorLost, trio.TooSlowError, OSError) as errors:
        _say_why_not(course, words(_first(errors)))
        relayed = channels()
        held = relayed.held is not None if relayed is not None else course.kept_until_loaded
        course.feed(Event.LEG_HELD if held else Event.ATTEMPT_FAILED)
    else:
        log.warning("%s: the migration has failed, and the guest goes on here", course.name)


async def _end_and_fail(course: Course, channels: Channels) -> None:
    sizes = {block.name: block.used_length for block in channels.relay.blocks()}
    _must_not_have_answered(channels)
    cost = channels.cost_of_stopping()
    if cost is not None and not cost[0] and not await _fails_by_itself(channels):
        raise AttemptFailed(f"QEMU's leg may not be closed now: {cost[1]}")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channels.closing.swallow)
        await _when(course, lambda status: status not in _WRITING)
        nursery.cancel_scope.cancel()
    await channels.end(channels.channel)
    course.look_soon()
    await _when(course, lambda status: status in ("postcopy-paused", "failed"))
    if course.status == "postcopy-paused":
        _must_not_have_answered(channels)  # on a channel that was open till now
        await trio.sleep(abilities(course.vm.version).resume_after)
        await _resume_to_us(course, sizes)


async def _fails_by_itself(channels: Channels) -> bool:
    """Whether the end of its leg makes QEMU fail and run the guest, which is what is wanted here."""
    stays = channels.held_until_loaded or cannot_have_left(channels.relay.passed())
    return stays and (await channels.word.ask()).status == WAITS_FOR_PONG


async def _let_go(course: Course) -> None:
    """The same where QEMU alone holds both ends of the leg, since an earlier refault."""
    await take_back(course.vm.monitor, *course.kept_before)
    course.look_soon()
    await _when(course, lambda status: status == "failed")


def _must_not_have_answered(channels: Channels) -> None:
    if not channels.relay.closed:
        channels.look()
    if channels.has_arrived:
        raise AttemptFailed("the destination has answered meanwhile, and has the guest")


def _say_why_not(course: Course, why: str) -> None:
    if not course.under_way and course.status != "failed":
        log.warning("%s: %s: the guest is not taken back", course.name, why)
    else:
        log.error(
            "%s: ALERT: the guest could not be taken back: %s; it stays paused here, whole: do not quit this"
            " QEMU",
            course.name,
            why,
        )


async def _when(course: Course, holds: Callable[[str | None], bool]) -> None:
    while not holds(course.status):  # events and the poller both tell it
        if not course.under_way:
            raise AttemptFailed(f"the migration has ended: {course.status}")
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


async def _resume_to_us(course: Course, sizes: Mapping[bytes, int]) -> None:
    vm = course.vm
    async with (
        offered(vm.monitor, vm.sockets if course.lanes.count else None) as (uri, main),
        trio.open_nursery() as nursery,
    ):

        async def fail() -> None:
            await fail_as_destination(await main(), sizes)

        nursery.start_soon(fail)
        command: dict[str, object] = {"uri": uri, "resume": True}
        await vm.monitor.execute("migrate", command, timeout=RESUME_TIMEOUT)
        await _when(course, lambda status: status == "failed")
        nursery.cancel_scope.cancel()
