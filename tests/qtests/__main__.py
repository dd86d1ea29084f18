"""QEMU's own migration-test, case by case: with its QEMU alone, and with a refault in front of each QEMU.

Run: python -m tests.qtests [--qemu 7.2]... [--only PART]... [--each N] [--jobs N] [--logs DIRECTORY]

Prints a table, and exits with 1 if a case that passes with QEMU alone does not through refault, a refault did
not end well, or no case passes with QEMU alone. `make qtests` builds what it needs (tests/tools/qtests).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = ["7.2", "10"]
"""Those of tests/tools/qtests."""
COLUMNS = ["case", "QEMU alone", "through refault", "relayed by", "seconds"]
PREFIX = "/x86_64/migration/"
PR_SET_CHILD_SUBREAPER = 36
CASE_SECONDS = 300.0
"""What a case may take; the longest takes half a minute on two idle cores."""
_TAP = re.compile(r"^(ok|not ok) \d+ \S+(.*)$", re.MULTILINE)
_RELAYED = re.compile(r": relaying as the (\w+)")


@dataclass
class Run:
    """One case, once: `word` is ok, skipped, FAILED or HANGS; `relayed` are the roles in which refault
    carried the channel; `complaints` say what is wrong with a refault itself.
    """

    word: str
    seconds: float
    relayed: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tests:
    """The test program and the QEMU of one version."""

    version: str
    directory: Path

    @property
    def program(self) -> str:
        return str(self.directory / "migration-test")

    @property
    def qemu(self) -> str:
        return str(self.directory / "qemu-system-x86_64")

    def cases(self) -> list[str]:
        """Their paths, all of them: newer versions hide most behind --full."""
        environment = {**os.environ, "QTEST_QEMU_BINARY": self.qemu}
        listed = subprocess.run(
            [self.program, "--full", "-l"], capture_output=True, text=True, env=environment, check=True
        )
        return [line for line in listed.stdout.splitlines() if line.startswith("/")]

    def run(self, case: str, logs: Path, refault: Path | None) -> Run:
        """Runs a case; through `refault`, if there is one. What was said is in `logs`."""
        logs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="qt-") as name:
            directory = Path(name)
            environment = {**os.environ, "TMPDIR": name, "QTEST_QEMU_BINARY": self.qemu}
            if refault is not None:
                environment |= through_refault(directory, self.qemu, refault)
            begun = time.monotonic()
            word = self._run_program(case, environment, logs / "program.log")
            result = Run(word, time.monotonic() - begun)
            reap_keepers()
            for vm in sorted(directory.glob("vm-*")):
                shutil.copy(vm / "log", logs / f"{vm.name}.log")
                said = (vm / "log").read_text(errors="replace")
                result.relayed |= set(_RELAYED.findall(said))
                result.complaints += complaints(said, vm / "status")
        return result

    def _run_program(self, case: str, environment: dict[str, str], log: Path) -> str:
        with log.open("w") as out:
            program = subprocess.Popen(
                [self.program, "--full", "--tap", "-p", case],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment,
            )
            try:
                status = program.wait(CASE_SECONDS)
            except subprocess.TimeoutExpired:
                program.kill()  # and so its QEMUs, which have it as PR_SET_PDEATHSIG
                program.wait()
                return "HANGS"
        said = _TAP.findall(log.read_text(errors="replace"))
        if status != 0 or not said or any(word != "ok" for word, _ in said):
            return "FAILED"
        return "skipped" if all("# SKIP" in rest for _, rest in said) else "ok"


def through_refault(directory: Path, qemu: str, refault: Path) -> dict[str, str]:
    """The environment in which a qtest program starts tests/qtests/wrapper.py, under a name that ends as
    libqtest wants it (qtest_get_arch).
    """
    wrapper = directory / "refault-system-x86_64"
    command = shlex.join([sys.executable, str(ROOT / "tests/qtests/wrapper.py")])
    wrapper.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    wrapper.chmod(0o700)
    return {
        "QTEST_QEMU_BINARY": str(wrapper),
        "QTESTS_QEMU": qemu,
        "QTESTS_REFAULT": str(refault),
        "QTESTS_DIRECTORY": str(directory),
    }


def reap_keepers() -> None:
    """Waits for all children, which are keepers that end soon after their QEMU (tests/qtests/wrapper.py)."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def complaints(said: str, status: Path) -> list[str]:
    """What a refault's log and exit status tell against it."""
    ended = status.read_text() if status.exists() else "no status"
    found = [] if ended == "0" else [f"a refault ended with {ended}"]
    return found + [line for line in said.splitlines() if "Traceback" in line or "internal error" in line]


def summary(runs: list[Run]) -> str:
    """The words of several runs of a case: `ok`, or `2 ok, 1 FAILED`."""
    words = Counter(run.word for run in runs)
    if len(words) == 1:
        return next(iter(words))
    return ", ".join(f"{count} {word}" for word, count in words.most_common())


def row(case: str, alone: list[Run], through: list[Run]) -> str:
    """Of the table whose columns are COLUMNS."""
    relayed = ", ".join(sorted(set().union(*(run.relayed for run in through)))) or "-"
    took = (f"{sum(run.seconds for run in runs) / len(runs):.0f}" for runs in (alone, through))
    cells = [case.removeprefix(PREFIX), summary(alone), summary(through), relayed, ", ".join(took)]
    return f"| {' | '.join(cells)} |"


def differs(alone: list[Run], through: list[Run]) -> bool:
    """Whether something is worse through refault than without: a case ends in a way in which it does not end
    alone, or ends well less often, or a refault did not end well.
    """
    words, others = (Counter(run.word for run in each) for each in (alone, through))
    return (
        others["ok"] < words["ok"]
        or not set(others) <= {*words, "ok"}
        or any(run.complaints for run in through)
    )


def become_reaper() -> None:
    """Orphans among our descendants become our children from now on (prctl(2))."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def main(arguments: argparse.Namespace) -> int:
    refault = ROOT / ".venv/bin/refault"
    ways = {"alone": None, "refault": refault}
    cases = passed = worse = 0
    # Processes, for each of them waits for all of its children.
    with ProcessPoolExecutor(arguments.jobs, initializer=become_reaper) as pool:
        for version in arguments.qemu or VERSIONS:
            tests = Tests(version, ROOT / f".qemus/qtests-{version}")
            said = subprocess.check_output([tests.qemu, "--version"], text=True)
            print(f"\n{said.splitlines()[0]}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
            chosen = [case for case in tests.cases() if any(part in case for part in arguments.only or [""])]
            runs = {
                (case, way): [
                    pool.submit(tests.run, case, arguments.logs / version / case[1:] / f"{way}-{each}", path)
                    for each in range(arguments.each)
                ]
                for case in chosen
                for way, path in ways.items()
            }
            for case in chosen:
                alone, through = ([run.result() for run in runs[case, way]] for way in ways)
                print(row(case, alone, through), flush=True)
                for complaint in (line for run in through for line in run.complaints):
                    print(f"  {complaint}", file=sys.stderr, flush=True)
                cases += 1
                passed += any(run.word == "ok" for run in alone)
                worse += differs(alone, through)
    print(
        f"\n{cases} cases, {passed} of them pass with QEMU alone, {worse} are worse through refault;"
        f" what was said is in {arguments.logs}"
    )
    return int(worse > 0 or passed == 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="tests.qtests", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--qemu", action="append", choices=VERSIONS)
    parser.add_argument("--only", metavar="PART", action="append", help="cases with this in their path")
    parser.add_argument("--each", metavar="N", type=int, default=1, help="runs of each case; default: 1")
    parser.add_argument("--jobs", metavar="N", type=int, default=2, help="runs at a time; default: 2")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir(), "refault-qtests"))
    raise SystemExit(main(parser.parse_args()))
