from __future__ import annotations

import io
import json
import re
from xml.etree import ElementTree

import pytest
from rich.console import Console

from refault.lab.channel import Loss
from refault.lab.guest import Mismatch, Progress
from refault.lab.host_check import Finding
from refault.lab.live_view import show_findings, show_outcome, showing, sparkline, view
from refault.lab.memory import Verdict
from refault.lab.report import report
from refault.lab.story import LossResult, Sample, Story

FINDINGS = [Finding("QEMU", "ok", "7.2.0 <qemu>"), Finding("KVM", "note", "none")]
RIGHT = Verdict(100, 0, (), (Progress(2, 1),))
WRONG = Verdict(100, 1, (Mismatch(0x1000, 3, b"\x01", b"\x02"),), (Progress(2, 1),), (0,))


def finished(verdict: Verdict = RIGHT) -> Story:
    story = Story(2, "refault", began=0.0)
    for side in ("source", "destination"):
        story.statuses[side] = [(1.0, "active"), (1.5, "postcopy-active"), (2.0, "postcopy-paused")]
        story.statuses[side] += [
            (2.1, "postcopy-recover-setup"),
            (2.2, "postcopy-active"),
            (4.0, "completed"),
        ]
    story.samples = [Sample(1 + n / 10, n % 4, 9, 5, 3, 1, 1000) for n in range(30)]
    story.losses = [
        LossResult(1, Loss.RESET, 2.0, 0, 17, 13, 4, 0.2),
        LossResult(2, Loss.KILL, 3.0, 16, None, None, None, 0.1),
    ]
    story.total, story.completed, story.verdict = 2000, 4.0, verdict
    story.notes = [(1.0, "begin & <end>")]
    return story


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(each) for each in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_the_page_is_self_contained_and_its_pictures_are_well_formed() -> None:
    page = report(finished(), FINDINGS)
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script", page)
    timeline, outstanding = svgs(page)
    assert len(timeline.findall("rect")) == 12
    assert len(timeline.findall("line[@class='loss']")) == 2
    assert len(outstanding.findall("path")) == 2
    for rect in timeline.findall("rect"):
        assert 0 <= float(rect.get("x", "")) <= 960
        assert float(rect.get("width", "")) > 0
    cells = "".join(f'<td class="n">{count}</td>' for count in (17, 13, 4))
    assert re.search(rf"<td>reset</td>.*{cells}</tr>", page)
    assert "those that it does not repeat" in page
    assert "begin &amp; &lt;end&gt;" in page
    assert "7.2.0 &lt;qemu&gt;" in page
    assert "2 of 2 losses recovered by refault" in page


def test_a_run_that_failed_at_once_has_a_page_too() -> None:
    story = Story(2, "refault", began=0.0)
    story.failure = "no <QEMU>"
    page = report(story, FINDINGS)
    assert "no &lt;QEMU&gt;" in page
    assert "Nobody counted them" in page
    assert len(svgs(page)) == 1


@pytest.mark.parametrize("spoil", ["verdict", "loss", "failure", "completion", "missing loss"])
def test_nothing_but_a_run_in_which_all_went_well_is_ok(spoil: str) -> None:
    story = finished()
    assert story.ok
    if spoil == "verdict":
        story.verdict = WRONG
    elif spoil == "loss":
        story.losses[1].recovered = None
    elif spoil == "failure":
        story.failure = "something"
    elif spoil == "completion":
        story.completed = None
    else:
        story.wanted_losses = 3
    assert not story.ok
    document = json.loads(json.dumps(story.document()))
    assert document["ok"] is False


def test_the_document_tells_each_loss_and_the_memory() -> None:
    document = json.loads(json.dumps(finished(WRONG).document()))
    assert document["losses"][0] == {
        "number": 1,
        "loss": "reset",
        "at_seconds": 2.0,
        "recovered_seconds": 0.2,
        "noticed_by_qemu": True,
        "requests_outstanding": 17,
        "requests_repeated_by_qemu": 13,
        "requests_replayed": 4,
        "return_path_bytes_lost": 0,
    }
    assert document["memory"]["pages_wrong"] == 1
    assert "page 1 (pc.ram offset 0x1000)" in document["memory"]["wrong"][0]
    assert document["memory"]["stuck_vcpus"] == [0]
    assert document["recoveries"] == 2


@pytest.mark.parametrize("dumb", [False, True])
async def test_plain_lines_where_nothing_can_be_drawn(dumb: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=dumb, _environ={"TERM": "dumb"})
    story = Story(1, "refault")
    show_findings(console, FINDINGS)
    async with showing(console, story, view):
        story.note("it begins")
    show_outcome(console, finished(WRONG))
    text = out.getvalue()
    assert re.search(r"\d\.\d\d s  it begins\n", text)
    assert re.search(r"1 +reset +- +200 ms +17 +13 +4 *\n", text)
    assert re.search(r"2 +killed carrier +16 B +100 ms +- +- +- *\n", text)
    assert "100 pages compared, 1 wrong" in text
    assert "alone" not in text
    assert "\x1b" not in text


async def test_the_live_view_shows_the_story() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    async with showing(console, finished(), view):
        pass
    assert "completed" in out.getvalue()
    assert "2 of 2 losses" in out.getvalue()


def test_the_sparkline_keeps_to_its_width_and_scale() -> None:
    story = finished()
    assert sparkline(story, 8) == "▆█ ▃▆█ ▃  of 3"
    assert sparkline(Story(1, "refault", began=0.0), 8) == ""
