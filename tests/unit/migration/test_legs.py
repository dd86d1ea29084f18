"""The table of legs: complete, and each row what was tried on live QEMUs."""

import pytest

from refault.migration.legs import RULES, SENT_ALL, UNTIL_LOADED, WAITS_FOR_PONG, Verdict, may_close
from refault.migration.phase import Phase, Role

V52, V72, V81, V82, V100 = (5, 2, 0), (7, 2, 22), (8, 1, 5), (8, 2, 0), (10, 0, 2)


def test_every_phase_has_a_rule_for_both_sides() -> None:
    assert set(RULES) == {(phase, role) for phase in Phase for role in Role}


def test_every_hold_tells_the_operator_what_to_do() -> None:
    for rule in RULES.values():
        assert rule.effect
        if rule.verdict is not Verdict.CLOSE:
            assert rule.advice


@pytest.mark.parametrize(
    ("phase", "role", "version", "close"),
    [
        (Phase.PRECOPY, Role.SOURCE, V72, True),
        (Phase.PRECOPY, Role.DESTINATION, V72, True),
        (Phase.SWITCHOVER, Role.SOURCE, V72, True),
        (Phase.SWITCHOVER, Role.DESTINATION, V72, False),
        (Phase.SWITCHOVER, Role.DESTINATION, V100, False),
        (Phase.POSTCOPY, Role.SOURCE, V52, True),
        (Phase.POSTCOPY, Role.DESTINATION, V100, True),
        (Phase.RECOVERY_HANDSHAKE, Role.SOURCE, V72, False),
        (Phase.RECOVERY_HANDSHAKE, Role.DESTINATION, V72, False),
        (Phase.RECOVERY_HANDSHAKE, Role.DESTINATION, V81, False),
        (Phase.RECOVERY_HANDSHAKE, Role.DESTINATION, V82, True),
        (Phase.RECOVERY_HANDSHAKE, Role.SOURCE, V100, True),
        (Phase.COMPLETING, Role.SOURCE, V72, False),
        (Phase.COMPLETING, Role.SOURCE, V100, False),
        (Phase.DONE, Role.SOURCE, V100, True),
    ],
)
def test_the_table(phase: Phase, role: Role, version: tuple[int, int, int], close: bool) -> None:
    assert may_close(phase, role, version)[0] is close


@pytest.mark.parametrize("phase", [Phase.PRECOPY, Phase.SWITCHOVER, Phase.POSTCOPY])
def test_a_source_that_waits_for_its_guests_arrival_is_held_whatever_the_phase_seems_to_be(
    phase: Phase,
) -> None:
    assert may_close(phase, Role.SOURCE, (11, 1, 3), WAITS_FOR_PONG) == (False, UNTIL_LOADED)
    assert may_close(phase, Role.SOURCE, (11, 1, 3), "postcopy-active")[0] is True
    assert UNTIL_LOADED.advice


@pytest.mark.parametrize("status", ["active", "device"])
def test_a_source_that_has_sent_all_in_precopy_is_held_and_cancelled_by_who_knows_its_destination(
    status: str,
) -> None:
    assert may_close(Phase.COMPLETING, Role.SOURCE, (7, 2, 22), status) == (False, SENT_ALL)
    assert may_close(Phase.PRECOPY, Role.SOURCE, (7, 2, 22), status)[0] is True
    assert "migrate_cancel" in SENT_ALL.advice


def test_an_unknown_version_is_the_most_careful() -> None:
    assert may_close(Phase.RECOVERY_HANDSHAKE, Role.SOURCE, (0, 0, 0))[0] is False
