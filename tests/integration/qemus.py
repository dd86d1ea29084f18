"""The QEMUs that the tests run: the machine's own, and those that `make qemus` has unpacked."""

from __future__ import annotations

import os
import shutil

import pytest

from refault.lab.qemu import DEFAULT_BINARY

ALL_OTHERS = ("qemu-5.2", "qemu-10", "qemu-11")
OTHERS = [name for name in ALL_OTHERS if shutil.which(name)]
"""In CI these are all there: .ci/run runs `make qemus`."""


def qemus(*names: str) -> list[str]:
    """The machine's own QEMU and, of those named, what is there; in CI a missing one is an error."""
    missing = set(names) - set(OTHERS)
    if missing and os.environ.get("CI"):
        raise RuntimeError(f"{', '.join(sorted(missing))} not found: run 'make qemus' first")
    return [DEFAULT_BINARY, *(name for name in names if name not in missing)]


BINARIES = qemus("qemu-10")
OTHERS_NIGHTLY = [BINARIES[0], *(pytest.param(name, marks=pytest.mark.nightly) for name in BINARIES[1:])]
"""For long tests that are the same for each: CI runs them on the machine's own."""
ALL_BINARIES = qemus(*ALL_OTHERS)
"""For a few short tests; all checks on all of them: `make matrix`."""
