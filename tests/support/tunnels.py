"""Two `refault tunnel`, and what breaks the connections between them."""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.breaking_proxy import BreakingProxy
from tests.support.until import until

_PIECE = 256 << 10
_BEGUN = re.compile(r"tunnel: (?:plain|session) side at (?:tcp:127\.0\.0\.1:(\d+)|unix:\S+)")


@dataclass
class Refault:
    """One end of a tunnel."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int
    """Where it listens; 0: a unix socket."""

    def text(self) -> str:
        """What it has logged so far."""
        return self.log.read_text()

    def says(self, what: str) -> None:
        """Waits until its log holds `what`, for it is written beside the work. Raises AssertionError."""
        until(lambda: what in self.text(), self.text)

    def memory(self) -> int:
        """Its resident memory, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) << 10

    def end(self) -> int:
        """SIGTERM, and its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextlib.contextmanager
def refault(listen: str, to: str, *options: str) -> Iterator[Refault]:
    """Starts one end, and waits until it listens."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        command = [sys.executable, "-m", "refault", "tunnel", "--listen", listen, "--to", to, *options]
        with log.open("wb") as opened:
            process = subprocess.Popen(command, stderr=opened)
        try:

            def listens() -> re.Match[str] | None:
                assert process.poll() is None, log.read_text()
                return _BEGUN.search(log.read_text())

            begun = until(listens, log.read_text)
            assert begun is not None
            yield Refault(process, log, int(begun[1] or 0))
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


@dataclass
class Tunnel:
    """Both ends, and the proxy between them."""

    plain: Refault
    session: Refault
    proxy: BreakingProxy
    target: socket.socket

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """A connection through it, from either side."""
        client = socket.create_connection(("127.0.0.1", self.plain.port), timeout=20)
        self.target.settimeout(20)
        server, _ = self.target.accept()
        server.settimeout(20)
        return client, server


@contextlib.contextmanager
def tunnel(*options: str, losses: int = 0, most: int = 1 << 20, seed: int | None = None) -> Iterator[Tunnel]:
    """A tunnel to a listening socket, which loses `losses` connections, each after at most `most` bytes."""
    seed = random.randrange(1 << 32) if seed is None else seed
    print(f"seed {seed}")
    with (
        socket.create_server(("127.0.0.1", 0), backlog=200) as target,
        refault("session:127.0.0.1:0", f"tcp:127.0.0.1:{target.getsockname()[1]}", *options) as answers,
        BreakingProxy(answers.port, seed, losses=losses, most=most) as proxy,
        refault("tcp:127.0.0.1:0", f"session:127.0.0.1:{proxy.port}", *options) as dials,
    ):
        yield Tunnel(dials, answers, proxy, target)


class Copy(threading.Thread):
    """Sends bytes of its own into one socket, and then its end, and compares what comes out of another."""

    def __init__(self, sender: socket.socket, receiver: socket.socket, size: int, seed: int) -> None:
        super().__init__(daemon=True)
        self._sender, self._receiver, self._size = sender, receiver, size
        self._block = random.Random(seed).randbytes(_PIECE + 4096)
        self._sent, self._received = hashlib.blake2b(), hashlib.blake2b()
        self.count = 0
        self.failed: BaseException | None = None

    def run(self) -> None:
        """Both at once."""
        sending = threading.Thread(target=self._guarded, args=(self._send,), daemon=True)
        sending.start()
        self._guarded(self._receive)
        sending.join()

    def check(self, seconds: float) -> None:
        """Waits for both ends, and fails where a byte is wrong."""
        self.join(seconds)
        assert not self.is_alive(), f"{self.count} of {self._size} bytes have come"
        if self.failed is not None:
            raise self.failed
        assert self.count == self._size
        assert self._received.digest() == self._sent.digest()

    def _guarded(self, task: object) -> None:
        try:
            task()  # type: ignore[operator]
        except BaseException as error:
            self.failed = error

    def _send(self) -> None:
        left, turn = self._size, 0
        while left:
            turn += 1  # no piece is like the one before
            piece = memoryview(self._block)[turn * 61 % 4096 :][: min(left, _PIECE)]
            self._sender.sendall(piece)
            self._sent.update(piece)
            left -= len(piece)
        self._sender.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        while data := self._receiver.recv(_PIECE):
            self._received.update(data)
            self.count += len(data)


def copies(pairs: Sequence[tuple[socket.socket, socket.socket]], forward: int, back: int) -> list[Copy]:
    """Begins to copy in both directions of each connection."""
    begun = [
        Copy(*ends, size, seed)
        for number, (client, server) in enumerate(pairs)
        for ends, size, seed in (
            ((client, server), forward, 2 * number),
            ((server, client), back, 2 * number + 1),
        )
    ]
    for each in begun:
        each.start()
    return begun
