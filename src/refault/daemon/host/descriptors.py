"""How many descriptors this process may have, and what of them is for whom.

Clients leave some free, so that a migration is recovered however many come; and the control socket has some
of its own, so that the operator is told where there are none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource

RESERVE = 64
"""Descriptors that clients leave free; where few are permitted an eighth of them."""
_LENT = 8
"""To answer one who asks: his connection, and files that are looked at for it."""
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE})


def raise_limit() -> int:
    """As many as it may ask for, from now on; returns their number. The 1024 that a shell gives are those of
    programs that use select(2), and too few for the VMs of a host."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def why_few() -> str | None:
    """What to tell where no more are free than clients leave; None where there are."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return None
    try:
        lowest = os.eventfd(0, os.EFD_CLOEXEC)  # the kernel gives the lowest number that is free
    except OSError as error:
        if error.errno not in EXHAUSTED:
            return None
    else:
        os.close(lowest)
        if lowest < most - min(RESERVE, most // 8):
            return None
    return f"its descriptors are used up but for a reserve: it may have {most} (LimitNOFILE=, ulimit -Hn)"


class Spare:
    """Some that are kept for one purpose, and lent to it where there are no others."""

    def __init__(self) -> None:
        self._kept: list[int] = []
        self.take_back()

    @property
    def lent(self) -> bool:
        """Whether they are."""
        return not self._kept

    def lend(self) -> bool:
        """Makes them free; whether there are any."""
        there = bool(self._kept)
        self.close()
        return there

    def take_back(self) -> None:
        """Keeps as many again, as far as there are."""
        with contextlib.suppress(OSError):
            while len(self._kept) < _LENT:
                self._kept.append(os.eventfd(0, os.EFD_CLOEXEC))

    def close(self) -> None:
        """They are anybody's."""
        while self._kept:
            os.close(self._kept.pop())
