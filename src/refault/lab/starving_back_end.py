"""A migration whose destination has a vhost-user back end, lost with a request of that back end inside.

No QEMU repeats such a request: it keeps it by the back end's own address, which postcopy_sync_page_req
(migration/migration.c) does not find among its RAM blocks.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import trio

from . import bare
from .channel import Channel, free_port, start_channel
from .driver import REFAULT, RefaultDriver, refault_driver
from .guest import Guest
from .process import Process, started
from .qemu import DEFAULT_BINARY, Pair, PairOptions, Qemu, start_pair
from .vhost_user import STATE

WITHOUT_REPLAY = (sys.executable, "-m", "refault.lab.without_replay")
_STILL = 0.2
_DEVICE = 4
_PORTS = 0xC000
_QUEUE = 2 << 20
"""Where the virtqueue is: outside of what the lab's guest writes to, and empty."""


@dataclass(frozen=True)
class BackEndCase:
    """One way to run it; `background` is what postcopy sends unasked, in bytes per second."""

    guest: Guest
    background: int
    replay: bool
    """Whether both refaults replay what was lost, or recover only."""
    binary: str = DEFAULT_BINARY


@dataclass
class BackEnd:
    """The back end of one QEMU: a process, and the file in which it counts."""

    process: Process
    state: Path

    def counts(self) -> tuple[int, int]:
        """Touches begun, touches done."""
        begun, done = STATE.unpack(self.state.read_bytes())
        return begun, done

    async def wait_stuck(self) -> None:
        """Waits until one touch has not been done for some time; the deadline is the caller's."""
        since, last = trio.current_time(), (0, 0)
        while trio.current_time() < since + _STILL:
            await trio.sleep(0.005)
            self.process.must_run()
            if (now := self.counts()) != last or now[0] == now[1]:
                since, last = trio.current_time(), now


@dataclass
class BackEndMigration:
    """Two QEMUs, each with a back end and behind a refault. The stages are called one after the other, each
    once."""

    case: BackEndCase
    pair: Pair
    channel: Channel
    driver: RefaultDriver
    back_end: BackEnd
    """The destination's."""
    lost: float | None = None
    """When the channel was lost, by trio's clock."""
    recovered: float | None = None
    """When QEMU was active again, by its own word."""
    stuck: int = 0
    """The number of the touch whose request was lost."""

    async def start_postcopy(self) -> None:
        """Migrates until the destination's back end has touched a page; within 80 s."""
        await bare.start_postcopy(
            self.driver.source, self.driver.destination, self.channel, bandwidth=self.case.background
        )
        await bare.heard_of_postcopy(self.pair.source.qmp, self.pair.destination.qmp)
        with trio.fail_after(20):
            while self.back_end.counts()[1] == 0:
                await trio.sleep(0.005)

    async def lose(self) -> None:
        """Loses the channel with the back end's request inside, and waits for the recovery; within 60 s."""
        with trio.fail_after(20):
            while not await self._freeze_with_request():
                self.channel.thaw()
                await trio.sleep(random.uniform(0.005, 0.02))  # noqa: S311
        events = self.pair.destination.qmp  # its own monitor: what it tells passes nobody else
        since = len(events.events)
        self.stuck = self.back_end.counts()[0]
        self.lost = (await self.channel.kill(request_inside=False, last=True)).when
        with trio.fail_after(40):
            self.recovered = (await events.wait_migration("postcopy-active", since=since)).emitted

    async def _freeze_with_request(self) -> bool:
        """Makes the network silent; whether it has the back end's request inside, and not the answer."""
        self.channel.freeze()
        await self.back_end.wait_stuck()
        with trio.move_on_after(_STILL):
            while not self.channel.unread_requests():
                await trio.sleep(0.005)
            return True
        return False

    def runs(self) -> bool:
        """Whether the lost touch is done."""
        return self.back_end.counts()[1] >= self.stuck

    async def run_again(self, seconds: float) -> float | None:
        """Seconds from the recovery until the lost touch was seen to be done; None if it is not in this
        time."""
        if self.recovered is None:
            raise RuntimeError("the channel has not been lost and recovered yet")
        with trio.move_on_after(seconds):
            while not self.runs():
                await trio.sleep(0.001)
            return trio.current_time() - self.recovered
        return None


@contextlib.asynccontextmanager
async def start_with_back_ends(case: BackEndCase, directory: Path) -> AsyncIterator[BackEndMigration]:
    """Starts it all, with its files in ``directory``; ended when the block is left.

    Raises ProcessFailed where something does not start.
    """
    with contextlib.ExitStack() as processes:
        await _start_back_end(processes, directory, "src")
        back_end = await _start_back_end(processes, directory, "dst")
        options = PairOptions(
            case.binary,
            case.binary,
            _memory_and_device(case.guest.ram_bytes),
            ["env", "-C", str(directory / "vhost-src")],
            ["env", "-C", str(directory / "vhost-dst")],
        )
        command = REFAULT if case.replay else WITHOUT_REPLAY
        async with (
            start_pair(case.guest, directory, options) as pair,
            start_channel(directory, free_port()) as channel,
            refault_driver(pair, channel, directory, command=command) as driver,
        ):
            await _start_device(pair.source)
            yield BackEndMigration(case, pair, channel, driver, back_end)


def _memory_and_device(ram_bytes: int) -> list[str]:
    """QEMU's arguments; the back end's socket is in QEMU's working directory."""
    return [
        *("-object", f"memory-backend-memfd,id=shared,size={ram_bytes},share=on"),
        *("-machine", "memory-backend=shared"),
        *("-chardev", "socket,id=vhost,path=vhost"),
        *("-device", f"vhost-user-blk-pci,chardev=vhost,num-queues=1,addr={_DEVICE},disable-modern=on"),
    ]


async def _start_device(qemu: Qemu) -> None:
    """What a driver does, by the monitor's hand: the device gets its ports and one queue and is started.

    Registers of PCI's configuration mechanism 1 and of a legacy virtio device (virtio 1.2, 4.1.4.10).
    """
    configuration = 0x80000000 | _DEVICE << 11
    writes = [
        ("w", 0xCF8, configuration | 0x10),
        ("w", 0xCFC, _PORTS),  # BAR 0
        ("w", 0xCF8, configuration | 0x04),
        ("w", 0xCFC, 0x5),  # command: I/O space, bus master
        ("h", _PORTS + 14, 0),  # queue select
        ("w", _PORTS + 8, _QUEUE >> 12),  # queue address
        ("b", _PORTS + 18, 0x7),  # status: ACKNOWLEDGE, DRIVER, DRIVER_OK
    ]
    for size, port, value in writes:
        answer = await qemu.qmp.monitor_command(f"o /{size} {port:#x} {value:#x}")
        if answer:
            raise RuntimeError(f"{qemu.name}: o /{size} {port:#x} says {answer!r}")


async def _start_back_end(stack: contextlib.ExitStack, directory: Path, end: str) -> BackEnd:
    place = directory / f"vhost-{end}"
    place.mkdir()
    socket, state = place / "vhost", place / "state"
    command = [sys.executable, "-m", "refault.lab.vhost_user", str(socket), str(state)]
    process = stack.enter_context(started(f"vhost-user ({end})", command, place / "log"))
    with trio.fail_after(30):
        while not socket.exists():
            process.must_run()
            await trio.sleep(0.01)
    return BackEnd(process, state)
