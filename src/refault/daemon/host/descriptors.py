"""How many descriptors this process may have."""

from __future__ import annotations

import contextlib
import resource


def raise_limit() -> int:
    """As many as it may ask for, from now on; returns their number. The 1024 that a shell gives are those of
    programs that use select(2), and too few for the VMs of a host."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft
