"""`refault watch`: all VMs on a terminal's whole screen, as they are now."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import trio
from rich.console import Console
from rich.live import Live

from refault.cli.daemons import add_selection, ask, join
from refault.cli.watch_view import Picture, view
from refault.daemon.host.errors import OperatorError
from refault.daemon.telling.snapshot import Status

_INTERVAL = 0.5
"""Seconds between two looks, as often as a daemon makes a new picture."""
_QUIT = frozenset(b"qQ")
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def add_parser(subparsers: Any) -> None:
    """Adds the command to argparse's `subparsers`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "watch",
        help="watch all VMs and their migrations, live",
        description="Shows all VMs and their migrations on the whole screen, until q is pressed.",
    )
    add_selection(parser)
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Shows it until somebody ends it: 0."""
    if not sys.stdout.isatty():
        raise OperatorError("watch needs a terminal; `refault status` and `refault events` do not")
    if Console().is_dumb_terminal:
        raise OperatorError(
            "watch needs a terminal whose cursor can be moved, and TERM says that this is none;"
            " `refault status` and `refault events` do not"
        )
    trio.run(_Watch(options).run)
    return 0


class _Watch:
    """The screen, what is on it, and what changes it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._console = Console()
        self._picture = Picture(Status(vms=()))
        self._forward: dict[str, tuple[float, int]] = {}
        self._suspended = False

    async def run(self) -> None:
        """Until it is ended; stopped (SIGTSTP) with the terminal as it was before."""
        while True:
            with _screen(), Live(console=self._console, screen=True, auto_refresh=False) as live:
                self._suspended = False
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._look, live)
                    nursery.start_soon(self._signals, live, nursery.cancel_scope)
                    nursery.start_soon(self._keys, nursery.cancel_scope)
            if not self._suspended:
                return
            os.kill(os.getpid(), signal.SIGSTOP)

    async def _look(self, live: Live) -> None:
        while True:
            asked = partial(ask, self._options.name, self._options.control)
            answers, errors = await trio.to_thread.run_sync(asked, abandon_on_cancel=True)
            status = join(answers) if answers else Status(vms=())
            self._picture = Picture(status, tuple(map(str, errors)), self._rates(status))
            self._draw(live)
            await trio.sleep(_INTERVAL)

    def _rates(self, status: Status) -> dict[str, float]:
        now = time.monotonic()
        before, self._forward = self._forward, {vm.name: (now, vm.channel.bytes_forward) for vm in status.vms}
        return {
            name: max(count - before[name][1], 0) / (when - before[name][0])
            for name, (when, count) in self._forward.items()
            if name in before and when > before[name][0]
        }

    def _draw(self, live: Live) -> None:
        picture = replace(self._picture, at=time.time())
        live.update(view(picture, *self._console.size), refresh=True)

    async def _signals(self, live: Live, scope: trio.CancelScope) -> None:
        with trio.open_signal_receiver(*_ENDS, signal.SIGWINCH, signal.SIGTSTP) as signals:
            async for number in signals:
                if number == signal.SIGWINCH:
                    self._draw(live)
                    continue
                self._suspended = number == signal.SIGTSTP
                scope.cancel()

    async def _keys(self, scope: trio.CancelScope) -> None:
        if not sys.stdin.isatty():
            return
        while True:
            await trio.lowlevel.wait_readable(0)
            pressed = os.read(0, 1024)
            if not pressed or _QUIT.intersection(pressed):
                scope.cancel()
                return


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """Keys come one by one and are not shown; the terminal is left as it was."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setcbreak(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
