"""`refault demo`: the main job on real QEMUs on this host, so that it is a self-check of the host too."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import trio
from rich.console import Console

from refault import __version__
from refault.cli.arguments import path
from refault.daemon.host.errors import OperatorError
from refault.lab import live_view, side_by_side, side_by_side_view
from refault.lab.host_check import Finding, check_host
from refault.lab.process import ProcessFailed
from refault.lab.qemu import DEFAULT_BINARY
from refault.lab.qmp_client import QmpClosed, QmpError
from refault.lab.report import report
from refault.lab.scenario import Options, ScenarioFailed, run
from refault.lab.story import Notes, Story

_UNITS = {"": 20, "K": 10, "M": 20, "G": 30}
_SIZE = re.compile(r"(\d+)([KMG]?)(?:iB|B)?", re.IGNORECASE)
_SMALLEST, _LARGEST = 16 << 20, 2 << 30
_LOSSES, _MEMORY = 6, 256 << 20


def add_parser(subparsers: Any) -> None:
    """Adds the command to argparse's `subparsers`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="show and check here what refault does",
        description="Migrates a guest between two QEMUs here, loses the channel again and again, lets "
        "refault recover it, and compares every page of the guest's memory. Exit status 0: every loss was "
        "recovered and memory is right.",
    )
    parser.add_argument(
        "--starve",
        action="store_true",
        help="instead, two migrations beside each other whose vhost-user back ends lose a page request, "
        "which no QEMU repeats: one refault asks again, one does not",
    )
    parser.add_argument("--losses", type=_losses, metavar="N", help=f"how often (default: {_LOSSES})")
    parser.add_argument(
        "--memory", type=_size, metavar="SIZE", help="what the guest writes to, as 64M or 1G (default: 256M)"
    )
    parser.add_argument(
        "--relay", choices=("auto", "off"), help="off: recover over QMP alone (default: auto)"
    )
    parser.add_argument(
        "--session",
        choices=("auto", "off"),
        help="auto: both refaults carry the channel as a session, so that no QEMU sees a loss (default: off)",
    )
    parser.add_argument(
        "--qemu", default=DEFAULT_BINARY, metavar="PROGRAM", help=f"QEMU (default: {DEFAULT_BINARY})"
    )
    parser.add_argument("--json", action="store_true", help="the result as one JSON document")
    parser.add_argument("--report", type=path, metavar="FILE.html", help="write the run as one HTML page")
    parser.set_defaults(execute=execute, usage_error=parser.error)


def execute(arguments: argparse.Namespace) -> int:
    """Runs the demo: 0 if all went as it should and memory is right, 1 if not, 130 when interrupted."""
    if arguments.starve:
        for option in ("losses", "memory", "relay", "session", "report"):
            if getattr(arguments, option) is not None:
                arguments.usage_error(f"--{option} is not for --starve")
    console = Console(stderr=arguments.json)
    if arguments.report is not None and not os.path.isdir(arguments.report.parent):
        raise OperatorError(f"--report {arguments.report}: there is no directory {arguments.report.parent}")
    findings, version = check_host(arguments.qemu)
    live_view.show_findings(console, findings)
    missing = [each for each in findings if each.grade == "missing"]
    if missing or version is None:
        raise OperatorError("the demo cannot run here: " + "; ".join(each.text for each in missing))
    show = _starve if arguments.starve else _lose
    return show(arguments, console, findings)


def _lose(arguments: argparse.Namespace, console: Console, findings: list[Finding]) -> int:
    losses = _LOSSES if arguments.losses is None else arguments.losses
    if (arguments.relay, arguments.session) == ("off", "auto"):
        arguments.usage_error("--session auto needs the relay: not with --relay off")
    options = Options(
        losses,
        arguments.memory or _MEMORY,
        arguments.relay or "auto",
        arguments.session or "off",
        binary=arguments.qemu,
    )

    async def tell() -> Story | None:
        story = Story(options.losses, options.who, sessions=options.session == "auto")
        shown = live_view.showing(console, story, live_view.view)
        return story if await _run(story, shown, functools.partial(run, options, story)) else None

    story = trio.run(tell)
    if story is None:
        return _interrupted()
    live_view.show_outcome(console, story)
    if arguments.report is not None:
        try:
            arguments.report.write_text(report(story, findings))
        except OSError as error:
            raise OperatorError(f"--report {arguments.report}: {error.strerror}") from error
        console.print(f"report: {arguments.report}", highlight=False)
    if arguments.json:
        print(json.dumps(_document(story, findings, options)))
    return 0 if story.ok else 1


def _starve(arguments: argparse.Namespace, console: Console, findings: list[Finding]) -> int:
    async def tell() -> side_by_side.SideBySide | None:
        story = side_by_side.SideBySide()
        shown = live_view.showing(console, story, side_by_side_view.view)
        go = functools.partial(side_by_side.run, story, binary=arguments.qemu)
        return story if await _run(story, shown, go) else None

    story = trio.run(tell)
    if story is None:
        return _interrupted()
    side_by_side_view.show_outcome(console, story)
    if arguments.json:
        host = [each.document() for each in findings]
        print(json.dumps({"version": __version__, "host": host, **story.document()}))
    return 0 if story.ok else 1


def _interrupted() -> int:
    print("refault: interrupted; everything that was started has been ended", file=sys.stderr)
    return 130


async def _run(
    story: Notes,
    shown: AbstractAsyncContextManager[None],
    go: Callable[[Path], Awaitable[None]],
) -> bool:
    """Runs it to its end, whatever comes of it; whether no signal ended it before."""
    interrupted = False

    async def watch_signals(task_status: trio.TaskStatus[None]) -> None:
        nonlocal interrupted
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                interrupted = True
                nursery.cancel_scope.cancel()

    with tempfile.TemporaryDirectory(prefix="refault-") as directory:
        async with trio.open_nursery() as nursery:
            await nursery.start(watch_signals)
            async with shown:
                story.failure = await _tell_failure(functools.partial(go, Path(directory)), Path(directory))
            nursery.cancel_scope.cancel()
    return not interrupted


async def _tell_failure(go: Callable[[], Awaitable[None]], directory: Path) -> str | None:
    """Runs the scenario; gives what made it end early, and the end of refault's logs with it."""
    try:
        await go()
    except ProcessFailed as error:
        return str(error)
    except (ScenarioFailed, QmpError, QmpClosed) as error:
        failure = str(error)
    except trio.TooSlowError:
        failure = "something took too long; is this host very busy?"
    else:
        return None
    return failure + _last_words(directory)


def _last_words(directory: Path) -> str:
    """The end of refault's logs."""
    said = ""
    for log in sorted(directory.rglob("refault-*.log")):
        lines = log.read_text(errors="replace").splitlines()[-15:]
        said += "".join(f"\n{log.stem}: {line}" for line in lines)
    return said


def _document(story: Story, findings: list[Finding], options: Options) -> dict[str, Any]:
    return {
        "version": __version__,
        "relay": options.relay,
        "session": options.session,
        "memory_bytes": options.guest.written_bytes,
        "vcpus": options.guest.vcpus,
        "host": [each.document() for each in findings],
        **story.document(),
    }


def _losses(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1000")
    return int(text)


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64M or 1G")
    size = int(match[1]) << _UNITS[match[2].upper()]
    if not _SMALLEST <= size <= _LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range: 16M to 2G")
    return size
