"""`refault events`: each loss and what became of it, as a line of JSON, as it happens."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from refault.cli.daemons import NO_ANSWER, NO_DAEMON, NOT_PERMITTED, add_selection, ask, exit_status
from refault.daemon.telling.snapshot import LossStatus, Status

_INTERVAL = 0.5
"""Seconds between two looks, as often as a daemon makes a new picture."""

What = Literal["lost", "recovered", "given-up", "ended"]


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line; docs/status.md says what its fields are."""

    time: str
    vm: str
    event: What
    recovery_id: str
    loss: int
    role: str
    attempts: int | None = None
    seconds: float | None = None
    error: str | None = None


def add_parser(subparsers: Any) -> None:
    """Adds the command to argparse's `subparsers`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "events",
        help="follow losses and recoveries, as JSON lines",
        description="Prints a line of JSON for each lost channel and for what became of it: those that the "
        "daemons still know of, then each as it happens.",
        epilog=f"Exit status: {NO_DAEMON} where there is no daemon, {NOT_PERMITTED} where it may not be"
        f" asked, {NO_ANSWER} where it does not answer. One that went away later is waited for.",
    )
    add_selection(parser)
    parser.add_argument("--no-follow", action="store_true", help="end with what is known now")
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Prints what is new until it is ended, or once."""
    news = News()
    said: set[str] = set()
    while True:
        answers, errors = ask(options.name, options.control)
        for line in news.lines(answers):
            sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
        sys.stdout.flush()
        told = {str(error) for error in errors}
        for text in sorted(told - said):
            print(f"refault: {text}", file=sys.stderr)
        said = told
        if options.no_follow or (not news.answered and errors):
            return min(map(exit_status, errors), default=0)
        time.sleep(_INTERVAL)


class News:
    """What has not been told yet of the losses that the daemons know of."""

    def __init__(self) -> None:
        self.answered = False
        """Whether any daemon has ever answered."""
        self._told: dict[str, tuple[str, set[What]]] = {}
        """By loss: its VM, and what was told of it."""

    def lines(self, answers: Sequence[Status]) -> list[Line]:
        """The new lines, the oldest first."""
        self.answered = self.answered or bool(answers)
        vms = [vm for status in answers for vm in status.vms]
        known = [(vm.name, loss) for vm in vms for loss in vm.recovery.recent]
        found: list[tuple[float, Line]] = []
        for name, loss in known:
            _, told = self._told.setdefault(loss.id, (name, set()))
            for when, line in _course(name, loss):
                if line.event not in told:
                    told.add(line.event)
                    found.append((when, line))
        self._forget(answered={vm.name for vm in vms}, kept={loss.id for _, loss in known})
        return [line for _, line in sorted(found, key=lambda each: each[0])]

    def _forget(self, answered: set[str], kept: set[str]) -> None:
        """What a daemon that answers knows no more will not come again."""
        self._told = {
            id_: (name, told)
            for id_, (name, told) in self._told.items()
            if id_ in kept or name not in answered
        }


def _course(vm: str, loss: LossStatus) -> Iterator[tuple[float, Line]]:
    """All that has happened with a loss, and when (Unix time, s)."""

    def line(event: What, when: float, **further: Any) -> tuple[float, Line]:
        stamp = datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return when, Line(
            time=stamp, vm=vm, event=event, recovery_id=loss.id, loss=loss.number, role=loss.role, **further
        )

    yield line("lost", loss.lost_at)
    if loss.given_up_at is not None:
        yield line("given-up", loss.given_up_at, attempts=loss.attempts, error=loss.error)
    if loss.over_at is not None and loss.seconds is not None:
        yield line("recovered", loss.over_at, attempts=loss.attempts, seconds=loss.seconds)
    elif loss.over_at is not None:
        yield line("ended", loss.over_at, attempts=loss.attempts, error=loss.error)
