import dataclasses

import pytest

from refault.migration.phase import Passed, Phase, Role, Told, cannot_have_left, phase_of


@pytest.mark.parametrize(
    ("passed", "phase"),
    [
        (Passed(), Phase.PRECOPY),
        (Passed(packaged_begun=True), Phase.SWITCHOVER),
        (Passed(packaged_begun=True, running=True), Phase.POSTCOPY),
        (Passed(packaged_begun=True, running=True, ended=True), Phase.COMPLETING),
        (Passed(packaged_begun=True, running=True, ended=True, shut=True), Phase.DONE),
        (Passed(packaged_begun=True, running=True, resumed=True), Phase.RECOVERY_HANDSHAKE),
        (Passed(packaged_begun=True, running=True, resumed=True, resume_acknowledged=True), Phase.POSTCOPY),
        # A restarted refault has seen nothing of the switchover.
        (Passed(resumed=True), Phase.RECOVERY_HANDSHAKE),
        (Passed(resumed=True, resume_acknowledged=True), Phase.POSTCOPY),
        (Passed(resumed=True, resume_acknowledged=True, ended=True), Phase.COMPLETING),
    ],
)
def test_what_passed_gives_the_phase(passed: Passed, phase: Phase) -> None:
    assert phase_of(passed) is phase


ACTIVE = Told("postcopy-active")
RUNS = Told("postcopy-active", runs=True)
MUCH_LEFT = Told("postcopy-active", much_left=True)


@pytest.mark.parametrize(
    ("passed", "told", "source", "destination"),
    [
        (Passed(), None, Phase.PRECOPY, Phase.PRECOPY),
        (Passed(), Told("active"), Phase.PRECOPY, Phase.PRECOPY),
        # It may be about to complete, where a close doubles the guest; it may not run yet, where one ends it.
        (Passed(), ACTIVE, Phase.COMPLETING, Phase.SWITCHOVER),
        (Passed(), MUCH_LEFT, Phase.POSTCOPY, Phase.SWITCHOVER),
        (Passed(), RUNS, Phase.COMPLETING, Phase.POSTCOPY),
        # RESUME was told, though query-migrate could not be asked since.
        (Passed(), Told("active", runs=True), Phase.COMPLETING, Phase.POSTCOPY),
        (Passed(), Told("active", runs=True, never_postcopy=True), Phase.DONE, Phase.DONE),
        (Passed(), Told("active", never_postcopy=True), Phase.PRECOPY, Phase.PRECOPY),
        (Passed(running=True), ACTIVE, Phase.COMPLETING, Phase.POSTCOPY),
        (Passed(packaged_begun=True), Told("active"), Phase.SWITCHOVER, Phase.SWITCHOVER),
        (Passed(), Told("postcopy-recover"), Phase.RECOVERY_HANDSHAKE, Phase.RECOVERY_HANDSHAKE),
        (Passed(resumed=True), None, Phase.RECOVERY_HANDSHAKE, Phase.RECOVERY_HANDSHAKE),
        # The word may be older than what QEMU does now.
        (Passed(resumed=True), Told("postcopy-paused"), Phase.RECOVERY_HANDSHAKE, Phase.RECOVERY_HANDSHAKE),
        (Passed(resumed=True), Told("postcopy-recover"), Phase.RECOVERY_HANDSHAKE, Phase.RECOVERY_HANDSHAKE),
        (Passed(resumed=True), ACTIVE, Phase.COMPLETING, Phase.POSTCOPY),
        (Passed(resumed=True), MUCH_LEFT, Phase.POSTCOPY, Phase.POSTCOPY),
        (Passed(resumed=True, ended=True), MUCH_LEFT, Phase.COMPLETING, Phase.COMPLETING),
        (Passed(shut=True), MUCH_LEFT, Phase.DONE, Phase.DONE),
        (Passed(), Told("completed"), Phase.DONE, Phase.DONE),
    ],
)
def test_what_qemu_says_counts_where_the_stream_is_opaque(
    passed: Passed, told: Told | None, source: Phase, destination: Phase
) -> None:
    opaque = dataclasses.replace(passed, opaque=True)
    assert phase_of(opaque, Role.SOURCE, told) is source
    assert phase_of(opaque, Role.DESTINATION, told) is destination
    for role in Role:  # and only there
        assert phase_of(passed, role, told) is phase_of(passed)


def test_a_source_completes_before_it_has_sent_all() -> None:
    completing = Passed(packaged_begun=True, running=True, completing=True)
    assert phase_of(completing, Role.SOURCE) is Phase.COMPLETING
    assert phase_of(completing, Role.DESTINATION) is Phase.POSTCOPY  # it still lacks pages


@pytest.mark.parametrize(
    ("passed", "here"),
    [
        (Passed(), False),  # in precopy QEMU fails by itself
        (Passed(discarding=True), True),
        (Passed(discarding=True, packaged_begun=True), True),
        (Passed(packaged_begun=True, packaged_passed=True), False),
        (Passed(packaged_begun=True, running=True), False),
        (Passed(packaged_begun=True, resumed=True), False),
        (Passed(packaged_begun=True, opaque=True), False),
    ],
)
def test_a_guest_cannot_have_left_before_the_package_has(passed: Passed, here: bool) -> None:
    assert cannot_have_left(passed) is here
