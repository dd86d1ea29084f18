"""Who recovers a lost channel in the scenario: a script, nobody, or two `refault run`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import trio

from refault.daemon.telling import snapshot
from refault.daemon.telling.snapshot import VmStatus

from . import bare, qmp_client
from .channel import Channel, free_port
from .process import Process, started
from .qemu import Pair
from .qmp_client import QmpClient
from .story import SIDES, Side
from .tasks import background

Relay = Literal["auto", "off"]
REFAULT = (sys.executable, "-m", "refault")


class Driver(Protocol):
    """The two ends as a client has them, and what is done after a loss."""

    source: QmpClient
    destination: QmpClient

    @property
    def processes(self) -> Sequence[Process]:
        """The refaults, the source's first."""

    async def postcopy_began(self) -> None:
        """What is to be prepared before the first loss."""

    async def repair(self, since: int) -> None:
        """What is done by hand after a loss; ``since``: the number of the destination's events before it."""

    async def statuses(self) -> list[VmStatus]:
        """What the refaults say, where there are any and they answer within ten seconds."""


@dataclass
class BareDriver:
    """A client at QEMU's own monitors; a script recovers (``by_hand``) or nobody does."""

    source: QmpClient
    destination: QmpClient
    channel: Channel
    by_hand: bool = True
    processes: Sequence[Process] = ()

    async def postcopy_began(self) -> None:
        """Nothing."""

    async def repair(self, since: int) -> None:
        """Recovers, knowing that there was a loss."""
        if self.by_hand:
            await bare.recover(self.source, self.destination, self.channel, since=since)

    async def statuses(self) -> list[VmStatus]:
        """None: nobody counts page requests here."""
        return []


@dataclass
class RefaultDriver:
    """A client at the listen sockets of two `refault run`, which share nothing but the network."""

    source: QmpClient
    destination: QmpClient
    channel: Channel
    processes: list[Process]
    controls: Sequence[Path]
    recover_port: int | None
    start: Callable[[int], Process]
    """Starts the refault of that end (0: the source's), as it was started first."""
    connect: Callable[[int], Awaitable[QmpClient]]
    """Connects a client to it when it listens; raises trio.TooSlowError after 30 s."""

    def start_again(self, end: int) -> Process:
        """Starts a refault anew in the place of one that has ended, as a supervisor does."""
        self.processes[end] = self.start(end)
        return self.processes[end]

    async def connect_again(self, end: int) -> None:
        """A new client at a refault that was started anew. Raises trio.TooSlowError after 30 s."""
        client = await self.connect(end)
        if end == 0:
            self.source = client
        else:
            self.destination = client

    async def postcopy_began(self) -> None:
        """Without a relay QEMU itself listens, where it can; each listener is good for one connection."""
        if self.recover_port is not None:
            await self.channel.lead_once(self.recover_port)

    async def repair(self, since: int) -> None:
        """Nothing: refault does it."""

    async def statuses(self) -> list[VmStatus]:
        """What both say; those that do not answer in time are left out."""
        answers: list[VmStatus] = []
        for control in self.controls:
            with trio.move_on_after(10), contextlib.suppress(OSError, trio.BrokenResourceError):
                answers.append(await _query(control))
        return answers


async def _query(control: Path) -> VmStatus:
    async with await trio.open_unix_socket(str(control)) as stream:
        document = b"".join([chunk async for chunk in stream])
    if not document:
        raise OSError("the control socket told nothing")
    return snapshot.decode(document).vms[0]


@contextlib.asynccontextmanager
async def bare_driver(pair: Pair, channel: Channel, *, by_hand: bool = True) -> AsyncIterator[BareDriver]:
    """Clients at the monitors of both QEMUs."""
    async with (
        qmp_client.connect(pair.source.monitor, name="source") as source,
        qmp_client.connect(pair.destination.monitor, name="destination") as destination,
    ):
        yield BareDriver(source, destination, channel, by_hand)


async def _hold_client(
    directory: Path, side: Side, *, task_status: trio.TaskStatus[QmpClient] = trio.TASK_STATUS_IGNORED
) -> None:
    async with qmp_client.connect(str(directory / f"{side}.client"), name=side) as client:
        task_status.started(client)
        await trio.sleep_forever()


@contextlib.asynccontextmanager
async def refault_driver(
    pair: Pair,
    channel: Channel,
    directory: Path,
    *,
    relay: Relay = "auto",
    command: Sequence[str] = REFAULT,
    prefixes: tuple[Sequence[str], Sequence[str]] = ((), ()),
    options: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> AsyncIterator[RefaultDriver]:
    """Starts a `refault run` at each QEMU, with its files in ``directory``, and connects a client to each.

    ``command`` is how refault is started, ``prefixes`` what comes before it at the source and at the
    destination, ``options`` what comes after. Raises ProcessFailed, with what it said, when one does
    not start.
    """
    recover_port = free_port() if relay == "off" else None
    commands: list[tuple[list[str], Path]] = []
    controls: list[Path] = []
    async with contextlib.AsyncExitStack() as stack:
        ends = zip(SIDES, (pair.source, pair.destination), prefixes, options, strict=True)
        for side, qemu, prefix, further in ends:
            listen, control, state = (directory / f"{side}.{kind}" for kind in ("client", "control", "state"))
            state.mkdir(mode=0o700, exist_ok=True)
            arguments = ["run", "--qemu", qemu.monitor, "--listen", f"unix:{listen}", "--name", side]
            arguments += ["--relay", relay, "--control", str(control), "--state-dir", str(state)]
            if side == "destination" and recover_port is not None:
                arguments += ["--recover-uri", f"tcp:{channel.host}:{recover_port}"]
            commands.append(([*prefix, *command, *arguments, *further], directory / f"refault-{side}.log"))
            controls.append(control)

        def start(end: int) -> Process:
            name = f"refault ({SIDES[end]})"
            return stack.enter_context(started(name, *commands[end]))

        processes = [start(end) for end in range(2)]
        for process, control, side in zip(processes, controls, SIDES, strict=True):
            with trio.move_on_after(30):
                while not (control.exists() and (directory / f"{side}.client").exists()):
                    process.must_run()
                    await trio.sleep(0.01)
        # A client that comes later has a task of its own, for it ends before what was begun before it.
        nursery = await stack.enter_async_context(background())

        async def connect(end: int) -> QmpClient:
            client: QmpClient = await nursery.start(_hold_client, directory, SIDES[end])
            return client

        source, destination = await connect(0), await connect(1)
        driver = RefaultDriver(
            source, destination, channel, processes, controls, recover_port, start, connect
        )
        yield driver
        for process in driver.processes:
            await process.stop()
