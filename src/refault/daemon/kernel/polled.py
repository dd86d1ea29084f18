"""What poll(2) tells of a socket at this moment."""

from __future__ import annotations

import select
import socket


def readable(sock: socket.socket | int) -> bool:
    """Whether there is something to be read now, or somebody to be accepted."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def hung_up(sock: socket.socket) -> bool:
    """Whether the peer has closed altogether, and not its sending side alone; also where it was shut down."""
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))
