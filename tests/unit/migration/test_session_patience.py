"""For how long a session may be without a connection, by phase."""

from __future__ import annotations

import math

import pytest

from refault.migration.phase import Passed, Phase, Role
from refault.migration.session_patience import NETWORK, STANDS_STILL, session_patience

SOURCE, DESTINATION = Role.SOURCE, Role.DESTINATION
LEAVING = Passed(discarding=True)
LEFT = Passed(packaged_begun=True, packaged_passed=True)
RUNS = Passed(packaged_begun=True, packaged_passed=True, running=True)


@pytest.mark.parametrize(
    ("phase", "role", "passed", "stopped", "seconds"),
    [
        (Phase.PRECOPY, SOURCE, Passed(), False, NETWORK),
        (Phase.PRECOPY, SOURCE, Passed(), True, STANDS_STILL),  # the guest runs nowhere
        (Phase.PRECOPY, DESTINATION, Passed(), False, NETWORK),
        (Phase.SWITCHOVER, SOURCE, LEAVING, True, STANDS_STILL),
        (Phase.SWITCHOVER, SOURCE, LEFT, True, NETWORK),
        (Phase.SWITCHOVER, DESTINATION, LEAVING, False, NETWORK),
        (Phase.POSTCOPY, SOURCE, RUNS, True, NETWORK),
        (Phase.POSTCOPY, DESTINATION, RUNS, False, NETWORK),
        (Phase.RECOVERY_HANDSHAKE, SOURCE, Passed(resumed=True), True, NETWORK),
        (Phase.COMPLETING, SOURCE, RUNS, True, math.inf),
        (Phase.POSTCOPY, DESTINATION, Passed(running=True, completing=True), False, math.inf),
        (Phase.DONE, DESTINATION, RUNS, False, math.inf),
    ],
)
def test_it_waits_the_longer_the_worse_a_loss_is(
    phase: Phase, role: Role, passed: Passed, *, stopped: bool, seconds: float
) -> None:
    assert session_patience(phase, role, passed, stopped=stopped) == seconds
