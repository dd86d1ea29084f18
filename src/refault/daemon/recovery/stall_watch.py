"""Pauses a migration that stands still where no relay would notice, by `migrate-pause`. What follows
is a recovery as after any loss."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any

import trio

from refault.daemon.kernel.process import resident_pages
from refault.daemon.kernel.userfaultfd import waiting
from refault.daemon.known.course import Course
from refault.daemon.known.vm_state import QUERY_TIMEOUT
from refault.daemon.monitor.monitor import MonitorLost, QmpError, words
from refault.migration.phase import Role
from refault.migration.stall import StallDetector
from refault.migration.versions import abilities

log = logging.getLogger("refault.migration")

_LOOKS = 20
"""How often it is looked at within the time after which it is paused."""


async def watch(course: Course) -> None:
    """Looks until cancelled."""
    stall_after = course.vm.patience.stall_after
    detector = StallDetector(stall_after)
    handshake, patience = StallDetector(stall_after), stall_after
    while True:
        await course.until_under_way()
        await trio.sleep(stall_after / _LOOKS)
        if handshake.stalls(trio.current_time(), None, work_left=_in_handshake(course)):
            await _pause(course, patience)
            patience *= 2
            handshake = StallDetector(patience)
        if not course.under_way or course.status != "postcopy-active" or course.kept_by is not None:
            detector = StallDetector(stall_after)
            continue
        handshake, patience = StallDetector(stall_after), stall_after
        look = _source if course.role is Role.SOURCE else _destination
        seen = await look(course)
        if seen is not None and detector.stalls(trio.current_time(), seen[0], work_left=seen[1]):
            await _pause(course, stall_after)


def _in_handshake(course: Course) -> bool:
    """Whether it is in a recovery handshake that QEMU can be brought out of.

    What passes in it QEMU does not count, so time alone tells; a large guest's may take longer, and is given
    twice as much each time.
    """
    leaves = abilities(course.vm.version).pauses_again_in_handshake
    return leaves and course.under_way and course.status == "postcopy-recover"


async def _source(course: Course) -> tuple[Hashable, bool] | None:
    """What it has sent, and whether pages are left. None where QEMU does not tell."""
    try:
        reply: Mapping[str, Any] = await course.vm.query("query-migrate")
    except (QmpError, MonitorLost, trio.TooSlowError):
        return None
    ram = reply.get("ram", {})
    if reply.get("status") != "postcopy-active" or "transferred" not in ram:
        return None
    return (ram["transferred"], ram["remaining"], ram.get("postcopy-requests")), ram["remaining"] > 0


async def _destination(course: Course) -> tuple[Hashable, bool] | None:
    """Its memory in use, which each page that is placed adds to, and whether threads wait for pages.

    All of it from /proc, for its main thread may be one of those that wait. None where the kernel does not
    tell.
    """
    pid = course.vm.qemu_pid
    if pid is None:
        return None
    threads = waiting(pid)
    if threads is None:
        return None
    try:
        return (resident_pages(pid), threads.total), threads.total > 0
    except (OSError, ValueError, IndexError):
        return None


async def _pause(course: Course, seconds: float) -> None:
    log.warning(
        "%s: postcopy has not moved for %g s though the %s waits for it: pausing it, to recover it; is the"
        " network to the other host silent?",
        course.name,
        seconds,
        course.role,
        extra=course.repeats("stalls"),
    )
    try:
        await course.vm.monitor.execute("migrate-pause", oob=True, timeout=QUERY_TIMEOUT)
    except (QmpError, MonitorLost, trio.TooSlowError) as error:
        extra = course.repeats("not paused", words(error))
        log.warning("%s: could not pause it: %s; trying again", course.name, words(error), extra=extra)
