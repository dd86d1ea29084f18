"""The run as it happens: a live view on a terminal, plain lines elsewhere; at the end a table."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TypeVar

import trio
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .host_check import Finding, Grade
from .story import REPLAY, REQUESTS, SIDES, Notes, Story
from .tasks import background

_GRADES: dict[Grade, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "note": ("note", "yellow"),
    "danger": ("danger", "yellow"),
    "missing": ("MISSING", "bold red"),
}
_BARS = " ▁▂▃▄▅▆▇█"
_REFRESH = 0.1
_NOTES = 12


_Told = TypeVar("_Told", bound=Notes)


def show_findings(console: Console, findings: Iterable[Finding]) -> None:
    """Says what was found on the host."""
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        word, style = _GRADES[finding.grade]
        table.add_row(Text(word, style), finding.subject, finding.text)
    console.print(table)


@contextlib.asynccontextmanager
async def showing(
    console: Console, story: _Told, view: Callable[[_Told, int], RenderableType]
) -> AsyncIterator[None]:
    """Shows ``story`` on ``console`` while the block runs: ``view`` draws it so many columns wide."""
    if not console.is_terminal or console.is_dumb_terminal:
        story.on_note = lambda when, text: console.print(
            f"{when:7.2f} s  {text}", highlight=False, soft_wrap=True
        )
        yield
        return
    with Live(view(story, console.width), console=console, auto_refresh=False, transient=False) as live:

        async def refresh() -> None:
            while True:
                live.update(view(story, console.width), refresh=True)
                await trio.sleep(_REFRESH)

        try:
            async with background() as nursery:
                nursery.start_soon(refresh)
                yield
        finally:
            live.update(view(story, console.width), refresh=True)


def view(story: Story, width: int) -> RenderableType:
    """The live view's picture of now, ``width`` columns wide."""
    states = Table.grid(padding=(0, 2))
    for side in SIDES:
        states.add_row(side, _status(story.status(side)))
    remaining = next((s.remaining for s in reversed(story.samples) if s.remaining is not None), story.total)
    arrived = story.total - (0 if story.completed is not None else remaining)
    states.add_row(
        "memory", ProgressBar(total=max(story.total, 1), completed=arrived, width=min(width - 16, 60))
    )
    states.add_row("waiting", Text(sparkline(story, min(width - 16, 60)), "cyan"))
    states.add_row("recovered", f"{story.recoveries} of {story.wanted_losses} losses")
    return Group(states, Text(""), last_notes(story))


def last_notes(story: Notes) -> RenderableType:
    """What was said last."""
    notes = Table.grid(padding=(0, 1))
    for when, text in story.notes[-_NOTES:]:
        notes.add_row(Text(f"{when:7.2f} s", "dim"), Text(text))
    return notes


def _status(status: str) -> Text:
    if status in ("postcopy-active", "completed"):
        return Text(status, "green")
    lost = status in ("postcopy-paused", "failed")
    return Text(status, "bold red" if lost else "yellow")


def sparkline(story: Story, width: int) -> str:
    """The outstanding requests of the last samples, the newest at the right."""
    values = [sample.outstanding for sample in story.samples[-width:]]
    top = max((value for value in values if value is not None), default=0)
    if top == 0:
        return ""
    return "".join(_BARS[0 if value is None else -(-value * 8 // top)] for value in values) + f"  of {top}"


def show_outcome(console: Console, story: Story) -> None:
    """The table at the end, and in one line whether all is well."""
    if story.losses:
        console.print(Text("\nLosses and recoveries", "bold"))
        console.print(_losses(story))
        console.print()
        if any(loss.repeated for loss in story.losses):
            console.print(Text(REPLAY, "dim"))
    if story.failure is not None:
        console.print(Text(f"FAILED: {story.failure}", "bold red"), soft_wrap=True)
    if story.verdict is not None:
        console.print(Text(f"memory: {story.verdict}", "green" if story.verdict.right else "bold red"))
    if story.ok:
        console.print(Text(story.result, "bold green"))


def _losses(story: Story) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("loss", "lost by"):
        table.add_column(heading, no_wrap=True)
    requests = [heading.replace(" ", "\n", 1) for heading in REQUESTS]  # all fits into 80 columns
    for heading in ("lost\ninside", story.again_after.replace(" again", "\nagain"), *requests):
        table.add_column(heading, justify="right", no_wrap=True)
    for loss in story.losses:
        table.add_row(
            str(loss.number),
            loss.loss.value,
            f"{loss.bytes_inside} B" if loss.bytes_inside else "-",
            "never" if loss.recovered is None else f"{loss.recovered * 1000:.0f} ms",
            *(_count(count) for count in (loss.outstanding, loss.repeated, loss.replayed)),
        )
    return table


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)
