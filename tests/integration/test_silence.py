"""Two hosts and a network that goes silent: noticed in postcopy, waited out in precopy, and never guessed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from refault.channel.relay import DEAD_AFTER_SECONDS
from refault.lab import bare
from refault.lab.channel import free_port
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.netns import Host, two_hosts
from refault.lab.process import Process, started
from refault.lab.qemu import Pair, start_pair
from refault.lab.qmp_client import QmpClient, connect

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces"),
]

GUEST = Guest(vcpus=4, log_pages=11, tick_ns=1_000_000)


@dataclass
class TwoHosts:
    """A pair of QEMUs, each with a refault in a network of its own."""

    pair: Pair
    hosts: tuple[Host, Host]
    clients: tuple[QmpClient, QmpClient]
    refaults: tuple[Process, Process]

    async def begin(self, bandwidth: int) -> None:
        source, destination = self.clients
        for client in self.clients:
            await bare.set_capabilities(client, *bare.CAPABILITIES)
        limits = {"max-bandwidth": bandwidth, "max-postcopy-bandwidth": bandwidth}
        await source.execute("migrate-set-parameters", limits)
        uri = f"tcp:{self.hosts[1].address}:{free_port()}"
        await destination.execute("migrate-incoming", {"uri": uri})
        await source.execute("migrate", {"uri": uri})
        await bare.wait_status(source, "active")

    async def postcopy(self) -> None:
        source, destination = self.clients
        await bare.wait_sent(source, 0.05)
        await source.execute("migrate-start-postcopy")
        await source.wait_migration("postcopy-active")
        await destination.wait_event(lambda event: event.name == "RESUME")

    async def finish(self) -> None:
        await self.pair.destination.wait_progress(30)
        await bare.finish(self.clients[0])
        verdict = await compare(GUEST, self.pair.destination.qmp, self.pair.source.qmp)
        assert verdict.right, verdict


@asynccontextmanager
async def two_fronted_hosts(directory: Path) -> AsyncIterator[TwoHosts]:
    async with AsyncExitStack() as stack:
        hosts = stack.enter_context(two_hosts())
        pair = await stack.enter_async_context(start_pair(GUEST, directory))
        clients, refaults = [], []
        for host, qemu, side in zip(hosts, (pair.source, pair.destination), ("src", "dst"), strict=True):
            listen = f"unix:{directory}/{side}.client"
            command = [*host.prefix, sys.executable, "-m", "refault", "run", "--qemu", qemu.monitor]
            command += ["--listen", listen, "--name", side, "--control", f"{directory}/{side}.control"]
            command += ["--state-dir", str(directory)]
            log = directory / f"refault-{side}.log"
            refaults.append(stack.enter_context(started(f"refault ({side})", command, log)))
            clients.append(await stack.enter_async_context(connect(listen, name=side)))
        yield TwoHosts(pair, hosts, (clients[0], clients[1]), (refaults[0], refaults[1]))


async def test_a_silent_network_is_noticed_in_postcopy_and_left_when_it_is_back(tmp_path: Path) -> None:
    async with two_fronted_hosts(tmp_path) as lab:
        await lab.begin(1 << 20)
        await lab.postcopy()
        monitors = lab.pair.source.qmp, lab.pair.destination.qmp
        since = [len(qmp.events) for qmp in monitors]
        down = trio.current_time()
        lab.hosts[1].link("down")
        with trio.fail_after(DEAD_AFTER_SECONDS + 3):
            for qmp, seen in zip(monitors, since, strict=True):
                paused = await qmp.wait_migration("postcopy-paused", since=seen)
                assert paused.when - down < DEAD_AFTER_SECONDS + 2
        lab.hosts[1].link("up")
        with trio.fail_after(10):  # a new connection's SYN may have to be sent again first
            for qmp, seen in zip(monitors, since, strict=True):
                await qmp.wait_migration("postcopy-active", since=seen)
        await lab.finish()


async def test_a_peer_that_is_stopped_but_whose_host_answers_is_not_cut(tmp_path: Path) -> None:
    async with two_fronted_hosts(tmp_path) as lab:
        await lab.begin(1 << 20)
        await lab.postcopy()
        since = len(lab.pair.source.qmp.events)
        lab.refaults[1].signal(signal.SIGSTOP)
        await trio.sleep(DEAD_AFTER_SECONDS + 3)
        lab.refaults[1].signal(signal.SIGCONT)
        await lab.finish()
        told = {event.data.get("status") for event in lab.pair.source.qmp.events[since:]}
        assert "postcopy-paused" not in told


async def test_in_precopy_a_silent_network_is_waited_out(tmp_path: Path) -> None:
    async with two_fronted_hosts(tmp_path) as lab:
        await lab.begin(4 << 20)
        lab.hosts[1].link("down")
        await trio.sleep(DEAD_AFTER_SECONDS + 3)
        lab.hosts[1].link("up")
        await lab.postcopy()
        await lab.finish()
