"""Hears from the kernel that a link, an address or a route has changed: a path may be there again.

rtnetlink(7). What has changed is not looked at: a dial that comes to nothing costs less than being wrong.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import trio

log = logging.getLogger("refault.routes")

_GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
"""RTMGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE (linux/rtnetlink.h)."""
PAUSE = 1.0
"""Seconds between two calls at the least, on a host where something changes all the time."""


async def watch(changed: Callable[[], bool]) -> None:
    """Calls `changed` after each change, and not again for PAUSE where it says that it made use of it.

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
        while True:
            await trio.lowlevel.wait_readable(netlink)
            _drain(netlink)
            if changed():
                await trio.sleep(PAUSE)


def _drain(netlink: socket.socket) -> None:
    while True:
        try:
            netlink.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            continue  # ENOBUFS: there were more than fit, so something has changed
