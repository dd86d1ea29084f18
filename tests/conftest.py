"""Hooks for all tests: in CI nothing is skipped, for a skip there is a check that nobody notices is gone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

IN_CI = bool(os.environ.get("CI"))
_LOG_LINES = 60
"""That are told of each log where a test fails."""

# How long an example takes tells of the machine's other work (in CI Hypothesis has a like profile by itself).
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
if not IN_CI:
    settings.load_profile("busy")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one, for unix sockets lie in it, and pytest's own are long where several workers run."""
    with tempfile.TemporaryDirectory(prefix="t", ignore_cleanup_errors=True) as path:
        yield Path(path)


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Makes a skip a failure that says why. An expected failure (xfail) counts as a skip too; it stays."""
    if not IN_CI or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"skipped, which CI does not allow (CI is set): {reason}"


def _tell_logs(item: pytest.Item, report: pytest.TestReport) -> None:
    """Adds the ends of what refaults and QEMUs wrote, which go with the test's directory."""
    directory = getattr(item, "funcargs", {}).get("tmp_path")
    for log in sorted(directory.rglob("*.log")) if report.failed and directory is not None else ():
        report.sections.append(
            (
                str(log.relative_to(directory)),
                "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:]),
            )
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skips by a mark or inside a test, and what a failure needs to be understood."""
    report = yield
    _fail_if_skipped(report)
    _tell_logs(item, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skips of whole modules."""
    report = yield
    _fail_if_skipped(report)
    return report
