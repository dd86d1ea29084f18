"""Out-of-band commands get through at once, whatever waits in-band."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest
import trio
from tests.integration.qmp_tools import (
    Client,
    clients_gone,
    connected,
    directory,
    negotiated,
    qemu_process,
    refault,
)

from refault.daemon.monitor.monitor import Answer, Forward, QmpError, WatchedCommand

pytestmark = pytest.mark.qemu

PAUSE = b'{"exec-oob": "migrate-pause", "id": "oob"}'
"""Fails at once without a migration, but runs out-of-band."""


@contextmanager
def fifo(path: Path) -> Iterator[bytes]:
    """The command that blocks QEMU's main loop until the FIFO is written to; it is, at the end."""
    os.mkfifo(path)
    yield (
        b'{"execute": "blockdev-add", "id": "block", "arguments": {"driver": "blkdebug",'
        b' "node-name": "blocked", "config": "%s", "image": {"driver": "null-co", "read-zeroes": true}}}'
        % str(path).encode()
    )


def unblock(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


async def times(client: Client, count: int = 200) -> list[float]:
    found = []
    for _ in range(count):
        start = time.perf_counter()
        await client.send(PAUSE)
        await client.reply("oob")
        found.append(time.perf_counter() - start)
    return found


async def test_while_the_main_loop_is_blocked_and_100_clients_wait() -> None:
    with directory() as path:
        monitors = [f"unix:{path}/{name},server=on,wait=off" for name in ("direct", "qemu")]
        with qemu_process(*monitors), fifo(path / "fifo") as block:
            async with refault(path / "qemu", path / "front") as monitor, AsyncExitStack() as stack:
                direct = await stack.enter_async_context(negotiated(path / "direct", "oob"))
                through = await stack.enter_async_context(negotiated(path / "front", "oob"))
                clients = [await stack.enter_async_context(negotiated(path / "front")) for _ in range(100)]
                await clients[0].send(block)
                await trio.sleep(0.1)
                for client in clients:
                    await client.send(b'{"execute": "query-status", "id": "s"}' * 20)
                await through.send(b'{"execute": "query-name"}' * 30)
                late = await stack.enter_async_context(connected(path / "front"))
                await late.negotiate("oob")  # even one that comes now
                await trio.sleep(0.1)
                one, other = [], []
                for _ in range(5):
                    one += await times(direct, 40)
                    other += await times(through, 40)
                # The quickest: the slower ones tell what else the machine did, and one that waits behind the
                # others' commands is never quick, for those are not answered before the end.
                near, far = min(one), min(other)
                print(f"direct {near * 1e6:.0f} us, through {far * 1e6:.0f} us")
                assert far <= 1.5 * near + 0.001
                await times(late, 10)
                with pytest.raises(QmpError):  # refault's own
                    await monitor.execute("migrate-pause", oob=True, timeout=20)
                with pytest.raises(trio.TooSlowError):
                    await monitor.execute("query-status", timeout=0.05)
                unblock(path / "fifo")
                await clients[0].reply("block")
                for client in clients:
                    for _ in range(20):
                        await client.reply("s")
                assert await monitor.execute("query-name", timeout=20) == {}


async def test_watched_commands_wait_for_their_handler_and_nobody_else_does() -> None:
    gate = trio.Event()
    asked: list[WatchedCommand] = []
    replies: list[bytes] = []

    async def hold(command: WatchedCommand) -> Forward | Answer:
        asked.append(command)
        assert await monitor.execute("query-name", timeout=20) == {}
        await gate.wait()

        def note(reply: bytes) -> bytes:
            replies.append(reply)
            return reply

        return Forward(on_reply=note)

    async def at_once(command: WatchedCommand) -> Forward | Answer:
        asked.append(command)
        return Answer(error=("GenericError", "not now"))

    async def fail(command: WatchedCommand) -> Forward | Answer:
        raise RuntimeError("a bug")

    async def other_arguments(command: WatchedCommand) -> Forward | Answer:
        return Forward({**command.arguments, "path": "/"})

    watch = {
        "query-status": hold,
        "migrate-pause": at_once,
        "query-version": fail,
        "qom-list": other_arguments,
    }
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with (
            refault(path / "qemu", path / "front", watch=watch) as monitor,
            negotiated(path / "front", "oob") as client,
            negotiated(path / "front") as other,
        ):
            await client.send(b'{"execute": "query-name", "id": 1}{"execute": "query-status", "id": 2}')
            await client.send(b'{"execute": "query-name", "id": 3}' + PAUSE)
            assert (await client.receive())["id"] in (1, "oob")
            assert (await client.receive())["id"] in (1, "oob")
            assert await other.command("query-name") == {}
            assert {command.name for command in asked} == {"query-status", "migrate-pause"}
            with trio.move_on_after(0.1):
                raise AssertionError(await client.receive())
            gate.set()
            assert (await client.receive())["id"] == 2
            assert (await client.receive())["id"] == 3
            assert replies[0].startswith(b'{"return": {"status"')
            assert b"id" not in replies[0]
            assert (await other.command("query-version"))["qemu"]
            await other.send(b"{'execute': 'qom-list', 'arguments': {'path': '/nothing'}, 'id': 4}")
            assert "return" in await other.reply(4)


async def test_several_of_one_client_are_answered_in_qemus_order_however_long_a_handler_takes() -> None:
    commands = [
        b'{"exec-oob": "migrate-pause", "id": 1}',
        b'{"exec-oob": "migrate-recover", "arguments": {"uri": "tcp:127.0.0.1:1"}, "id": 2}',
        b'{"exec-oob": "migrate-recover", "arguments": {"uri": 3}, "id": 3}',
        b'{"exec-oob": "migrate-pause", "unknown": 4, "id": 4}',
        b'{"exec-oob": "migrate-pause", "id": 5}',
        b'{"exec-oob": "query-status", "id": 6}',
        b'{"exec-oob": "no-such-command", "id": 7}',
    ]

    async def slow(command: WatchedCommand) -> Forward:
        for _ in range(20):
            await monitor.execute("query-name", timeout=5)
        return Forward()

    async def at_once(command: WatchedCommand) -> Forward:
        return Forward()

    with directory() as path:
        monitors = [f"unix:{path}/{name},server=on,wait=off" for name in ("direct", "qemu")]
        with qemu_process(*monitors):
            watch = {"migrate-pause": slow, "migrate-recover": at_once}
            async with (
                refault(path / "qemu", path / "front", watch=watch) as monitor,
                negotiated(path / "direct", "oob") as direct,
                negotiated(path / "front", "oob") as through,
            ):
                answers = []
                for client in (direct, through):
                    await client.send(b"".join(commands))
                    answers.append([await client.receive() for _ in commands])
                assert answers[1] == answers[0]
                assert [answer["id"] for answer in answers[0]] == [1, 2, 3, 4, 5, 6, 7]


async def test_a_watched_command_is_forwarded_when_its_client_leaves() -> None:
    asked, gate, answered = trio.Event(), trio.Event(), trio.Event()

    async def hold(command: WatchedCommand) -> Forward | Answer:
        asked.set()
        await gate.wait()

        def note(reply: bytes) -> bytes:
            answered.set()
            return reply

        return Forward(on_reply=note)

    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with refault(path / "qemu", path / "front", watch={"stop": hold}) as monitor:
            async with negotiated(path / "front") as client:
                await client.send(b'{"execute": "stop"}{"execute": "cont"}')
                with trio.fail_after(20):
                    await asked.wait()
            await clients_gone(monitor)
            gate.set()
            with trio.fail_after(20):
                await answered.wait()
            status = await monitor.execute("query-status", timeout=20)
            assert isinstance(status, dict)
            assert status["running"] is False
