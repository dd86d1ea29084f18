"""The phase of a migration, read off what has passed the relay."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass


class Role(enum.StrEnum):
    """Which of the two QEMUs stands behind our monitor."""

    SOURCE = "source"
    DESTINATION = "destination"


class Phase(enum.StrEnum):
    """A phase, named by what an untimely close would do in it (DESIGN, 6)."""

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


# The first row whose condition holds gives the phase.
_PHASES: tuple[tuple[Callable[[Passed], bool], Phase], ...] = (
    (lambda p: p.shut, Phase.DONE),
    (lambda p: (p.packaged_begun or p.resumed) and p.ended, Phase.COMPLETING),
    (lambda p: p.resumed and not p.resume_acknowledged, Phase.RECOVERY_HANDSHAKE),
    (lambda p: p.running, Phase.POSTCOPY),
    (lambda p: p.resumed, Phase.POSTCOPY),
    (lambda p: p.packaged_begun, Phase.SWITCHOVER),
)

# Where the stream tells nothing, QEMU's own word for it does.
# `postcopy-active` begins at LISTEN, before the destination runs: what is not known to be over is taken as
# under way.
_BY_STATUS = {
    "postcopy-active": Phase.SWITCHOVER,
    "postcopy-paused": Phase.POSTCOPY,
    "postcopy-recover-setup": Phase.RECOVERY_HANDSHAKE,
    "postcopy-recover": Phase.RECOVERY_HANDSHAKE,
    "completed": Phase.DONE,
}


def phase_of(passed: Passed, status: str | None = None) -> Phase:
    """The phase, from what passed; `status` (query-migrate's word) counts only where the stream is opaque."""
    if passed.opaque and passed.resumed and not passed.shut and status == "postcopy-active":
        return Phase.POSTCOPY  # RESUME_ACK may have passed unread; QEMU says so after it
    for holds, phase in _PHASES:
        if holds(passed):
            return phase
    if passed.opaque and status is not None:
        return _BY_STATUS.get(status, Phase.PRECOPY)
    return Phase.PRECOPY
