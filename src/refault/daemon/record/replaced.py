"""A file that is replaced as a whole: whoever reads it has the one before or the new one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from refault.daemon.host.paths import make_again
from refault.daemon.host.whole import NEW


def replace(path: Path, content: bytes) -> None:
    """Writes it anew, for this user alone, in a directory that is made again where it has gone. Raises
    OSError; then the one before is there yet."""
    temporary = path.with_suffix(".new")
    try:
        make_again(path.parent)
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, NEW, 0o600)
        with open(descriptor, "wb") as file:
            file.write(content)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
