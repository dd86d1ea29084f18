"""When the local leg may be closed, once the far leg is lost, as a table. All of it was tried on live
QEMUs; docs/campaign.md has the figures.

The rule: close it only where the table allows; else hold it open, say so, and repair what is behind it. A
held leg is looked at again whenever more has passed, so a hold "until" something is a hold in one phase and
a close in the next.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from refault.migration.phase import ENDS_PRECOPY, Phase, Role
from refault.migration.versions import Version, abilities


class Verdict(enum.Enum):
    """What to do with the local leg."""

    CLOSE = "close"
    HOLD = "hold"
    BY_VERSION = "close where this QEMU pauses again, else hold"


@dataclass(frozen=True)
class Rule:
    """One cell of the table: the verdict, what a close does there, and what the operator can do about a
    hold."""

    verdict: Verdict
    effect: str
    advice: str = ""


_CLOSE_PRECOPY = Rule(Verdict.CLOSE, "the migration fails and the guest goes on at the source; migrate again")
_CLOSE_POSTCOPY = Rule(Verdict.CLOSE, "this QEMU pauses the migration; refault recovers it")
_CLOSE_DONE = Rule(Verdict.CLOSE, "the migration has ended")
_HANDSHAKE = Rule(
    Verdict.BY_VERSION,
    "QEMU up to 8.1 does not survive a channel lost in the recovery handshake: the destination segfaults, the"
    " source stays in postcopy-recover",
    "do not stop refault or QEMU; keep the other host's QEMU running; QEMU before 8.2 cannot be brought out"
    " of this state",
)

RULES: dict[tuple[Phase, Role], Rule] = {
    (Phase.PRECOPY, Role.SOURCE): _CLOSE_PRECOPY,
    (Phase.PRECOPY, Role.DESTINATION): _CLOSE_PRECOPY,
    (Phase.SWITCHOVER, Role.SOURCE): Rule(
        Verdict.CLOSE,
        "this QEMU pauses the migration, which recovers if the destination has got all device state",
    ),
    (Phase.SWITCHOVER, Role.DESTINATION): Rule(
        Verdict.HOLD,
        "the destination exits while it loads the device state",
        "held until the destination says that it runs; if the device state came only in part it never"
        " will, and the guest is at the source, whole: look there whether it goes on, and do not quit that"
        " QEMU; its refault says how it is brought to go on",
    ),
    (Phase.POSTCOPY, Role.SOURCE): _CLOSE_POSTCOPY,
    (Phase.POSTCOPY, Role.DESTINATION): _CLOSE_POSTCOPY,
    (Phase.RECOVERY_HANDSHAKE, Role.SOURCE): _HANDSHAKE,
    (Phase.RECOVERY_HANDSHAKE, Role.DESTINATION): _HANDSHAKE,
    (Phase.COMPLETING, Role.SOURCE): Rule(
        Verdict.HOLD,
        "the source goes to failed and runs the guest a second time (10.0 and later) or hangs (up to 7.2)",
        "look at the destination: if its migration is completed, end the source QEMU; it must not run again."
        " If it waits, this QEMU sends no more: what the guest there lacks cannot be had again",
    ),
    (Phase.COMPLETING, Role.DESTINATION): Rule(
        Verdict.HOLD,
        "the destination has what it needs and is about to say so",
        "nothing; it ends by itself",
    ),
    (Phase.DONE, Role.SOURCE): _CLOSE_DONE,
    (Phase.DONE, Role.DESTINATION): _CLOSE_DONE,
}

WAITS_FOR_PONG = "postcopy-device"
"""The status of a source since 10.2, from its package on until PONG 0x42 has come (migration/migration.c,
postcopy_start and source_return_path_thread)."""
UNTIL_LOADED = Rule(
    Verdict.HOLD,
    "the source fails and runs the guest again, be it at the destination or not (11.1, tried)",
    "look at the destination: if it has ended without having run the guest, or its query-status says"
    " inmigrate and you have ended it, say refault:take-back (docs/running.md): the guest goes on here. If it"
    " has the guest this QEMU sends it no more: the guest here is whole, and as old as the switchover",
)
SENT_ALL = Rule(
    Verdict.HOLD,
    "the source, which has sent all in precopy, fails and runs its guest, which the destination may run too",
    "look at the destination: if it runs the guest, or its migration is completed, quit this QEMU, which must"
    " not run again. If it has failed or ended, or you have ended it, say migrate_cancel here: the guest goes"
    " on",
)
"""Of a source that has sent all in precopy, for as long as its destination has not said that it has it."""


ENDED_WITHOUT = Rule(
    Verdict.CLOSE,
    "the destination's QEMU has ended, and never had the guest: the migration fails and the guest goes on at"
    " the source; migrate again",
)


def waits_for_pong(role: Role, status: str | None) -> bool:
    """Whether a QEMU of that migration status is a source that does not know yet that its guest arrived."""
    return role is Role.SOURCE and status == WAITS_FOR_PONG


def may_close(
    phase: Phase,
    role: Role,
    version: Version,
    status: str | None = None,
    *,
    ended_without: bool = False,
) -> tuple[bool, Rule]:
    """Whether the local leg of a QEMU `version` may be closed now, and the rule that says so; `status` is
    QEMU's own word, if that is known, which no phase tells. `ended_without`: a source's destination has
    ended, and never had the guest."""
    rule = UNTIL_LOADED if waits_for_pong(role, status) else RULES[phase, role]
    if (phase, role) == (Phase.COMPLETING, Role.SOURCE) and status in ENDS_PRECOPY:
        rule = ENDED_WITHOUT if ended_without else SENT_ALL
    if rule.verdict is Verdict.BY_VERSION:
        return abilities(version).pauses_again_in_handshake, rule
    return rule.verdict is Verdict.CLOSE, rule
