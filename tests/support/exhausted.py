"""A process that may have no more descriptors than it has."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def permitted(more: int) -> Iterator[None]:
    """So many may be made yet, at the most."""
    lowest = os.eventfd(0)
    os.close(lowest)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def exhausted() -> Iterator[None]:
    """None may be made."""
    with permitted(8), contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            while True:
                stack.callback(os.close, os.eventfd(0))
        yield
