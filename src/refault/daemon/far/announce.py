"""Makes the destination's host known to the source's again, as soon as a path may be there.

A source that dials while the network is silent waits for the link-layer address of the destination's host,
which its kernel asks for once a second (arp(7), retrans_time_ms): so late its connection comes after the
path is there. When the destination's host asks for the source's the kernel there has what it waits for
(net/ipv4/arp.c, arp_process; net/ipv6/ndisc.c, ndisc_recv_ns), and the connection is made at once. An empty
datagram to the discard port (RFC 863) has it ask; nobody needs to receive it.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

import trio

_DISCARD = 9


@dataclass(frozen=True)
class Ends:
    """The addresses of a channel between two hosts, as getsockname and getpeername give them."""

    family: int
    ours: tuple[object, ...]
    theirs: tuple[object, ...]

    @classmethod
    def of(cls, connection: trio.socket.SocketType) -> Ends | None:
        """None for one whose peer has gone away already."""
        try:
            return cls(connection.family, connection.getsockname(), connection.getpeername())
        except OSError:
            return None


def announce(ends: Ends) -> bool:
    """Sends that datagram to the peer; False where no route leads there yet. Does not block."""
    try:
        with socket.socket(ends.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.bind((ends.ours[0], 0, *ends.ours[2:]))  # it is our address that is to be known
            sock.sendto(b"", (ends.theirs[0], _DISCARD, *ends.theirs[2:]))
    except OSError:
        return False
    return True
