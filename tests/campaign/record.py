"""The campaign's record: what was run, and what came of it, by class."""

from __future__ import annotations

import statistics
import subprocess
from collections import Counter
from dataclasses import dataclass, field

from tests.campaign.life import Result
from tests.campaign.losses import LossClass
from tests.campaign.outcomes import allowed

from refault.migration.versions import Version


def commit_of() -> str:
    """The commit of the tree, with ``+`` where it has changes."""
    git = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


@dataclass
class Record:
    """Counts by class and outcome. The commit is that of the tree, ``+`` where it has changes."""

    command: str
    commit: str
    seed: int
    version: Version = (0, 0, 0)
    lives: int = 0
    pages_compared: int = 0
    results: list[Result] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Migrations that ended because something of the lab's did not work, and not by a loss."""

    @property
    def defects(self) -> list[Result]:
        """The losses that did not end as well as this QEMU allows."""
        return [each for each in self.results if each.outcome not in allowed(each.planned.kind, self.version)]

    def __str__(self) -> str:
        version = ".".join(map(str, self.version))
        lines = [
            f"command  {self.command}",
            f"commit   {self.commit}",
            f"seed     {self.seed}",
            f"QEMU     {version}",
            f"{len(self.results)} losses in {self.lives} migrations; {self.pages_compared} pages compared",
            "",
            "| class | losses | outcomes | median ms | p99 ms |",
            "|---|---|---|---|---|",
        ]
        for kind in LossClass:
            mine = [result for result in self.results if result.planned.kind is kind]
            counts = Counter(result.outcome for result in mine)
            told = ", ".join(f"{outcome.value} {count}" for outcome, count in counts.most_common())
            times = sorted(result.seconds for result in mine if result.seconds is not None)
            figures = f"{_ms(statistics.median(times))} | {_ms(_p99(times))}" if times else "- | -"
            lines.append(f"| {kind.value} | {len(mine)} | {told or '-'} | {figures} |")
        lines.append("")
        lines += [f"DEFECT: {each.planned}: {each.outcome.value}: {each.note}" for each in self.defects]
        lines += [f"LAB: {text}" for text in self.failures]
        lines.append(f"{len(self.defects)} not as good as this QEMU allows")
        return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f}"


def _p99(times: list[float]) -> float:
    return times[min(len(times) - 1, int(len(times) * 0.99))]
