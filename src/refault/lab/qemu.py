"""Real QEMUs with the lab's guest: one, or the two ends of a migration."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from . import qmp_client
from .guest import Guest, Progress
from .memory import ProcessMemory
from .process import Process, started
from .qmp_client import QmpClient, QmpClosed

DEFAULT_BINARY = "qemu-system-x86_64"


@dataclass
class Qemu:
    """A running QEMU. ``qmp`` is the lab's own monitor; ``monitor`` is the address of another, free for
    refault.
    """

    name: str
    guest: Guest
    process: Process
    qmp: QmpClient
    monitor: str
    memory: ProcessMemory

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def progress(self) -> list[Progress | None]:
        """How far each vCPU has come, read from outside: no monitor is asked, no page requested."""
        return self.memory.progress(self.guest)

    async def wait_guest(self, timeout: float = 60.0) -> None:
        """Waits until each vCPU has written to all its pages; raises trio.TooSlowError after ``timeout``
        seconds, or ProcessFailed.
        """
        with trio.fail_after(timeout):
            while not all(state is not None and state.sweep > 1 for state in self.progress()):
                self.process.must_run()
                await trio.sleep(0.02)

    async def wait_progress(self, timeout: float = 30.0) -> None:
        """Waits until each vCPU has come further than now; raises trio.TooSlowError after ``timeout``
        seconds.
        """
        before = self.progress()
        with trio.fail_after(timeout):
            while not all(
                new is not None and (old is None or new > old)
                for old, new in zip(before, self.progress(), strict=True)
            ):
                self.process.must_run()
                await trio.sleep(0.01)


def accelerator() -> str:
    """`kvm` where this process may use it, else `tcg`."""
    return "kvm" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"


def command_line(
    guest: Guest, binary: str, firmware: Path, monitors: Sequence[Path], extra: Sequence[str] = ()
) -> list[str]:
    """QEMU's arguments for the lab's guest; both ends of a migration must have the same."""
    command = [
        binary,
        "-M",
        "pc",
        "-accel",
        accelerator(),
        "-smp",
        f"{guest.vcpus},sockets=1,cores={guest.vcpus}",
    ]
    command += ["-m", f"{guest.ram_bytes >> 10}K", "-nodefaults", "-no-user-config", "-display", "none"]
    command += ["-serial", "none", "-vga", "none", "-bios", str(firmware)]
    for monitor in monitors:
        command += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    return [*command, *extra]


def disks(count: int) -> list[str]:
    """Arguments for so many disks (`disk0`, `disk1`...) that hold nothing; each is 45 KiB of device state."""
    arguments: list[str] = []
    for number in range(count):
        arguments += ["-blockdev", f"driver=null-co,node-name=node{number},size=1048576"]
        arguments += ["-device", f"virtio-blk-pci,drive=node{number},id=disk{number}"]
    return arguments


@contextlib.asynccontextmanager
async def start_qemu(
    guest: Guest,
    directory: Path,
    name: str = "qemu",
    *,
    binary: str = DEFAULT_BINARY,
    incoming: str | None = None,
    extra: Sequence[str] = (),
    prefix: Sequence[str] = (),
) -> AsyncIterator[Qemu]:
    """Starts a QEMU with its files (``name``.log and sockets) in ``directory``, killed when the block is
    left.

    ``incoming`` is what follows `-incoming`, ``extra`` are further arguments, ``prefix`` a command to start
    it with. Raises ProcessFailed, with what QEMU said, when it does not start.
    """
    firmware, monitor, own = (directory / f"{name}.{suffix}" for suffix in ("rom", "qmp", "lab"))
    firmware.write_bytes(guest.firmware())
    for socket in (monitor, own):
        socket.unlink(missing_ok=True)
    command = [*prefix, *command_line(guest, binary, firmware, [monitor, own], extra)]
    if incoming is not None:
        command += ["-incoming", incoming]
    async with contextlib.AsyncExitStack() as stack:
        process = stack.enter_context(started(name, command, directory / f"{name}.log"))
        qmp = await _own_monitor(stack, process, own)
        answer = await qmp.monitor_command("gpa2hva 0")
        found = re.search(r"is (0x[0-9a-f]+)", answer)
        if found is None:
            raise RuntimeError(f"{name}: gpa2hva says {answer!r}")
        memory = ProcessMemory(process.pid, int(found[1], 16))
        yield Qemu(name, guest, process, qmp, f"unix:{monitor}", memory)


async def _own_monitor(stack: contextlib.AsyncExitStack, process: Process, path: Path) -> QmpClient:
    with trio.move_on_after(30):
        while not path.exists():
            process.must_run()
            await trio.sleep(0.005)
    try:
        return await stack.enter_async_context(qmp_client.connect(str(path), name=process.name))
    except (QmpClosed, trio.TooSlowError):
        with trio.move_on_after(1):
            await process.wait()
        process.must_run()
        raise


@dataclass(frozen=True)
class PairOptions:
    """How the two ends of a migration are started."""

    source_binary: str = DEFAULT_BINARY
    destination_binary: str = DEFAULT_BINARY
    extra: Sequence[str] = ()
    source_prefix: Sequence[str] = field(default=())
    destination_prefix: Sequence[str] = field(default=())
    incoming: str = "defer"


@dataclass
class Pair:
    """A source whose guest runs, and a destination that waits for it."""

    source: Qemu
    destination: Qemu


@contextlib.asynccontextmanager
async def start_pair(
    guest: Guest, directory: Path, options: PairOptions | None = None
) -> AsyncIterator[Pair]:
    """Starts both ends with their files in ``directory`` and waits until the guest has filled its memory at
    the source.
    """
    opts = options or PairOptions()
    async with (
        start_qemu(
            guest, directory, "src", binary=opts.source_binary, extra=opts.extra, prefix=opts.source_prefix
        ) as source,
        start_qemu(
            guest,
            directory,
            "dst",
            binary=opts.destination_binary,
            extra=opts.extra,
            prefix=opts.destination_prefix,
            incoming=opts.incoming,
        ) as destination,
    ):
        await source.wait_guest()
        yield Pair(source, destination)
