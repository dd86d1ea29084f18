"""The campaign's record: what was run, and what came of it, by class.

Several of one QEMU as one table: python -m tests.campaign.record FILE...
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from tests.campaign.life import Life
from tests.campaign.losses import LossClass
from tests.campaign.outcomes import Outcome, allowed

from refault.migration.versions import Version


def commit_of() -> str:
    """The commit of the tree, with ``+`` where it has changes."""
    git = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


@dataclass
class Entry:
    """One loss and its end, in words that a file can hold."""

    kind: LossClass
    loss: str
    outcome: Outcome
    seconds: float | None = None
    note: str = ""
    outstanding: int = 0
    """Page requests that waited for their answer when the channel was lost."""
    at_its_end: bool = False
    """Whether the source had turned to its completion by then, which its class does not say."""

    def __str__(self) -> str:
        took = "" if self.seconds is None else f" in {self.seconds * 1000:.0f} ms"
        end = ", at the source's end" if self.at_its_end else ""
        return f"{self.loss}{end}: {self.outcome.value}{took} {self.note}".rstrip()


@dataclass
class Record:
    """Counts by class and outcome. The commit is that of the tree, ``+`` where it has changes."""

    command: str
    commit: str
    seed: int
    version: Version = (0, 0, 0)
    lives: int = 0
    pages_compared: int = 0
    replayed: int = 0
    results: list[Entry] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Migrations that ended because something of the lab's did not work, and not by a loss."""

    @classmethod
    def begin(cls, command: str, seed: int, path: Path | None = None) -> Record:
        """An empty one, or what ``path`` has of the same command and commit. Raises ValueError where it is
        of another."""
        record = cls(command, commit_of(), seed)
        if path is None or not path.exists():
            return record
        kept = cls.read(path)
        if (kept.command, kept.commit) != (command, record.commit):
            raise ValueError(f"{path} is of another run: {kept.command} at {kept.commit}")
        return kept

    @classmethod
    def read(cls, path: Path) -> Record:
        """One that was kept."""
        return msgspec.json.decode(path.read_bytes(), type=cls)

    def keep(self, path: Path) -> None:
        """Writes it down, for a later run to go on with."""
        path.write_bytes(msgspec.json.encode(self))

    def add(self, life: Life) -> list[Entry]:
        """Counts a migration; its losses, as recorded."""
        self.version = max(self.version, life.version)
        self.pages_compared += life.pages_compared
        self.replayed += life.replayed
        entries = [
            Entry(
                result.planned.kind,
                str(result.planned),
                result.outcome,
                result.seconds,
                result.note,
                result.outstanding,
                result.at_its_end,
            )
            for result in life.results
        ]
        self.results += entries
        return entries

    def left(self, kinds: Sequence[LossClass], each: int) -> dict[LossClass, int]:
        """How many losses of each class are still to be made."""
        made = Counter(entry.kind for entry in self.results)
        return {kind: max(0, each - made[kind]) for kind in kinds}

    def is_defect(self, entry: Entry) -> bool:
        """Whether it did not end as well as this QEMU allows."""
        return entry.outcome not in allowed(entry.kind, self.version, at_its_end=entry.at_its_end)

    @property
    def defects(self) -> list[Entry]:
        """The losses that did not end as well as this QEMU allows."""
        return [entry for entry in self.results if self.is_defect(entry)]

    def __str__(self) -> str:
        return f"{self.heading}\n{self.table}"

    @property
    def heading(self) -> str:
        """What was run."""
        return f"command  {self.command}\ncommit   {self.commit}\nseed     {self.seed}"

    @property
    def table(self) -> str:
        """What came of it."""
        lines = [
            f"QEMU     {'.'.join(map(str, self.version))}",
            f"{len(self.results)} losses in {self.lives} migrations; {self.pages_compared} pages compared",
            f"{sum(each.outstanding > 0 for each in self.results)} losses with page requests outstanding,"
            f" {sum(each.outstanding for each in self.results)} of them; {self.replayed} replayed by refault",
            "",
            "| class | losses | outcomes | median ms | p99 ms |",
            "|---|---|---|---|---|",
        ]
        for kind in LossClass:
            mine = [entry for entry in self.results if entry.kind is kind]
            counts = Counter(entry.outcome for entry in mine)
            told = ", ".join(f"{outcome.value} {count}" for outcome, count in counts.most_common())
            times = sorted(entry.seconds for entry in mine if entry.seconds is not None)
            figures = f"{_ms(statistics.median(times))} | {_ms(_p99(times))}" if times else "- | -"
            lines.append(f"| {kind.value} | {len(mine)} | {told or '-'} | {figures} |")
        lines.append("")
        lines += [f"DEFECT: {entry}" for entry in self.defects]
        lines += [f"LAB: {text}" for text in self.failures]
        lines.append(f"{len(self.defects)} not as good as this QEMU allows")
        return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f}"


def _p99(times: list[float]) -> float:
    return times[min(len(times) - 1, int(len(times) * 0.99))]


def main() -> int:
    """Prints the table of several records together; 1 where one has a defect."""
    records = [Record.read(Path(name)) for name in sys.argv[1:]]
    whole = Record("", "", 0)
    for record in records:
        if whole.version not in ((0, 0, 0), record.version):
            raise ValueError("records of different QEMUs make no table")
        print(record.heading)
        whole.version = record.version
        whole.lives += record.lives
        whole.pages_compared += record.pages_compared
        whole.replayed += record.replayed
        whole.results += record.results
        whole.failures += record.failures
    print(whole.table)
    return 1 if whole.defects or whole.failures else 0


if __name__ == "__main__":
    sys.exit(main())
