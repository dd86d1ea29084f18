"""For how long a session may be without a connection before its channel counts as lost, by phase.

While it waits QEMU knows of nothing, and nothing in QEMU gives up; what a loss does is in legs.py. So it
waits the longer the worse that is: for ever where both guests would run.
"""

from __future__ import annotations

import math

from refault.migration.phase import Passed, Phase, Role, cannot_have_left

NETWORK = 30.0
"""Seconds: a network that comes back mostly does so by then. Precopy then fails, and the guest goes on at the
source; postcopy pauses and is recovered, for operators are to see that it stands."""
STANDS_STILL = 3.0
"""The guest runs nowhere, and would at the source, were it given back."""
_BY_PHASE = {
    Phase.PRECOPY: NETWORK,
    Phase.SWITCHOVER: NETWORK,
    Phase.POSTCOPY: NETWORK,
    Phase.RECOVERY_HANDSHAKE: NETWORK,
    Phase.COMPLETING: math.inf,
    Phase.DONE: math.inf,
}


def session_patience(phase: Phase, role: Role, passed: Passed, *, stopped: bool) -> float:
    """Seconds; infinite for no end. `stopped`: a source's guest has been stopped since the migration began,
    and QEMU has not said that it has sent all."""
    if passed.completing:
        return _BY_PHASE[Phase.COMPLETING]  # a destination too: its source does not pause any more
    in_switchover = stopped if phase is Phase.PRECOPY else cannot_have_left(passed)
    if role is Role.SOURCE and in_switchover and phase in (Phase.PRECOPY, Phase.SWITCHOVER):
        return STANDS_STILL
    return _BY_PHASE[phase]
