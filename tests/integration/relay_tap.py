"""The destination's relay in this process, behind the lab's channel: its record can be read page by page."""

from __future__ import annotations

from pathlib import Path

import trio
from tests.support.pagemap import Request, walk

from refault.channel.relay import LegState, Relay
from refault.lab.channel import Channel, Loss, Lost
from refault.migration.phase import Role


class RelayTap(Channel):
    """Stands where the lab's channel stands, whose target is ``port``; QEMU listens on unix sockets.

    source ══ carrier ══ this relay ══ destination
    """

    def __init__(self, directory: Path, port: int) -> None:
        self._directory = directory
        self._listen_port = port
        self._attempt = 0
        self._channel: Channel | None = None
        self.relay = Relay(Role.DESTINATION)

    async def begin_behind(self, channel: Channel, nursery: trio.Nursery) -> None:
        """Accepts what comes over ``channel`` from now on."""
        self._channel = channel
        listeners = await trio.open_tcp_listeners(self._listen_port, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, self._join, listeners)

    @property
    def carried_by(self) -> Channel:
        assert self._channel is not None
        return self._channel

    @property
    def uri(self) -> str:
        return self.carried_by.uri

    @property
    def target_uri(self) -> str:
        return f"unix:{self._path}"

    @property
    def _path(self) -> Path:
        return self._directory / f"attempt{self._attempt}"

    async def retarget(self, port: int | None = None) -> None:
        self._attempt += 1

    async def wait_open(self) -> None:
        while not self._path.exists():
            await trio.sleep(0.001)
        await self.carried_by.wait_open()

    async def _join(self, far: trio.SocketStream) -> None:
        local = await trio.open_unix_socket(str(self._path))
        recovered = self.relay.look().channel > 0
        ends = local.socket.detach(), far.socket.detach()
        self.relay.attach(*ends, recovered=recovered, may_replay=True)

    async def lose(self, loss: Loss) -> Lost:
        """Loses the channel; the destination's leg is closed as soon as the relay has told, as the daemon
        does."""
        lost = await self.carried_by.lose(loss)
        with trio.fail_after(20):
            while (view := self.relay.look()).far is LegState.OPEN:
                await trio.sleep(0.0005)
            self.relay.close_channel(view.channel)
            while self.relay.look().local is LegState.OPEN:
                await trio.sleep(0.0005)
        return lost

    def records(self) -> list[Request]:
        """What is on record, oldest first. Only while both legs are closed: the pump writes nothing then."""
        view = self.relay.look()
        assert LegState.OPEN not in (view.local, view.far)
        return list(walk(self.relay._map))
