"""A resolver that takes five seconds for one name, to be preloaded into a refault."""

from __future__ import annotations

import subprocess
from pathlib import Path

SLOW_NAME = "far.test"
"""It stands for 127.0.0.1; slow while the file that `SLOW` in the environment names is there."""


def slow_resolver(directory: Path) -> Path:
    """Builds the library to be named in `LD_PRELOAD`."""
    library = directory / "slow_resolver.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library
