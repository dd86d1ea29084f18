"""A client that does not read and one that sends without end cost the others nothing, and bounded memory."""

from __future__ import annotations

import logging
import resource
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import NamedTuple

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

from refault.daemon.monitor.monitor import Monitor
from refault.qmp.session import Limits
from refault.qmp.window import WINDOW

pytestmark = pytest.mark.qemu

MIB = 1 << 20
LIMITS = Limits(unsent=4 * MIB)


def memory(pid: int | str = "self") -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


class Cost(NamedTuple):
    """What passed in refault's thread between a normal client's command and its reply."""

    commands: int
    """Of all clients, taken from them."""
    seconds: float
    """Of processor time: what else the machine does is not in it."""


async def normal_costs(monitor: Monitor, clients: list[Client], seconds: float) -> list[Cost]:
    """Round trips of clients that each ask a hundred times a second."""
    found: list[Cost] = []
    end = trio.current_time() + seconds

    async def ask(client: Client, number: int) -> None:
        await trio.sleep(number * 0.0005)
        while trio.current_time() < end:
            before = Cost(monitor.counters.commands, time.thread_time())
            await client.command("query-status")
            found.append(
                Cost(monitor.counters.commands - before.commands, time.thread_time() - before.seconds)
            )
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


def p99(costs: Iterable[float]) -> float:
    return statistics.quantiles(costs, n=100)[98]


@pytest.mark.slow
def as_quiet(loud: list[Cost], quiet: list[Cost]) -> bool:
    """Whether normal clients take no more of the processor while others misbehave."""
    return p99(cost.seconds for cost in loud) <= 1.5 * p99(cost.seconds for cost in quiet)


async def test_beside_normal_clients() -> None:
    """A normal client waits for no more commands of others than have their turn before it.

    Not in seconds: where the misbehaving and QEMU have to share processors those are the machine's.
    """
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with refault(path / "qemu", path / "front") as monitor, AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(negotiated(path / "front")) for _ in range(20)]
            await normal_costs(monitor, clients, 0.5)
            before = memory()
            quiet: list[Cost] = []
            loud: list[Cost] = []
            flooded = 0
            rounds = 0
            # What else the machine does may fall on the one alone: then it takes more of both to tell.
            while rounds < 3 or (rounds < 12 and not as_quiet(loud, quiet)):
                rounds += 1
                quiet += await normal_costs(monitor, clients, 1)
                async with trio.open_nursery() as abusers:
                    for kind in ("slow", "flood"):
                        script = [sys.executable, str(Path(__file__).with_name("qmp_abuse.py")), kind]
                        abusers.start_soon(trio.run_process, [*script, str(path / "front")])
                    with trio.fail_after(30):
                        while monitor.clients < len(clients) + 2:
                            await trio.sleep(0.01)
                    taken = monitor.counters.commands
                    now = await normal_costs(monitor, clients, 1)
                    flooded += monitor.counters.commands - taken - len(now)
                    loud += now
                    abusers.cancel_scope.cancel()
                await clients_gone(monitor, len(clients))
            grown = memory() - before
        print(f"memory {grown / MIB:+.1f} MiB; the others' commands: {flooded}")
        for name, costs in (("quiet", quiet), ("loud", loud)):
            commands, seconds = zip(*costs, strict=True)
            print(f"{name}: p99 {p99(commands):.0f} commands, {p99(seconds) * 1e6:.0f} us; {len(costs)}")
        assert grown < 32 * MIB
        assert flooded > 100
        assert max(cost.commands for cost in loud) <= 2 * (len(clients) + 2) + WINDOW
        assert as_quiet(loud, quiet)


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
            silent = monitor.clients_total
            caplog.set_level(logging.WARNING)
            with trio.fail_after(30):
                while monitor.clients > 1:
                    await normal.send(b'{"execute": "stop"}{"execute": "cont"}' * 20)
                    for _ in range(80):
                        await normal.receive()
            assert monitor.counters.slow_clients == 1
            assert f"vm: client {silent} does not read" in caplog.text
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
