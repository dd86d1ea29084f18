"""refault killed at random moments under clients that are at work: none may notice.

Five clients: with 0, 1 or 40 commands in flight, one that reads large replies slowly, and one that passes
descriptors; at each kill a visitor in the midst of something (visitors.py); beside events that somebody at
another monitor of QEMU's makes happen. After so many kills: each command has had one answer, in order; each
event has come once, in order; QEMU has run each command once and no other, by its own trace (ran.py) and by
the fd sets.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import trio
from tests.campaign.ran import Said, miscounted
from tests.campaign.visitors import ALL, Visitor

from refault.qmp.splitter import Splitter

REFAULT = (sys.executable, "-m", "refault")
WEIGHTS = (4, 4, 4, 1, 4)
"""How often each of the visitors comes."""
EARLY = 0.3
"""Of the kills: those of a refault that is about to start."""
STARTED_WITHIN = 1.0
"""Seconds: such a one is killed within these, or a little later."""
NOTICED_WITHIN = 30.0
"""Seconds in which a client must have an answer, whatever befalls refault."""
UNDECIDED = 1_000
"""Ends for each thing that a kill may leave undecided."""


@dataclass
class Client:
    """What one client has sent and seen."""

    name: str
    window: int
    path: Path
    chance: random.Random
    fds: bool = False
    large: bool = False
    oob: bool = False
    said: Said = field(default_factory=Said)
    sent: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    events: list[tuple[str, int, int]] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    stop: bool = False
    heard: float = 0.0

    async def run(self) -> None:
        """Connects once and for all."""
        sock = trio.socket.socket(socket.AF_UNIX)
        with sock:
            await self._comes(sock)
            self._splitter = Splitter(lenient=True)
            self._sock = sock
            await self._say(
                b'{"execute": "qmp_capabilities"%s}'
                % (b', "arguments": {"enable": ["oob"]}' if self.oob else b"")
            )
            self._greetings = 2
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read)
                while not self.stop:
                    if len(self.sent) - len(self.answered) < self.window and not self._greetings:
                        await self._command()
                    else:
                        await trio.sleep(0.001)
                with trio.fail_after(NOTICED_WITHIN):
                    while len(self.answered) < len(self.sent):
                        await trio.sleep(0.01)
                await trio.sleep(0.3)  # for what comes twice
                nursery.cancel_scope.cancel()

    async def _comes(self, sock: trio.socket.SocketType) -> None:
        """A socket's file is there a moment before somebody listens."""
        with trio.fail_after(NOTICED_WITHIN):
            while True:
                try:
                    await sock.connect(str(self.path))
                except ConnectionRefusedError:
                    await trio.sleep(0.02)
                else:
                    return

    async def _command(self) -> None:
        name = f"{self.name}-{len(self.sent)}"
        self.sent.append(name)
        if self.fds:
            socket.send_fds(self._stdlib, [self.said.command("add-fd", name, opaque=name)], [2])
            return
        if self.large:
            data = self.said.command("query-qmp-schema", name)
        else:
            data = self.said.command("qom-list", name, path=f"/{name}")
        if self.chance.random() < 0.3:
            cut = self.chance.randrange(len(data))
            await self._say(data[:cut])
            await trio.sleep(self.chance.random() * 0.02)
            data = data[cut:]
        await self._say(data)

    @property
    def _stdlib(self) -> socket.socket:
        return self._sock._sock  # type: ignore[attr-defined,no-any-return]

    async def _say(self, data: bytes) -> None:
        while data:
            data = data[await self._sock.send(data) :]

    async def _read(self) -> None:
        while True:
            size = 4096 if self.large else 65536
            if self.large:
                await trio.sleep(0.0005)
            data = await self._sock.recv(size)
            if not data:
                self.odd.append("end of file")
                return
            self.heard = time.monotonic()
            for message in self._splitter.feed(data):
                if message.problem:
                    self.odd.append(f"torn: {message.raw[:80]!r}")
                    continue
                self._take(json.loads(message.raw))

    def _take(self, message: dict[str, object]) -> None:
        if self._greetings and ("QMP" in message or message == {"return": {}}):
            self._greetings -= 1
        elif "event" in message:
            stamp = message["timestamp"]
            assert isinstance(stamp, dict)
            self.events.append((str(message["event"]), stamp["seconds"], stamp["microseconds"]))
        elif "id" in message:
            self.answered.append(str(message["id"]))
            self.said.answered(self.answered[-1])
            if self.fds and "return" not in message:
                self.odd.append(json.dumps(message)[:150])
        else:
            self.odd.append(json.dumps(message)[:150])

    def verdict(self) -> list[str]:
        """What is wrong."""
        wrong = [f"{self.name}: {each}" for each in self.odd]
        if self.answered != self.sent:
            doubled = [each for each, count in Counter(self.answered).items() if count > 1]
            missing = sorted(set(self.sent) - set(self.answered))
            wrong.append(
                f"{self.name}: {len(self.sent)} sent, {len(self.answered)} answered; doubled {doubled[:5]},"
                f" missing {missing[:5]}"
            )
        return wrong


@contextmanager
def qemu_at(binary: str, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU with two monitors, that traces the commands it gets."""
    monitors = [f"unix:{directory}/{name},server=on,wait=off" for name in ("q", "q2")]
    process = subprocess.Popen(
        [
            *(binary, "-machine", "none", "-m", "4M", "-nodefaults", "-display", "none"),
            *("-qmp", monitors[0], "-qmp", monitors[1]),
            *("-trace", "handle_qmp_command", "-D", f"{directory}/trace"),
        ]
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def events_at(path: Path, seen: list[tuple[str, int, int]], stop: trio.Event) -> int:
    """Makes events happen, and writes down those that QEMU has told; the fd sets at the end."""
    stream = await trio.open_unix_socket(str(path))
    splitter = Splitter(lenient=True)
    async with stream:
        await stream.send_all(b'{"execute": "qmp_capabilities"}')
        turn = 0
        waits = 2
        while True:
            for message in splitter.feed(await stream.receive_some()):
                told = json.loads(message.raw)
                if "event" in told:
                    stamp = told["timestamp"]
                    seen.append((told["event"], stamp["seconds"], stamp["microseconds"]))
                elif told.get("id") == "sets":
                    return sum(len(each["fds"]) for each in told["return"])
                else:
                    waits -= 1
            if waits <= 0 and not stop.is_set():
                await trio.sleep(0.003)
                await stream.send_all(b'{"execute": "%s"}' % (b"stop", b"cont")[turn % 2])
                turn += 1
                waits = 1
            elif waits <= 0:
                await trio.sleep(1)
                await stream.send_all(b'{"execute": "query-fdsets", "id": "sets"}')


async def visit(visitor: Visitor, do: Callable[[Visitor], Awaitable[None]], wrong: list[str]) -> None:
    """One visitor, from its coming to its going."""
    if (told := await visitor.run(do)) is not None:
        wrong.append(told)


async def told(directory: Path) -> dict[str, int]:
    """What refault tells of the VM's clients; nothing where it has only just begun."""
    try:
        stream = await trio.open_unix_socket(str(directory / "control"))
    except OSError:
        return {}
    async with stream:
        vms = json.loads(b"".join([data async for data in stream]))["vms"]
    return dict(vms[0]["clients"]) if vms else {}


async def connected(directory: Path, expected: int) -> int:
    """How many clients refault serves: who has left is not served for long."""
    served = -1
    with trio.move_on_after(NOTICED_WITHIN):
        while (served := (await told(directory)).get("connected", -1)) != expected:
            await trio.sleep(0.1)
    return served


def start(directory: Path, program: Sequence[str] = REFAULT) -> subprocess.Popen[bytes]:
    """One more refault."""
    with open(directory / "log", "ab") as log:
        return subprocess.Popen(
            [
                *(*program, "run", "--name", "vm", "--qemu", f"{directory}/q", "--listen", f"{directory}/f"),
                *("--state-dir", f"{directory}/state", "--control", f"{directory}/control"),
            ],
            stderr=log,
        )


class Daemon(Protocol):
    """A refault in front of `q` in the campaign's directory that listens at `f`; `control` is there, too."""

    async def start(self) -> None:
        """Has one more run."""

    async def end(self, *, planned: bool) -> None:
        """Ends the one that runs, by SIGKILL or for the next one; returns when it is no more."""

    def over(self) -> None:
        """Ends it for good."""

    def log(self) -> str:
        """What all of them have said."""


class Child:
    """A process of ours."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        (directory / "state").mkdir()

    async def start(self) -> None:
        self._process = start(self._directory)

    async def end(self, *, planned: bool) -> None:
        self._process.send_signal(signal.SIGUSR2 if planned else signal.SIGKILL)
        await trio.to_thread.run_sync(self._process.wait)

    def over(self) -> None:
        self._process.kill()
        self._process.wait()

    def log(self) -> str:
        return (self._directory / "log").read_text()


def undecided(log: str) -> int:
    """What was done at a kill that the next refault could not tell from what it found, by what it says."""
    lost = sum(map(int, re.findall(r"(\d+) descriptors that clients had passed are lost", log)))
    return lost + log.count("cannot go on where the last refault ended")


async def campaign(
    binary: str, kills: int, seed: int, directory: Path, *, planned: bool, daemon: Daemon | None = None
) -> list[str]:
    """What was wrong after so many kills, of a child of ours where no other `daemon` is given."""
    chance = random.Random(seed)
    daemon = daemon or Child(directory)
    path = directory / "f"
    clients = [
        Client("none", 0, path, random.Random(seed + 1)),
        Client("one", 1, path, random.Random(seed + 2), oob=True),
        Client("many", 40, path, random.Random(seed + 3)),
        Client("fds", 1, path, random.Random(seed + 4), fds=True),
        Client("large", 2, path, random.Random(seed + 5), large=True),
    ]
    seen: list[tuple[str, int, int]] = []
    stop = trio.Event()
    sets, early = -1, 0
    visitors: list[Visitor] = []
    wrong: list[str] = []
    with qemu_at(binary, directory) as qemu:
        while not (directory / "q2").exists():
            assert qemu.poll() is None
            await trio.sleep(0.02)
        await daemon.start()
        try:
            while not path.exists():
                await trio.sleep(0.02)
            async with trio.open_nursery() as nursery:

                async def make_events() -> None:
                    nonlocal sets
                    sets = await events_at(directory / "q2", seen, stop)

                async with trio.open_nursery() as working:
                    for client in clients:
                        working.start_soon(client.run)
                    while not all(client.answered for client in clients if client.window):
                        await trio.sleep(0.02)
                    while not (await told(directory)).get("kept"):
                        await trio.sleep(0.02)
                    nursery.start_soon(make_events)
                    for _ in range(kills):
                        do = chance.choices(ALL, WEIGHTS)[0]
                        visitors.append(visitor := Visitor(path, do.__name__))
                        working.start_soon(visit, visitor, do, wrong)
                        with trio.move_on_after(NOTICED_WITHIN):
                            await visitor.ready.wait()
                        if chance.random() < 0.7:
                            await trio.sleep(chance.random() * 0.2)
                        await daemon.end(planned=planned)
                        visitor.killed.set()
                        if chance.random() < 0.3:
                            await trio.sleep(0.3)
                        await daemon.start()
                        if not planned and chance.random() < EARLY:  # in any moment of the start
                            await trio.sleep(chance.random() * STARTED_WITHIN)
                            await daemon.end(planned=False)
                            early += 1
                            await daemon.start()
                        restarted = time.monotonic()
                        with trio.move_on_after(NOTICED_WITHIN) as scope:
                            while any(client.heard < restarted for client in clients[1:]):
                                await trio.sleep(0.01)
                        if scope.cancelled_caught:
                            late = [client.name for client in clients if client.heard < restarted]
                            wrong.append(f"nothing heard for {NOTICED_WITHIN} s: {late}")
                            break
                    for client in clients:
                        client.window = 0
                    with trio.move_on_after(NOTICED_WITHIN):
                        while any(len(client.answered) < len(client.sent) for client in clients):
                            await trio.sleep(0.01)
                    stop.set()
                    with trio.move_on_after(NOTICED_WITHIN):  # until everybody has been told of all events
                        while sets < 0 or any(client.events[-1:] != seen[-1:] for client in clients):
                            await trio.sleep(0.01)
                    if (served := await connected(directory, len(clients))) != len(clients):
                        wrong.append(f"{served} clients are served, and there are {len(clients)}")
                    for client in clients:
                        client.stop = True
        except BaseExceptionGroup as error:
            wrong.append(repr(error)[:300])
        finally:
            daemon.over()
        assert qemu.poll() is None
    for client in clients:
        wrong += client.verdict()
        expected = (
            seen[seen.index(client.events[0]) :] if client.events and client.events[0] in seen else seen
        )
        if client.events != expected:
            at = next(
                (n for n, (a, b) in enumerate(zip(client.events, expected, strict=False)) if a != b), -1
            )
            wrong.append(f"{client.name}: {len(client.events)} events of {len(expected)}, differ at {at}")
    if sets != len(clients[3].sent):
        wrong.append(f"{len(clients[3].sent)} descriptors were passed, QEMU has {sets}")
    said = [*(client.said for client in clients), *(visitor.said for visitor in visitors)]
    ran, wrongly = miscounted((directory / "trace").read_text(), said)
    wrong += wrongly
    commands = sum(len(client.sent) for client in clients)
    ends, not_decided = kills + early, undecided(daemon.log())
    if not_decided * UNDECIDED > ends:
        wrong.append(f"{not_decided} not decided in {ends} ends, more than 1 in {UNDECIDED:,}")
    print(
        f"{binary}: {ends} ends, {early} in a start, {commands} commands,"
        f" {len(seen)} events, {sets} descriptors, {ran} commands in QEMU's trace,"
        f" {not_decided} not decided"
    )
    return wrong


def main() -> int:
    """The campaign, by the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--qemu", default="qemu-system-x86_64")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--planned", action="store_true", help="SIGUSR2 in place of SIGKILL")
    parser.add_argument("--keep", action="store_true", help="leaves the directory with the logs")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    directory = Path(tempfile.mkdtemp(prefix="refault-restart-"))
    wrong = trio.run(
        lambda: campaign(options.qemu, options.kills, options.seed, directory, planned=options.planned)
    )
    print("\n".join(wrong) or "nobody has noticed")
    if not options.keep and not wrong:
        for each in sorted(directory.rglob("*"), reverse=True):
            each.rmdir() if each.is_dir() else each.unlink()
        directory.rmdir()
    else:
        print(directory)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
