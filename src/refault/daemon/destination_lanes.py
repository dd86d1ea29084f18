"""A destination's channel with lanes: the connections that came from the other host are given to QEMU in its
order, both or none.

QEMU up to 7.2 starts when all are there, and a half-made attempt kills it at the next one: nothing is
connected to it before all have come. Later ones start on the main connection, and the source opens its
preempt channel only when it needs it: the pump holds back what must not come before that (cext/relay.h).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from refault.daemon.channels import Channels
from refault.daemon.far import FIRST_BYTES_TIMEOUT
from refault.daemon.far_socket import alive, detached
from refault.daemon.local import LocalLeg
from refault.daemon.local_unix import peer_inode_now
from refault.daemon.waiting_room import WaitingRoom
from refault.migration.versions import abilities

if TYPE_CHECKING:
    from refault.daemon.migration import Migration

log = logging.getLogger("refault.migration")

ALL_WITHIN = 10.0
"""How long the other connections of a channel may be behind its main one."""
_LOOK = 0.1


@dataclass(frozen=True)
class QemuListens:
    """Where QEMU was told to listen for a channel; good for one."""

    path: str

    @property
    def uri(self) -> str:
        """The address that QEMU was given."""
        return f"unix:{self.path}"


class Gathering:
    """Brings together the connections of one migration's channels."""

    def __init__(self, migration: Migration, room: WaitingRoom) -> None:
        self._migration = migration
        self._room = room
        self._multifd: dict[trio.socket.SocketType, trio.Event] = {}
        """Multifd channels that wait; the event says that it is taken."""

    async def offer_multifd(self, connection: trio.socket.SocketType) -> None:
        """A multifd channel has come: it waits until it is taken, or goes away, but not for ever alone."""
        taken = self._multifd[connection] = trio.Event()
        try:
            with trio.move_on_after(FIRST_BYTES_TIMEOUT):
                while not taken.is_set() and alive(connection):
                    with trio.move_on_after(_LOOK):
                        await taken.wait()
        finally:
            del self._multifd[connection]

    async def connect(
        self, channels: Channels, door: QemuListens, main: trio.socket.SocketType, *, recovered: bool
    ) -> bool:
        """Joins a channel whose main connection has come. False where the others did not: QEMU is untouched
        then.

        Raises AttemptFailed where the channel before must stay, OSError where QEMU does not listen.
        """
        migration = self._migration
        number, peer = self._room.number_of(main)
        late = migration.lanes.preempt and abilities(migration.vm.version).preempt_comes_late
        others: list[trio.socket.SocketType] = []
        if not late and not await self._gather(others, main, number, peer):
            for other in others:
                other.close()
            return False
        channels.check_room()
        sockets = migration.vm.sockets
        with trio.CancelScope(shield=True):
            local = await sockets.connect(door.path)
            channels.join(LocalLeg(door.path, local, peer_inode_now(local)), main, recovered=recovered)
            channel = channels.channel
            if migration.lanes.preempt and not late:
                channels.closing.gives_preempt(channel)
            for other in others:
                channels.add_lane(channel, await sockets.connect(door.path), other)
        if late:
            migration.vm.start_soon(self._bring_preempt, channels, channel, door, number, peer)
        return True

    async def _gather(
        self, others: list[trio.socket.SocketType], main: trio.socket.SocketType, number: int, peer: str
    ) -> bool:
        lanes = self._migration.lanes
        deadline = trio.current_time() + ALL_WITHIN
        while len(others) < lanes.count:
            if not alive(main) or trio.current_time() > deadline:
                log.warning(
                    "%s: closed a channel from %s: of its %d further connections %d came",
                    self._migration.name, peer, lanes.count, len(others),
                )  # fmt: skip
                return False
            others += (
                await self._take_multifd(peer) if lanes.multifd else await self._take_preempt(number, peer)
            )
            if len(others) < lanes.count:
                with trio.move_on_after(_LOOK):
                    await self._room.changed.wait()
        return True

    async def _take_multifd(self, peer: str) -> list[trio.socket.SocketType]:
        """All that are needed, or none."""
        found = [
            connection
            for connection, taken in self._multifd.items()
            if not taken.is_set() and alive(connection) and connection.getpeername()[0] == peer
        ][-self._migration.lanes.multifd :]
        if len(found) < self._migration.lanes.multifd:
            return []
        for connection in found:
            self._multifd[connection].set()
        return [detached(connection) for connection in found]

    async def _take_preempt(self, number: int, peer: str) -> list[trio.socket.SocketType]:
        arrival = self._room.silent_after(number, peer)
        return [await self._room.take(arrival)] if arrival is not None else []

    async def _bring_preempt(
        self, channels: Channels, channel: int, door: QemuListens, number: int, peer: str
    ) -> None:
        """Brings QEMU its preempt channel when the source is about to need it."""
        with self._room.patient(number, peer):
            while channels.lives(channel):
                if not channels.relay.look().waiting:
                    await channels.changed.wait()
                    continue
                for connection in await self._take_preempt(number, peer):
                    if not channels.lives(channel):
                        connection.close()  # QEMU would take it for a main one
                        return
                    channels.closing.gives_preempt(channel)
                    with trio.CancelScope(shield=True):
                        local = await self._migration.vm.sockets.connect(door.path)
                        channels.add_lane(channel, local, connection)
                    return
                with trio.move_on_after(_LOOK):
                    await self._room.changed.wait()
