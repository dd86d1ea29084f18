"""Clients in the midst of something as refault is killed, who go on with it."""

from __future__ import annotations

import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
from tests.campaign.ran import Said

from refault.qmp.splitter import MAX_REPLY, Splitter

WITHIN = 60.0
"""Seconds in which all is well again, whatever befalls refault."""
LARGE = 2_000_000
"""Bytes of the guest's memory that are dumped, in 15 MB. Who does not read 16 MiB is disconnected."""


class Visitor:
    """One of them. `killed` is set when no refault is there."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.ready, self.killed = trio.Event(), trio.Event()
        self.said = Said()
        self._path = path
        self._splitter = Splitter(max_bytes=MAX_REPLY, lenient=True)
        self._messages: list[dict[str, object]] = []
        self._sock: trio.socket.SocketType

    async def run(self, do: Callable[[Visitor], Awaitable[None]]) -> str | None:
        """What it did not get."""
        with trio.socket.socket(socket.AF_UNIX) as self._sock:
            try:
                with trio.fail_after(WITHIN):
                    await self._sock.connect(str(self._path))
                    assert "QMP" in await self.message()
                    await self.say(b'{"execute": "qmp_capabilities"}')
                    assert await self.message() == {"return": {}}
                    await do(self)
            except (trio.TooSlowError, OSError, AssertionError) as error:
                return f"{self.name}: {error!r:.300}"
            finally:
                self.ready.set()
        return None

    async def say(self, data: bytes) -> None:
        """Sends all of it."""
        while data:
            data = data[await self._sock.send(data) :]

    def pass_descriptor(self, data: bytes) -> None:
        """Sends it with one."""
        with socket.socket(fileno=self._sock.dup().detach()) as sock:
            socket.send_fds(sock, [data], [2])

    async def read(self, most: int) -> None:
        """Reads bytes of what comes."""
        data = await self._sock.recv(most)
        assert data, "end of file"
        for message in self._splitter.feed(data):
            assert message.problem is None, message.raw[:100]
            told = json.loads(message.raw)
            if "event" not in told:
                self._messages.append(told)
                self.said.answered(str(told.get("id")))

    async def message(self) -> dict[str, object]:
        """The next that is no event."""
        while not self._messages:
            await self.read(65536)
        return self._messages.pop(0)

    async def answered(self, *ids: str) -> None:
        """Reads the replies to these, each once and in order, and no other."""
        for each in ids:
            assert (await self.message())["id"] == each
        await self.say(self.said.command("query-name", "last"))
        assert (await self.message())["id"] == "last"


async def half_a_command(visitor: Visitor) -> None:
    """Has said half of one."""
    data = visitor.said.command("query-name", "half")
    await visitor.say(data[:20])
    visitor.ready.set()
    await visitor.killed.wait()
    await visitor.say(data[20:])
    await visitor.answered("half")


async def half_a_reply(visitor: Visitor) -> None:
    """Has read half of one."""
    await visitor.say(visitor.said.command("query-qmp-schema", "schema"))
    for _ in range(10):
        await visitor.read(4096)
    visitor.ready.set()
    await visitor.killed.wait()
    await visitor.answered("schema")


async def a_descriptor(visitor: Visitor) -> None:
    """Passes one in this very moment."""
    visitor.ready.set()
    visitor.pass_descriptor(visitor.said.command("getfd", "get", fdname="mine"))
    await visitor.killed.wait()
    reply = await visitor.message()
    assert reply == {"return": {}, "id": "get"}, reply
    await visitor.say(visitor.said.command("closefd", "close", fdname="mine"))
    reply = await visitor.message()
    assert reply == {"return": {}, "id": "close"}, reply
    await visitor.answered()


async def a_large_reply(visitor: Visitor) -> None:
    """Is in the midst of one of almost 16 MiB."""
    dump = {"command-line": f"xp /{LARGE}xb 0"}
    await visitor.say(visitor.said.command("human-monitor-command", "large", **dump))
    await visitor.read(65536)
    visitor.ready.set()
    await visitor.killed.wait()
    reply = await visitor.message()
    assert reply["id"] == "large"
    assert str(reply["return"]).count("0x") == LARGE
    await visitor.answered()


async def gone(visitor: Visitor) -> None:
    """Leaves while no refault is there, its commands on their way."""
    for each in range(4):
        await visitor.say(visitor.said.command("query-qmp-schema", str(each)))
    visitor.ready.set()
    await visitor.killed.wait()


ALL = (half_a_command, half_a_reply, a_descriptor, a_large_reply, gone)
