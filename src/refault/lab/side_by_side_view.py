"""The two migrations beside each other (side_by_side.py) as they go on, and the table at the end."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .live_view import last_notes
from .side_by_side import LOOKED, WAYS, Half, SideBySide, milliseconds

_BARS = " ▁▂▃▄▅▆▇█"
_WIDEST = 40
_OK, _BAD, _BUSY = "green", "bold red", "yellow"
_WHY = (
    "No QEMU repeats a request of a vhost-user back end that was lost with the channel: the thread that made "
    "it sleeps until the background copy comes to its page. refault has it on record, and asks again."
)


def view(story: SideBySide, width: int) -> RenderableType:
    """The live view's picture of now, ``width`` columns wide."""
    table = Table.grid(padding=(0, 2))
    table.add_row("", *(Text(half.way, "bold") for half in story.halves))
    table.add_row("migration", *(_stage(half) for half in story.halves))
    table.add_row("back end", *(_back_end(half, story.now()) for half in story.halves))
    room = max(min((width - 18) // 2, _WIDEST), 8)
    table.add_row("its touches", *(Text(_graph(half, room), "cyan") for half in story.halves))
    return Group(table, Text(""), last_notes(story))


def show_outcome(console: Console, story: SideBySide) -> None:
    """The table at the end, and in one line whether all is well."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("", *WAYS):
        table.add_column(heading, no_wrap=not heading)
    rows = (
        ("both QEMUs active again, after the loss", [milliseconds(h.recovery_seconds) for h in story.halves]),
        ("the thread runs again, after that", [milliseconds(h.blocked_seconds) for h in story.halves]),
        ("memory", [_memory(half) for half in story.halves]),
    )
    for heading, cells in rows:
        table.add_row(heading, *cells)
    console.print()
    console.print(table)
    console.print()
    console.print(Text(_WHY, "dim"))
    if story.failure is not None:
        console.print(Text(f"FAILED: {story.failure}", _BAD), soft_wrap=True)
    elif story.ok:
        helped = milliseconds(story.halves[0].blocked_seconds)
        text = (
            f"with the replay it ran again after {helped}; without, it was blocked for more than {LOOKED:g} s"
        )
        console.print(Text(text, "bold green"))
    else:
        console.print(Text("FAILED: not what was to be shown: see the table", _BAD))


def _memory(half: Half) -> str:
    if half.verdict is None:
        return "-"
    return f"{half.verdict.pages} pages right" if half.verdict.right else str(half.verdict)


def _stage(half: Half) -> Text:
    return Text(half.stage, {"lost": _BAD, "recovered": _OK, "completed": _OK}.get(half.stage, _BUSY))


def _back_end(half: Half, now: float) -> Text:
    if half.ran_again is not None:
        return Text(f"runs, after {milliseconds(half.blocked_seconds)}", _OK)
    if half.recovered is not None:
        return Text(f"BLOCKED for {now - half.recovered:.1f} s", _BAD)
    if half.stage == "lost":
        return Text("waits for the network", _BUSY)
    return Text("runs" if half.touches else "waits for postcopy", _OK if half.touches else _BUSY)


def _graph(half: Half, width: int) -> str:
    """How many pages were touched in each of the last intervals, the newest at the right."""
    top = max(half.touches, default=0)
    if not top:
        return ""
    return "".join(_BARS[-(-count * 8 // top)] for count in half.touches[-width:])
