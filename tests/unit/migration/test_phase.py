import pytest

from refault.migration.phase import Passed, Phase, cannot_have_left, phase_of


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


def test_the_status_counts_only_where_the_stream_is_opaque() -> None:
    assert phase_of(Passed(), "postcopy-active") is Phase.PRECOPY
    assert phase_of(Passed(opaque=True), "postcopy-active") is Phase.SWITCHOVER
    assert phase_of(Passed(opaque=True, running=True), "postcopy-active") is Phase.POSTCOPY
    assert phase_of(Passed(opaque=True), "postcopy-recover") is Phase.RECOVERY_HANDSHAKE
    assert phase_of(Passed(opaque=True), "active") is Phase.PRECOPY


def test_an_acknowledgement_that_passed_unread_is_taken_from_the_status() -> None:
    assert phase_of(Passed(resumed=True, opaque=True), "postcopy-recover") is Phase.RECOVERY_HANDSHAKE
    assert phase_of(Passed(resumed=True, opaque=True), "postcopy-active") is Phase.POSTCOPY


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
