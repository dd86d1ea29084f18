"""A migration between two hosts (network namespaces), in each of the ways that it can be laid: what the
benchmarks of the migration channel stand on."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from refault.lab import bare
from refault.lab.channel import free_port
from refault.lab.guest import Guest
from refault.lab.netns import Host, two_hosts
from refault.lab.process import Process, started
from refault.lab.qemu import DEFAULT_BINARY, Pair, PairOptions, start_pair
from refault.lab.qmp_client import QmpClient, connect

TRACE = ("-msg", "timestamp=on")
EVENTS = ("postcopy_ram_fault_thread_request", "postcopy_page_req_del")
_LINE = re.compile(
    rb"@(?P<second>\d+)\.(?P<micro>\d+):"
    rb"postcopy_(?:ram_fault_thread_request Request for HVA=(?P<fault>0x[0-9a-f]+)"
    rb"|page_req_del resolved page req (?P<gone>0x[0-9a-f]+))"
)
_SWITCHES = re.compile(r"^(?:non)?voluntary_ctxt_switches:\s*(\d+)", re.MULTILINE)
_TICK = os.sysconf("SC_CLK_TCK")


class NotEndedError(RuntimeError):
    """A migration failed, or did not come to its end."""


@dataclass(frozen=True)
class Way:
    """How the source reaches the destination."""

    name: str
    between: str = ""
    """`refault` or `socat`; else nothing."""
    sides: tuple[str, ...] = ("src", "dst")
    """Where it stands."""
    tree: Path | None = None
    """The `src` of another checkout, whose refault is run."""


WAYS = {
    way.name: way
    for way in (
        Way("direct"),
        Way("socat", "socat"),
        Way("source", "refault", ("src",)),
        Way("both", "refault"),
    )
}


def options_of(description: str) -> argparse.Namespace:
    """The command line that the benchmarks share; `ways` are those that it asks for."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--qemu", default=DEFAULT_BINARY)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vcpus", type=int, default=1)
    parser.add_argument("--ways", default=",".join(WAYS), help="some of them, the first to compare with")
    parser.add_argument(
        "--beside", action="append", default=[], help="a built checkout, whose refault runs too"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ways = [WAYS[name] for name in options.ways.split(",")]
    if shutil.which("socat") is None:
        ways = [way for way in ways if way.between != "socat"]
    for tree in map(Path, options.beside):
        ways += [
            Way(f"{way.name}, {tree.name}", way.between, way.sides, tree.resolve() / "src")
            for way in ways
            if way.between == "refault" and way.tree is None
        ]
    options.ways = ways
    return options


def take_turns(
    options: argparse.Namespace, run: Callable[[Way, Path], Awaitable[Run]]
) -> dict[str, list[Run]]:
    """What each way took, in as many rounds, where it came to its end.

    Raises NotEndedError where it did not, but for socat's: that takes connections in no order, and 7.2 has
    the first for its main one (migration/migration.c, migration_ioc_process_incoming), with preempt too.
    """
    results: dict[str, list[Run]] = {way.name: [] for way in options.ways}
    for _ in range(options.rounds):
        for way in options.ways:
            with tempfile.TemporaryDirectory(prefix="refault-bench-") as directory:
                try:
                    results[way.name].append(trio.run(run, way, Path(directory)))
                except NotEndedError:
                    if way.between != "socat":
                        raise
    return results


def compared(
    options: argparse.Namespace,
    cells: Iterable[Cell],
    migrate: Callable[[Cell, Way, Path], Awaitable[Run]],
    measures: Callable[[list[Run]], dict[str, float]],
) -> dict[str, dict[str, dict[str, float]]]:
    """For each cell the measures of each way."""
    told = {}
    for cell in cells:
        results = take_turns(options, partial(migrate, cell))
        told[cell.name] = {
            name + f", {len(runs)} of {options.rounds}" * (len(runs) < options.rounds): measures(runs)
            for name, runs in results.items()
            if runs
        }
    return told


def rows_of(ways: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """A table's rows, the head first: of each figure what it is of the first way's, and of that the figure
    itself, and so of those that it has none of."""
    first = next(iter(ways))
    rows = [["", *ways[first]]]
    for way, figures in ways.items():
        rows.append([way])
        for name, base in ways[first].items():
            if way == first or not base:
                rows[-1].append(f"{figures[name]:.3g}" if figures[name] else "")
            else:
                rows[-1].append(f"{figures[name] / base:.2f} x")
    return rows


def table(ways: Mapping[str, Mapping[str, float]]) -> str:
    """As text."""
    rows = rows_of(ways)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def tell(
    measure: Callable[[argparse.Namespace], dict[str, dict[str, dict[str, float]]]], description: str
) -> None:
    """A benchmark's whole course, from its command line to its tables."""
    options = options_of(description)
    told = measure(options)
    if options.json:
        json.dump(told, sys.stdout)
        return
    for name, ways in told.items():
        print(f"\n{name}\n{table(ways)}")


@dataclass(frozen=True)
class Cell:
    """The link, as tc(8) names its rate (None: no limit), and the mode."""

    rate: str | None
    preempt: bool = False

    @property
    def name(self) -> str:
        """For people."""
        link = "no limit" if self.rate is None else {"1gbit": "1 Gbit/s"}.get(self.rate, self.rate)
        return link + ", preempt" * self.preempt


@dataclass
class Spent:
    """What processes have taken so far."""

    seconds: float = 0.0
    """User and system."""
    switches: int = 0

    @classmethod
    def of(cls, processes: Sequence[Process]) -> Spent:
        total = cls()
        groups = {process.pid for process in processes}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                stat = path.read_text().rpartition(")")[2].split()
                if int(stat[2]) not in groups:  # what socat forks is in its group
                    continue
                texts = [status.read_text() for status in path.parent.glob("task/*/status")]
            except OSError:
                continue  # it has ended meanwhile
            total.seconds += (int(stat[11]) + int(stat[12])) / _TICK
            total.switches += sum(int(number) for text in texts for number in _SWITCHES.findall(text))
        return total


@dataclass
class Run:
    """One migration, as it went."""

    total: float
    """Seconds from `migrate` to `completed`, by QEMU's word; so the others."""
    downtime: float
    sent: int
    """Bytes of RAM."""
    seconds: float
    """User and system, of what stands between the QEMUs."""
    switches: int
    faults: list[float] = field(default_factory=list)
    """Seconds that each fault took, in order of time, from its request to its page."""

    @property
    def gib(self) -> float:
        """What was sent."""
        return self.sent / (1 << 30)


@dataclass
class Laid:
    """Two QEMUs that are ready, and what stands between them."""

    way: Way
    pair: Pair
    clients: tuple[QmpClient, QmpClient]
    incoming: str
    uri: str
    between: Sequence[Process]
    directory: Path

    async def migrate(self, parameters: Mapping[str, object], capabilities: Sequence[str]) -> None:
        """Has the source begin."""
        source, destination = self.clients
        for client in self.clients:
            await bare.set_capabilities(client, "events", *capabilities)
            await client.execute("migrate-set-parameters", dict(parameters))
        await destination.execute("migrate-incoming", {"uri": self.incoming})
        await source.execute("migrate", {"uri": self.uri})

    async def result(self, before: Spent, seconds: float = 60.0) -> Run:
        """Waits for the end. Raises NotEndedError where it fails, or does not come in time."""
        answer: dict[str, Any] = {"status": f"not at its end after {seconds:g} s"}
        with trio.move_on_after(seconds):
            answer = await bare.wait_status(self.clients[0], "completed", "failed", poll=0.02)
            while answer["status"] == "completed" and not answer["total-time"]:  # it comes behind the status
                answer = await self.clients[0].execute("query-migrate")
        if answer["status"] != "completed":
            raise NotEndedError(f"{self.way.name}: {answer}")
        spent = Spent.of(self.between)
        return Run(
            answer["total-time"] / 1e3,
            answer["downtime"] / 1e3,
            answer["ram"]["transferred"],
            spent.seconds - before.seconds,
            spent.switches - before.switches,
        )

    def faults(self) -> list[float]:
        """From the destination's trace."""
        asked: dict[int, float] = {}
        took: list[float] = []
        for found in _LINE.finditer((self.directory / "dst.log").read_bytes()):
            at = int(found["second"]) + int(found["micro"]) / 1e6
            if found["fault"]:
                asked.setdefault(int(found["fault"], 16) >> 12, at)
            elif (since := asked.pop(int(found["gone"], 16) >> 12, None)) is not None:
                took.append(at - since)
        return took


@asynccontextmanager
async def laid(
    way: Way, guest: Guest, directory: Path, rate: str | None, *, binary: str = DEFAULT_BINARY, trace: bool
) -> AsyncIterator[Laid]:
    """Lays the way, over a link of that rate (tc(8)'s; None for no limit). Needs root."""
    async with AsyncExitStack() as stack:
        hosts = stack.enter_context(two_hosts())
        if rate is not None:
            for host in hosts:
                host.limit(rate)
        extra = [*TRACE, *(word for event in EVENTS for word in ("-trace", event))] if trace else []
        options = PairOptions(
            binary, binary, extra, source_prefix=hosts[0].prefix, destination_prefix=hosts[1].prefix
        )
        pair = await stack.enter_async_context(start_pair(guest, directory, options))
        port = free_port()
        incoming = uri = f"tcp:{hosts[1].address}:{port}"
        between: list[Process] = []
        monitors = [pair.source.monitor, pair.destination.monitor]
        if way.between == "socat":
            incoming, uri = f"tcp:127.0.0.1:{port + 1}", f"tcp:127.0.0.1:{port}"
            for side in (0, 1):
                command, log = _socat(hosts, port, side, directory)
                between.append(stack.enter_context(started("socat", command, log)))
        elif way.between == "refault":
            for number, name in enumerate(("src", "dst")):
                if name in way.sides:
                    command = _refault(way, hosts[number], directory, name, monitors[number])
                    log = directory / f"refault-{name}.log"
                    between.append(stack.enter_context(started(f"refault ({name})", command, log)))
                    monitors[number] = f"unix:{directory}/{name}.client"
        clients = [await stack.enter_async_context(connect(monitor, name=way.name)) for monitor in monitors]
        yield Laid(way, pair, (clients[0], clients[1]), incoming, uri, between, directory)


def _socat(hosts: tuple[Host, Host], port: int, side: int, directory: Path) -> tuple[list[str], Path]:
    listen, to = (
        (f"{port},bind=127.0.0.1", f"{hosts[1].address}:{port}"),
        (f"{port},bind={hosts[1].address}", f"127.0.0.1:{port + 1}"),
    )[side]
    socat = ["socat", "-b", "262144", f"TCP-LISTEN:{listen},fork,reuseaddr", f"TCP:{to}"]
    return [*hosts[side].prefix, *socat], directory / f"socat-{side}.log"


def _refault(way: Way, host: Host, directory: Path, side: str, monitor: str) -> list[str]:
    command = [*host.prefix]
    if way.tree is not None:
        command += ["env", f"PYTHONPATH={way.tree}"]
    command += [sys.executable, "-m", "refault", "run", "--qemu", monitor, "--name", side]
    command += ["--listen", f"unix:{directory}/{side}.client", "--state-dir", str(directory)]
    return command
