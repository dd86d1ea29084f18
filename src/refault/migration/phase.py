"""The phase of a migration, read off what has passed the relay."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from dataclasses import dataclass


class Role(enum.StrEnum):
    """Which of the two QEMUs stands behind our monitor."""

    SOURCE = "source"
    DESTINATION = "destination"


class Phase(enum.StrEnum):
    """A phase, named by what an untimely close would do in it (legs.py)."""

    PRECOPY = "precopy"
    SWITCHOVER = "switchover"
    POSTCOPY = "postcopy"
    RECOVERY_HANDSHAKE = "recovery-handshake"
    COMPLETING = "completing"
    DONE = "done"


@dataclass(frozen=True)
class Passed:
    """What has passed the relay, of the whole migration and (`resumed`, `resume_acknowledged`) of this
    channel."""

    discarding: bool = False
    """RAM_DISCARD: the source has stopped its guest, and the switchover is next (ram.c,
    ram_postcopy_send_discard_bitmap)."""
    packaged_begun: bool = False
    """MIG_CMD_PACKAGED: the device state is under way (migration/savevm.c, qemu_savevm_send_packaged)."""
    packaged_passed: bool = False
    """All of it has been read from QEMU, or from the far leg."""
    running: bool = False
    """The destination has said so, or has had time to after its answer to the ping before RUN
    (migration/migration.c, postcopy_start); for the source that answer alone."""
    completing: bool = False
    """A section END in postcopy: the source sends the rest, and does not pause any more (savevm.c,
    qemu_savevm_state_complete_postcopy)."""
    ended: bool = False
    """QEMU_VM_EOF after postcopy: the source has sent all (savevm.c, qemu_savevm_state_complete_postcopy)."""
    shut: bool = False
    """MIG_RP_MSG_SHUT: the destination has all."""
    resumed: bool = False
    """This channel replaces a lost one."""
    resume_acknowledged: bool = False
    """MIG_RP_MSG_RESUME_ACK on this channel."""
    opaque: bool = False
    """A direction could not be decoded, so the facts above may be missing."""


def cannot_have_left(passed: Passed) -> bool:
    """Of a source whose far leg is lost: whether the switchover has begun and the destination surely cannot
    run the guest, for RUN is the last of the package (loadvm_handle_cmd_packaged wants all of it first)."""
    begun = passed.discarding or passed.packaged_begun
    return begun and not (passed.packaged_passed or passed.running or passed.resumed or passed.opaque)


def in_doubt(passed: Passed) -> bool:
    """Of a source that has not heard that its guest has arrived: whether it may have."""
    return (passed.discarding or passed.packaged_begun) and not passed.opaque


@dataclass(frozen=True)
class Told:
    """What QEMU itself says: it counts where the stream cannot be read."""

    status: str | None = None
    """query-migrate's word."""
    runs: bool = False
    """A destination: RUN has been carried out."""
    never_postcopy: bool = False
    """A destination: postcopy-ram was off when its channel began, so that it runs once it has all."""
    much_left: bool = False
    """A source: so much is left to send that it is not about to complete."""
    sent_all: bool = False
    """A source that has not switched to postcopy: it has sent all, so the destination may run the guest."""


# The first row whose condition holds gives the phase.
_PHASES: tuple[tuple[Callable[[Passed], bool], Phase], ...] = (
    (lambda p: p.shut, Phase.DONE),
    (lambda p: (p.packaged_begun or p.resumed) and p.ended, Phase.COMPLETING),
    (lambda p: p.resumed and not p.resume_acknowledged, Phase.RECOVERY_HANDSHAKE),
    (lambda p: p.running, Phase.POSTCOPY),
    (lambda p: p.resumed, Phase.POSTCOPY),
    (lambda p: p.packaged_begun, Phase.SWITCHOVER),
)

ENDS_PRECOPY = ("active", "device")
"""The statuses in which a source sends the last of precopy, and waits for its destination's word; before 8.0
mostly the first (migration/migration.c, migration_completion)."""
_BY_STATUS = {
    "postcopy-device": Phase.SWITCHOVER,
    "postcopy-paused": Phase.POSTCOPY,
    "postcopy-recover-setup": Phase.RECOVERY_HANDSHAKE,
    "postcopy-recover": Phase.RECOVERY_HANDSHAKE,
    "completed": Phase.DONE,
}


def phase_of(passed: Passed, role: Role = Role.DESTINATION, told: Told | None = None) -> Phase:
    """The phase, from what passed; what QEMU `told` counts only where the stream is opaque."""
    told = told or Told()
    if role is Role.SOURCE and passed.completing:
        passed = dataclasses.replace(passed, ended=True)
    read = next((phase for holds, phase in _PHASES if holds(passed)), Phase.PRECOPY)
    if not passed.opaque or read in (Phase.DONE, Phase.COMPLETING):
        return read
    if told.status == "completed" or (told.runs and told.never_postcopy):
        return Phase.DONE
    if told.status == "postcopy-active" or (told.runs and not passed.resumed):
        return _unread_postcopy(passed, role, told)
    if passed.resumed and not passed.resume_acknowledged:
        return Phase.RECOVERY_HANDSHAKE
    if role is Role.SOURCE and told.sent_all and told.status in ENDS_PRECOPY and read is Phase.PRECOPY:
        return Phase.COMPLETING
    return _BY_STATUS.get(told.status or "", read)


def _unread_postcopy(passed: Passed, role: Role, told: Told) -> Phase:
    """What is not known to be over is taken as under way, and what may have begun as begun."""
    if role is Role.SOURCE:
        return Phase.POSTCOPY if told.much_left else Phase.COMPLETING
    # It says postcopy-active from LISTEN on, before it runs; after a recovery only once it has resumed.
    return Phase.POSTCOPY if passed.running or passed.resumed or told.runs else Phase.SWITCHOVER
