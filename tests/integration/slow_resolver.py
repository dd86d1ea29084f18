"""A resolver that takes its time for one name, to be preloaded into a refault."""

from __future__ import annotations

import subprocess
from pathlib import Path

SLOW_NAME = "far.test"
"""It stands for 127.0.0.1, which nobody is told while the file that `HELD` in the environment names is there,
and only after five seconds while that of `SLOW` is."""


def slow_resolver(directory: Path) -> Path:
    """Builds the library to be named in `LD_PRELOAD`."""
    library = directory / "slow_resolver.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library
