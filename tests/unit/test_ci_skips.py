"""The hook of tests/conftest.py that makes skips failures in CI: it can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parents[1] / "conftest.py"
SKIPS = """
import pytest

@pytest.mark.skip(reason="by a mark")
def test_marked(): pass

def test_inside(): pytest.skip("in the test")

@pytest.mark.xfail(strict=True)
def test_expected(): assert False
"""
SKIPPED_MODULE = 'import pytest\npytest.importorskip("no_such_module_anywhere")\n'


def run_pytest(directory: Path, *, ci: str) -> subprocess.CompletedProcess[str]:
    (directory / "conftest.py").write_text(CONFTEST.read_text())
    (directory / "test_skips.py").write_text(SKIPS)
    (directory / "test_module.py").write_text(SKIPPED_MODULE)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--continue-on-collection-errors", "-vv", "-rsf", str(directory)],
        cwd=directory,
        env=os.environ | {"CI": ci},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_skip_fails_in_ci_and_says_why(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, ci="true")
    assert run.returncode != 0
    for reason in ("by a mark", "in the test", "could not import 'no_such_module_anywhere'"):
        assert f"which CI does not allow (CI is set): Skipped: {reason}" in run.stdout
    assert "1 failed, 1 xfailed, 2 errors" in run.stdout


def test_elsewhere_a_skip_is_a_skip(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, ci="")
    assert run.returncode == 0
    assert "3 skipped, 1 xfailed" in run.stdout
