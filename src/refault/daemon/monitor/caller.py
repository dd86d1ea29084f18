"""Who is at the other end of a connection, as the kernel has it, and whether he may speak."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from refault.daemon.kernel.peer import Socket, groups_of, peer_of
from refault.daemon.kernel.process import names_of
from refault.daemon.monitor.address import host_port
from refault.qmp.access import Callers


@dataclass(frozen=True)
class Caller:
    """The process that connected, or listens where we connected, as it was then; over TCP only its address.

    The program's names are its own to choose (`comm`) or those of its file (`exe`): "?" where they cannot be
    read.
    """

    uid: int | None
    pid: int | None
    comm: str = "?"
    exe: str = "?"
    address: str | None = None

    def __str__(self) -> str:
        if self.uid is None:
            return self.address or "?"
        return f"uid {self.uid}, pid {self.pid or '?'}, {self.comm}, {self.exe}"


def caller_of(sock: Socket) -> Caller:
    """The process, which may have ended by now. A pid that our namespace does not know is None."""
    if sock.family != socket.AF_UNIX:
        return Caller(None, None, address=_address(sock))
    peer = peer_of(sock)
    comm, exe = names_of(peer.pid) if peer.pid is not None else (b"", b"")
    return Caller(peer.uid, peer.pid, _plain(comm), _plain(exe))


def may_speak(sock: Socket, callers: Callers) -> bool:
    """Whether the process at the other end is one of `callers`."""
    return callers.admit(peer_of(sock).uid, lambda: groups_of(sock))


def _plain(name: bytes) -> str:
    """A name as it can stand in a line of the log, whatever a process calls itself."""
    text = name.decode(errors="replace")
    return "".join(character if character.isprintable() else "?" for character in text) or "?"


def _address(sock: Socket) -> str:
    try:
        host, port, *_ = sock.getpeername()
    except OSError:
        return "?"
    return host_port(host, port)
