"""Random courses of ends on a relay and, beside it, on plain TCP sockets that no relay is between.

    QEMU's end ══ pump ══ the other host's end          an end ════════════ another end
    relayed, main connection and lanes                  plain, one for each, on which the same is done

Every byte that a plain socket would have given must have come through the pump as well, and what was asked
for on the return path must be on record, whoever closed, reset or half closed what, in what order, and
whatever the pump was told meanwhile. What is written after the far side was lost is beyond that: a channel is
lost as a whole (cext/ends.h).

    python -m tests.model.ends --steps 1000000 --seed 1
"""

from __future__ import annotations

import argparse
import array
import contextlib
import errno
import fcntl
import random
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.unit.channel import streams

from refault.channel.relay import Lane, Relay
from refault.migration.phase import Role

BLOCK = b"pc.ram"
PAGE = 4096
PAGES = 1 << 20
DEADLINE = 20.0
CHUNK = 4096
MOST = 40 * 1024
"""Bytes on one direction of one connection in a course: all kernels together hold them."""
MOST_REQUESTS = 60
COURSES_EACH = 100
"""On one relay, channel after channel."""

BEGINNING = (
    streams.HEADER + streams.configuration() + streams.command(1) + streams.advise() + streams.start(b"ram")
    + streams.block_list([(BLOCK, PAGES * PAGE, b"")]) + streams.EOS + streams.footer()
)  # fmt: skip
SECTION = streams.part() + streams.zero(0, BLOCK) + streams.EOS + streams.footer()
EOF = streams.part(kind=3) + streams.EOS + streams.footer() + streams.EOF
RESET = struct.pack("ii", 1, 0)
REQUEST = 4 + 8 + 4 + 1 + len(BLOCK)
"""The length of a request."""
_TCP_CLOSE = 7


class NotAsPlain(Exception):  # noqa: N818 - it says what happened
    """Something came through a plain socket and not through the pump."""


@dataclass
class End:
    """One end of a relayed connection, and the same end of the plain one beside it."""

    relayed: socket.socket
    plain: socket.socket
    got: bytearray = field(default_factory=bytearray)
    """Read from the relayed one."""
    plainly: bytearray = field(default_factory=bytearray)
    """Read from the plain one."""
    sent: bytearray = field(default_factory=bytearray)
    promised: int = 0
    """Of `sent`, the bytes that are to reach the other end."""
    writes: bool = True
    open: bool = True

    def send(self, data: bytes, *, promised: bool) -> None:
        """Writes on both, as far as they take it."""
        with contextlib.suppress(ConnectionError):
            self.plain.send(data)
        try:
            taken = self.relayed.send(data)
        except ConnectionError:
            self.writes = False
            return
        self.sent += data[:taken]
        if promised:
            self.promised = len(self.sent)

    def read(self) -> None:
        """Takes what is there."""
        for end, got in ((self.relayed, self.got), (self.plain, self.plainly)):
            with contextlib.suppress(OSError):
                while data := end.recv(1 << 16):
                    got += data

    def half_close(self) -> None:
        """Ends its writing direction."""
        self.writes = False
        for end in (self.relayed, self.plain):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_WR)

    def close(self, *, reset: bool) -> None:
        """Closes it, in order or by a reset."""
        self.writes = self.open = False
        for end in (self.relayed, self.plain):
            if reset:
                with contextlib.suppress(OSError):  # a unix socket has none
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            end.close()

    def arrived(self) -> None:
        """Waits until the kernels beyond have all that was sent."""
        deadline = time.monotonic() + DEADLINE
        for end in (self.relayed, self.plain):
            while under_way := _under_way(end):
                if time.monotonic() > deadline:
                    raise NotAsPlain(f"of {len(self.sent)} bytes {under_way} do not arrive")
                time.sleep(0.0001)

    def promises_what_arrived(self) -> int:
        """What is under way reaches no end that is closed now. Gives the bytes that were not."""
        there = len(self.sent) - _under_way(self.relayed)
        self.promised = min(self.promised, there)
        return there


def _under_way(end: socket.socket) -> int:
    """Bytes that the kernel beyond does not have yet, and is going to."""
    if end.family != socket.AF_INET:
        return 0  # there is one kernel
    count = array.array("i", [0])
    fcntl.ioctl(end, termios.TIOCOUTQ, count)
    was_reset = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE
    return 0 if was_reset else count[0]


@dataclass
class Connection:
    """QEMU's end and the other host's."""

    qemu: End
    host: End
    lane: Lane | None = None
    """What it carries; None for the main connection."""

    def close(self) -> None:
        for end in (self.qemu, self.host):
            if end.open:
                end.close(reset=False)


class Course:
    """One channel of a relay, from its beginning to its end."""

    def __init__(self, relay: Relay, role: Role, chance: random.Random, first_page: int) -> None:
        self.relay = relay
        self.role = role
        self.chance = chance
        self.page = first_page
        """The next one to be asked for."""
        self.asked = 0
        """Requests that are to be on record."""
        self.lost = False
        """Whether the far side may count as lost."""
        self.told = False
        """Whether that is to be told."""
        self.done: list[str] = []
        self.read = chance.random() < 0.5
        """Whether the forward stream can be decoded."""
        self.completed = False
        self.number = relay.look().channel + 1
        lanes = chance.choice((0, 0, 1, 2))
        self.kind = chance.choice(list(Lane))
        self.waiting = lanes
        self.connections = [self._connect(None, lanes)]
        self._until(lambda: relay.look().channel == self.number, "the channel is attached")
        if self.read:
            self._source_end(self.main).send(BEGINNING, promised=True)

    @property
    def main(self) -> Connection:
        """The main connection."""
        return self.connections[0]

    # ---- what is done ----

    def step(self) -> None:
        """One more of all that can happen."""
        happen: list[tuple[int, Callable[[], object]]] = [
            (30, self._forward),
            (20, self._ask),
            (10, self._take),
            (3, self._lane if self.waiting else self._forward),
            (2, self._host_ends),
            (1, self._qemu_ends),
            (1, self._complete),
        ]
        if self.chance.random() < 0.01:
            happen.append((60, self._lose))
        weights = [weight for weight, _ in happen]
        action = self.chance.choices([what for _, what in happen], weights)[0]
        self.done.append(action.__name__)
        action()

    def _connect(self, lane: Lane | None, lanes: int = 0) -> Connection:
        local, qemu = socket.socketpair()
        far, host = _tcp_pair()
        near, away = _tcp_pair()
        if lane is None:
            self.relay.attach(local.detach(), far.detach(), recovered=False, may_replay=True, lanes=lanes)
        else:
            self.relay.add_lane(self.number, lane, local.detach(), far.detach())
        for end in (qemu, host, near, away):
            end.setblocking(False)
        return Connection(End(qemu, near), End(host, away), lane)

    def _source_end(self, connection: Connection) -> End:
        return connection.qemu if self.role is Role.SOURCE else connection.host

    def _destination_end(self, connection: Connection) -> End:
        return connection.host if self.role is Role.SOURCE else connection.qemu

    def _lane(self) -> None:
        if not self.main.qemu.open or self.lost:
            return
        before = self.relay.look().lanes
        self.connections.append(self._connect(self.kind))
        self.waiting -= 1
        self._until(lambda: self.relay.look().lanes > before, "a lane is added")

    def _forward(self) -> None:
        connection = self.chance.choice(self.connections)
        end = self._source_end(connection)
        if not end.writes or len(end.sent) > MOST:
            return
        if connection.lane is None and self.completed:
            return
        if connection.lane is Lane.PREEMPT:
            data = streams.zero(self.chance.randrange(64) * PAGE, BLOCK)
        elif connection.lane is None and self.read:
            data = SECTION * self.chance.randrange(1, 30)
        else:
            data = self.chance.randbytes(self.chance.randrange(1, CHUNK))
        end.send(data, promised=self._promises(connection))

    def _complete(self) -> None:
        if self.read and not self.completed and self._source_end(self.main).writes:
            self.completed = True
            self._source_end(self.main).send(EOF, promised=self._promises(self.main))

    def _ask(self) -> None:
        end = self._destination_end(self.main)
        if not end.writes or len(end.sent) > MOST_REQUESTS * REQUEST:
            return
        before = len(end.sent)
        end.send(_request(self.page), promised=self._promises(self.main))
        self.page += 1
        heard = end is self.main.qemu or (not self.lost and self.main.qemu.open)
        self.asked += heard and len(end.sent) > before

    def _promises(self, connection: Connection) -> bool:
        return not self.lost and connection.qemu.open and connection.host.open and self.main.qemu.writes

    def _take(self) -> None:
        connection = self.chance.choice(self.connections)
        end = self.chance.choice((connection.qemu, connection.host))
        if end.open:
            end.read()

    def _host_ends(self) -> None:
        connection = self.chance.choice(self.connections)
        host = connection.host
        if not host.open:
            return
        for other in self.connections:
            self._gets(other.host, other.qemu)
            if other.host.open:
                other.host.arrived()
        how = self.chance.choice(("half", "close", "reset"))
        self.done.append(how)
        if connection.lane is not Lane.MULTIFD or how == "reset":
            self.lost = True
        if connection.lane is None:
            # Where pages go over several connections, and more of them are due or it cannot be read whether
            # they are, a destination's QEMU is shown the end.
            all_due = self.completed or how == "reset" or self.role is Role.SOURCE
            self.told = (self.read and all_due) or self.kind is Lane.PREEMPT or not self.connections[1:]
        if how == "half":
            host.half_close()
        else:
            host.close(reset=how == "reset")

    def _qemu_ends(self) -> None:
        connection = self.chance.choice(self.connections)
        if not connection.qemu.open:
            return
        for other in self.connections:
            self._gets(other.qemu, other.host)
        if connection.lane is None:
            self.done.append("main")
        connection.qemu.close(reset=False)
        if connection.lane is None and self.role is Role.SOURCE and self.waiting:
            self.relay.no_more_lanes(self.number)

    def _lose(self) -> None:
        for connection in self.connections:
            self._gets(connection.host, connection.qemu)
            if connection.host.open:
                connection.host.arrived()
        self.lost = self.told = True
        self.relay.lose(self.number, errno.ECONNREFUSED)

    # ---- what must have come of it ----

    def _gets(self, reader: End, writer: End) -> None:
        """An end that is open gets what it was promised, and what a plain one gets of that."""
        if not reader.open:
            return
        wanted = writer.promised

        def has() -> bool:
            reader.read()
            return len(reader.got) >= min(wanted, len(reader.plainly))

        self._until(has, "all that a plain socket gives has come")
        if not writer.sent.startswith(reader.got):
            raise NotAsPlain(f"other bytes than were sent: {self}")

    def finish(self) -> None:
        """Lets everybody read, has the channel closed, and looks at what came."""
        if self.told and self.main.qemu.open:
            for connection in self.connections:
                self._gets(connection.qemu, connection.host)
            self._until(
                lambda: self.relay.look().far.lost or self.relay.look().local.lost,
                "the loss is told",
                read=True,
            )
        arrives = self.chance.random() < 0.5
        for connection in self.connections:
            host = connection.host
            if not host.open:
                continue
            if arrives:
                host.arrived()
            there = host.promises_what_arrived()
            if host is self._destination_end(self.main):
                self.asked = min(self.asked, there // REQUEST)
        self.relay.close_channel(self.number)
        for connection in self.connections:
            if connection.host.open:
                connection.host.arrived()
        for connection in self.connections:
            self._gets(connection.qemu, connection.host)
            if not self.lost:
                self._gets(connection.host, connection.qemu)
        for connection in self.connections:
            connection.close()

    def _until(self, holds: Callable[[], bool], what: str, *, read: bool = False) -> None:
        deadline = time.monotonic() + DEADLINE
        pause = 0.0
        while not holds():
            if read:
                for connection in self.connections:
                    if connection.qemu.open:
                        connection.qemu.read()
            if time.monotonic() > deadline:
                raise NotAsPlain(f"not so after {DEADLINE:g} s: {what}: {self}")
            time.sleep(pause)
            pause = min(pause + 0.00005, 0.005)

    def __str__(self) -> str:
        ends = [
            f"{connection.lane.name if connection.lane is not None else 'main'}: "
            + ", ".join(
                f"{name} sent {len(end.sent)} ({end.promised} to arrive), got {len(end.got)}, plainly"
                f" {len(end.plainly)}"
                for name, end in (("QEMU", connection.qemu), ("host", connection.host))
            )
            for connection in self.connections
        ]
        return (
            f"{self.role}, {'read' if self.read else 'unread'}, {self.relay.look()}; {'; '.join(ends)}; "
            + " ".join(name.strip("_") for name in self.done)
        )


def _request(page: int) -> bytes:
    body = struct.pack(">QI", page * PAGE, PAGE) + bytes([len(BLOCK)]) + BLOCK
    return struct.pack(">HH", 3, len(body)) + body


_server: list[socket.socket] = []


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    if not _server:
        _server.append(socket.create_server(("127.0.0.1", 0)))
    near = socket.create_connection(_server[0].getsockname())
    away, _ = _server[0].accept()
    for end in (near, away):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, away


def run(steps: int, seed: int, tell: Callable[[str], object] = lambda _: None) -> int:
    """Does `steps` steps; how many courses they were. Raises NotAsPlain."""
    chance = random.Random(seed)
    courses = 0
    while steps > 0:
        role = chance.choice(list(Role))
        relay = Relay(role)
        asked = page = 0
        try:
            for _ in range(COURSES_EACH):
                course = Course(relay, role, chance, page)
                for _ in range(chance.randrange(1, 60)):
                    course.step()
                    steps -= 1
                course.finish()
                asked, page = asked + course.asked, course.page
                if relay.pages().recorded < asked:
                    deadline = time.monotonic() + DEADLINE
                    while relay.pages().recorded < asked:
                        if time.monotonic() > deadline:
                            raise NotAsPlain(f"{relay.pages().recorded} of {asked} on record: {course}")
                        time.sleep(0.0001)
                courses += 1
                if steps <= 0:
                    break
        finally:
            relay.close()
        tell(f"{courses} courses, {max(steps, 0)} steps to go")
    return courses


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    courses = run(options.steps, options.seed, lambda text: print(text, flush=True))
    print(f"{options.steps} steps in {courses} courses: no byte fewer than a plain socket gives")
    return 0


if __name__ == "__main__":
    sys.exit(main())
