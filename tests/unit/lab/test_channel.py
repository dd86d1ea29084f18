from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from refault.lab import channel as channel_module
from refault.lab.channel import Channel, Cut, Loss, free_port, start_channel
from refault.lab.process import ProcessFailed
from refault.lab.procnet import is_listening


async def far_end(channel: Channel, port: int) -> trio.SocketListener:
    (listener,) = await trio.open_tcp_listeners(port, host="127.0.0.1")
    with trio.fail_after(20):
        await channel.wait_open()
    return listener


@asynccontextmanager
async def connected(
    channel: Channel, listener: trio.SocketListener
) -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    async with await trio.open_tcp_stream("127.0.0.1", channel.port) as near:
        with trio.fail_after(20):
            far = await listener.accept()
        async with far:
            yield near, far


@asynccontextmanager
async def carried(directory: Path) -> AsyncIterator[tuple[Channel, trio.SocketStream, trio.SocketStream]]:
    port = free_port()
    async with (
        start_channel(directory, port) as channel,
        await far_end(channel, port) as listener,
        connected(channel, listener) as (near, far),
    ):
        yield channel, near, far


async def test_it_listens_only_where_the_far_end_does(tmp_path: Path) -> None:
    port = free_port()
    async with start_channel(tmp_path, port) as channel:
        await trio.sleep(0.05)
        assert not is_listening(channel.port)
        listener = await far_end(channel, port)
        await listener.aclose()
        with trio.fail_after(20):
            while is_listening(channel.port):
                await trio.sleep(0.005)
        with pytest.raises(OSError, match=r"attempt|refused"):
            await trio.open_tcp_stream("127.0.0.1", channel.port)


async def test_bytes_pass_unchanged_in_both_directions(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192
    async with carried(tmp_path) as (_channel, near, far):
        for one, other in ((near, far), (far, near)):
            received = b""
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.send_all, data)
                with trio.fail_after(20):
                    while len(received) < len(data):
                        received += await other.receive_some()
            assert received == data
        await near.send_eof()
        assert await far.receive_some() == b""
        await far.send_all(b"still open this way")
        assert await near.receive_some() == b"still open this way"


@pytest.mark.parametrize("loss", [Loss.RESET, Loss.CLOSE])
async def test_what_both_ends_see_of_a_loss(tmp_path: Path, loss: Loss) -> None:
    port = free_port()
    async with start_channel(tmp_path, port) as channel, await far_end(channel, port) as listener:
        for _ in range(3):
            async with connected(channel, listener) as ends:
                await ends[0].send_all(b"x")
                assert await ends[1].receive_some() == b"x"
                await channel.lose(loss)
                for end in ends:
                    with trio.fail_after(20):
                        if loss is Loss.CLOSE:
                            assert await end.receive_some() == b""
                        else:
                            with pytest.raises(trio.BrokenResourceError):
                                await end.receive_some()


async def test_it_is_killed_with_bytes_of_the_return_path_inside_and_is_there_again(tmp_path: Path) -> None:
    port = free_port()
    async with start_channel(tmp_path, port) as channel, await far_end(channel, port) as listener:
        for _ in range(3):
            async with connected(channel, listener) as (_near, far):
                first = channel.pid
                async with trio.open_nursery() as nursery:

                    async def requests(end: trio.SocketStream) -> None:
                        while True:
                            await end.send_all(b"0123456789ab")
                            await trio.sleep(0.003)

                    async def lose(until: trio.CancelScope) -> None:
                        lost = await channel.kill()
                        assert lost.bytes_inside >= 12
                        until.cancel()

                    nursery.start_soon(lose, nursery.cancel_scope)
                    try:
                        await requests(far)
                    except trio.BrokenResourceError:
                        await trio.sleep(5)
                assert channel.pid != first
                with trio.fail_after(20):
                    await channel.wait_open()


async def test_no_request_no_kill(tmp_path: Path) -> None:
    async with carried(tmp_path) as (channel, near, far):
        with pytest.raises(trio.TooSlowError):
            await channel.kill(deadline=0.3)
        await near.send_all(b"goes on")
        with trio.fail_after(20):
            assert await far.receive_some() == b"goes on"


async def test_silence_tells_nobody_and_ends(tmp_path: Path) -> None:
    async with carried(tmp_path) as (channel, near, far):
        channel.freeze()
        await near.send_all(b"waits")
        with trio.move_on_after(0.2) as silence:
            await far.receive_some()
        assert silence.cancelled_caught
        channel.thaw()
        with trio.fail_after(20):
            assert await far.receive_some() == b"waits"


async def test_another_target(tmp_path: Path) -> None:
    port = free_port()
    async with start_channel(tmp_path, port) as channel, await far_end(channel, port):
        await channel.retarget()
        assert not is_listening(channel.port)
        port = int(channel.target_uri.rpartition(":")[2])
        async with await far_end(channel, port) as listener, connected(channel, listener) as (near, far):
            await far.send_all(b"new")
            assert await near.receive_some() == b"new"


async def test_a_carrier_that_dies_by_itself_is_a_failure(tmp_path: Path) -> None:
    async def use() -> None:
        async with start_channel(tmp_path, free_port()) as channel:
            channel._running().process.kill()
            await trio.sleep(5)

    with pytest.raises(ProcessFailed, match="carrier was ended by SIGKILL"):
        await use()


@pytest.mark.parametrize("chunks", [1, 4096])
@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("extra", [20, -1])
async def test_a_cut_at_a_place_in_the_stream(tmp_path: Path, forward: bool, chunks: int, extra: int) -> None:
    data = b"x" * 100 + b"\x08\x00\x09\x00\x00" + b"y" * 1000
    cut = Cut(Loss.CLOSE, forward, rb"\x08\x00\x09..", extra)
    port = free_port()
    async with start_channel(tmp_path, port) as channel, await far_end(channel, port) as listener:
        async with connected(channel, listener) as (near, _):
            await channel.cut_at(cut)  # of the next connection, not of this one
            await near.send_all(data)
            async with connected(channel, listener) as ends:
                writer, reader = ends if forward else ends[::-1]
                for at in range(0, len(data), chunks):
                    with contextlib.suppress(trio.BrokenResourceError):
                        await writer.send_all(data[at : at + chunks])
                await channel.was_cut(cut)
                received = b""
                with trio.fail_after(9):
                    while more := await reader.receive_some():
                        received += more
                assert received == data[: 105 + extra]
        async with connected(channel, listener) as (near, far):
            await near.send_all(data)  # it is made once
            received = b""
            with trio.fail_after(9):
                while len(received) < len(data):
                    received += await far.receive_some()


async def test_a_cut_of_the_connection_that_is_there(tmp_path: Path) -> None:
    cut = Cut(Loss.RESET, True, b"end", connection="now")
    async with carried(tmp_path) as (channel, near, far):
        await channel.cut_at(cut)
        await near.send_all(b"not the e")
        assert await far.receive_some() == b"not the e"
        await near.send_all(b"nd")
        assert await far.receive_some() == b"nd"
        await channel.was_cut(cut)
        for end in (near, far):
            with pytest.raises(trio.BrokenResourceError):
                await end.receive_some()


async def test_silence_at_a_place_in_the_stream_loses_nothing(tmp_path: Path) -> None:
    async with carried(tmp_path) as (channel, near, far):
        await channel.cut_at(Cut(Loss.CLOSE, True, b"EOF", 0, "now"), freezes=True)
        await near.send_all(b"before, ")
        assert await read(far, 8) == b"before, "
        await near.send_all(b"EOF")
        await channel.was_frozen()
        await near.send_all(b", behind")
        await far.send_all(b"back")
        assert await read(far, 3) == b"EOF"
        with trio.move_on_after(0.1):
            raise AssertionError(await far.receive_some(1))
        channel.thaw()
        with trio.fail_after(20):
            assert await read(far, 8) == b", behind"
            assert await read(near, 4) == b"back"


async def read(stream: trio.SocketStream, length: int) -> bytes:
    found = b""
    while len(found) < length:
        found += (more := await stream.receive_some(length - len(found)))
        assert more, found
    return found


def test_where_all_ports_of_a_share_are_taken_the_next_one_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as taken:
        ports = [
            taken.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)
        ]
        monkeypatch.setattr(channel_module, "_ours", deque(ports))
        free = free_port()
        assert free not in ports
        assert len(channel_module._ours) > len(ports)
        assert free_port() not in (*ports, free)


def test_where_there_is_no_share_any_more_the_kernel_gives_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "_ours", deque())
    monkeypatch.setattr(channel_module, "_shares", lambda: iter(()))
    assert free_port() > 0
