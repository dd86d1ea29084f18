"""Host names, looked up by the C library in a thread: each once at a time, for whoever asks.

A resolver that is slow delays who waits for it, and no more: a look-up goes on though who began it has given
up, and what it finds is there for the next who asks.
"""

from __future__ import annotations

import math
import socket
from dataclasses import dataclass, field
from typing import Any

import trio

KEPT = 30.0
"""Seconds for which what was found is kept for those who gave up before: longer than between two attempts."""

Found = list[tuple[Any, ...]]
"""As socket.getaddrinfo gives it."""


@dataclass
class _LookUp:
    over: trio.Event = field(default_factory=trio.Event)
    found: Found = field(default_factory=list)
    error: OSError | None = None
    ended: float = math.inf


_under_way: trio.lowlevel.RunVar[dict[str, _LookUp]] = trio.lowlevel.RunVar("look-ups")


async def look_up(host: str, port: int) -> Found:
    """The addresses of a host, for TCP. Raises OSError (socket.gaierror) where there are none."""
    try:
        return socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except OSError:  # a name
        pass
    known = _all()
    look_up = known.get(host)
    if look_up is None or look_up.ended + KEPT < trio.current_time():
        look_up = known[host] = _LookUp()
        trio.lowlevel.spawn_system_task(_run, host, look_up)
    await look_up.over.wait()
    if known.get(host) is look_up:
        del known[host]  # it has served; the next who asks is to hear of a change
    if look_up.error is not None:
        raise look_up.error
    return [(*rest, (where[0], port, *where[2:])) for *rest, where in look_up.found]


def _all() -> dict[str, _LookUp]:
    try:
        return _under_way.get()
    except LookupError:
        known: dict[str, _LookUp] = {}
        _under_way.set(known)
        return known


async def _run(host: str, look_up: _LookUp) -> None:
    try:
        # As bytes, which go to the C library as they are, as QEMU gives it them. No limit of threads: a
        # look-up that hangs must not hold up another's.
        look_up.found = await trio.to_thread.run_sync(
            lambda: socket.getaddrinfo(host.encode(), None, type=socket.SOCK_STREAM),
            abandon_on_cancel=True,
            limiter=trio.CapacityLimiter(math.inf),
        )
    except OSError as error:
        look_up.error = error
    except ValueError as error:  # no host's name
        look_up.error = OSError(socket.EAI_NONAME, str(error))
    finally:
        look_up.ended = trio.current_time()
        look_up.over.set()
