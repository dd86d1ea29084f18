"""What is said of a thing that happens again and again."""

import logging

import pytest

from refault.daemon.host.repeats import LONGEST_INTERVAL, MOST_SUBJECTS, Sparing, repeats


class Said:
    """A logger's lines as they pass the filter, by a clock that is set."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sparing = Sparing(lambda: self.now)

    def __call__(self, message: str, *args: object, subject: str = "attempt", what: object = None) -> str:
        """The line as it is said; empty where it is not."""
        record = logging.LogRecord("refault", logging.WARNING, "", 0, message, args, None)
        if what is not None:
            vars(record).update(repeats(subject, what))
        return record.getMessage() if self.sparing.filter(record) else ""


@pytest.fixture
def said() -> Said:
    return Said()


def test_a_day_of_attempts_is_some_dozens_of_lines_that_tell_of_all(said: Said) -> None:
    lines = []
    for number in range(24 * 3600 // 2):
        said.now = number * 2.0
        lines.append(said("attempt %d failed: no route", number, what="no route"))
    spoken = [line for line in lines if line]
    assert spoken[0] == "attempt 0 failed: no route"
    assert 20 < len(spoken) < 50
    unsaid = [int(line.split("(")[1].split()[0]) for line in spoken if "(" in line]
    assert sum(unsaid) + len(spoken) <= len(lines) < sum(unsaid) + len(spoken) + LONGEST_INTERVAL / 2
    assert unsaid == sorted(unsaid)


def test_the_first_and_every_change_are_said_at_once(said: Said) -> None:
    for what in ("no route", "refused", "no route"):
        assert said("failed: %s", what, what=what) == f"failed: {what}"
        assert said("failed: %s", what, what=what) == ""


def test_one_subject_does_not_silence_another_and_a_line_without_is_always_said(said: Said) -> None:
    assert said("a", what=1)
    assert said("b", subject="another", what=1)
    assert not said("a", what=1)
    assert [said("plain") for _ in range(3)] == ["plain"] * 3


def test_what_the_line_is_made_of_is_kept() -> None:
    """The journal's fields are made of a line's message and arguments."""
    times = iter((0.0, 0.5, 10.0))
    sparing = Sparing(lambda: next(times))
    for _ in range(3):
        record = logging.LogRecord("refault", logging.WARNING, "", 0, "%s: 100%% lost", ("vm1",), None)
        vars(record).update(repeats("loss", 1))
        sparing.filter(record)
    assert record.args == ("vm1", 1)
    assert record.getMessage() == "vm1: 100% lost (1 more of these since the last one said)"


def test_so_many_subjects_are_remembered(said: Said) -> None:
    for number in range(MOST_SUBJECTS + 1):
        assert said("a", subject=str(number), what=1)
    assert not said("a", subject="1", what=1)
    assert said("a", subject="0", what=1)
    assert len(said.sparing._said) == MOST_SUBJECTS
