"""Strangers at the migration address in every phase: with refault no guest notices, beside it a bare QEMU.

Each phase of one migration is met by 50 strangers: some connect and close, some connect and say nothing, some
send garbage, some the stream of another VM. The migration must recover, complete, and its memory be right.
Beside it a bare QEMU meets one stranger of each kind in each phase, each in a migration of its own.

Run: python -m tests.campaign.strays [--qemu QEMU] [--strays 50] [--seed N] [--no-bare]
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import random
import signal
import socket
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import trio
from tests.campaign.campaign import keep_logs
from tests.campaign.connection import connection_of
from tests.campaign.hosts import Setting, TwoHosts, on_two_hosts, refault_command
from tests.campaign.record import commit_of

from refault.lab.channel import free_port
from refault.lab.process import started
from refault.lab.qemu import DEFAULT_BINARY
from refault.lab.qmp_client import QmpClosed, QmpError

PRECOPY = 8 << 20
BACKGROUND = 1 << 20
_SETTLES = 0.5
"""Seconds after which a QEMU that a stranger kills is surely gone."""
_TRIES = 20


class Kind(enum.Enum):
    """What a stranger does."""

    CLOSE = "connects and closes"
    SILENT = "says nothing"
    GARBAGE = "sends garbage"
    FOREIGN = "another VM's stream"


class Phase(enum.Enum):
    """When it comes. In this order, one migration after the other."""

    LISTENING = "before the source comes"
    PRECOPY = "precopy"
    SWITCHOVER = "switchover"
    POSTCOPY = "postcopy"
    PAUSED = "paused, the destination waits for the source"
    HANDSHAKE = "recovery handshake"
    COMPLETED = "after completion"


def _header(machine: bytes) -> bytes:
    """migration/savevm.c, qemu_savevm_state_header: magic, version, and the configuration section."""
    return struct.pack(">4sIBI", b"QEVM", 3, 7, len(machine)) + machine


def _recv_bitmap(block: bytes) -> bytes:
    """migration/savevm.c, qemu_savevm_send_recv_bitmap: what a recovered channel begins with."""
    return struct.pack(">BHHB", 8, 10, 1 + len(block), len(block)) + block


def words_of(kind: Kind, phase: Phase, draw: random.Random) -> bytes:
    """What a stranger sends."""
    if kind is Kind.GARBAGE:
        return draw.randbytes(draw.randrange(1, 5000))
    if kind is not Kind.FOREIGN:
        return b""
    # Before the source comes whoever begins a migration is taken for the source: that is measured apart.
    begins = phase is not Phase.LISTENING and draw.random() < 0.5
    return _header(b"pc-q35-5.0") + bytes(64) if begins else _recv_bitmap(b"another.ram")


class Strangers:
    """Those of one migration: the silent ones stay connected until it has ended."""

    def __init__(self, lab: TwoHosts, draw: random.Random) -> None:
        self.made: Counter[str] = Counter()
        self._lab = lab
        self._draw = draw
        self._silent: list[socket.socket] = []

    def ready(self, kind: Kind, phase: Phase) -> tuple[Kind, Phase, socket.socket]:
        """One that only has to connect."""
        return kind, phase, self._lab.hosts[0].socket()

    async def come(self, kind: Kind, phase: Phase, sock: socket.socket) -> None:
        """Connects and does what its kind does."""
        address = (self._lab.hosts[1].address, self._lab.port)
        sock.setblocking(False)
        stranger = trio.socket.from_stdlib_socket(sock)
        try:
            with trio.fail_after(20):
                await stranger.connect(address)
                if data := words_of(kind, phase, self._draw):
                    await stranger.send(data)
                    await trio.sleep(0.01)
        except (OSError, trio.TooSlowError):
            self.made["refused"] += 1
            stranger.close()
            return
        self.made[kind.value] += 1
        if kind is Kind.SILENT:
            self._silent.append(sock)
            return
        if self._draw.random() < 0.5:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stranger.close()

    async def crowd(self, kinds: list[Kind], phase: Phase) -> None:
        """All of them at once."""
        ready = [self.ready(kind, phase) for kind in kinds]
        async with trio.open_nursery() as nursery:
            for each in ready:
                nursery.start_soon(self.come, *each)

    def leave(self) -> None:
        """The silent ones too."""
        for sock in self._silent:
            sock.close()


class Course:
    """A migration that is brought from phase to phase, with refault or without."""

    def __init__(self, lab: TwoHosts, processes: contextlib.ExitStack) -> None:
        self._lab = lab
        self._processes = processes
        self._fronts = list(lab.refaults)

    async def come_to(self, phase: Phase) -> None:
        """From the phase before. Raises what the lab raises, and trio.TooSlowError."""
        with trio.fail_after(80):
            await _STEPS[phase](self)

    async def listen(self) -> None:
        await self._lab.listen(PRECOPY, BACKGROUND)

    async def precopy(self) -> None:
        await self._lab.migrate()

    async def switchover(self) -> None:
        await self._lab.clients[0].execute("migrate-start-postcopy")

    async def postcopy(self) -> None:
        await self._lab.pair.destination.qmp.wait_event(lambda event: event.name == "RESUME")
        await self._lab.pair.source.qmp.wait_migration("postcopy-active")
        await trio.sleep(0.1)

    async def pause(self) -> None:
        """So that nobody recovers: the source's refault is killed, a bare destination has been told to."""
        lab = self._lab
        since = lab.marks()
        if lab.setting.refault:
            self._kill_front()
            await lab.both("postcopy-paused", since, 40)
            return
        with connection_of(lab.pair.source.pid, lab.port) as connection:
            connection.shutdown(socket.SHUT_RDWR)
        await lab.both("postcopy-paused", since, 40)
        await self._wait_for_source()

    def _kill_front(self) -> None:
        self._fronts.pop(0).kill()

    async def _wait_for_source(self) -> None:
        self._lab.port = free_port()
        await self._lab.clients[1].execute("migrate-recover", {"uri": self._lab.uri}, oob=True)

    async def handshake(self) -> None:
        """The source is stopped in the middle of it: where it was too quick the channel is lost anew."""
        lab = self._lab
        source, destination = lab.qemus
        for _ in range(_TRIES):
            since = lab.marks()
            await self._recover()
            await destination.qmp.wait_migration("postcopy-recover", since=since[1])
            source.process.signal(signal.SIGSTOP)
            await trio.sleep(0.02)
            told = [event.data.get("status") for event in destination.qmp.events[since[1] :]]
            if "postcopy-active" not in told:
                return
            source.process.signal(signal.SIGCONT)
            await lab.both("postcopy-active", since, 40)
            await trio.sleep(0.1)
            since = lab.marks()
            owner = self._fronts[0] if lab.setting.refault else source
            with connection_of(owner.pid, lab.port) as connection:
                if lab.setting.refault:
                    self._kill_front()
                else:
                    connection.shutdown(socket.SHUT_RDWR)
            await lab.both("postcopy-paused", since, 40)
            if not lab.setting.refault:
                await self._wait_for_source()
        raise RuntimeError("the recovery handshake was always over before the source was stopped")

    async def _recover(self) -> None:
        lab = self._lab
        if not lab.setting.refault:
            await lab.clients[0].execute("migrate", {"uri": lab.uri, "resume": True})
            return
        command = refault_command(lab.directory, "src", lab.pair.source, lab.hosts, lab.setting)
        log = lab.directory / "refault-src.log"
        self._fronts.insert(0, self._processes.enter_context(started("refault (src)", command, log)))

    async def complete(self) -> None:
        self._lab.pair.source.process.signal(signal.SIGCONT)
        await self._lab.pair.source.qmp.wait_migration("postcopy-active")
        await self._lab.finish(40)

    def all_live(self) -> None:
        """Raises ProcessFailed where one has ended."""
        for process in (*(qemu.process for qemu in self._lab.qemus), *self._fronts):
            process.must_run()


_STEPS = {
    Phase.LISTENING: Course.listen,
    Phase.PRECOPY: Course.precopy,
    Phase.SWITCHOVER: Course.switchover,
    Phase.POSTCOPY: Course.postcopy,
    Phase.PAUSED: Course.pause,
    Phase.HANDSHAKE: Course.handshake,
    Phase.COMPLETED: Course.complete,
}


async def with_refault(
    directory: Path, binary: str, strays: int, draw: random.Random
) -> dict[Phase, Counter[str]]:
    """One migration that meets so many in each phase; how many came. Raises where it is harmed."""
    counts: dict[Phase, Counter[str]] = {}
    with contextlib.ExitStack() as processes:
        async with on_two_hosts(directory, Setting(binary)) as lab:
            course, strangers = Course(lab, processes), Strangers(lab, draw)
            for phase in Phase:
                kinds = [list(Kind)[at % len(Kind)] for at in range(strays)]
                strangers.made = counts[phase] = Counter()
                await course.come_to(phase)
                await strangers.crowd(kinds, phase)
                await trio.sleep(_SETTLES if phase is not Phase.SWITCHOVER else 0)
                course.all_live()
            strangers.leave()
            await trio.sleep(_SETTLES)
            course.all_live()
    return counts


async def bare(directory: Path, binary: str, phase: Phase, kind: Kind, draw: random.Random) -> str:
    """A bare QEMU's migration that meets one stranger; what became of it."""
    with contextlib.ExitStack() as processes:
        async with on_two_hosts(directory, Setting(binary, refault=False)) as lab:
            course, strangers = Course(lab, processes), Strangers(lab, draw)
            phases = list(Phase)
            try:
                for each in phases[: phases.index(phase) + 1]:
                    await course.come_to(each)
                await strangers.crowd([kind], phase)
                await trio.sleep(_SETTLES)
                for each in phases[phases.index(phase) + 1 :]:
                    await course.come_to(each)
                course.all_live()
            except (Exception, trio.Cancelled) as error:
                return await _what_became(lab, error)
            return "unharmed" if "refused" not in strangers.made else "not there to be met"


async def _what_became(lab: TwoHosts, error: BaseException) -> str:
    lab.pair.source.process.signal(signal.SIGCONT)
    await trio.sleep(_SETTLES)
    runs = False
    with contextlib.suppress(QmpError, QmpClosed, trio.TooSlowError):
        runs = bool((await lab.pair.source.qmp.execute("query-status", timeout=5))["running"])
    where = "guest goes on at the source" if runs else "GUEST LOST"
    if lab.pair.destination.process.status is not None:
        return f"destination dead, {where}"
    if lab.pair.source.process.status is not None:
        return "source dead"
    if isinstance(error, AssertionError):
        return f"WRONG MEMORY: {error}"
    told = (_last(lab, side) for side in (0, 1))
    return f"does not go on ({' / '.join(told)}), {'guest goes on at the source' if runs else 'guest stuck'}"


def _last(lab: TwoHosts, side: int) -> str:
    events = [event for event in lab.qemus[side].qmp.events if event.name == "MIGRATION"]
    return str(events[-1].data["status"]) if events else "none"


async def measure(binary: str, strays: int, draw: random.Random, beside: bool, logs: Path | None) -> int:
    """Prints both; 1 where a migration with refault was harmed."""
    harmed: BaseException | None = None
    with tempfile.TemporaryDirectory(prefix="refault-strays-") as directory:
        try:
            counts = await with_refault(Path(directory), binary, strays, draw)
            print("| phase | with refault, strangers | refused |\n|---|---|---|")
            for phase, made in counts.items():
                print(f"| {phase.value} | {made.total()}, no harm | {made['refused']} |")
            print("completed, memory right", flush=True)
        except Exception as error:
            harmed = error
            print(f"HARMED: {error!r}", flush=True)
            keep_logs(logs, directory, "strays")
    if beside:
        print(f"| bare QEMU, one stranger | {' | '.join(kind.value for kind in Kind)} |")
        print(f"|---|{'---|' * len(Kind)}")
        for phase in Phase:
            cells = []
            for kind in Kind:
                with tempfile.TemporaryDirectory(prefix="refault-strays-") as directory:
                    cells.append(await bare(Path(directory), binary, phase, kind, draw))
            print(f"| {phase.value} | {' | '.join(cells)} |", flush=True)
    return 0 if harmed is None else 1


def main() -> int:
    """The process's beginning."""
    parser = argparse.ArgumentParser(prog="make campaign-strays")
    parser.add_argument("--qemu", default=DEFAULT_BINARY)
    parser.add_argument("--strays", type=int, default=50, help="in each phase")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--no-bare", action="store_true", help="leave the bare QEMU out")
    parser.add_argument("--logs", type=Path, help="where to keep the logs of what ended badly")
    arguments = parser.parse_args()
    print(f"command  python -m tests.campaign.strays {' '.join(sys.argv[1:])}")
    print(f"commit   {commit_of()}\nQEMU     {arguments.qemu}\nseed     {arguments.seed}", flush=True)
    draw = random.Random(arguments.seed)
    beside = not arguments.no_bare
    return trio.run(measure, arguments.qemu, arguments.strays, draw, beside, arguments.logs)


if __name__ == "__main__":
    sys.exit(main())
