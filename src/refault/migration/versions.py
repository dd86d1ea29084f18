"""What the versions of QEMU allow during a recovery. Tried on live QEMUs where the comment says so."""

from __future__ import annotations

from dataclasses import dataclass, replace

Version = tuple[int, int, int]


@dataclass(frozen=True)
class Abilities:
    """What one version of QEMU survives."""

    pauses_again_in_handshake: bool
    """A channel lost in the recovery handshake brings `postcopy-paused` back. Else the destination segfaults
    and the source stays in `postcopy-recover` for ever (tried on 5.2 and 7.2; 10.0 pauses again)."""
    refuses_cancel_in_postcopy: bool
    """`migrate_cancel` in postcopy is an error. Else it hangs in `cancelling` while paused, and from
    `postcopy-active` the source goes to `cancelled` and the destination stays paused for good (tried on 5.2
    and 7.2)."""

    tells_that_it_dials: bool
    """`postcopy-recover-setup` stands from `migrate` with `resume` until it has connected or not. Else it
    stays paused, and a second resume meanwhile ends it by an assertion (tried on 7.2; 10.0 tells)."""

    fails_when_told: bool
    """A destination's word that it failed, on a resumed channel, makes a paused source fail and gives it its
    guest back (tried on 7.2 and 10.0; 5.2 does not take the resume)."""

    resume_after: float
    """Seconds that the source is left alone after it has paused. Before 8.2 its return-path thread may come
    to the old channel's end only after a resume has opened the new one, and then frees the new one's file
    (migration/migration.c, source_return_path_thread; seen once on 7.2 as a segfault). Not where the
    thread has been seen to be out of the way (daemon/near/return_path.py)."""
    survives_failed_resume: bool
    """A resume and a `migrate-recover` whose connection comes to nothing may be followed by others. Else the
    source aborts at the next and the destination says "triggered already" for ever (tried on 5.2; 7.2, 10.0
    and 11.1 survive)."""
    preempt_comes_late: bool
    """The source opens its preempt channel when it needs it: in postcopy_start, and after the received
    bitmaps of a recovery; the destination starts on the main one. Else the source opens both at once, and the
    destination waits for both (migration/migration.c, migrate_fd_connect, migration_ioc_process_incoming)."""
    waits_for_arrival: bool
    """A source is `postcopy-device` until its destination has said that it has the guest, and fails and runs
    the guest again where its channel ends before (tried on 11.1; migration/migration.c, postcopy_start)."""


_OLDEST = Abilities(
    pauses_again_in_handshake=False,
    refuses_cancel_in_postcopy=False,
    tells_that_it_dials=False,
    fails_when_told=False,
    resume_after=0.05,
    survives_failed_resume=False,
    preempt_comes_late=False,
    waits_for_arrival=False,
)
_V72 = replace(_OLDEST, fails_when_told=True, survives_failed_resume=True)
_V80 = replace(_V72, preempt_comes_late=True)
_V82 = replace(_V80, pauses_again_in_handshake=True, resume_after=0.0)
_V100 = replace(_V82, tells_that_it_dials=True, refuses_cancel_in_postcopy=True)
_V102 = replace(_V100, waits_for_arrival=True)
_SINCE: tuple[tuple[Version, Abilities], ...] = (
    ((7, 2, 0), _V72),
    ((8, 0, 0), _V80),
    ((8, 2, 0), _V82),
    ((10, 0, 0), _V100),
    ((10, 2, 0), _V102),
)


def abilities(version: Version) -> Abilities:
    """The abilities of a QEMU `version`; an unknown newer one is taken for the newest known."""
    found = _OLDEST
    for since, what in _SINCE:
        if version >= since:
            found = what
    return found
