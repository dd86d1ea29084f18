"""Hears from the kernel that a link, an address or a route has changed: a path may be there again.

rtnetlink(7). What has changed is not looked at: a dial that comes to nothing costs less than being wrong. But
each change makes a VM that waits try some eight times in two seconds, so they are counted with a pause.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable

import trio

log = logging.getLogger("refault.routes")

_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
"""RTMGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE (linux/rtnetlink.h)."""
SETTLES = 0.05
"""Seconds from the first word of a change, for one comes in several: a link is up and has its routes before
it carries anything (net/core/link_watch.c), and an ARP request that is lost then is repeated a second
later."""
PAUSE = 1.0
"""Seconds between two calls at the least."""
LONGEST_PAUSE = 8.0
"""The same on a host where something changes all the time, as where containers come and go."""


class Pauses:
    """How long nothing is made of further changes: the sooner they follow one another, the longer."""

    def __init__(self) -> None:
        self._pause = PAUSE
        self._last = -math.inf

    def after(self, now: float) -> float:
        """Seconds to pause for after the change of `now`, in seconds of any clock."""
        quiet = now - self._last > LONGEST_PAUSE * 1.25
        self._pause = PAUSE if quiet else min(self._pause * 2, LONGEST_PAUSE)
        self._last = now
        return self._pause


async def watch(changed: Callable[[], bool]) -> None:
    """Calls `changed` after each change, and not again for a pause where it says that it made use of it.

    Returns at once where the kernel does not tell, as in a sandbox without AF_NETLINK.
    """
    try:
        netlink = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
    except OSError as error:
        log.info("changes of routes are not heard of: %s", error.strerror)
        return
    with netlink:
        netlink.bind((0, _GROUPS))  # permitted to everyone
        pauses = Pauses()
        while True:
            await trio.lowlevel.wait_readable(netlink)
            await trio.sleep(SETTLES)
            _drain(netlink)
            if changed():
                await trio.sleep(pauses.after(trio.current_time()))


def _drain(netlink: socket.socket) -> None:
    while True:
        try:
            netlink.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            continue  # ENOBUFS: there were more than fit, so something has changed
