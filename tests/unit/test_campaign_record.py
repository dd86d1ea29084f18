"""The campaign's record: what is kept, and what a later run makes of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.campaign.life import Life, Result
from tests.campaign.losses import LossClass, plan
from tests.campaign.outcomes import Outcome
from tests.campaign.record import Record, main

KINDS = (LossClass.RESET, LossClass.HANDSHAKE_ACK)


def lived() -> Life:
    draw = random.Random(1)
    results = [Result(plan(kind, draw), Outcome.RECOVERED, 0.012) for kind in KINDS]
    return Life([*results, Result(plan(LossClass.RESET, draw), Outcome.DEAD, note="why")], (10, 0, 2), 7)


def test_a_record_that_was_kept_goes_on_where_it_was(tmp_path: Path) -> None:
    record = Record.begin("command", 1, tmp_path / "record")
    record.add(lived())
    record.keep(tmp_path / "record")
    again = Record.begin("command", 2, tmp_path / "record")
    assert again == record
    assert str(again) == str(record)
    assert again.left(KINDS, 2) == {LossClass.RESET: 0, LossClass.HANDSHAKE_ACK: 1}
    assert [defect.note for defect in again.defects] == ["why"]


def test_a_loss_is_judged_by_when_it_befell(tmp_path: Path) -> None:
    """A refault that hangs in postcopy may be killed once the source has sent all: no defect then."""
    draw = random.Random(2)
    held = [
        Result(plan(LossClass.REFAULT_HUNG, draw), Outcome.HELD, at_its_end=late) for late in (False, True)
    ]
    dead = Result(plan(LossClass.REFAULT_HUNG, draw), Outcome.DEAD, at_its_end=True)
    record = Record.begin("command", 1)
    record.add(Life([*held, dead], (10, 0, 2)))
    record.keep(tmp_path / "record")
    assert [record.is_defect(entry) for entry in record.results] == [True, False, True]
    assert Record.read(tmp_path / "record").defects == record.defects


def test_records_of_one_qemu_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        record = Record.begin(name, 1)
        life = lived()
        life.replayed = 5
        record.add(life)
        record.keep(tmp_path / name)
    monkeypatch.setattr("sys.argv", ["record", str(tmp_path / "one"), str(tmp_path / "two")])
    assert main() == 1  # two are dead
    told = capsys.readouterr().out
    assert "6 losses in 0 migrations; 14 pages compared" in told
    assert "10 replayed by refault" in told


def test_a_record_of_another_command_is_refused(tmp_path: Path) -> None:
    Record.begin("one", 1).keep(tmp_path / "record")
    with pytest.raises(ValueError, match="another run"):
        Record.begin("another", 1, tmp_path / "record")
