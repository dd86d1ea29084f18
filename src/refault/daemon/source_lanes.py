"""A source's channel with lanes: QEMU connects at a private socket, the main connection first, and each is
completed to the other host before the next is taken."""

from __future__ import annotations

import logging
import socket
from collections import deque
from typing import TYPE_CHECKING

import trio

from refault.daemon.channels import AttemptFailed, Channels
from refault.daemon.far_dial import connect_any
from refault.daemon.local import LocalLeg
from refault.daemon.local_unix import Listening, peer_inode_now
from refault.migration.endpoint import Inet

if TYPE_CHECKING:
    from refault.daemon.migration import Migration

log = logging.getLogger("refault.migration")

QEMU_CONNECTS_WITHIN = 10.0
LANE_TIMEOUT = 10.0
"""How long the other host is dialled for a lane before the channel counts as lost."""
_REDIAL_AFTER = 0.1


class Opening:
    """One channel on its way. It owns `connections`, the far ones that were dialled ahead, main first."""

    def __init__(
        self,
        migration: Migration,
        channels: Channels,
        listening: Listening,
        endpoint: Inet,
        connections: deque[trio.socket.SocketType],
        *,
        recovered: bool,
    ) -> None:
        self.uri = f"unix:{listening.path}"
        """What QEMU's `migrate` is given."""
        self.joined = trio.Event()
        """Set once QEMU's main connection is joined to the other host."""
        self.over = trio.Event()
        """Set when no more connections are taken."""
        self._migration = migration
        self._channels = channels
        self._listening = listening
        self._endpoint = endpoint
        self._connections = connections
        self._recovered = recovered
        self._scope = trio.CancelScope()

    def cancel(self) -> None:
        """Takes no more connections; what is joined stays."""
        self._scope.cancel()

    async def run(self) -> None:
        """Serves until all connections are there, or the channel is lost."""
        try:
            with self._scope:
                await self._take_main()
        finally:
            self._listening.close()
            for connection in self._connections:
                connection.close()
            self.over.set()

    async def _take_main(self) -> None:
        local = None
        with trio.move_on_after(QEMU_CONNECTS_WITHIN):
            local = await self._listening.accept()
        if local is None:
            log.warning(
                "%s: QEMU was told to migrate but did not connect to %s in %g s: if SELinux or AppArmor"
                " forbids it that, use --relay off",
                self._migration.name,
                self._listening.path,
                QEMU_CONNECTS_WITHIN,
            )
            return
        leg = LocalLeg(self._listening.path, local, peer_inode_now(local))
        try:
            self._channels.join(leg, self._connections.popleft(), recovered=self._recovered)
        except AttemptFailed as error:
            log.warning("%s: %s", self._migration.name, error)
            leg.close()
            return
        self.joined.set()
        channel = self._channels.channel
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_lost, channel)
            for _ in range(self._migration.lanes.count):
                await self._take_lane(channel)
            nursery.cancel_scope.cancel()

    async def _cancel_when_lost(self, channel: int) -> None:
        while self._channels.lives(channel):
            await self._channels.changed.wait()
        self.cancel()

    async def _take_lane(self, channel: int) -> None:
        local = await self._listening.accept()
        try:
            connection = self._connections.popleft() if self._connections else await self._dial()
        except OSError as error:
            log.warning("%s: no further connection of the channel: %s", self._migration.name, error)
            self._channels.lose(channel, error)
            await _until_cancelled_with(local)
        except BaseException:
            local.close()
            raise
        else:
            self._channels.add_lane(channel, local, connection)

    async def _dial(self) -> trio.socket.SocketType:
        """Dials for as long as it makes sense: the main connection of this channel is made already."""
        deadline = trio.current_time() + LANE_TIMEOUT
        while True:
            try:
                return (await connect_any([self._endpoint], deadline - trio.current_time()))[0]
            except OSError:
                if trio.current_time() + _REDIAL_AFTER >= deadline:
                    raise
            await trio.sleep(_REDIAL_AFTER)


async def _until_cancelled_with(local: socket.socket) -> None:
    """Keeps a lane that QEMU opened until the pump has seen the channel lost."""
    with local:
        await trio.sleep_forever()
