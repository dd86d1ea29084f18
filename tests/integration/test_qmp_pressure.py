"""A client that does not read and one that sends without end cost the others nothing, and bounded memory."""

from __future__ import annotations

import logging
import resource
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
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

from refault.qmp.session import Limits

pytestmark = pytest.mark.qemu

MIB = 1 << 20
LIMITS = Limits(unsent=4 * MIB)


def memory(pid: int | str = "self") -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


async def normal_times(clients: list[Client], seconds: float) -> list[float]:
    """Round trips of clients that each ask a hundred times a second."""
    found: list[float] = []
    end = trio.current_time() + seconds

    async def ask(client: Client, number: int) -> None:
        await trio.sleep(number * 0.0005)
        while trio.current_time() < end:
            start = time.perf_counter()
            await client.command("query-status")
            found.append(time.perf_counter() - start)
            await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        for number, client in enumerate(clients):
            nursery.start_soon(ask, client, number)
    return found


async def does_not_read(client: Client) -> None:
    """Asks for big replies and leaves them, until it is disconnected."""
    with suppress(trio.BrokenResourceError):
        while True:
            await client.send(b'{"execute": "query-qmp-schema"}' * 10)


async def sends_without_end(client: Client) -> None:
    """Commands as fast as they go, and reads what comes."""
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            while await client.stream.receive_some():
                pass

        nursery.start_soon(read)
        while True:
            await client.send(b'{"execute": "query-status", "id": 1}' * 1000)


async def sends_nonsense(client: Client) -> None:
    """Causes as many errors as it sends bytes, which it does not read, until it is disconnected."""
    with suppress(trio.BrokenResourceError):
        while True:
            await client.send(b"]" * 65536)


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


@pytest.mark.slow
async def test_beside_normal_clients() -> None:
    """Each of the misbehaving, QEMU and refault in processes of their own."""
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        front = str(path / "front")
        here = Path(__file__).parent
        argv = [sys.executable, str(here / "qmp_front.py"), str(path / "qemu"), front]
        async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
            running: trio.Process = await nursery.start(trio.run_process, argv)
            clients = [await stack.enter_async_context(negotiated(path / "front")) for _ in range(20)]
            await normal_times(clients, 0.5)
            before = memory(running.pid)
            for attempt in range(3):  # what else the machine does does not meet both alike
                quiet: list[float] = []
                loud: list[float] = []
                for _ in range(4):
                    quiet += await normal_times(clients, 1)
                    async with trio.open_nursery() as abusers:
                        for kind in ("slow", "flood"):
                            script = [sys.executable, str(here / "qmp_abuse.py"), kind, front]
                            abusers.start_soon(trio.run_process, script)
                        await trio.sleep(0.3)
                        loud += await normal_times(clients, 1)
                        abusers.cancel_scope.cancel()
                    await trio.sleep(0.1)
                print(
                    f"attempt {attempt}: p50 {statistics.median(quiet) * 1e6:.0f} and"
                    f" {statistics.median(loud) * 1e6:.0f} us, p99 {p99(quiet) * 1e6:.0f} and"
                    f" {p99(loud) * 1e6:.0f} us"
                )
                if p99(loud) <= 1.5 * p99(quiet):
                    break
            grown = memory(running.pid) - before
            print(f"memory {grown / MIB:+.1f} MiB")
            nursery.cancel_scope.cancel()
        assert grown < 32 * MIB
        assert p99(loud) <= 1.5 * p99(quiet)


@pytest.mark.parametrize("bad", [does_not_read, sends_without_end, sends_nonsense])
async def test_memory_is_bounded(bad: Callable[[Client], Awaitable[None]]) -> None:
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with (
            refault(path / "qemu", path / "front", limits=LIMITS) as monitor,
            negotiated(path / "front") as normal,
        ):
            before = memory()
            async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
                for _ in range(5):
                    client = await stack.enter_async_context(negotiated(path / "front"))
                    nursery.start_soon(bad, client)
                for _ in range(10):
                    await trio.sleep(0.1)
                    await normal.command("query-status")
                    assert memory() - before < 5 * 8 * MIB
                nursery.cancel_scope.cancel()
            await clients_gone(monitor, 1)


async def test_one_that_does_not_read_events_is_disconnected(caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(unsent=MIB // 4)
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with (
            refault(path / "qemu", path / "front", limits=limits) as monitor,
            negotiated(path / "front") as normal,
            negotiated(path / "front"),
        ):
            caplog.set_level(logging.WARNING)
            with trio.fail_after(30):
                while monitor.clients > 1:
                    await normal.send(b'{"execute": "stop"}{"execute": "cont"}' * 20)
                    for _ in range(80):
                        await normal.receive()
            assert monitor.counters.slow_clients == 1
            assert "vm: client 2 does not read" in caplog.text
            await normal.command("query-status")


async def test_a_reply_larger_than_the_limit_gets_through() -> None:
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with (
            refault(path / "qemu", path / "front", limits=Limits(unsent=1000)),
            negotiated(path / "front") as client,
        ):
            assert len(await client.command("query-qmp-schema")) > 100


async def test_a_message_that_never_ends() -> None:
    limits = Limits(message=MIB)
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with refault(path / "qemu", path / "front", limits=limits), connected(path / "front") as client:
            before = memory()
            await client.send(b'{"execute": "')
            for _ in range(40):
                await client.send(b"x" * MIB)
            assert memory() - before < 16 * MIB
            error = {"class": "GenericError", "desc": "JSON token size limit exceeded"}
            assert await client.receive() == {"error": error}
            await client.send(b"\n")
            await client.negotiate()
