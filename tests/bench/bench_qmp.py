"""What refault costs a QMP client: round trips and pipelined commands, beside other ways through.

One QEMU has one monitor for each way: directly, and through refault, socat, a bare trio byte pump, and a
proxy written with the qemu.qmp library; and a new connection with one command. The ways take turns in small
rounds, so that what else the machine does meets all alike.

Run: python -m tests.bench.bench_qmp [--qemu QEMU] [--rounds N] [--beside CHECKOUT] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import trio

WAYS = ("direct", "pump", "refault", "socat", "qemu.qmp")
NEW = "new connections"
"""QEMU's monitor for direct ones: it has one client at a time."""
QUERY = b'{"execute": "query-status", "id": 1}\n'
PER_ROUND = 100
CONNECTIONS = 20
PIPELINED = 1000
DEPTH = 64


class Client:
    """A plain blocking QMP client."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.sock.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self.sock.settimeout(20)
        self.held = b""
        self.line()
        self.ask(b'{"execute": "qmp_capabilities"}\n')

    def line(self) -> bytes:
        while b"\n" not in self.held:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError
            self.held += data
        line, _, self.held = self.held.partition(b"\n")
        return line

    def ask(self, command: bytes) -> bytes:
        self.sock.sendall(command)
        return self.line()

    def round_trips(self, count: int) -> list[float]:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            self.ask(QUERY)
            times.append(time.perf_counter() - start)
        return times

    def pipelined(self, count: int) -> float:
        """Commands a second, with DEPTH of them on the way."""
        start = time.perf_counter()
        sent = min(DEPTH, count)
        self.sock.sendall(QUERY * sent)
        for _ in range(count):
            reply = self.line()
            if b'"return"' not in reply:
                raise ValueError(reply)
            if sent < count:
                self.sock.sendall(QUERY)
                sent += 1
        return count / (time.perf_counter() - start)

    def close(self) -> None:
        self.sock.close()


def connections(path: Path, count: int) -> float:
    """Seconds that a connection with one command takes, on average."""
    start = time.perf_counter()
    for _ in range(count):
        client = Client(path)
        client.ask(QUERY)
        client.close()
    return (time.perf_counter() - start) / count


def serve_pump(qemu: str, listen: str) -> None:
    """A byte pump as one writes it with trio."""

    async def copy(source: trio.SocketStream, sink: trio.SocketStream, nursery: trio.Nursery) -> None:
        async for data in source:
            await sink.send_all(data)
        nursery.cancel_scope.cancel()

    async def serve(client: trio.SocketStream) -> None:
        async with await trio.open_unix_socket(qemu) as server, trio.open_nursery() as nursery:
            nursery.start_soon(copy, client, server, nursery)
            nursery.start_soon(copy, server, client, nursery)

    async def run() -> None:
        with trio.socket.socket(trio.socket.AF_UNIX) as sock:
            await sock.bind(listen)
            sock.listen(5)
            await trio.serve_listeners(serve, [trio.SocketListener(sock)])

    trio.run(run)


def serve_library(qemu: str, listen: str) -> None:
    """A proxy as one writes it with qemu.qmp: each command becomes a task that awaits its reply."""
    from qemu.qmp import QMPClient
    from qemu.qmp.message import Message

    async def run() -> None:
        upstream: Any = QMPClient("bench")
        upstream.logger.setLevel("CRITICAL")
        await upstream.connect(qemu)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(json.dumps(upstream.greeting._asdict()).encode() + b"\r\n")
            tasks: asyncio.Queue[tuple[object, asyncio.Task[Any]]] = asyncio.Queue()

            async def reply() -> None:
                while True:
                    spelling, task = await tasks.get()
                    answer = dict(await task)
                    answer.pop("id", None)
                    if spelling is not None:
                        answer["id"] = spelling
                    writer.write(json.dumps(answer).encode() + b"\r\n")
                    await writer.drain()

            replies = asyncio.create_task(reply())
            async for line in reader:
                command = json.loads(line)
                if command["execute"] == "qmp_capabilities":
                    writer.write(b'{"return": {}}\r\n')
                    continue
                spelling = command.pop("id", None)
                message = Message(command)
                tasks.put_nowait((spelling, asyncio.create_task(upstream._execute(message))))
            replies.cancel()
            writer.close()

        server = await asyncio.start_unix_server(serve, listen)
        await server.serve_forever()

    asyncio.run(run())


SERVERS: dict[str, Callable[[str, str], None]] = {
    "pump": serve_pump,
    "qemu.qmp": serve_library,
}


def command(way: str, qemu: Path, listen: Path, trees: Mapping[str, Path]) -> list[str]:
    """`trees`: of the ways that are another checkout's refault, its `src`."""
    if way == "socat":
        return ["socat", f"UNIX-LISTEN:{listen},fork", f"UNIX-CONNECT:{qemu}"]
    if way in SERVERS:
        return [sys.executable, __file__, "--serve", way, str(qemu), str(listen)]
    state = Path(f"{listen}.state")
    state.mkdir()
    argv = [sys.executable, "-m", "refault", "run", "--name", listen.name, "--qemu", f"unix:{qemu}"]
    argv += ["--listen", f"unix:{listen}", "--state-dir", str(state)]
    return ["env", f"PYTHONPATH={trees[way]}", *argv] if way in trees else argv


@contextmanager
def process(argv: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as running:
        try:
            yield running
        finally:
            running.kill()


def measure(qemu: str, rounds: int, trees: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """For each way: p50 and p99 of the round trip in us, pipelined commands a second (median), and us for a
    connection with one command, where the way has connections of its own."""
    ways = (*WAYS, *trees)
    with ExitStack() as stack:
        shm = Path("/dev/shm")
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None)))
        monitors = {way: directory / f"{number}.qemu" for number, way in enumerate((*ways, NEW))}
        argv = [qemu, "-machine", "none", "-nodefaults", "-nographic", "-display", "none"]
        for path in monitors.values():
            argv += ["-qmp", f"unix:{path},server=on,wait=off"]
        stack.enter_context(process(argv))
        while not all(path.exists() for path in monitors.values()):
            time.sleep(0.02)
        clients, anew = {"direct": Client(monitors["direct"])}, {"direct": monitors[NEW]}
        for number, way in enumerate(ways[1:]):
            listen = directory / f"way{number}"
            stack.enter_context(process(command(way, monitors[way], listen, trees)))
            clients[way] = Client(listen)
            if way == "refault" or way in trees:
                anew[way] = listen
        for client in clients.values():
            client.round_trips(50)
        times: dict[str, list[list[float]]] = {way: [] for way in ways}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        connects: dict[str, list[float]] = {way: [] for way in anew}
        for turn in range(rounds):
            order = ways[turn % len(ways) :] + ways[: turn % len(ways)]
            for way in order:
                times[way].append(clients[way].round_trips(PER_ROUND))
            for way in order:
                rates[way].append(clients[way].pipelined(PIPELINED))
            for way in filter(anew.__contains__, order):
                connects[way].append(connections(anew[way], CONNECTIONS))
        return {way: row(times, rates, way) | connection_row(connects, way) for way in ways}


def ratio(of: list[float], to: list[float]) -> float:
    """The median over the rounds, each round's ways compared with each other."""
    return statistics.median(one / other for one, other in zip(of, to, strict=True))


def connection_row(connects: dict[str, list[float]], way: str) -> dict[str, float]:
    """A way's figures of new connections, if it has some."""
    if way not in connects:
        return {}
    return {
        "connection_us": statistics.median(connects[way]) * 1e6,
        "connection_to_direct": ratio(connects[way], connects["direct"]),
        "connection_to_refault": ratio(connects[way], connects["refault"]),
    }


def row(times: dict[str, list[list[float]]], rates: dict[str, list[float]], way: str) -> dict[str, float]:
    """A way's figures of round trips and pipelined commands."""
    every = [time for turn in times[way] for time in turn]
    medians = {name: [statistics.median(turn) for turn in turns] for name, turns in times.items()}
    return {
        "p50_us": statistics.median(every) * 1e6,
        "p99_us": statistics.quantiles(every, n=100)[98] * 1e6,
        "p50_to_direct": ratio(medians[way], medians["direct"]),
        "p50_to_pump": ratio(medians[way], medians["pump"]),
        "p50_to_socat": ratio(medians[way], medians["socat"]),
        "p50_to_refault": ratio(medians[way], medians["refault"]),
        "commands_per_second": statistics.median(rates[way]),
        "rate_to_direct": ratio(rates[way], rates["direct"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--qemu", default=os.environ.get("QEMU", "qemu-system-x86_64"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--beside", action="append", default=[], help="a built checkout, whose refault runs too"
    )
    parser.add_argument("--serve", nargs=3, metavar=("WAY", "QEMU", "LISTEN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        way, qemu, listen = options.serve
        SERVERS[way](qemu, listen)
        return
    trees = {f"refault, {Path(tree).name}": Path(tree).resolve() / "src" for tree in options.beside}
    result = measure(options.qemu, options.rounds, trees)
    if options.json:
        print(json.dumps(result))
        return
    heads = "us,p99 us,x direct,x pump,x socat,x refault,commands/s,x direct,connect us,x direct,x refault"
    print(f"{'way':20}" + "".join(f" {head:>10}" for head in heads.split(",")))
    for way, line in result.items():
        print(f"{way:20}" + "".join(f" {figure:10.{0 if figure > 100 else 2}f}" for figure in line.values()))
    added, theirs = (result[way]["p50_us"] - result["direct"]["p50_us"] for way in ("refault", "qemu.qmp"))
    print(f"added to the round trip: refault {added:.1f} us, a qemu.qmp proxy {theirs:.1f} us")


if __name__ == "__main__":
    main()
