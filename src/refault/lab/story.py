"""What happened in a run of the scenario, as the views show, the report draws and `--json` prints it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import trio

from .channel import Loss
from .memory import Verdict

Side = Literal["source", "destination"]
REPLAY = (
    "After a recovery QEMU's destination (since 5.2) repeats its outstanding requests by itself; "
    "refault replays those that it does not repeat."
)
REQUESTS = ("requests outstanding", "repeated by QEMU", "replayed by refault")
SIDES: tuple[Side, ...] = ("source", "destination")


@dataclass(frozen=True)
class Sample:
    """One look at both ends: ``when`` in seconds since the beginning; None is what nobody could tell.

    Page counts are the destination side's, in host pages, as in `refault status`; ``replayed`` is the sum of
    both sides. ``remaining`` is what the source still has, in bytes.
    """

    when: float
    outstanding: int | None = None
    requested: int | None = None
    arrived: int | None = None
    repeated: int | None = None
    replayed: int | None = None
    remaining: int | None = None


@dataclass
class LossResult:
    """One loss and its recovery; ``when`` in seconds since the beginning, ``recovered`` in seconds from the
    loss. ``noticed`` by a QEMU: not where a session went on over the next connection; then ``recovered`` is
    until bytes ran again.

    Page requests, None where nobody could tell: ``outstanding`` when the channel was lost, of these or later
    ones ``repeated`` by the destination QEMU itself after the recovery and ``replayed`` by refault (both
    sides).
    """

    number: int
    loss: Loss
    when: float
    bytes_inside: int
    outstanding: int | None = None
    repeated: int | None = None
    replayed: int | None = None
    recovered: float | None = None
    noticed: bool = True

    def document(self) -> dict[str, Any]:
        """Its part of the JSON document."""
        return {
            "number": self.number,
            "loss": self.loss.value,
            "at_seconds": round(self.when, 4),
            "recovered_seconds": None if self.recovered is None else round(self.recovered, 4),
            "noticed_by_qemu": self.noticed,
            "requests_outstanding": self.outstanding,
            "requests_repeated_by_qemu": self.repeated,
            "requests_replayed": self.replayed,
            "return_path_bytes_lost": self.bytes_inside,
        }

    @property
    def counts(self) -> str:
        """Its page requests in words; empty where nobody could tell."""
        counts = (
            (self.outstanding, "requests outstanding"),
            (self.repeated, "repeated by QEMU"),
            (self.replayed, "replayed"),
        )
        return ", ".join(f"{count} {words}" for count, words in counts if count is not None)


@dataclass(kw_only=True)
class Notes:
    """A run, from its beginning, and what is said of it: filled by a scenario, read by the views while it
    goes on.
    """

    on_note: Callable[[float, str], None] = lambda when, text: None
    began: float = field(default_factory=trio.current_time)
    notes: list[tuple[float, str]] = field(default_factory=list)
    failure: str | None = None

    def now(self) -> float:
        """Seconds since the beginning."""
        return trio.current_time() - self.began

    def note(self, text: str) -> None:
        """Says what happens, to whoever looks on."""
        when = self.now()
        self.notes.append((when, text))
        self.on_note(when, text)


@dataclass
class Story(Notes):
    """A migration whose channel is lost again and again."""

    wanted_losses: int
    recovered_by: str
    sessions: bool = False
    facts: dict[str, str] = field(default_factory=dict)
    statuses: dict[Side, list[tuple[float, str]]] = field(
        default_factory=lambda: {side: [] for side in SIDES}
    )
    samples: list[Sample] = field(default_factory=list)
    losses: list[LossResult] = field(default_factory=list)
    total: int = 0
    completed: float | None = None
    verdict: Verdict | None = None

    def status(self, side: Side) -> str:
        """The side's migration status, as far as it is known."""
        return self.statuses[side][-1][1] if self.statuses[side] else "none"

    @property
    def recoveries(self) -> int:
        """How many losses were recovered."""
        return sum(loss.recovered is not None for loss in self.losses)

    @property
    def result(self) -> str:
        """How the losses went."""
        losses = f"{self.recoveries} of {self.wanted_losses} losses"
        unnoticed = sum(not loss.noticed for loss in self.losses)
        if self.sessions and unnoticed == self.recoveries:
            return f"{losses} were pauses in the bytes, which no QEMU noticed"
        others = f", {unnoticed} of them noticed by no QEMU" if self.sessions else ""
        return f"{losses} recovered by {self.recovered_by} alone{others}"

    @property
    def again_after(self) -> str:
        """What the time of a loss is until."""
        return "bytes again after" if self.sessions else "both active again after"

    @property
    def ok(self) -> bool:
        """Whether every loss was made and recovered, the migration completed, and memory is right."""
        return (
            self.failure is None
            and self.completed is not None
            and self.recoveries == self.wanted_losses
            and self.verdict is not None
            and self.verdict.right
        )

    def document(self) -> dict[str, Any]:
        """The run as one JSON document."""
        verdict = self.verdict
        return {
            "ok": self.ok,
            "failure": self.failure,
            "recovered_by": self.recovered_by,
            "facts": self.facts,
            "wanted_losses": self.wanted_losses,
            "recoveries": self.recoveries,
            "losses": [loss.document() for loss in self.losses],
            "completed_seconds": None if self.completed is None else round(self.completed, 3),
            "memory": verdict
            and {
                "right": verdict.right,
                "pages_compared": verdict.pages,
                "pages_wrong": verdict.wrong,
                "wrong": [str(each) for each in verdict.mismatches],
                "stuck_vcpus": list(verdict.stuck_vcpus),
            },
            "statuses": {
                side: [[round(when, 4), status] for when, status in self.statuses[side]] for side in SIDES
            },
        }
