"""A /proc that shows nobody to this process, as hidepid= and ProtectProc= make it for one without rights."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

import pytest

from refault.daemon.kernel import process


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Nothing may be known of any process, but that it has ended."""

    def not_permitted(_: int) -> str:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(process, "_stat", not_permitted)
        yield
