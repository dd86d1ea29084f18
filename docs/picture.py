"""Draws docs/demo.svg, the README's picture: what `refault demo` leaves on a terminal (`make picture`)."""

from __future__ import annotations

import io
import re
import sys
import tempfile
from pathlib import Path

import trio
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from refault.lab.host_check import check_host
from refault.lab.live_view import show_findings, show_outcome, view
from refault.lab.qemu import DEFAULT_BINARY
from refault.lab.scenario import Options, run
from refault.lab.story import Story

WIDTH = 104
OPTIONS = Options()


async def told() -> Story:
    """Runs the demo's scenario."""
    story = Story(OPTIONS.losses, OPTIONS.who)
    with tempfile.TemporaryDirectory(prefix="refault-") as directory:
        await run(OPTIONS, story, Path(directory))
    return story


def main() -> None:
    """Runs the demo once and writes the picture to the path given."""
    console = Console(width=WIDTH, record=True, file=io.StringIO(), force_terminal=True)
    findings, _ = check_host(DEFAULT_BINARY)
    story = trio.run(told)
    console.print(Text("$ refault demo", "bold"))
    show_findings(console, findings)
    console.print()
    console.print(view(story, WIDTH))
    show_outcome(console, story)
    if not story.ok:
        raise SystemExit("not everything went well, so there is no picture of it")
    picture = console.export_svg(title="refault demo", theme=MONOKAI, unique_id="demo")
    # Readers' own fonts: rich would have them load one from elsewhere.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    Path(sys.argv[1]).write_text("\n".join(line.rstrip() for line in picture.splitlines()) + "\n")


if __name__ == "__main__":
    main()
