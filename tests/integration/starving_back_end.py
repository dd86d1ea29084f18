"""The request of a vhost-user back end lost inside the killed carrier, with a refault that replays it or not.

No QEMU repeats such a request: it keeps it by the back end's own address, which postcopy_sync_page_req
(migration/migration.c) does not find among its RAM blocks.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import trio

from refault.lab import bare
from refault.lab.channel import Channel, free_port, start_channel
from refault.lab.driver import RefaultDriver, refault_driver
from refault.lab.process import Process, started
from refault.lab.qemu import Pair, PairOptions, Qemu, start_pair

from .starving import Case, refault_command
from .vhost_user import STATE

_STILL = 0.2
_DEVICE = 4
_PORTS = 0xC000
_QUEUE = 2 << 20
"""Where the virtqueue is: outside of what the lab's guest writes to, and empty."""


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
class Recovered:
    """A migration that is active again since ``recovered`` (trio's clock), with the touch number ``stuck``
    lost."""

    pair: Pair
    driver: RefaultDriver
    back_end: BackEnd
    recovered: float
    stuck: int

    async def run_again(self, seconds: float) -> float | None:
        """Seconds from the recovery until the lost touch was seen to be done; None if it is not in this
        time."""
        with trio.move_on_after(seconds):
            while self.back_end.counts()[1] < self.stuck:
                await trio.sleep(0.001)
            return trio.current_time() - self.recovered
        return None


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
    command = [sys.executable, "-m", "tests.integration.vhost_user", str(socket), str(state)]
    process = stack.enter_context(started(f"vhost-user ({end})", command, place / "log"))
    with trio.fail_after(30):
        while not socket.exists():
            process.must_run()
            await trio.sleep(0.01)
    return BackEnd(process, state)


async def _kill_with_request(channel: Channel, back_end: BackEnd) -> int:
    """Loses the channel with the back end's request inside; says which touch made it."""
    channel.freeze()
    with trio.fail_after(10):
        await back_end.wait_stuck()
        while not channel.unread_requests():
            await trio.sleep(0.005)
    await channel.kill(request_inside=False, last=True)
    return back_end.counts()[0]


@contextlib.asynccontextmanager
async def lose_a_back_ends_request(case: Case, directory: Path) -> AsyncIterator[Recovered]:
    """Migrates, loses the channel with a request of the destination's back end inside, and waits for
    refault's recovery."""
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
        async with (
            start_pair(case.guest, directory, options) as pair,
            start_channel(directory, free_port()) as channel,
            refault_driver(pair, channel, directory, command=refault_command(case.replay)) as driver,
        ):
            await _start_device(pair.source)
            await bare.start_postcopy(driver.source, driver.destination, channel, bandwidth=case.background)
            with trio.fail_after(10):
                while back_end.counts()[1] == 0:
                    await trio.sleep(0.005)
            events = pair.destination.qmp  # its own monitor: what it tells passes nobody else
            since = len(events.events)
            stuck = await _kill_with_request(channel, back_end)
            with trio.fail_after(10):
                event = await events.wait_migration("postcopy-active", since=since)
            yield Recovered(pair, driver, back_end, event.emitted, stuck)
