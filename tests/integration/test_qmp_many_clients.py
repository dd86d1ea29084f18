"""Many clients at once: each gets its own replies in its own order, and all events."""

from __future__ import annotations

import json
import random

import pytest
import trio
from tests.integration.qmp_tools import (
    Client,
    clients_gone,
    directory,
    negotiated,
    open_fds,
    qemu_process,
    refault,
)

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.timeout(300)]

CLIENTS = 100
COMMANDS = 1000
LEAVERS = 30
"""Of the clients, how many leave now and then in the midst of it."""


def command(client: int, serial: int) -> tuple[bytes, str]:
    """A command whose reply can be no other's, and its id."""
    spelling = f"{client}/{serial}"
    name = "query-name" if serial % 3 else f"no-such-command-{client}-{serial}"
    return json.dumps({"execute": name, "id": spelling}).encode(), spelling


def check(reply: dict[str, object], client: int, serial: int) -> None:
    assert reply["id"] == f"{client}/{serial}"
    if serial % 3:
        assert reply["return"] == {}
    else:
        error = {
            "class": "CommandNotFound",
            "desc": f"The command no-such-command-{client}-{serial} has not been found",
        }
        assert reply["error"] == error


async def send_in_chunks(client: Client, data: bytes, chance: random.Random) -> None:
    while data:
        size = chance.choice((1, 7, 100, 5000))
        await client.send(data[:size])
        data = data[size:]


async def converse(client: Client, number: int, chance: random.Random, events: list[str]) -> None:
    """Sends all commands in bursts of random size and chunks; every reply comes, in order."""
    serial = 0
    while serial < COMMANDS:
        burst = min(chance.choice((1, 5, 60, 200)), COMMANDS - serial)
        commands = b"".join(command(number, serial + i)[0] for i in range(burst))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_in_chunks, client, commands, chance)
            for i in range(burst):
                while "event" in (message := await client.receive()):
                    events.append(message["event"])
                check(message, number, serial + i)
        serial += burst


async def test_every_reply_to_its_asker_and_all_events_to_all() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    fds = len(open_fds())
    with directory() as path, qemu_process(f"unix:{path}/qemu,server=on,wait=off"):
        async with refault(path / "qemu", path / "front") as monitor:
            seen: dict[int, list[str]] = {}
            left = trio.Event()
            arrived = 0
            everybody = trio.Event()

            async def stay(number: int) -> None:
                nonlocal arrived
                chance = random.Random(seed + number)
                async with negotiated(path / "front") as client:
                    seen[number] = []
                    arrived += 1
                    if arrived == CLIENTS - LEAVERS:
                        everybody.set()
                    await everybody.wait()
                    await converse(client, number, chance, seen[number])
                    await left.wait()
                    await client.send(b'{"execute": "query-name", "id": "end"}')
                    while (message := await client.receive()).get("id") != "end":
                        seen[number].append(message["event"])

            async def leave(number: int) -> None:
                chance = random.Random(seed + number)
                done = 0
                while done < COMMANDS:
                    async with negotiated(path / "front") as client:
                        burst = chance.randrange(1, 200)
                        for serial in range(burst):
                            await client.send(command(number, serial)[0])
                        for serial in range(chance.randrange(burst)):
                            while "event" in (message := await client.receive()):
                                pass
                            check(message, number, serial)
                        done += burst

            async def make_events(count: int) -> None:
                await everybody.wait()
                async with negotiated(path / "front") as client:
                    for _ in range(count):
                        await client.command("stop")
                        await client.command("cont")
                        await trio.sleep(0.05)
                left.set()

            async with trio.open_nursery() as nursery:
                for number in range(CLIENTS - LEAVERS):
                    nursery.start_soon(stay, number)
                for number in range(CLIENTS - LEAVERS, CLIENTS):
                    nursery.start_soon(leave, number)
                nursery.start_soon(make_events, 40)

            assert len(seen) == CLIENTS - LEAVERS
            for events in seen.values():
                assert events == ["STOP", "RESUME"] * 40
            assert monitor.counters.slow_clients == 0
            await clients_gone(monitor)
    assert len(open_fds()) == fds
