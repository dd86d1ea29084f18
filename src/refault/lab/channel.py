"""The breakable network between the two ends of a migration, as the lab and the tests handle it."""

from __future__ import annotations

import contextlib
import enum
import functools
import random
import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import trio

from .process import Process, ProcessFailed, started
from .procnet import ESTABLISHED, is_listening, listeners, tcp_sockets
from .tasks import background

_FIRST_PORT, _SHARE = 10000, 100
_LOOK = 0.05  # how long a stopped carrier is watched for a request before it may go on and be stopped again


class Loss(enum.Enum):
    """The ways in which the lab loses a channel."""

    RESET = "reset"
    CLOSE = "close"
    KILL = "killed carrier"


@dataclass(frozen=True)
class Lost:
    """A loss that was made: when (trio's clock, seconds) and how many return-path bytes were lost inside."""

    loss: Loss
    when: float
    bytes_inside: int = 0


@dataclass(frozen=True)
class Cut:
    """A loss at a place in the stream: when ``extra`` bytes have passed after ``pattern`` was first met.

    ``pattern`` is a regular expression over bytes, of matches up to 64 bytes; ``forward`` is from the source
    to the destination; below 0 ``extra`` keeps back the end of what matched and of what came before it, as
    far as that has not passed. ``connection`` says whether those that are open now are cut, or one of the
    next.
    """

    loss: Literal[Loss.RESET, Loss.CLOSE]
    forward: bool
    pattern: bytes
    extra: int = 0
    connection: Literal["now", "next"] = "next"

    def command(self, *, freezes: bool = False) -> str:
        """As the carrier takes it; where it ``freezes`` nothing is lost there."""
        way, how = "forward" if self.forward else "backward", "freeze" if freezes else self.loss.value
        return f"cut {self.connection} {how} {way} {self.extra} {self.pattern.hex()}"


@dataclass(frozen=True)
class Between:
    """Where the carrier stands: started with ``prefix`` in the source's network namespace, it connects to
    ``far_host`` (by default its own), in the namespace of the process ``far_pid``.
    """

    prefix: Sequence[str] = ()
    far_host: str | None = None
    far_pid: int | None = None


class _Carrier:
    def __init__(self, process: Process, control: trio.SocketStream) -> None:
        self.process = process
        self.killed = False
        self._control = control

    async def command(self, word: str, deadline: float = 30) -> None:
        line = word.encode() + b"\n"
        answer = b""
        with trio.fail_after(deadline):
            await self._control.send_all(line)
            while answer != line:
                answer += (more := await self._control.receive_some(len(line) - len(answer)))
                if not more:
                    raise ProcessFailed(f"the carrier has ended; its last output:\n{self.process.tail()}")


class Channel:
    """A carrier that runs, and a spare that takes its place at once when it is killed. Made by
    ``start_channel``.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        processes: contextlib.ExitStack,
        directory: Path,
        host: str,
        port: int,
        target: int,
        between: Between,
    ) -> None:
        self.host = between.far_host or host
        self.port = port
        self._near_host = host
        self._between = between
        self._nursery = nursery
        self._processes = processes
        self._directory = directory
        self._target = target
        self._others: tuple[int, ...] = ()
        self._aim = f"target {target}"
        self._count = 0
        self._spare: _Carrier | None = None
        self._spare_there = trio.Event()
        self._carrier: _Carrier | None = None

    async def begin(self) -> None:
        """Starts the first carrier and its spare."""
        self._nursery.start_soon(self._keep_carrier)
        await self._replace()

    @property
    def uri(self) -> str:
        """What the source's `migrate` is given."""
        return f"tcp:{self._near_host}:{self.port}"

    @property
    def target_uri(self) -> str:
        """What the destination's `migrate-incoming` or `migrate-recover` is given."""
        return f"tcp:{self.host}:{self._target}"

    async def retarget(self, port: int | None = None) -> None:
        """Leads to another port of the destination from now on, by default a free one; connections stay.

        What listens on the first is QEMU's old listener, which may be open for ever.
        """
        self._target = port or free_port()
        self._aim = f"target {self._target}"
        await self._running().command(self._aim)

    async def lead_once(self, other: int) -> None:
        """Leads to what begins to listen on the target port or ``other``, to each socket once.

        QEMU's old listeners stay open and are dangerous to connect to (docs/campaign.md, Strangers): in this
        network nobody makes that mistake.
        """
        self._others = (other,)
        self._pass_over_listeners()
        await self._running().command(self._aim)

    async def wait_open(self) -> None:
        """Waits until the channel accepts, which it does when the destination does; the deadline is the
        caller's.
        """
        while not is_listening(self.port, self.pid):
            await trio.sleep(0.001)

    @property
    def pid(self) -> int:
        """The process id of the carrier that runs now."""
        return self._running().process.pid

    async def lose(self, loss: Loss) -> Lost:
        """Loses the channel in one of the ways; the network is there again at once."""
        if loss is Loss.KILL:
            return await self.kill()
        when = trio.current_time()
        await self._running().command(loss.value)
        return Lost(loss, when)

    async def reset(self) -> Lost:
        """Breaks all connections: both ends see a reset."""
        return await self.lose(Loss.RESET)

    async def close(self) -> Lost:
        """Ends all connections: both ends see an orderly end."""
        return await self.lose(Loss.CLOSE)

    async def cut_at(self, cut: Cut, *, freezes: bool = False) -> None:
        """Arms the carrier to lose a channel at a place in the stream, in place of a cut not made yet; or,
        with ``freezes``, to lose nothing and be silent from there on (``was_frozen``), until ``thaw``.
        """
        await self._running().command(cut.command(freezes=freezes))

    async def was_cut(self, cut: Cut, deadline: float = 30.0) -> Lost:
        """Waits for the cut that was armed; raises trio.TooSlowError after ``deadline`` seconds, and then the
        channel is to be thrown away.
        """
        await self._running().command("cut-done", deadline)
        return Lost(cut.loss, trio.current_time())

    async def was_frozen(self, deadline: float = 30.0) -> float:
        """Waits for the place where the carrier was armed to fall silent; the time. Raises trio.TooSlowError
        after ``deadline`` seconds.
        """
        stat = Path(f"/proc/{self.pid}/stat")
        with trio.fail_after(deadline):
            while stat.read_text().rpartition(")")[2].split()[0] != "T":
                await trio.sleep(0.0005)
        return trio.current_time()

    async def kill(self, *, request_inside: bool = True, deadline: float = 40.0, last: bool = False) -> Lost:
        """Kills the carrier, by default when unread bytes of the return path (page requests) are inside it.

        ``last``: no spare is started for a next kill, which would take processor time from the recovery.
        Raises trio.TooSlowError when no request came by for ``deadline`` seconds; the carrier runs on then.
        """
        inside = await self.freeze_with_request(deadline) if request_inside else 0
        carrier = self._running()
        when = trio.current_time()
        if self._others:
            self._pass_over_listeners()  # the next carrier cannot know them: the end may listen anew at once
        carrier.killed = True
        carrier.process.kill()
        await self._replace(last)
        return Lost(Loss.KILL, when, inside)

    def freeze(self) -> None:
        """Makes the network silent: nothing passes, nobody is told."""
        self._running().process.signal(signal.SIGSTOP)

    async def freeze_with_request(self, deadline: float = 40.0) -> int:
        """Makes the network silent when unread bytes of the return path are inside the carrier; how many.

        Raises trio.TooSlowError when no request came by for ``deadline`` seconds.
        """
        with trio.fail_after(deadline):
            while not (inside := await self._stop_with_request()):
                await trio.sleep(random.uniform(0.001, 0.01))  # noqa: S311
        return inside

    def thaw(self) -> None:
        """Ends the silence."""
        self._running().process.signal(signal.SIGCONT)

    def unread_requests(self) -> int:
        """Bytes that the destination sent and the carrier has not read yet; of use while it is frozen."""
        ports = (self._target, *self._others)
        rows = tcp_sockets(self.pid)
        return sum(row.unread for row in rows if row.state == ESTABLISHED and row.remote[1] in ports)

    def _pass_over_listeners(self) -> None:
        ports = (self._target, *self._others)
        far_pid = self._between.far_pid or "self"
        used = set().union(*(listeners(port, far_pid) for port in ports)) or {0}
        self._aim = f"once {' '.join(map(str, ports))} {','.join(map(str, used))}"

    def _running(self) -> _Carrier:
        if self._carrier is None:
            raise RuntimeError("the channel has no carrier: it is being replaced")
        return self._carrier

    async def _stop_with_request(self) -> int:
        """Stops the carrier and looks for a request inside; without one it goes on."""
        inside = 0
        self.freeze()
        try:
            with trio.move_on_after(_LOOK):
                while not (inside := self.unread_requests()):
                    await trio.sleep(0.001)
        finally:
            if not inside:
                self.thaw()
        return inside

    async def _replace(self, last: bool = False) -> None:
        with trio.fail_after(30):
            await self._spare_there.wait()
        carrier, self._spare = self._spare, None
        if carrier is None:
            raise RuntimeError("two losses at once")
        await carrier.command(self._aim)
        await carrier.command("open")
        self._carrier = carrier
        self._spare_there = trio.Event()
        if not last:
            self._nursery.start_soon(self._keep_carrier)

    async def _keep_carrier(self) -> None:
        """One carrier's life: a spare until it is opened, until it is killed."""
        ours, theirs = socket.socketpair()
        self._count += 1
        command = [*self._between.prefix, sys.executable, "-m", "refault.lab.carrier"]
        command += ["--listen", f"{self._near_host}:{self.port}", "--connect", f"{self.host}:{self._target}"]
        if self._between.far_pid is not None:
            command += ["--far-pid", str(self._between.far_pid)]
        log = self._directory / f"carrier{self._count}.log"
        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as control:
            with theirs:
                process = self._processes.enter_context(
                    started("carrier", command, log, stdin=theirs.fileno())
                )
            carrier = _Carrier(process, control)
            await carrier.command("ready")
            self._spare = carrier
            self._spare_there.set()
            await process.wait()
            if not carrier.killed:
                process.must_run()


@contextlib.asynccontextmanager
async def start_channel(
    directory: Path, target: int, *, host: str = "127.0.0.1", between: Between | None = None
) -> AsyncIterator[Channel]:
    """Starts a channel to the destination's port ``target`` on ``host``; ended when the block is left.

    ``between``: where the carrier stands, when the two ends have networks of their own; ``host`` is the
    source's. A carrier that ends without having been told to makes the block fail with ProcessFailed.
    """
    with contextlib.ExitStack() as processes:
        async with background() as nursery:
            channel = Channel(nursery, processes, directory, host, free_port(), target, between or Between())
            await channel.begin()
            yield channel


def free_port() -> int:
    """A TCP port nobody uses, below those that the kernel hands out by itself, so that it stays free. No
    other process that asks here is given it, though it is bound much later.

    Raises OSError where there is none.
    """
    while True:
        for _ in range(len(_ours)):
            _ours.rotate(-1)
            with contextlib.suppress(OSError):
                return _bound(_ours[-1])
        share = next(_shares(), None)
        if share is None:
            return _bound(0)
        _ours.extend(share)


_ours: deque[int] = deque()
"""The ports of this process, the next at the left."""


def _bound(port: int) -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", port))
        return int(sock.getsockname()[1])


@functools.cache
def _shares() -> Iterator[range]:
    """Those that no other process has, each this one's from then on: while it has the socket of that name."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    firsts = list(range(_FIRST_PORT, low - _SHARE + 1, _SHARE))
    random.shuffle(firsts)
    for first in firsts:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0refault-lab-ports-{first}")
        except OSError:
            claim.close()
            continue
        claim.detach()  # open for as long as the process is there
        yield range(first, first + _SHARE)
