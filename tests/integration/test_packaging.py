"""The artefacts of ``make dist``: complete, clean, and running where nothing of the checkout is."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import ffi
import refault

ROOT = Path(__file__).parents[2]
COMPILED = [module.name for module in ffi.MODULES]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


pytestmark = [
    pytest.mark.xdist_group("packaging"),
    pytest.mark.timeout(300),
]  # what they look at is made once


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel built from that sdist alone, as ``make dist`` builds them (or has)."""
    if built := os.environ.get("REFAULT_DIST"):
        return Path(built)
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", directory, ROOT, cwd=directory)
    return directory


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a virtual environment that holds the wheel and what it depends on."""
    directory = tmp_path_factory.mktemp("venv")
    venv.create(directory, with_pip=True)
    (wheel,) = dist.glob("refault-*.whl")
    run(directory / "bin" / "python", "-m", "pip", "install", "--quiet", wheel, cwd=directory)
    return directory / "bin"


def test_wheel_is_versioned_and_holds_the_compiled_parts(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    assert wheel.name.startswith(f"refault-{refault.__version__}-cp")
    names = zipfile.ZipFile(wheel).namelist()
    assert "refault/py.typed" in names
    for module in COMPILED:
        stem = module.replace(".", "/") + "."
        assert [name for name in names if name.startswith(stem) and name.endswith(".so")], module


def test_sdist_holds_what_builds_tests_and_serves_and_nothing_built(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"Makefile", "LICENSE", "README.md", "cext/ffi.py", "docs/status.md", "tests/tools/bootstrap"}
    assert wanted <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


@pytest.mark.parametrize("command", [["refault"], ["python", "-m", "refault"]])
def test_installed_command_tells_its_version(installed: Path, command: list[str], tmp_path: Path) -> None:
    output = run(installed / command[0], *command[1:], "--version", cwd=tmp_path)
    assert output == f"refault {refault.__version__}\n"


def test_installed_compiled_parts_load(installed: Path, tmp_path: Path) -> None:
    for module in COMPILED:
        output = run(installed / "python", "-c", f"import {module} as m; print(m.__file__)", cwd=tmp_path)
        assert str(ROOT / "src") not in output
