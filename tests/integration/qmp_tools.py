"""Real QEMUs with monitors, refault in front of them, and QMP clients that read every message."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

from refault.daemon.monitor.address import Address
from refault.daemon.monitor.address_text import parse_address
from refault.daemon.monitor.monitor import Monitor

QEMUS = [qemu for qemu in os.environ.get("REFAULT_QEMUS", "qemu-system-x86_64").split(":") if qemu]

Message = dict[str, Any]


@contextmanager
def qemu_process(
    *monitors: str, qemu: str = QEMUS[0], extra: Sequence[str] = (), stderr: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU without a machine, paused with nothing to run; `monitors` are chardev arguments for -qmp."""
    argv = [qemu, "-machine", "none", "-nodefaults", "-display", "none", *extra]
    for monitor in monitors:
        argv += ["-qmp", monitor]
    with subprocess.Popen(argv, stderr=stderr) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="refault-") as path:
        yield Path(path)


@asynccontextmanager
async def refault(qemu: Address | Path, *listen: Address | Path, **options: Any) -> AsyncIterator[Monitor]:
    """refault's monitor, in this process."""

    def address(where: Address | Path, server: bool) -> Address:
        return parse_address(str(where), server=server) if isinstance(where, Path) else where

    monitor = Monitor("vm", address(qemu, False), [address(where, True) for where in listen], **options)
    async with trio.open_nursery() as nursery:
        await nursery.start(monitor.run)
        yield monitor
        nursery.cancel_scope.cancel()


class Client:
    """A QMP client. Messages come in order, events among them."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.held = b""
        self.greeting: Message = {}

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def send_fd(self, data: bytes, fd: int) -> None:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, "little"))
        assert await self.stream.socket.sendmsg([data], [rights]) == len(data)

    async def line(self) -> bytes:
        """One message's bytes; empty at the end of file."""
        with trio.fail_after(30):
            while b"\n" not in self.held:
                data = await self.stream.receive_some()
                if not data:
                    return b""
                self.held += data
        line, _, self.held = self.held.partition(b"\n")
        return line

    async def receive(self) -> Message:
        line = await self.line()
        if not line:
            raise EOFError
        message: Message = json.loads(line)
        return message

    async def reply(self, spelling: object) -> Message:
        """The reply with this id; what comes before it is dropped."""
        while True:
            message = await self.receive()
            if "event" not in message and message.get("id") == spelling:
                return message

    async def command(
        self, name: str, arguments: Mapping[str, object] | None = None, *, oob: bool = False
    ) -> Any:
        """Runs a command and returns what it returns; AssertionError if that is an error."""
        members: dict[str, object] = {"exec-oob" if oob else "execute": name, "id": f"command-{name}"}
        if arguments is not None:
            members["arguments"] = arguments
        await self.send(json.dumps(members).encode())
        reply = await self.reply(f"command-{name}")
        assert "return" in reply, reply
        return reply["return"]

    async def negotiate(self, *enable: str) -> None:
        await self.command("qmp_capabilities", {"enable": list(enable)})


async def dial(path: Path | tuple[str, int]) -> trio.SocketStream:
    """Connects as soon as somebody listens."""
    with trio.fail_after(30):
        while True:
            try:
                if isinstance(path, Path):
                    return await trio.open_unix_socket(path)
                return await trio.open_tcp_stream(*path)
            except OSError:
                await trio.sleep(0.02)


async def greeted(path: Path | tuple[str, int]) -> Client:
    """Connects as soon as QEMU is there: before, there is the end of file in place of its greeting."""
    with trio.fail_after(30):
        while True:
            client = Client(await dial(path))
            try:
                client.greeting = await client.receive()
            except (EOFError, trio.BrokenResourceError):
                await client.stream.aclose()
                await trio.sleep(0.02)
            except BaseException:
                await trio.aclose_forcefully(client.stream)
                raise
            else:
                return client


@asynccontextmanager
async def connected(path: Path | tuple[str, int]) -> AsyncIterator[Client]:
    """A client that has read the greeting."""
    client = await greeted(path)
    async with client.stream:
        yield client


@asynccontextmanager
async def negotiated(path: Path | tuple[str, int], *enable: str) -> AsyncIterator[Client]:
    async with connected(path) as client:
        await client.negotiate(*enable)
        yield client


async def clients_gone(monitor: Monitor, remaining: int = 0) -> None:
    """Waits until refault has noticed."""
    with trio.fail_after(30):
        while monitor.clients > remaining:
            await trio.sleep(0.01)


def open_fds() -> dict[str, str]:
    """This process's descriptors and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
    return found


async def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Waits for it, with a deadline."""
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.01)


def greeting(micro: int = 0) -> bytes:
    """As a QEMU of 7.2 sends it."""
    version = {"qemu": {"micro": micro, "minor": 2, "major": 7}, "package": ""}
    return b"%s\r\n" % json.dumps({"QMP": {"version": version, "capabilities": []}}).encode()


GREETING = greeting()


async def greet(connection: socket.socket, monitor: Monitor, micro: int = 0) -> None:
    """What a QEMU says until the monitor has negotiated with it."""
    connection.sendall(greeting(micro))
    asked = json.loads(await trio.to_thread.run_sync(connection.recv, 4096))
    connection.sendall(json.dumps({"return": {}, "id": asked["id"]}).encode() + b"\r\n")
    await until(lambda: monitor.qemu)


def listening(path: Path) -> socket.socket:
    """Somebody else's socket, or a played QEMU's."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(1)
    return sock
