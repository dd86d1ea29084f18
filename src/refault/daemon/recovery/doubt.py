"""A switchover that was lost when all device state had left the source's QEMU: who has the guest?

The destination, if all of it has come; it has said so then, or says so in the recovery. If a part was lost
on its way nobody sends that again, and the guest runs nowhere: it is at the source, whole, and QEMU refuses
`cont` and `migrate_cancel`. The source's refault cannot tell the one from the other; an operator can, who
looks at the destination. His word is a command that no client sends by chance:

    {"execute": "migrate", "arguments": {"uri": "refault:take-back", "resume": true}}
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from refault.migration.legs import UNTIL_LOADED
from refault.migration.phase import Role
from refault.migration.recovery import Event, State
from refault.migration.versions import abilities

if TYPE_CHECKING:
    from refault.daemon.migration import Migration

log = logging.getLogger("refault.migration")

TAKE_BACK = "refault:take-back"
TOLD_AFTER = 2.0
"""Seconds of a lost switchover; one whose package has come whole is recovered sooner."""
_ADVICE = (
    "If its query-status says inmigrate, end it; then, or if it had ended without having run the guest, say"
    ' so at this QMP socket: {"execute": "migrate", "arguments":'
    f' {{"uri": "{TAKE_BACK}", "resume": true}}}}, and the guest goes on here'
)
_NO_WAY = "If not: this QEMU has no way to let the guest go on, and it must be started anew"


def in_doubt(migration: Migration) -> bool:
    """Whether the source's guest may or may not have arrived."""
    channels = migration.channels
    if migration.held_until_loaded and not (channels is not None and channels.has_arrived):
        return True
    if channels is None or channels.relay.closed or migration.role is not Role.SOURCE:
        return False
    passed = channels.relay.passed()
    begun = passed.discarding or passed.packaged_begun
    return begun and channels.knows_first and not (channels.has_arrived or passed.opaque)


async def tell_doubt(migration: Migration) -> None:
    """Tells the operator if the loss of the first channel is not soon over."""
    await trio.sleep(TOLD_AFTER)
    lost = migration.policy.state not in (State.RUNNING, State.RECLAIMING)
    if not (migration.under_way and lost and in_doubt(migration)):
        return
    log.error(
        "%s: ALERT: the channel was lost in the switchover, and the destination has not said since that it"
        " has the guest: if a part of the device state was lost on the way the guest runs nowhere; it is"
        " here, whole and paused. What to do: do not quit this QEMU, and look at the destination's. If it"
        " runs the guest leave both: refault recovers the channel. %s",
        migration.name,
        _ADVICE if abilities(migration.vm.version).fails_when_told else _NO_WAY,
    )


def hold_again(migration: Migration) -> None:
    """QEMU holds the leg of a source that waits for its guest's arrival, and an earlier refault has ended."""
    log.error(
        "%s: ALERT: the channel was lost while the source waited to hear of its guest's arrival, and QEMU"
        " holds its leg open since an earlier refault, for if it closed: %s. What to do: %s",
        migration.name,
        UNTIL_LOADED.effect,
        UNTIL_LOADED.advice,
    )
    migration.feed(Event.LEG_HELD)


def decide(migration: Migration) -> str | None:
    """Does what the operator says; else why not, in words."""
    version = abilities(migration.vm.version)
    state = migration.policy.state
    if not version.fails_when_told:
        return "this QEMU cannot be made to give its guest back"
    if not in_doubt(migration):
        return (
            "it is not in doubt here who has the guest: the destination has said that it had it, or this"
            " refault has not seen the whole migration"
        )
    if state in (State.OPEN, State.HANDSHAKE) and not version.pauses_again_in_handshake:
        return "this QEMU does not survive the end of the recovery handshake that it is in"
    if state is State.HELD and not migration.held_until_loaded:
        return "this QEMU's leg is held open, and may not be closed now"
    migration.feed(Event.TOLD_TO_TAKE_BACK)
    if migration.policy.state is not State.RECLAIMING:
        return f"not while the migration is {state.value}"
    return None
