"""What a source's refault asks before a recovered channel, and what is an answer."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator

import pytest
import trio

from refault.daemon.far import ping
from refault.migration.messages import PING, PONG, Kind, classify

SILENCE = 5.0
REQUEST = struct.pack(">HHQIB", 3, 13 + 3, 4096, 4096, 3) + b"ram"


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[trio.socket.SocketType, trio.socket.SocketType]]:
    with socket.create_server(("127.0.0.1", 0)) as server, trio.fail_after(20):
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        with trio.socket.from_stdlib_socket(ours) as one, trio.socket.from_stdlib_socket(theirs) as other:
            yield one, other


async def test_it_is_asked_answered_and_gone() -> None:
    async with connected() as (source, destination):
        await ping.ask(source, SILENCE)
        assert classify(await destination.recv(4, socket.MSG_PEEK)) is Kind.PING
        assert await ping.answer(destination)
        await ping.answered(source)
        for one, other in ((source, destination), (destination, source)):
            await one.send(b"what follows")
            assert await other.recv(100) == b"what follows"
        assert source.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


async def test_an_answer_may_come_in_pieces(nursery: trio.Nursery) -> None:
    async with connected() as (source, destination):

        async def slowly() -> None:
            for byte in PONG:
                await destination.send(bytes([byte]))
                await trio.sleep(0.002)

        nursery.start_soon(slowly)
        await ping.answered(source)


async def test_a_page_request_is_an_answer_too_and_stays() -> None:
    async with connected() as (source, destination):
        await destination.send(REQUEST + PONG)
        await ping.answered(source)
        assert await source.recv(100) == REQUEST + PONG


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH", PONG[:4] + bytes(4), struct.pack(">HH", 6, 4)])
async def test_what_is_no_answer_is_told(said: bytes) -> None:
    async with connected() as (source, destination):
        await destination.send(said)
        with pytest.raises(OSError, match="no destination"):
            await ping.answered(source)


@pytest.mark.parametrize("said", [b"", PONG[:5]])
async def test_one_that_closes_has_not_answered(said: bytes) -> None:
    async with connected() as (source, destination):
        await destination.send(said)
        destination.shutdown(socket.SHUT_WR)
        with pytest.raises(OSError, match="closed before there was an answer"):
            await ping.answered(source)


async def test_a_ping_of_another_value_is_not_answered() -> None:
    async with connected() as (source, destination):
        other = PING[:-1] + b"\x00"
        await source.send(other)
        assert not await ping.answer(destination)
        assert await destination.recv(100) == other
