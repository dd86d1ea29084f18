"""A forwarder in front of the lab's channel that feeds what passes to a tracker and keeps it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio
from tests.support.tracker import Tracker

from refault.lab.channel import Channel

_READ = 32 << 10


@dataclass
class Passed:
    """What passed on one main channel, each way."""

    forward: bytearray = field(default_factory=bytearray)
    backward: bytearray = field(default_factory=bytearray)


class Tap(Channel):
    """Stands where the lab's channel stands. A second connection beside the first is the preempt channel."""

    def __init__(self, channel: Channel, nursery: trio.Nursery) -> None:
        self._channel = channel
        self._nursery = nursery
        self._open = 0
        self.tracker = Tracker()
        self.channels: list[Passed] = []

    async def begin(self) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self._port: int = listeners[0].socket.getsockname()[1]
        self._nursery.start_soon(trio.serve_listeners, self._connection, listeners)

    @property
    def uri(self) -> str:
        return f"tcp:127.0.0.1:{self._port}"

    @property
    def target_uri(self) -> str:
        return self._channel.target_uri

    async def wait_open(self) -> None:
        await self._channel.wait_open()

    async def retarget(self, port: int | None = None) -> None:
        await self._channel.retarget(port)

    def save(self, directory: Path, name: str) -> None:
        """Writes what passed, for tests/fuzz/seeds.py."""
        for number, passed in enumerate(self.channels):
            (directory / f"{name}-{number}.forward").write_bytes(passed.forward)
            (directory / f"{name}-{number}.return").write_bytes(passed.backward)

    async def _connection(self, near: trio.SocketStream) -> None:
        host, port = self._channel.uri.removeprefix("tcp:").split(":")
        far = await trio.open_tcp_stream(host, int(port))
        main = self._open == 0
        self._open += 1
        try:
            async with near, far:
                await (self._main(near, far) if main else self._preempt(near, far))
        finally:
            self._open -= 1

    async def _main(self, near: trio.SocketStream, far: trio.SocketStream) -> None:
        self.tracker.channel_begin(recovered=bool(self.channels))
        passed = Passed()
        self.channels.append(passed)

        def forward(data: bytes) -> None:
            passed.forward.extend(data)
            self.tracker.forward(data, time.monotonic_ns())

        def backward(data: bytes) -> None:
            passed.backward.extend(data)
            self.tracker.backward(data, time.monotonic_ns())

        await _both_ways(near, far, forward, backward)
        self.tracker.channel_lost()

    async def _preempt(self, near: trio.SocketStream, far: trio.SocketStream) -> None:
        self.tracker.preempt_begin()
        await _both_ways(
            near, far, lambda data: self.tracker.preempt_forward(data, time.monotonic_ns()), lambda data: None
        )


async def _both_ways(
    near: trio.SocketStream,
    far: trio.SocketStream,
    forward: Callable[[bytes], None],
    backward: Callable[[bytes], None],
) -> None:
    async def one_way(
        source: trio.SocketStream, sink: trio.SocketStream, see: Callable[[bytes], None]
    ) -> None:
        try:
            while data := bytes(await source.receive_some(_READ)):
                see(data)
                await sink.send_all(data)
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one_way, near, far, forward)
        nursery.start_soon(one_way, far, near, backward)


def save_directory() -> Path | None:
    """Where the environment asks for the streams to be saved."""
    named = os.environ.get("REFAULT_SAVE_STREAMS")
    return Path(named) if named else None
