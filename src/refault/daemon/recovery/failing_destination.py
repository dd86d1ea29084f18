"""Where a source's QEMU resumes to refault itself, and the destination that it finds there: one that has
every page, and fails (reclaim.py)."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

import trio

from refault.daemon.near.local import Executes, hand_over, take_back
from refault.daemon.near.local_unix import PrivateSockets
from refault.migration.messages import (
    COMMAND_HEAD,
    RECV_BITMAP,
    RESUME,
    RESUME_ACK,
    SECTION_COMMAND,
    SHUT_ERROR,
    all_received,
)
from refault.migration.phase import Role
from refault.migration.recovery import AttemptFailed

Main = Callable[[], Awaitable[trio.SocketStream]]
"""Waits for QEMU's main connection."""

TARGET_PAGE = 4096
"""Bytes that one bit stands for, on all that KVM runs on."""

_LAST = re.compile(rb"\0{7}\x10\x7e.{4}\0\Z", re.DOTALL)
"""The end of a section `ram`, its footer, QEMU_VM_EOF; another section would not begin with 0."""
_LAST_BYTES = 14


@asynccontextmanager
async def offered(monitor: Executes, sockets: PrivateSockets | None) -> AsyncIterator[tuple[str, Main]]:
    """The address that QEMU is to resume to, until the block is left: among `sockets` where it opens more
    connections than one. Raises OSError, and what `execute` raises."""
    if sockets is not None:
        with _listening(sockets) as place:
            yield place
    else:
        async with _handed(monitor) as place:
            yield place


@asynccontextmanager
async def _handed(monitor: Executes) -> AsyncIterator[tuple[str, Main]]:
    leg = await hand_over(monitor, Role.SOURCE)

    async def main() -> trio.SocketStream:
        return stream

    async with trio.SocketStream(trio.socket.from_stdlib_socket(leg.socket)) as stream:
        try:
            yield leg.uri, main
        except BaseException:
            with trio.CancelScope(shield=True):
                await take_back(monitor, leg.name)
            raise


@contextmanager
def _listening(sockets: PrivateSockets) -> Iterator[tuple[str, Main]]:
    """For a QEMU that connects twice, its preempt channel too (postcopy_preempt_establish_channel).

    That one carries no page, for none is asked for. It stays in the backlog, where it is connected to QEMU.
    """
    if not sockets.directory.exists():
        sockets.make()
    listening = sockets.listen()
    taken: list[trio.SocketStream] = []

    async def main() -> trio.SocketStream:
        taken.append(trio.SocketStream(trio.socket.from_stdlib_socket(await listening.accept())))
        return taken[0]

    try:
        yield f"unix:{listening.path}", main
    finally:
        listening.close()
        for stream in taken:
            stream.socket.close()


async def fail_as_destination(stream: trio.SocketStream, sizes: Mapping[bytes, int]) -> None:
    """Answers a source's resume, and reads what it sends until it ends. `sizes`: bytes, by RAM block.

    Raises AttemptFailed where it is not one.
    """
    command = None
    while command != RESUME:
        section, command, length = COMMAND_HEAD.unpack(await _exactly(stream, COMMAND_HEAD.size))
        payload = await _exactly(stream, length)
        if section != SECTION_COMMAND or command not in (RECV_BITMAP, RESUME):
            raise AttemptFailed(f"QEMU began its recovery with section {section}, command {command}")
        if command == RECV_BITMAP:
            if payload[1:] not in sizes:
                raise AttemptFailed(f"QEMU asks for a RAM block that is not known: {payload[1:]!r}")
            await stream.send_all(all_received(payload[1:], sizes[payload[1:]] // TARGET_PAGE))
    await stream.send_all(RESUME_ACK)
    end = b""
    while not _LAST.search(end):  # an error that comes sooner makes it pause once more
        more = await stream.receive_some(1 << 16)
        if not more:
            raise AttemptFailed("QEMU ended its recovery")
        end = (end + more)[-_LAST_BYTES:]
    await stream.send_all(SHUT_ERROR)
    while await stream.receive_some(1 << 16):
        pass


async def _exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = await stream.receive_some(count - len(data))
        if not more:
            raise AttemptFailed("QEMU ended its recovery")
        data += more
    return data
