"""A migration of the lab's guest through refaults that run already: `test_systemd` runs this in its Debian.

    under_units.py DIRECTORY SOURCE DESTINATION lose|pause

QEMU's monitors are src.qmp and dst.qmp in DIRECTORY; SOURCE and DESTINATION are where refault listens.
`lose`: the channel is lost in each of the lab's ways. `pause`: it is paused, the file `paused` is made, and
when that is gone somebody has recovered the migration. At the end all memory is compared.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from refault.lab import bare, qmp_client
from refault.lab.channel import Channel, Loss, free_port, start_channel
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.qemu import start_pair
from refault.lab.qmp_client import QmpClient

GUEST = Guest(vcpus=2, log_pages=12, tick_ns=1_000_000)


@contextlib.asynccontextmanager
async def clients(source: str, destination: str) -> AsyncIterator[tuple[QmpClient, QmpClient]]:
    with trio.fail_after(30):
        while not all([await trio.Path(each).exists() for each in (source, destination)]):
            await trio.sleep(0.02)
    async with (
        qmp_client.connect(source, name="source") as first,
        qmp_client.connect(destination, name="destination") as second,
    ):
        yield first, second


async def lose(source: QmpClient, destination: QmpClient, channel: Channel) -> None:
    for loss in Loss:
        since = len(source.events), len(destination.events)
        await channel.lose(loss)
        with trio.fail_after(30):
            await source.wait_migration("postcopy-active", since=since[0])
            await destination.wait_migration("postcopy-active", since=since[1])


async def pause(source: QmpClient, destination: QmpClient, paused: str) -> None:
    await source.execute("migrate-pause", oob=True)
    with trio.fail_after(30):
        await source.wait_migration("postcopy-paused")
        await destination.wait_migration("postcopy-paused")
    await trio.Path(paused).touch()
    with trio.fail_after(60):
        while await trio.Path(paused).exists():
            await trio.sleep(0.02)


async def migrate(directory: Path, source: str, destination: str, what: str) -> None:
    async with start_pair(GUEST, directory) as pair, start_channel(directory, free_port()) as channel:
        async with clients(source, destination) as (first, second):
            await bare.start_postcopy(first, second, channel, bandwidth=1 << 20)
            await bare.heard_of_postcopy(first, second)
            if what == "lose":
                await lose(first, second, channel)
            else:
                await pause(first, second, f"{directory}/paused")
        with trio.fail_after(30):
            await bare.wait_status(pair.source.qmp, "postcopy-active")
        await bare.finish(pair.source.qmp)
        verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
        assert verdict.right, verdict


if __name__ == "__main__":
    trio.run(migrate, Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4])
