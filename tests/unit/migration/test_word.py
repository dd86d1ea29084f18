import dataclasses

import pytest

from refault.migration.phase import Passed, Phase, Role
from refault.migration.word import UNSEEN, Word, phase_after_loss, word_of

READ = Passed(packaged_begun=True, running=True)
TLS = Passed(opaque=True)
AGAIN = Passed(opaque=True, resumed=True)
MIB = 1 << 20
ACTIVE = Word("postcopy-active", runs=True, remaining=64 * MIB, threshold=8 * MIB, rate=0.0, requests=3)


def now(status: str, **changed: object) -> Word:
    return dataclasses.replace(ACTIVE, status=status, **changed)  # type: ignore[arg-type]


def test_the_numbers_are_those_by_which_qemu_turns_to_the_completion() -> None:
    ram = {"remaining": UNSEEN + 5_000_000, "mbps": 80.0, "postcopy-requests": 2}
    migrate = {"status": "postcopy-active", "ram": ram}
    word = word_of(migrate, {"downtime-limit": 300}, runs=False)
    assert (word.status, word.remaining, word.requests) == ("postcopy-active", UNSEEN + 5_000_000, 2)
    assert (word.rate, word.threshold) == (10e6, 3e6)
    assert word.far_from_completion()
    assert word.far_from_completion(0.1)
    assert not word.far_from_completion(0.3)
    parameters = {"downtime-limit": 300, "avail-switchover-bandwidth": 20_000_000}
    assert word_of(migrate, parameters, runs=False).threshold == 6e6


@pytest.mark.parametrize("reply", [{}, {"status": "setup"}, {"status": 7, "ram": []}, {"ram": {"mbps": "x"}}])
def test_what_qemu_does_not_tell_makes_nobody_sure(reply: dict[str, object]) -> None:
    assert not word_of(reply, {}, runs=False).far_from_completion()


@pytest.mark.parametrize("passed", [READ, TLS, AGAIN])
def test_a_source_that_has_much_left_is_in_no_completion(passed: Passed) -> None:
    assert phase_after_loss(passed, Role.SOURCE, None, ACTIVE) is Phase.POSTCOPY


@pytest.mark.parametrize("passed", [READ, TLS, AGAIN])
@pytest.mark.parametrize("remaining", [MIB, UNSEEN + 8 * MIB])
def test_a_source_near_its_end_is_in_no_completion_if_it_stands_still_and_answers(
    passed: Passed, remaining: int
) -> None:
    near = now("postcopy-active", remaining=remaining)
    sent = now("postcopy-active", remaining=remaining - 4096)
    assert phase_after_loss(passed, Role.SOURCE, None, near) is None
    assert phase_after_loss(passed, Role.SOURCE, near, sent) is None
    assert phase_after_loss(passed, Role.SOURCE, now("active", remaining=remaining), near) is None
    assert phase_after_loss(passed, Role.SOURCE, near, near) is Phase.POSTCOPY


def test_a_source_that_has_sent_all_or_sends_the_rest_completes() -> None:
    nothing = now("postcopy-active", remaining=0)
    for passed in (READ, TLS, AGAIN):
        assert phase_after_loss(passed, Role.SOURCE, nothing, nothing) is Phase.COMPLETING
    for change in ({"completing": True}, {"ended": True}):
        passed = dataclasses.replace(READ, **change)
        assert phase_after_loss(passed, Role.SOURCE, ACTIVE, ACTIVE) is Phase.COMPLETING


@pytest.mark.parametrize(
    ("passed", "role", "word", "phase"),
    [
        (TLS, Role.SOURCE, now("active", runs=False), Phase.PRECOPY),
        (TLS, Role.DESTINATION, ACTIVE, Phase.POSTCOPY),
        (TLS, Role.DESTINATION, now("postcopy-active", runs=False), Phase.SWITCHOVER),
        (TLS, Role.DESTINATION, now("active", runs=False), Phase.PRECOPY),
        # The TLS handshake of a recovery goes before QEMU's own.
        (AGAIN, Role.SOURCE, now("postcopy-paused"), Phase.POSTCOPY),
        (AGAIN, Role.DESTINATION, now("postcopy-paused"), Phase.POSTCOPY),
        (AGAIN, Role.SOURCE, now("postcopy-recover"), Phase.RECOVERY_HANDSHAKE),
        (AGAIN, Role.DESTINATION, now("postcopy-recover"), Phase.RECOVERY_HANDSHAKE),
        (AGAIN, Role.DESTINATION, ACTIVE, Phase.POSTCOPY),
        (AGAIN, Role.SOURCE, now("completed"), Phase.DONE),
        # In precopy a source that has nothing left and whose guest stands has sent all.
        (TLS, Role.SOURCE, now("active", runs=False, remaining=0, stands=True), Phase.COMPLETING),
        (TLS, Role.SOURCE, now("device", runs=False, remaining=0, stands=True), Phase.COMPLETING),
        (TLS, Role.SOURCE, now("active", runs=False, remaining=0), Phase.PRECOPY),
        (TLS, Role.SOURCE, now("device", runs=False, remaining=1, stands=True), Phase.PRECOPY),
        (TLS, Role.SOURCE, now("pre-switchover", runs=False, remaining=0, stands=True), Phase.PRECOPY),
        (TLS, Role.DESTINATION, now("active", runs=False, remaining=0, stands=True), Phase.PRECOPY),
    ],
)
def test_where_nothing_can_be_read_what_qemu_says_twice_is_the_phase(
    passed: Passed, role: Role, word: Word, phase: Phase
) -> None:
    assert phase_after_loss(passed, role, None, word) is None
    assert phase_after_loss(passed, role, word, word) is phase


def test_what_was_read_needs_no_second_answer() -> None:
    assert phase_after_loss(READ, Role.SOURCE, None, now("postcopy-paused")) is Phase.POSTCOPY
    begun = Passed(packaged_begun=True)
    assert phase_after_loss(begun, Role.SOURCE, None, now("device", runs=False)) is Phase.SWITCHOVER
