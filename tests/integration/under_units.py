"""A migration of the lab's guest through refaults that run already: `test_systemd` runs this in its Debian.

    under_units.py DIRECTORY SOCKETS

QEMU's monitors are src.qmp and dst.qmp in DIRECTORY, refault's sockets src and dst in SOCKETS. The channel is
lost in each of the lab's ways, and at the end all memory is compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from refault.lab import bare, qmp_client
from refault.lab.channel import Loss, free_port, start_channel
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.qemu import start_pair

GUEST = Guest(vcpus=2, log_pages=12, tick_ns=1_000_000)


async def migrate(directory: Path, sockets: Path) -> None:
    async with start_pair(GUEST, directory) as pair, start_channel(directory, free_port()) as channel:
        with trio.fail_after(30):
            while not all((sockets / each).exists() for each in ("src", "dst")):
                await trio.sleep(0.02)
        async with (
            qmp_client.connect(str(sockets / "src"), name="source") as source,
            qmp_client.connect(str(sockets / "dst"), name="destination") as destination,
        ):
            await bare.start_postcopy(source, destination, channel, bandwidth=1 << 20)
            for loss in Loss:
                since = len(source.events), len(destination.events)
                await channel.lose(loss)
                with trio.fail_after(30):
                    await source.wait_migration("postcopy-active", since=since[0])
                    await destination.wait_migration("postcopy-active", since=since[1])
            await bare.finish(source)
        verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
        assert verdict.right, verdict


if __name__ == "__main__":
    trio.run(migrate, Path(sys.argv[1]), Path(sys.argv[2]))
