"""A crash in the decoder of one VM, in a `refault serve` that fronts two: the process is gone for both."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from refault.daemon.host.errors import OperatorError
from refault.daemon.telling.control import query
from refault.daemon.telling.snapshot import VmStatus
from refault.lab import bare, qmp_client
from refault.lab.channel import Channel, free_port, start_channel
from refault.lab.driver import REFAULT
from refault.lab.guest import Guest
from refault.lab.memory import compare
from refault.lab.process import Process, started
from refault.lab.qemu import Pair, Qemu, start_pair
from refault.lab.qmp_client import QmpClient

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(200)]

GUEST = Guest(vcpus=1, log_pages=12, tick_ns=8_000_000)
RECORDS_AT = 4096 + 4096 * 272
"""Where the page requests begin in a state file (cext/statefile.c)."""
VMS = ("a", "b")


@dataclass
class Host:
    """A `refault serve` in front of one end of each VM, with a client at each."""

    directory: Path
    stack: contextlib.AsyncExitStack
    clients: dict[str, QmpClient] = field(default_factory=dict)

    async def begin(self, qemus: dict[str, Qemu]) -> None:
        (self.directory / "state").mkdir(parents=True)
        text = f'[daemon]\ncontrol = "{self.directory}/control"\nstate_dir = "{self.directory}/state"\n'
        for vm, qemu in qemus.items():
            text += f'[vm.{vm}]\nqemu = "{qemu.monitor}"\nlisten = "{self.directory}/{vm}"\n'
        (self.directory / "refault.toml").write_text(text)
        self.start()
        await self.until(lambda vms: all(vm.listeners[0].listening for vm in vms.values()))
        for vm in qemus:
            connected = qmp_client.connect(f"{self.directory}/{vm}", name=vm)
            self.clients[vm] = await self.stack.enter_async_context(connected)

    def start(self) -> None:
        command = [*REFAULT, "serve", "--config", f"{self.directory}/refault.toml"]
        log = self.directory / "log"
        self.process: Process = self.stack.enter_context(
            started(f"refault ({self.directory.name})", command, log)
        )

    async def until(self, holds: Callable[[dict[str, VmStatus]], object]) -> dict[str, VmStatus]:
        """What is said of the VMs as soon as it holds of both."""
        vms: dict[str, VmStatus] = {}
        with trio.move_on_after(60):
            while len(vms) < len(VMS) or not holds(vms):
                await trio.sleep(0.02)
                with contextlib.suppress(OperatorError):
                    status = await trio.to_thread.run_sync(query, self.directory / "control", 20)
                    vms = {vm.name: vm for vm in status.vms}
            return vms
        raise AssertionError(f"{vms}\n{self.process.tail(50)}")

    async def crash(self, vm: str) -> None:
        """The decoder writes down the next request of that VM where its file ends no longer reaches."""
        pages = self.directory / "state" / vm / f"{vm}.pages"
        size = pages.stat().st_size
        assert size > RECORDS_AT
        os.truncate(pages, RECORDS_AT)
        with trio.fail_after(60):
            assert await self.process.wait() == -signal.SIGBUS
        os.truncate(pages, size)


@contextlib.asynccontextmanager
async def two_migrations(
    directory: Path,
) -> AsyncIterator[tuple[dict[str, Pair], dict[str, Host]]]:
    """Both in postcopy: of VMs with a refault for their sources, and one for their destinations."""
    async with contextlib.AsyncExitStack() as stack:
        pairs: dict[str, Pair] = {}
        channels: dict[str, Channel] = {}
        for vm in VMS:
            (directory / vm).mkdir()
            pairs[vm] = await stack.enter_async_context(start_pair(GUEST, directory / vm))
            channels[vm] = await stack.enter_async_context(start_channel(directory / vm, free_port()))
        hosts = {side: Host(directory / side, stack) for side in ("source", "destination")}
        await hosts["source"].begin({vm: pair.source for vm, pair in pairs.items()})
        await hosts["destination"].begin({vm: pair.destination for vm, pair in pairs.items()})
        for vm in VMS:
            ends = hosts["source"].clients[vm], hosts["destination"].clients[vm]
            await bare.start_postcopy(*ends, channels[vm], bandwidth=1 << 20)
            await bare.heard_of_postcopy(*ends)
        yield pairs, hosts


@pytest.mark.parametrize("side", ["source", pytest.param("destination", marks=pytest.mark.nightly)])
async def test_the_other_vm_is_tracked_as_before_and_no_client_notices(tmp_path: Path, side: str) -> None:
    async with two_migrations(tmp_path) as (pairs, hosts):
        crashed = hosts[side]
        before = await crashed.until(
            lambda vms: all(
                vm.migration.relay == "tracking" and vm.pages.requested and vm.clients.kept
                for vm in vms.values()
            )
        )
        assert [vm.recovery.losses for vm in before.values()] == [0, 0]
        await crashed.crash("a")
        crashed.start()
        for host in hosts.values():
            await host.until(lambda vms: [vm.recovery.recoveries for vm in vms.values()] == [1, 1])
        after = await crashed.until(lambda vms: vms["b"].pages.arrived > 0)
        assert {name: vm.migration.relay for name, vm in after.items()} == {"a": "opaque", "b": "tracking"}
        assert "refault crashed while it read it" in str(after["a"].migration.relay_reason)
        log = crashed.process.tail(1000)
        assert log.count("the refault before crashed while it decoded the channel") == 1
        assert re.search(r"\bb: page requests from before: \d+ on record", log)
        for vm, pair in pairs.items():
            await bare.finish(hosts["source"].clients[vm])
            verdict = await compare(GUEST, pair.destination.qmp, pair.source.qmp)
            assert verdict.right, verdict
        for host in hosts.values():
            for client in host.clients.values():  # each has the connection that it had
                assert await client.execute("query-status")
            told = await host.until(lambda vms: all(vm.clients.connected == 1 for vm in vms.values()))
            assert [vm.clients.slow_disconnected for vm in told.values()] == [0, 0]
            assert await host.process.stop() == 0
