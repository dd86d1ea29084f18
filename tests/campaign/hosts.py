"""Two hosts, as network namespaces, and a link between them: a QEMU on each, and a refault or none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from refault.lab import bare
from refault.lab.channel import free_port
from refault.lab.driver import REFAULT, Relay
from refault.lab.guest import Guest
from refault.lab.memory import Verdict, compare
from refault.lab.netns import Host, two_hosts
from refault.lab.process import Process, started
from refault.lab.qemu import DEFAULT_BINARY, Pair, PairOptions, Qemu, start_pair
from refault.lab.qmp_client import QmpClient, connect

GUEST = Guest(vcpus=4, log_pages=11, tick_ns=4_000_000)


@dataclass(frozen=True)
class Setting:
    """What stands on the two hosts."""

    binary: str = DEFAULT_BINARY
    guest: Guest = GUEST
    refault: bool = True
    """Else QEMU bare, with the client at its own monitor."""
    relay: Relay = "auto"
    recover_port: int | None = None
    """With a second network, which is named to both refaults: the port there."""
    options: tuple[str, ...] = ()
    """Further options of both refaults."""
    command: Sequence[str] = REFAULT
    """How a refault is started."""


@dataclass
class TwoHosts:
    """A pair of QEMUs, each with a refault (if any) in a network of its own, and a client at each host."""

    setting: Setting
    directory: Path
    pair: Pair
    hosts: tuple[Host, Host]
    clients: tuple[QmpClient, QmpClient]
    refaults: Sequence[Process] = ()
    port: int = field(default_factory=free_port)

    @property
    def qemus(self) -> tuple[Qemu, Qemu]:
        """The source's and the destination's."""
        return self.pair.source, self.pair.destination

    @property
    def uri(self) -> str:
        """The migration's address, at the destination."""
        return f"tcp:{self.hosts[1].address}:{self.port}"

    async def listen(self, bandwidth: int, postcopy_bandwidth: int | None = None) -> None:
        """Readies both for a migration at so many bytes a second, and has the destination listen."""
        for client in self.clients:
            await bare.set_capabilities(client, *bare.CAPABILITIES)
        postcopy = bandwidth if postcopy_bandwidth is None else postcopy_bandwidth
        limits = {
            "max-bandwidth": bandwidth,
            "max-postcopy-bandwidth": postcopy,
            "downtime-limit": bare.DOWNTIME_LIMIT,
        }
        await self.clients[0].execute("migrate-set-parameters", limits)
        await self.clients[1].execute("migrate-incoming", {"uri": self.uri})

    async def migrate(self) -> None:
        """Has the source begin; precopy runs then."""
        await self.clients[0].execute("migrate", {"uri": self.uri})
        with trio.fail_after(30):
            await bare.wait_status(self.clients[0], "active")

    async def begin(self, bandwidth: int, postcopy_bandwidth: int | None = None) -> None:
        """Until precopy runs."""
        await self.listen(bandwidth, postcopy_bandwidth)
        await self.migrate()

    async def postcopy(self, share: float = 0.05) -> None:
        """Until the guest runs at the destination; precopy sends ``share`` of the memory first."""
        source, destination = self.clients
        with trio.fail_after(30):
            await bare.wait_sent(source, share)
            await source.execute("migrate-start-postcopy")
            await source.wait_migration("postcopy-active")
            await destination.wait_event(lambda event: event.name == "RESUME")
        await bare.heard_of_postcopy(self.pair.source.qmp, self.pair.destination.qmp)

    def log(self, side: str) -> list[str]:
        """What the refault of that side (`src`, `dst`) has logged."""
        return (self.directory / f"refault-{side}.log").read_text().splitlines()

    def marks(self) -> list[int]:
        """How many events the lab's own monitors have told so far."""
        return [len(qemu.qmp.events) for qemu in self.qemus]

    async def both(self, status: str, since: Sequence[int], seconds: float) -> list[float]:
        """Waits for an event of that status at both; when each came. Raises trio.TooSlowError."""
        with trio.fail_after(seconds):
            events = [
                await qemu.qmp.wait_migration(status, since=mark)
                for qemu, mark in zip(self.qemus, since, strict=True)
            ]
        return [event.when for event in events]

    async def finish(self, seconds: float = 30.0) -> Verdict:
        """Lifts the limit, waits for the end, compares the memory. May raise AssertionError."""
        await self.pair.destination.wait_progress(seconds)
        await bare.finish(self.pair.source.qmp, seconds)
        verdict = await compare(self.setting.guest, self.pair.destination.qmp, self.pair.source.qmp)
        assert verdict.right, verdict
        return verdict


def refault_command(
    lab_directory: Path, side: str, qemu: Qemu, hosts: tuple[Host, Host], setting: Setting
) -> list[str]:
    """How the refault of one side is started, inside its host."""
    host = hosts[0 if side == "src" else 1]
    command = [*host.prefix, *setting.command, "run", "--qemu", qemu.monitor]
    command += ["--listen", f"unix:{lab_directory}/{side}.client", "--name", side, "--relay", setting.relay]
    command += ["--control", f"{lab_directory}/{side}.control", "--state-dir", str(lab_directory)]
    if setting.recover_port is not None:
        command += ["--recover-uri", f"tcp:{hosts[1].addresses[1]}:{setting.recover_port}"]
    return [*command, *setting.options]


@asynccontextmanager
async def on_two_hosts(directory: Path, setting: Setting | None = None) -> AsyncIterator[TwoHosts]:
    """Starts what ``setting`` says, in two namespaces that are removed when the block is left. Needs root."""
    setting = setting or Setting()
    async with AsyncExitStack() as stack:
        hosts = stack.enter_context(two_hosts("192.0.2", "198.51.100"))
        options = PairOptions(
            setting.binary,
            setting.binary,
            source_prefix=hosts[0].prefix,
            destination_prefix=hosts[1].prefix,
        )
        pair = await stack.enter_async_context(start_pair(setting.guest, directory, options))
        clients, refaults = [], []
        for qemu, side in zip((pair.source, pair.destination), ("src", "dst"), strict=True):
            address = qemu.monitor
            if setting.refault:
                command = refault_command(directory, side, qemu, hosts, setting)
                log = directory / f"refault-{side}.log"
                refaults.append(stack.enter_context(started(f"refault ({side})", command, log)))
                address = f"unix:{directory}/{side}.client"
            clients.append(await stack.enter_async_context(connect(address, name=side)))
        try:
            yield TwoHosts(setting, directory, pair, hosts, (clients[0], clients[1]), refaults)
        except BaseException:
            for refault in refaults:  # pytest shows it where a test fails
                print(refault.tail(40))
            raise
