"""The local leg: a socketpair, one end handed to QEMU with `getfd`. No path, no strangers, a send buffer
that we size (cext/queues.h). Or a connection to where a QEMU was told on its command line to listen."""

from __future__ import annotations

import logging
import os
import secrets
import select
import socket
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import trio

from refault.channel.relay import SOURCE_QUEUE
from refault.daemon.kernel.peer import peer_of
from refault.daemon.monitor.address import Address
from refault.daemon.monitor.dial import dial
from refault.daemon.monitor.monitor import words
from refault.migration.phase import Role

GETFD_TIMEOUT = 10.0
GIVE_BACK_TIMEOUT = 5.0

log = logging.getLogger("refault.local")


class Executes(Protocol):
    """The part of the monitor that local legs need."""

    name: str
    """The VM's, for messages."""

    async def execute(
        self,
        command: str,
        arguments: dict[str, object] | None = None,
        *,
        oob: bool = False,
        fd: int | None = None,
        timeout: float,  # noqa: ASYNC109
    ) -> object:
        """Runs one of refault's own commands."""


@dataclass
class LocalLeg:
    """Our end of a pair whose other end is QEMU's, by `name`; closed only where legs.py allows it."""

    name: str
    socket: socket.socket
    peer_inode: int
    """Of QEMU's end, as /proc shows it."""
    kept: str | None = None
    """The name by which QEMU knows our end, where it holds that too."""

    @property
    def uri(self) -> str:
        """The address by which QEMU uses its end."""
        return f"fd:{self.name}"

    def close(self) -> None:
        """Closes our end, where QEMU has not been told to use its own, or has gone."""
        self.socket.close()

    def detach(self) -> int:
        """Gives the descriptor away, to the pump."""
        return self.socket.detach()


async def hand_over(monitor: Executes, role: Role) -> LocalLeg:
    """Makes a pair and gives one end to QEMU. Raises what `execute` raises; then both ends are closed.

    QEMU reads nothing of it before a migrate command names it, so an end that was never named can be closed
    freely.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    if role is Role.SOURCE:  # the pump sizes what we write into ours
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOURCE_QUEUE)
    with theirs:
        inode = os.fstat(theirs.fileno()).st_ino
        try:
            name = await hand_connection(monitor, theirs.fileno())
        except BaseException:
            ours.close()
            raise
        if role is Role.DESTINATION:
            # Or a TLS handshake that stands still blocks QEMU's monitor. Only now, for QEMU makes what it is
            # passed blocking (io/channel-socket.c), as it does itself after the handshake. A source of 11.1
            # does not, and its migration thread then spins on a lost channel.
            theirs.setblocking(False)
    return LocalLeg(name, ours, inode)


class Pair:
    """A pair whose other end is QEMU's, used as a local_unix.Listening, for a QEMU that comes to none."""

    def __init__(self, leg: LocalLeg) -> None:
        self.uri = leg.uri
        self.path = leg.uri
        self._leg = leg

    def open(self) -> None:
        """QEMU has its end already."""

    def take(self) -> socket.socket:
        """Our end."""
        return socket.socket(fileno=self._leg.detach())

    async def accept(self) -> socket.socket:
        """The same."""
        await trio.lowlevel.checkpoint()
        return self.take()

    def refuse(self) -> None:
        """Closes our end, if it was not taken."""
        self._leg.close()

    close = refuse


async def lay(monitor: Executes) -> LocalLeg:
    """The same for a destination that is to wait on it. QEMU holds our end as well: before 8.2 it does not
    survive the end of one that it waits on, and a kill of refault ends it.
    """
    leg = await hand_over(monitor, Role.DESTINATION)
    leg.kept = await give_back(monitor, leg.socket)
    return leg


async def hand_connection(monitor: Executes, fd: int) -> str:
    """Gives QEMU a connection; the name by which it knows it. Raises what `execute` raises."""
    name = f"refault-{_never_used()}"
    await monitor.execute("getfd", {"fdname": name}, fd=fd, timeout=GETFD_TIMEOUT)
    return name


def has_ended(ours: socket.socket) -> bool:
    """Whether QEMU has closed its end, though there may be bytes of it to be read yet."""
    poll = select.poll()
    poll.register(ours, select.POLLRDHUP)
    return bool(poll.poll(0))


def has_unread(ours: socket.socket) -> bool:
    """Whether there are bytes of QEMU's that nobody has read."""
    try:
        return bool(ours.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False


async def reach(path: str, pid: int | None, timeout: float) -> LocalLeg:  # noqa: ASYNC109
    """Connects to where a destination QEMU, the process `pid`, listens itself. Raises OSError.

    Its listener may be good for one connection only (docs/campaign.md, Strangers).
    """
    try:
        ours = await dial(Address(path), timeout)
    except trio.TooSlowError:
        raise OSError(f"unix:{path} takes no connection") from None
    owner = peer_of(ours).pid
    if owner != pid:
        ours.close()
        raise OSError(f"process {owner} listens at unix:{path}, not QEMU, process {pid}")
    return LocalLeg(path, ours, 0)


async def take_back(monitor: Executes, *names: str) -> None:
    """Has QEMU close ends that it will not use. A QEMU that does not answer keeps them, to no harm."""
    for name in names:
        try:
            await monitor.execute("closefd", {"fdname": name}, timeout=GIVE_BACK_TIMEOUT)
        except Exception as error:
            log.debug("QEMU keeps the descriptor %s: %s", name, error)


def kept_name() -> str:
    """A new name for an end of ours that QEMU is to hold."""
    return f"refault-kept-{_never_used()}"


def _never_used() -> str:
    """A getfd of a name that QEMU knows closes what it knows by it (monitor/fds.c, monitor_add_fd), be it an
    earlier refault's; and in a container each has the same pid.
    """
    return secrets.token_hex(8)


async def give_back(monitor: Executes, ours: socket.socket, name: str | None = None) -> str | None:
    """Hands QEMU our end too, so that the pair never ends though we do, as `name` or a new one.

    The name by which QEMU knows it; None where it does not take it, or has not said so: it may have then.
    """
    name = name or kept_name()
    try:
        await monitor.execute("getfd", {"fdname": name}, fd=ours.fileno(), timeout=GIVE_BACK_TIMEOUT)
    except Exception as error:
        log.warning(
            "%s: QEMU did not take our end of a leg: %s; should refault be killed now, QEMU sees the leg end",
            monitor.name,
            words(error),
        )
        return None
    return name


class Deposits:
    """Descriptors laid with a destination QEMU, so that a recovery needs no in-band command."""

    WANTED = 8

    def __init__(self) -> None:
        self._legs: deque[LocalLeg] = deque()
        self._over = False

    async def fill(self, monitor: Executes) -> None:
        """Lays descriptors until there are enough; none once they were drained."""
        while len(self._legs) < self.WANTED and not self._over:
            leg = await lay(monitor)
            if self._over:  # the migration has ended meanwhile
                await _discard(monitor, leg)
                return
            self._legs.append(leg)

    @property
    def names(self) -> tuple[str, ...]:
        """By which QEMU holds the ends of those that are left."""
        return tuple(name for leg in self._legs for name in (leg.name, leg.kept) if name is not None)

    def take(self) -> LocalLeg | None:
        """One that QEMU knows; None where there is none left."""
        return self._legs.popleft() if self._legs else None

    def put_back(self, leg: LocalLeg) -> None:
        """Returns one that QEMU did not take."""
        self._legs.appendleft(leg)

    async def drain(self, monitor: Executes) -> None:
        """Has both ends of all that are left closed. It is for the end of the migration."""
        self._over = True
        while self._legs:
            await _discard(monitor, self._legs.popleft())


async def _discard(monitor: Executes, leg: LocalLeg) -> None:
    for name in (leg.name, leg.kept):
        if name is not None:
            await take_back(monitor, name)
    leg.close()
