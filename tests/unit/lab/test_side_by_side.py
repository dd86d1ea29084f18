from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from refault.lab.guest import Progress
from refault.lab.memory import Verdict
from refault.lab.side_by_side import LOOKED, SideBySide
from refault.lab.side_by_side_view import show_outcome, view

RIGHT = Verdict(100, 0, (), (Progress(2, 1),))
WRONG = Verdict(100, 1, (), (Progress(2, 1),))


def told(helped: float | None = 0.002, left: float | None = 5.5, verdict: Verdict = RIGHT) -> SideBySide:
    story = SideBySide(began=0.0)
    for half, blocked in zip(story.halves, (helped, left), strict=True):
        half.stage, half.lost, half.recovered, half.verdict = "completed", 2.0, 2.015, verdict
        half.ran_again = None if blocked is None else half.recovered + blocked
        half.touches = [20, 20, 0, 5]
    return story


@pytest.mark.parametrize(
    ("story", "ok"),
    [
        (told(), True),
        (told(helped=LOOKED + 1), False),
        (told(helped=None), False),
        (told(left=0.002), False),
        (told(left=None), False),
        (told(verdict=WRONG), False),
    ],
)
def test_all_is_well_only_where_the_one_ran_and_the_other_did_not(story: SideBySide, ok: bool) -> None:
    assert story.ok is ok
    assert json.loads(json.dumps(story.document()))["ok"] is ok


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SideBySide, "now", lambda self: 4.015)


def shown(story: SideBySide) -> str:
    out = io.StringIO()
    console = Console(file=out, width=80)
    console.print(view(story, 80))
    show_outcome(console, story)
    assert max(map(len, out.getvalue().splitlines())) <= 80
    return out.getvalue()


def test_both_are_shown_beside_each_other() -> None:
    text = shown(told())
    assert re.search(r"back end +runs, after 2 ms +runs, after 5.5 s", text)
    assert re.search(r"its touches +██ ▂ +██ ▂", text)
    assert re.search(r"both QEMUs active again, after the loss +15 ms +15 ms", text)
    assert "with the replay it ran again after 2 ms" in text


def test_who_is_blocked_is_shown_to_be() -> None:
    text = shown(told(left=None))
    assert "BLOCKED for 2.0 s" in text
    assert "FAILED" in text
