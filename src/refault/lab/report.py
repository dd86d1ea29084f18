"""The run as one self-contained HTML page: tables, and two pictures as inline SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from .host_check import Finding
from .story import REPLAY, REQUESTS, SIDES, Story

_WIDTH, _LEFT, _RIGHT = 960, 110, 20
_LANE = 26
_PLOT = 160
_KNOWN = ("setup", "active", "postcopy-active", "postcopy-paused", "postcopy-recover", "completed", "failed")
_ALIASES = {"device": "active", "postcopy-recover-setup": "postcopy-recover", "cancelled": "failed"}

_STYLE = """
:root { color-scheme: light dark; --text: #1c2329; --soft: #5d6b76; --page: #ffffff; --line: #d5dce1;
  --setup: #b9c3ca; --active: #7ea8d8; --postcopy-active: #3f9b6c; --postcopy-paused: #c8402f;
  --postcopy-recover: #e0a030; --completed: #2a6f4c; --failed: #7d1f16; --count: #3b6fb6; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e9ed; --soft: #94a3ae; --page: #14191d; --line: #38434b; --count: #7aa7e6; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { font-size: 1.1rem; font-weight: 600; } .right { color: var(--completed); } .wrong { color: #c8402f; }
@media (prefers-color-scheme: dark) { .right { color: #5fc18e; } .wrong { color: #f0776a; } }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .25rem .8rem .25rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; } th { color: var(--soft); font-weight: 500; }
td:nth-child(2) { white-space: nowrap; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; display: block; } svg text { font: 12px system-ui, sans-serif; fill: var(--text); }
svg .soft { fill: var(--soft); } svg .grid { stroke: var(--line); } svg .loss { stroke: #c8402f; stroke-dasharray: 3 3; }
svg .count { stroke: var(--count); fill: none; stroke-width: 1.5; } svg .under { fill: var(--count); opacity: .18; }
.legend span { display: inline-block; margin-right: 1.2rem; color: var(--soft); }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; vertical-align: -1px; }
pre { white-space: pre-wrap; color: var(--soft); font-size: 13px; }
"""  # noqa: E501 - style rules


def report(story: Story, findings: Iterable[Finding]) -> str:
    """The page. It refers to nothing outside itself."""
    good = story.ok
    words = (
        story.result
        + (f"; {story.verdict}" if story.verdict is not None else "; memory was not compared")
        + (f". {story.failure}" if story.failure is not None else "")
    )
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width"><title>refault demo</title>',
        f"<style>{_STYLE}</style></head><body><h1>A postcopy migration and its lost channels</h1>",
        f'<p class="verdict {"right" if good else "wrong"}">{escape(words)}</p>',
        "<h2>Status of both sides, and the losses</h2>",
        _timeline(story),
        _legend(story),
        "<h2>Page requests outstanding</h2>",
        _outstanding(story),
        "<h2>Losses and recoveries</h2>",
        _losses(story),
        f"<p>{escape(REPLAY)}</p>" if any(loss.repeated for loss in story.losses) else "",
        "<h2>The host</h2>",
        _table(
            ("", "what", "found"), [(each.grade, each.subject, each.text) for each in findings], numbers=0
        ),
        "<h2>As it happened</h2><pre>",
        escape("\n".join(f"{when:8.3f} s  {text}" for when, text in story.notes)),
        "</pre></body></html>\n",
    ]
    return "\n".join(parts)


def _end(story: Story) -> float:
    times = [when for side in SIDES for when, _ in story.statuses[side]]
    times += [sample.when for sample in story.samples]
    return max([*times, 1.0]) * 1.02


def _begin(story: Story) -> float:
    # The QEMUs' start is not of interest.
    return min((when for side in SIDES for when, _ in story.statuses[side]), default=0.0)


def _scale(story: Story) -> Callable[[float], float]:
    begin, end = _begin(story), _end(story)
    per_second = (_WIDTH - _LEFT - _RIGHT) / max(end - begin, 1e-9)
    return lambda when: _LEFT + min(max(when - begin, 0), end - begin) * per_second


def _svg(height: int, label: str, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">\n{body}\n</svg>'


def _axis(story: Story, top: int, bottom: int) -> list[str]:
    at, begin, end = _scale(story), _begin(story), _end(story)
    step = next((s for s in (0.5, 1, 2, 5, 10, 20, 50, 100) if (end - begin) / s <= 14), 200)
    parts = []
    for tick in range(int((end - begin) / step) + 1):
        x = at(begin + tick * step)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(
            f'<text class="soft" x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{tick * step:g} s</text>'
        )
    return parts


def _loss_lines(story: Story, top: int, bottom: int, *, named: bool) -> list[str]:
    at, parts = _scale(story), []
    free = 0.0  # the labels reach so far
    for loss in story.losses:
        x = at(loss.when)
        parts.append(f'<line class="loss" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        if named:
            name = f"{loss.number} {loss.loss.value.split()[0]}"
            if x - 4 * len(name) < free:
                name = str(loss.number)
            if x - 4 * len(name) < free:
                continue
            free = x + 4 * len(name)
            parts.append(
                f'<text class="soft" x="{x:.1f}" y="{top - 5}" text-anchor="middle">{escape(name)}</text>'
            )
    return parts


def _timeline(story: Story) -> str:
    at, end, top = _scale(story), _end(story), 22
    bottom = top + 2 * _LANE + 14
    parts = _axis(story, top, bottom)
    for lane, side in enumerate(SIDES):
        y = top + 6 + lane * (_LANE + 4)
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 16}" text-anchor="end">{side}</text>')
        changes = story.statuses[side]
        for at_change, (when, status) in enumerate(changes):
            until = changes[at_change + 1][0] if at_change + 1 < len(changes) else end
            if status == "setup" and any("postcopy" in before for _, before in changes[:at_change]):
                status = "postcopy-paused"  # what QEMU 7.2 emits for migrate-recover while it is still paused
            x, width = at(when), max(at(until) - at(when), 1)
            seconds = f"{status}: {until - when:.3f} s"
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_LANE - 4}" '
                f'fill="var(--{_colour(status)})"><title>{escape(seconds)}</title></rect>'
            )
    parts += _loss_lines(story, top, bottom, named=True)
    return _svg(bottom + 22, "migration status of source and destination over time, with the losses", parts)


def _colour(status: str) -> str:
    status = _ALIASES.get(status, status)
    return status if status in _KNOWN else "setup"


def _legend(story: Story) -> str:
    seen = {_colour(status) for side in SIDES for _, status in story.statuses[side]}
    marks = [
        f'<span><i style="background:var(--{status})"></i>{status}</span>'
        for status in _KNOWN
        if status in seen
    ]
    return f'<p class="legend">{"".join(marks)}<span>dashed: the channel is lost</span></p>'


def _outstanding(story: Story) -> str:
    points = [(sample.when, sample.outstanding) for sample in story.samples if sample.outstanding is not None]
    points = [(when, count) for when, count in points if when >= _begin(story)]
    if not points:
        return "<p>Nobody counted them: the channel did not pass a relay.</p>"
    at, top, bottom = _scale(story), 12, 12 + _PLOT
    most = max(max(count for _, count in points), 1)
    parts = _axis(story, top, bottom)
    for share in (0, 0.5, 1):
        y = bottom - share * _PLOT
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        if share * most == int(share * most):
            label = int(share * most)
            parts.append(f'<text class="soft" x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{label}</text>')
    line = [f"M{at(points[0][0]):.1f},{bottom - points[0][1] / most * _PLOT:.1f}"]
    line += [f"H{at(when):.1f}V{bottom - count / most * _PLOT:.1f}" for when, count in points[1:]]
    path = "".join(line)
    parts.append(f'<path class="under" d="{path}V{bottom}H{at(points[0][0]):.1f}Z"/>')
    parts.append(f'<path class="count" d="{path}"/>')
    parts += _loss_lines(story, top, bottom, named=False)
    return _svg(bottom + 22, "page requests outstanding over time", parts)


def _losses(story: Story) -> str:
    heads = (
        "loss",
        "lost by",
        "bytes lost inside",
        story.again_after,
        *REQUESTS,
    )
    rows = [
        (
            str(loss.number),
            loss.loss.value,
            str(loss.bytes_inside or "-"),
            "never" if loss.recovered is None else f"{loss.recovered * 1000:.0f} ms",
            *(
                "-" if count is None else str(count)
                for count in (loss.outstanding, loss.repeated, loss.replayed)
            ),
        )
        for loss in story.losses
    ]
    return _table(heads, rows, numbers=5)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int) -> str:
    """A table whose last ``numbers`` columns are numbers."""
    words = len(heads) - numbers

    def row(cells: Sequence[str], tag: str) -> str:
        marked = [
            f"<{tag}{' class=' + chr(34) + 'n' + chr(34) if at >= words else ''}>{escape(cell)}</{tag}>"
            for at, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(marked)}</tr>"

    return f"<table>{row(heads, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
