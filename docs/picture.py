"""Draws the README's pictures: what `refault demo` leaves on a terminal, and `refault watch` beside it.

python docs/picture.py docs/demo.svg docs/watch.svg
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
import time
from pathlib import Path

import trio
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from refault.cli import watch_view
from refault.cli.daemons import ask, join
from refault.cli.watch_view import Picture, is_migrating
from refault.daemon.telling.snapshot import Status
from refault.lab.host_check import check_host
from refault.lab.live_view import show_findings, show_outcome, view
from refault.lab.qemu import DEFAULT_BINARY
from refault.lab.scenario import Options, run
from refault.lab.story import SIDES, Story
from refault.lab.tasks import background

WIDTH = 104
OPTIONS = Options()


async def told() -> tuple[Story, Picture]:
    """Runs the demo's scenario; gives what came of it, and the moment with most requests outstanding."""
    story = Story(OPTIONS.losses, OPTIONS.who)
    seen = [Picture(Status(vms=()))]
    with tempfile.TemporaryDirectory(prefix="refault-") as directory:
        async with background() as nursery:
            nursery.start_soon(look, Path(directory), seen)
            await run(OPTIONS, story, Path(directory))
    return story, max(seen, key=outstanding)


async def look(directory: Path, seen: list[Picture]) -> None:
    """Asks both refaults again and again, as `refault watch` does."""
    while True:
        answers = []
        for side in SIDES:
            answers += (await trio.to_thread.run_sync(ask, None, directory / f"{side}.control"))[0]
        if answers:
            seen.append(Picture(join(answers), at=time.time()))
        await trio.sleep(0.02)


def outstanding(picture: Picture) -> int:
    """Page requests, as the side knows that has them."""
    return max((vm.pages.outstanding for vm in picture.status.vms if is_migrating(vm)), default=-1)


def save(console: Console, title: str, path: str) -> None:
    """Writes what was printed."""
    picture = console.export_svg(title=title, theme=MONOKAI, unique_id=title.split()[-1])
    # Readers' own fonts: rich would have them load one from elsewhere.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    Path(path).write_text("\n".join(line.rstrip() for line in picture.splitlines()) + "\n")


def recording() -> Console:
    """A terminal that nobody sees."""
    return Console(width=WIDTH, record=True, file=io.StringIO(), force_terminal=True)


def main() -> None:
    """Runs the demo once and writes both pictures to the paths given."""
    console, watch = recording(), recording()
    findings, _ = check_host(DEFAULT_BINARY)
    story, picture = trio.run(told)
    console.print(Text("$ refault demo", "bold"))
    show_findings(console, findings)
    console.print()
    console.print(view(story, WIDTH))
    show_outcome(console, story)
    if not story.ok:
        raise SystemExit("not everything went well, so there is no picture of it")
    watch.print(watch_view.view(picture, WIDTH, 40))
    save(console, "refault demo", sys.argv[1])
    save(watch, "refault watch", sys.argv[2])


if __name__ == "__main__":
    main()
