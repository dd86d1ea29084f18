"""Whether a TCP connection's peer has gone silent though it was asked, as cext/leg.c finds it for the pump.

Never by TCP_USER_TIMEOUT, which kills a live peer whose window is closed.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

_PROBES = 3
_UNANSWERED_PROBES = 2
_INFO = struct.Struct("=8B13I")
"""struct tcp_info (linux/tcp.h) as far as tcpi_last_ack_recv, which is the 14th of its 32-bit words."""


def watch(sock: socket.socket, seconds: int) -> None:
    """Has the kernel probe an idle connection, so that a peer that is gone shows within `seconds`."""
    idle = max(seconds - _PROBES, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, idle),
        (socket.TCP_KEEPINTVL, 1),
        (socket.TCP_KEEPCNT, _PROBES),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


@dataclass(frozen=True)
class _Info:
    retransmits: int
    probes: int
    backoff: int
    unacked: int
    last_ack_recv_ms: int


def _info(sock: socket.socket) -> _Info:
    size = _INFO.size
    fields = _INFO.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size))
    return _Info(fields[2], fields[3], fields[4], fields[8 + 4], fields[8 + 12])


def is_silent(sock: socket.socket, seconds: float) -> bool:
    """Whether there was no sign of life for so long though TCP asked for one: bytes that were sent again and
    not acknowledged, or window probes that nobody answers."""
    info = _info(sock)
    sent_again = info.unacked > 0 and (info.retransmits > 0 or info.backoff > 0)
    return info.last_ack_recv_ms > seconds * 1000 and (sent_again or info.probes >= _UNANSWERED_PROBES)
