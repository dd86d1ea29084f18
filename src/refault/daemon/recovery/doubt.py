"""A switchover that was lost when all device state had left the source's QEMU: who has the guest?

The destination, if all of it has come; it has said so then, or says so in the recovery. If a part was lost
on its way nobody sends that again, and the guest runs nowhere: it is at the source, whole, and QEMU refuses
`cont` and `migrate_cancel`. The source's refault cannot tell the one from the other; an operator can, who
looks at the destination. His word is a command that no client sends by chance:

    {"execute": "migrate", "arguments": {"uri": "refault:take-back", "resume": true}}
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from refault.daemon.known.course import Course
from refault.daemon.relayed.channels import Channels
from refault.migration.legs import UNTIL_LOADED, Rule
from refault.migration.recovery import Event, State
from refault.migration.versions import abilities

log = logging.getLogger("refault.migration")

TAKE_BACK = "refault:take-back"
TOLD_AFTER = 2.0
"""Seconds of a lost switchover; one whose package has come whole is recovered sooner."""
_ADVICE = (
    "If its query-status says inmigrate, end it; then, or if it had ended without having run the guest, say"
    ' so at this QMP socket: {"execute": "migrate", "arguments":'
    f' {{"uri": "{TAKE_BACK}", "resume": true}}}}, and the guest goes on here'
)
_STILL_HELD = (
    "%s: ALERT: QEMU holds its leg open since an earlier refault, for if it closed: %s. What to do: %s"
)
_STILL_HELD_UNTIL_LOADED = (
    "%s: ALERT: the channel was lost while the source waited to hear of its guest's arrival, and QEMU"
    " holds its leg open since an earlier refault, for if it closed: %s. What to do: %s"
)
_NO_WAY = "If not: this QEMU has no way to let the guest go on, and it must be started anew"


def in_doubt(course: Course, channels: Channels | None) -> bool:
    """Whether the source's guest may or may not have arrived."""
    return channels.in_doubt if channels is not None else course.kept_until_loaded


async def tell_doubt(course: Course, channels: Callable[[], Channels | None]) -> None:
    """Tells the operator if the loss of the first channel is not soon over."""
    await trio.sleep(TOLD_AFTER)
    lost = course.policy.state not in (State.RUNNING, State.RECLAIMING)
    if not (course.under_way and lost and in_doubt(course, channels())):
        return
    log.error(
        "%s: ALERT: the channel was lost in the switchover, and the destination has not said since that it"
        " has the guest: if a part of the device state was lost on the way the guest runs nowhere; it is"
        " here, whole and paused. What to do: do not quit this QEMU, and look at the destination's. If it"
        " runs the guest leave both: refault recovers the channel. %s",
        course.name,
        _ADVICE if abilities(course.vm.version).fails_when_told else _NO_WAY,
    )


def hold_again(course: Course, rule: Rule) -> None:
    """QEMU holds the leg of a source by `rule`, and an earlier refault has ended."""
    tell_still_held(course.name, rule)
    course.feed(Event.LEG_HELD)


def tell_still_held(vm: str, rule: Rule) -> None:
    """QEMU holds a source's leg since an earlier refault, by that rule, and this one leaves it so."""
    text = _STILL_HELD_UNTIL_LOADED if rule is UNTIL_LOADED else _STILL_HELD
    log.error(text, vm, rule.effect, rule.advice)


def decide(course: Course, channels: Channels | None) -> str | None:
    """Does what the operator says; else why not, in words."""
    version = abilities(course.vm.version)
    state = course.policy.state
    if not version.fails_when_told:
        return "this QEMU cannot be made to give its guest back"
    if not in_doubt(course, channels):
        return (
            "it is not in doubt here who has the guest: the destination has said that it had it, or this"
            " refault has not seen the whole migration"
        )
    if state in (State.OPEN, State.HANDSHAKE) and not version.pauses_again_in_handshake:
        return "this QEMU does not survive the end of the recovery handshake that it is in"
    until_loaded = channels.held_until_loaded if channels is not None else course.kept_until_loaded
    if state is State.HELD and not until_loaded:
        return "this QEMU's leg is held open, and may not be closed now"
    course.feed(Event.TOLD_TO_TAKE_BACK)
    if course.policy.state is not State.RECLAIMING:
        return f"not while the migration is {course.policy.state.value}"
    return None
