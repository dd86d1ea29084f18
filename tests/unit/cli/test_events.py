"""`refault events`: each thing once, in order."""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec
import pytest
from tests.unit.daemon.pictures import BUSY, IDLE, PICTURE

from refault.cli import events
from refault.cli.daemons import NO_DAEMON
from refault.cli.events import News
from refault.cli.main import main
from refault.daemon.host.errors import OperatorError
from refault.daemon.telling.control import NoDaemon
from refault.daemon.telling.snapshot import LossStatus, Status, VmStatus

replace = msgspec.structs.replace
LOSS = LossStatus(id="cc", number=5, role="source", lost_at=3000.0)


def vm(name: str, *losses: LossStatus) -> VmStatus:
    return replace(IDLE, name=name, recovery=replace(IDLE.recovery, recent=losses))


def told(news: News, *vms: VmStatus) -> list[tuple[str, str, str]]:
    lines = news.lines([Status(vms=vms)])
    return [(line.vm, line.recovery_id, line.event) for line in lines]


def test_what_is_known_comes_in_the_order_in_which_it_happened() -> None:
    news = News()
    assert told(news, vm("z", LOSS), BUSY) == [
        ("vm1", "aa", "lost"),
        ("vm1", "aa", "recovered"),
        ("vm1", "bb", "lost"),
        ("vm1", "bb", "given-up"),
        ("z", "cc", "lost"),
    ]
    assert told(news, vm("z", LOSS), BUSY) == []


def test_what_became_of_a_loss_comes_once_also_when_its_daemon_was_away() -> None:
    news = News()
    assert told(news, vm("a", LOSS)) == [("a", "cc", "lost")]
    assert told(news) == []
    over = replace(LOSS, attempts=2, over_at=3004.0)
    assert told(news, vm("a", over)) == [("a", "cc", "ended")]
    assert told(news, vm("a", over), vm("a")) == []


def test_what_no_daemon_knows_any_more_is_forgotten() -> None:
    news = News()
    told(news, vm("a", LOSS))
    told(news, vm("a"))
    assert news._told == {}


def test_lines_are_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "ask", lambda name, control: ([PICTURE], []))
    assert main(["events", "--no-follow"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    same = {"vm": "vm1", "role": "destination"}
    assert lines[1] == {
        "time": "1970-01-01T00:16:40.250Z",
        "event": "recovered",
        "recovery_id": "aa",
        "loss": 3,
        "attempts": 2,
        "seconds": 0.25,
        **same,
    }
    assert lines[3] == {
        "time": "1970-01-01T00:33:30.000Z",
        "event": "given-up",
        "recovery_id": "bb",
        "loss": 4,
        "attempts": 3,
        "error": "QEMU said no",
        **same,
    }


def test_it_ends_where_there_is_no_daemon_and_waits_for_one_that_went_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[tuple[Sequence[Status], Sequence[OperatorError]]] = []
    monkeypatch.setattr(events, "ask", lambda name, control: answers.pop(0))
    monkeypatch.setattr(events, "_INTERVAL", 0)
    gone = NoDaemon("no daemon")
    answers[:] = [([], [gone])]
    assert main(["events"]) == NO_DAEMON
    assert capsys.readouterr().err == "refault: no daemon\n"
    answers[:] = [([PICTURE], []), ([], [gone]), ([], [gone]), ([PICTURE], [])]
    with pytest.raises(IndexError):
        main(["events"])
    said = capsys.readouterr()
    assert said.err == "refault: no daemon\n"
    assert said.out.count("\n") == 4
