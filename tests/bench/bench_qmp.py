"""What refault costs a QMP client: round trips and pipelined commands, beside other ways through.

One QEMU has one monitor for each way: directly, and through refault, socat, a bare trio byte pump, and a
proxy written with the qemu.qmp library. The ways take turns in small rounds, so that what else the machine
does meets all alike.

Run: python -m tests.bench.bench_qmp [--qemu QEMU] [--rounds N] [--json]
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import trio

WAYS = ("direct", "pump", "refault", "socat", "qemu.qmp")
QUERY = b'{"execute": "query-status", "id": 1}\n'
PER_ROUND = 100
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


def serve_refault(qemu: str, listen: str) -> None:
    from refault.daemon.monitor.address_text import parse_address
    from refault.daemon.monitor.monitor import Monitor

    trio.run(Monitor("bench", parse_address(qemu), [parse_address(listen, server=True)]).run)


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
    "refault": serve_refault,
    "qemu.qmp": serve_library,
}


def command(way: str, qemu: Path, listen: Path) -> list[str]:
    if way == "socat":
        return ["socat", f"UNIX-LISTEN:{listen},fork", f"UNIX-CONNECT:{qemu}"]
    return [sys.executable, __file__, "--serve", way, str(qemu), str(listen)]


@contextmanager
def process(argv: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(argv) as running:
        try:
            yield running
        finally:
            running.kill()


def measure(qemu: str, rounds: int) -> dict[str, dict[str, float]]:
    """For each way: p50 and p99 of the round trip in us, and pipelined commands a second (median)."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        monitors = {way: directory / f"{way}.qemu" for way in WAYS}
        argv = [qemu, "-machine", "none", "-nodefaults", "-nographic", "-display", "none"]
        for path in monitors.values():
            argv += ["-qmp", f"unix:{path},server=on,wait=off"]
        stack.enter_context(process(argv))
        while not all(path.exists() for path in monitors.values()):
            time.sleep(0.02)
        clients = {"direct": Client(monitors["direct"])}
        for way in WAYS[1:]:
            listen = directory / way
            stack.enter_context(process(command(way, monitors[way], listen)))
            clients[way] = Client(listen)
        for client in clients.values():
            client.round_trips(50)
        times: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        rates: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(rounds):
            order = WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]
            for way in order:
                times[way].append(clients[way].round_trips(PER_ROUND))
            for way in order:
                rates[way].append(clients[way].pipelined(PIPELINED))
        return {way: row(times, rates, way) for way in WAYS}


def row(times: dict[str, list[list[float]]], rates: dict[str, list[float]], way: str) -> dict[str, float]:
    """A way's figures. Ratios are medians over the rounds, each round's ways compared with each other."""
    every = [time for turn in times[way] for time in turn]
    medians = {name: [statistics.median(turn) for turn in turns] for name, turns in times.items()}

    def ratio(of: list[float], to: list[float]) -> float:
        return statistics.median(one / other for one, other in zip(of, to, strict=True))

    return {
        "p50_us": statistics.median(every) * 1e6,
        "p99_us": statistics.quantiles(every, n=100)[98] * 1e6,
        "p50_to_direct": ratio(medians[way], medians["direct"]),
        "p50_to_pump": ratio(medians[way], medians["pump"]),
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
    parser.add_argument("--serve", nargs=3, metavar=("WAY", "QEMU", "LISTEN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        way, qemu, listen = options.serve
        SERVERS[way](qemu, listen)
        return
    result = measure(options.qemu, options.rounds)
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"{'way':10} {'p50 us':>8} {'p99 us':>8} {'x direct':>9} {'x pump':>7}"
        f" {'commands/s':>11} {'x direct':>9}"
    )
    for way in WAYS:
        line = result[way]
        print(
            f"{way:10} {line['p50_us']:8.1f} {line['p99_us']:8.1f} {line['p50_to_direct']:9.2f}"
            f" {line['p50_to_pump']:7.2f} {line['commands_per_second']:11.0f} {line['rate_to_direct']:9.2f}"
        )
    added, theirs = (result[way]["p50_us"] - result["direct"]["p50_us"] for way in ("refault", "qemu.qmp"))
    print(f"added to the round trip: refault {added:.1f} us, a qemu.qmp proxy {theirs:.1f} us")


if __name__ == "__main__":
    main()
