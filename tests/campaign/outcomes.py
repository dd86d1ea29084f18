"""How a loss can end, and which ends are the best that a version of QEMU allows (docs/campaign.md)."""

from __future__ import annotations

import enum

from tests.campaign.losses import LossClass, Phase, Place

from refault.migration.versions import Version, abilities


class Outcome(enum.Enum):
    """The end of one loss. ``good`` says whether it can be the best there is."""

    RECOVERED = "recovered"
    UNHARMED = "the migration goes on"
    SOURCE_GOES_ON = "guest goes on at the source"
    TAKEN_BACK = "taken back to the source on the operator's word"
    COMPLETED_HELD = "completed at the destination, source held"
    HELD = "held, nobody dead"
    LEFT_AT_SOURCE = "guest paused at the source, destination ended before it had it"
    STOPPED = "source failed, stopped"
    STUCK = "STUCK"
    DEAD = "DEAD"
    DOUBLED = "DOUBLED"
    WRONG_MEMORY = "WRONG MEMORY"
    REFUSED = "REFUSED as another VM's"
    NOTICED = "NOTICED by a client"


_AT_THE_END = (Outcome.RECOVERED, Outcome.COMPLETED_HELD, Outcome.HELD)


def allowed(kind: LossClass, version: Version, *, at_its_end: bool = False) -> tuple[Outcome, ...]:
    """The outcomes of a loss that are no defect of refault's.

    ``at_its_end``: the source had turned to its completion when the channel was lost, whatever the class.
    """
    if at_its_end:
        return _AT_THE_END
    if kind.phase is Phase.SETUP:
        # Where QEMU had no connection yet, the next refault may make one.
        return (Outcome.SOURCE_GOES_ON, Outcome.UNHARMED)
    if kind.place is Place.ALONE:
        return (Outcome.SOURCE_GOES_ON,)
    if kind.in_switchover:
        # A package of which a part is lost can be sent again by no QEMU.
        if abilities(version).fails_when_told:
            ends = (Outcome.RECOVERED, Outcome.SOURCE_GOES_ON, Outcome.TAKEN_BACK, Outcome.STOPPED)
            # A 10.0 that still writes it as a killed process closes its leg stays in `device`, bare or not.
            stays = kind.phase is Phase.SWITCHOVER and not abilities(version).waits_for_arrival
            return (*ends, Outcome.LEFT_AT_SOURCE) if stays else ends
        part_lost = (Outcome.HELD, Outcome.LEFT_AT_SOURCE, Outcome.STOPPED, Outcome.SOURCE_GOES_ON)
        return (Outcome.RECOVERED, *part_lost)
    if kind.place is Place.LAST:
        return _AT_THE_END
    if kind.leg_ends_in_handshake and not abilities(version).pauses_again_in_handshake:
        # A killed process closes its leg in the handshake too, which this QEMU does not survive.
        return (Outcome.RECOVERED, Outcome.HELD, Outcome.STUCK, Outcome.DEAD)
    if kind.in_handshake and not abilities(version).pauses_again_in_handshake:
        return (Outcome.RECOVERED, Outcome.HELD)
    return (Outcome.RECOVERED,)
