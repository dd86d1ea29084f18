"""An ordinary QMP client for the lab and the demo: what a management tool is to QEMU or to refault."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from .tasks import background


class QmpError(Exception):
    """An error reply; ``kind`` is its class, as GenericError."""

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"{command}: {description} ({kind})")
        self.kind = kind
        self.description = description


class QmpClosed(Exception):  # noqa: N818 - it says what happened
    """The connection ended."""


@dataclass(frozen=True)
class Event:
    """An event as it was received; ``when`` by trio's clock, ``stamp`` by QEMU's, since the epoch, in s."""

    name: str
    data: dict[str, Any]
    when: float
    stamp: float

    @property
    def emitted(self) -> float:
        """``stamp`` by trio's clock: right for as long as nobody sets the host's clock."""
        return trio.current_time() - (time.time() - self.stamp)


class QmpClient:
    """One negotiated connection. Made by ``connect``; commands may run concurrently (out-of-band ones
    overtake).
    """

    def __init__(self, name: str, stream: trio.SocketStream) -> None:
        self.name = name
        self.greeting: dict[str, Any] = {}
        self.events: list[Event] = []
        self._stream = stream
        self._ids = itertools.count(1)
        self._replies: dict[int, dict[str, Any]] = {}
        self._changed = trio.Condition()
        self._sending = trio.Lock()
        self._closed = False

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version from the greeting."""
        qemu = self.greeting["QMP"]["version"]["qemu"]
        return (qemu["major"], qemu["minor"], qemu["micro"])

    @property
    def unasked(self) -> int:
        """Replies that nobody waits for."""
        return len(self._replies)

    async def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        oob: bool = False,
        fds: Sequence[int] = (),
        timeout: float = 30.0,
    ) -> Any:
        """Runs one command (``oob``: out-of-band) and gives its return value.

        Raises QmpError for an error reply, QmpClosed when the connection ends, trio.TooSlowError after
        ``timeout`` seconds.
        """
        number = next(self._ids)
        message: dict[str, Any] = {"exec-oob" if oob else "execute": command, "id": number}
        if arguments is not None:
            message["arguments"] = arguments
        with trio.fail_after(timeout):
            await self._send(json.dumps(message).encode() + b"\r\n", fds)
            async with self._changed:
                while number not in self._replies:
                    if self._closed:
                        raise QmpClosed(f"{self.name}: closed while {command} ran")
                    await self._changed.wait()
                reply = self._replies.pop(number)
        if "error" in reply:
            raise QmpError(command, reply["error"]["class"], reply["error"]["desc"])
        return reply["return"]

    async def monitor_command(self, line: str) -> str:
        """Runs a line of the human monitor."""
        return str(await self.execute("human-monitor-command", {"command-line": line}))

    async def wait_event(self, wanted: Callable[[Event], bool], since: int = 0) -> Event:
        """The first event, from number ``since`` of ``events`` on, that is ``wanted``. The deadline is the
        caller's.

        Raises QmpClosed when the connection ends first.
        """
        seen = since
        async with self._changed:
            while True:
                for event in self.events[seen:]:
                    if wanted(event):
                        return event
                seen = len(self.events)
                if self._closed:
                    raise QmpClosed(f"{self.name}: closed while waiting for an event")
                await self._changed.wait()

    async def wait_migration(self, *statuses: str, since: int = 0) -> Event:
        """The first MIGRATION event with one of ``statuses``; needs the `events` capability."""
        return await self.wait_event(
            lambda event: event.name == "MIGRATION" and event.data["status"] in statuses, since
        )

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        async with self._sending:
            try:
                if fds:
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds).tobytes())
                    sent = await self._stream.socket.sendmsg([data], [rights])
                    data = data[sent:]
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
                raise QmpClosed(f"{self.name}: {error}") from error

    async def _read(self, negotiated: trio.Event) -> None:
        buffer = bytearray()
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for chunk in self._stream:
                buffer += chunk
                *lines, rest = buffer.split(b"\n")
                buffer = bytearray(rest)
                for line in filter(None, map(bytes.strip, map(bytes, lines))):
                    await self._take(json.loads(line), negotiated)
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
        negotiated.set()

    async def _take(self, message: dict[str, Any], negotiated: trio.Event) -> None:
        if "QMP" in message:
            self.greeting = message
            negotiated.set()
            return
        async with self._changed:
            if "event" in message:
                at = message["timestamp"]
                stamp = at["seconds"] + at["microseconds"] / 1e6
                self.events.append(
                    Event(message["event"], message.get("data", {}), trio.current_time(), stamp)
                )
            else:
                self._replies[message.get("id", 0)] = message
            self._changed.notify_all()


async def _open(address: str) -> trio.SocketStream:
    """Connects to `unix:PATH`, a path, or `tcp:HOST:PORT`; a full backlog of one is met by waiting."""
    while True:
        sock: trio.socket.SocketType | None = None
        try:
            if address.startswith("tcp:"):
                host, _, port = address.removeprefix("tcp:").rpartition(":")
                return await trio.open_tcp_stream(host.strip("[]"), int(port))
            sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            await sock.connect(address.removeprefix("unix:"))
            return trio.SocketStream(sock)
        except (BlockingIOError, ConnectionRefusedError, FileNotFoundError):
            if sock is not None:
                sock.close()
            await trio.sleep(0.02)


@contextlib.asynccontextmanager
async def connect(
    address: str, *, name: str = "", oob: bool = True, wait: float = 30.0
) -> AsyncIterator[QmpClient]:
    """Connects, waits up to ``wait`` seconds for the listener and its greeting, and negotiates.

    Raises trio.TooSlowError when nobody answers in that time, QmpClosed when the peer hangs up.
    """
    with trio.fail_after(wait):
        stream = await _open(address)
    client = QmpClient(name or address, stream)
    async with stream, background() as nursery:
        negotiated = trio.Event()
        nursery.start_soon(client._read, negotiated)
        with trio.fail_after(wait):
            await negotiated.wait()
            if not client.greeting:
                raise QmpClosed(f"{client.name}: closed without a greeting")
            enable = ["oob"] if oob and "oob" in client.greeting["QMP"]["capabilities"] else []
            await client.execute("qmp_capabilities", {"enable": enable}, timeout=wait)
        yield client
