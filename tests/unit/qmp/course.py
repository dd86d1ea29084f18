"""A core at work, by a seed: what befalls it, its clients and its QEMU, and the record of that."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass, field
from typing import Any

import msgspec
from tests.unit.qmp.played import GREETING, command

from refault import __version__
from refault.daemon.kept.left import FORMAT, About, Left, encode
from refault.daemon.kept.sockets import Identity
from refault.qmp import saved
from refault.qmp.access import Rule
from refault.qmp.commands import Answer, Forward
from refault.qmp.hiding import Word
from refault.qmp.journal import HEADER, MAGIC, Kind, Record, checked
from refault.qmp.multiplexer import Multiplexer, nobody
from refault.qmp.replay import Called, Joined, Replay, Said, Verdict, give_descriptors
from refault.qmp.session import GONE, Client, Limits, Request
from refault.qmp.splitter import Splitter, compact

WATCHED = ("watched", "exec-oob-watched")


def new_core(asked: list[Request]) -> Multiplexer:
    return Multiplexer(
        limits=Limits(unsent=20_000),
        watch=WATCHED,
        ask=asked.append,
        discard=lambda _: None,
        on_event=lambda *_: None,
        on_ready=lambda: None,
        audit=lambda _: None,
    )


@dataclass
class Side:
    """One core and the transport around it, which sends as much as it is told to."""

    core: Multiplexer
    asked: list[Request]
    upstream: list[tuple[bytes, int]] = field(default_factory=list)
    backlogs: dict[int, bytes] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    before: bytes = b""
    killed: bool = False
    peeked: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    """Descriptors that are in a client's socket yet, and what was received with them."""
    passed: int = -1
    """The descriptor that came to QEMU last and was not taken."""
    chance: random.Random = field(default_factory=lambda: random.Random(7))

    def note(self, kind: Kind, who: int, data: bytes = b"", count: int = 0) -> None:
        self.records.append(Record(kind, who, count or len(data), memoryview(data)))

    def flush(self) -> None:
        """Takes what the core has to say into the transport."""
        self.upstream += self.core.upstream_out
        self.core.upstream_out = []
        self.core.dirty.clear()
        for client in self.core.clients.values():
            if client.out:
                self.backlogs[client.number] = self.backlogs.get(client.number, b"") + b"".join(client.out)
                client.out.clear()

    def send_client(self, number: int, most: int) -> bytes:
        data = self.backlogs.get(number, b"")[:most]
        if data:
            self.backlogs[number] = self.backlogs[number][len(data) :]
            self.core.clients[number].unsent -= len(data)
            self.note(Kind.SENT, number, count=len(data))
        return data

    def send_upstream(self, most: int) -> bytes:
        if not self.upstream:
            return b""
        data, fd = self.upstream[0]
        sent = data[:most]
        if fd >= 0:
            self.passed = fd
        self.upstream[0] = (data[len(sent) :], -1)
        if not self.upstream[0][0]:
            self.upstream.pop(0)
        self.note(Kind.SENT, 0, count=len(sent))
        for number, (peeked, _) in list(self.peeked.items()):
            if peeked == fd and self.chance.random() < 0.8:
                self.consume(number)
        return sent

    def consume(self, number: int) -> None:
        """What is in a client's socket with a descriptor is taken out."""
        _, data = self.peeked.pop(number)
        if number in self.core.clients:
            self.note(Kind.CONSUMED, number, data)

    def client_of(self, fd: int) -> int:
        """In whose socket a descriptor is yet, or 0."""
        return next((number for number, (peeked, _) in self.peeked.items() if peeked == fd), 0)

    def save(self) -> None:
        """Begins its record anew."""
        backlogs = self.backlogs
        self.before = saved.save(
            self.core, lambda client: [backlogs.get(client.number, b"")], self.upstream, self.client_of
        )
        self.records.clear()

    def file(self) -> bytes:
        """All of it, as it stands in a journal (cext/journal.h)."""
        numbers = self.core.clients
        socket = Identity(7, b"8 octets", "name")
        clients = {number: About("unix:/front", b"%8d" % number) for number in numbers}
        left = Left(FORMAT, __version__, "unix:/q", 1, 1, socket, [socket] * 4, [], clients, self.before)
        before, log = checked(encode(left)), b""
        for each in self.records:
            log += struct.pack("=B3xII4x", each.kind, each.who, each.count)
            log += bytes(each.data) + bytes(-len(each.data) % 8)
        log_at = HEADER + len(before)
        head = struct.pack("=8sQQQQ", MAGIC, log_at, log_at + len(log), len(log), (1 << 64) - 1)
        return head.ljust(HEADER, b"\0") + before + log

    def next(self) -> Side:
        """The next refault's, after a kill in this moment."""
        asked: list[Request] = []
        core = new_core(asked)
        replay = Replay(core)
        replay.run(self.before, list(self.records))
        there = {number: fd for number, (fd, _) in self.peeked.items()}
        replay.finish(lambda number: there.pop(number, -1))
        asked.extend(core.asked.values())
        side = Side(core, asked, peeked=self.peeked.copy(), passed=self.passed)
        side.flush()
        return side

    def lose(self) -> None:
        """Every descriptor that would not outlive a kill in this moment."""
        core = self.core
        core.upstream_out, self.upstream = self.upstream, []
        give_descriptors(core, lambda fd: fd if self.client_of(fd) else GONE)
        self.flush()

    def go_on(self) -> None:
        """Serves its clients."""
        for number, client in list(self.core.clients.items()):
            self.note(Kind.MORE, number)
            self.core.receive(client, b"")
        self.note(Kind.MORE, 0)
        self.core.receive_upstream(b"")
        self.flush()

    # what befalls it; each is noted first

    def join(self, rule: Rule) -> Client:
        joined = Joined(rule.read_only, sorted(rule.deny), rule.audit, msgspec.Raw(b"\xc0"), rule.hide_pause)
        self.note(Kind.JOINED, self.core.last_client + 1, msgspec.msgpack.encode(joined))
        return self.core.join(None, rule)

    def receive(self, number: int, data: bytes, fd: int) -> None:
        client = self.core.clients[number]
        if number in self.peeked:
            self.consume(number)
        self.note(Kind.PEEKED if fd >= 0 else Kind.RECEIVED, number, data)
        self.core.receive(client, data, fd)
        if fd >= 0:
            self.peeked[number] = fd, data
            if self.chance.random() < 0.5:
                self.consume(number)
        while client.splitter.more and not client.closing:
            self.note(Kind.MORE, number)
            self.core.receive(client, b"")

    def answer(self, at: int, verdict: Forward | Answer) -> None:
        request = self.asked.pop(at)
        if isinstance(verdict, Answer):
            told = Verdict(request.asked, True, verdict.error, verdict.value)
        else:
            told = Verdict(
                request.asked,
                False,
                arguments=None if verdict.arguments is None else dict(verdict.arguments),
                changes=verdict.on_reply is not None,
            )
        self.note(Kind.ANSWERED, 0, msgspec.msgpack.encode(told))
        self.core.answer(request, verdict)

    def changed(self, reply: bytes) -> bytes:
        if self.killed:
            return reply
        reply = reply.replace(b"return", b"return")[:-1] + b', "changed": 1}'
        self.note(Kind.CHANGED, 0, reply)
        return reply

    def call(self, name: str, fd: int, beside: bool) -> None:
        told = Called(name, {"fdname": "own"}, False, fd >= 0, beside)
        self.note(Kind.CALLED, 0, msgspec.msgpack.encode(told))
        self.core.call(name, {"fdname": "own"}, oob=False, fd=fd, done=nobody, beside=beside)

    def hide(self, word: Word, value: float) -> None:
        self.note(Kind.HIDING, 0, msgspec.msgpack.encode(Said(word, value)))
        self.core.hide(word, value)

    def look(self) -> tuple[object, ...]:
        """What is to be seen of it: what it is going to send, and what it would save."""
        self.flush()
        backlogs = {number: self.backlogs.get(number, b"") for number in self.core.clients}
        whole = saved.save(
            self.core, lambda client: [backlogs.get(client.number, b"")], self.upstream, lambda _: 0
        )
        core = msgspec.msgpack.decode(whole, type=saved._Core)
        for each in core.requests:  # descriptors do not outlive their process
            each.fd = min(each.fd, -1)
        for request in core.requests:  # nor do watchers
            request.changes = False
        for client in core.clients:
            client.fd, client.queued_fds = min(client.fd, -1), 0
        core.upstream = [(data, -1) for data, _ in core.upstream]
        return backlogs, core


NEGOTIATE = command("qmp_capabilities")
NEGOTIATE_OOB = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": "n"}'


class Course:
    """A course of events by a seed, for one core, or for two beside each other."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        asked: list[Request] = []
        self.first = Side(new_core(asked), asked)
        core = self.first.core
        core.upstream_connected(b'"refault-77"')
        core.receive_upstream(GREETING % b'"oob"')
        core.upstream_out.clear()
        core.receive_upstream(b'{"return": {}, "id": "refault-77"}')
        self.sides = [self.first]
        self.qemu: list[dict[str, Any]] = []
        self.splitter = Splitter()
        self.reply = b""
        self.serial = 0
        self.rest: dict[int, bytes] = {}
        """Of what a client is saying."""
        self.got: dict[int, bytes] = {}
        """By clients."""
        self.ran: list[tuple[dict[str, Any], int]] = []
        """By QEMU, each with the descriptor that it took."""
        self.gone: set[int] = set()
        self.first.save()

    def data(self) -> tuple[bytes, int]:
        chance = self.chance
        self.serial += 1
        kind = chance.randrange(14)
        fd = -1
        if kind == 0:
            data = bytes(chance.choices(b'{}[]:,"x\x01\xff 1', k=chance.randrange(1, 12)))
        elif kind == 1:
            data, fd = command("getfd", self.serial, fdname=chance.choice("ab")), 5000 + self.serial
        elif kind == 2:
            data, fd = command("add-fd", self.serial), 5000 + self.serial
        elif kind == 3:
            data = command("watched", self.serial, x=1)
        elif kind == 4:
            data = b'{"exec-oob": "%s", "id": %d}' % (chance.choice((b"o", b"watched")), self.serial)
        elif kind == 5:
            data = b"{'execute': 'q', 'id': '%d'}" % self.serial
        elif kind == 6:
            data = b"".join(command("many", self.serial * 100 + each) for each in range(40))
        elif kind == 7:
            data = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["x"]}}'
        elif kind == 8:
            data = command("query-migrate", self.serial)
        else:
            data = command("plain", self.serial, fdname="a") if kind < 10 else command("p", self.serial)
        return data, fd

    def step(self) -> None:
        chance, sides = self.chance, self.sides
        numbers = [number for number in self.first.core.clients if number not in self.gone]
        kind = chance.randrange(16)
        if kind == 0 and len(numbers) < 6:
            rules = (Rule(), Rule(hide_pause=9.0), Rule(read_only=True), Rule(deny=frozenset({"p"})))
            rule = chance.choice(rules)
            new = {side.join(rule).number for side in sides}
            assert len(new) == 1
            [number] = new
            hello = chance.choice((NEGOTIATE, NEGOTIATE_OOB))
            for side in sides:
                side.receive(number, hello, -1)
        elif kind <= 5 and numbers:
            number = chance.choice(numbers)
            if number in self.rest:
                data, fd = self.rest.pop(number), -1
            else:
                data, fd = self.data()
            cut = chance.randrange(len(data)) if chance.random() < 0.3 else 0
            if cut:
                early = chance.random() < 0.3
                for side in sides:
                    side.receive(number, data[:cut], fd if early else -1)
                data, fd = data[cut:], -1 if early else fd
            if cut and fd < 0 and chance.random() < 0.5:
                self.rest[number] = data
            else:
                for side in sides:
                    side.receive(number, data, fd)
        elif kind == 6 and numbers and chance.random() < 0.3:
            number = chance.choice(numbers)
            for side in sides:
                side.note(Kind.LEFT, number)
                side.core.leave(side.core.clients[number])
                side.backlogs.pop(number, None)
                side.peeked.pop(number, None)
        elif kind == 7 and numbers and chance.random() < 0.2:
            number = chance.choice(numbers)
            self.gone.add(number)
            for side in sides:
                side.note(Kind.HALF_CLOSED, number)
                side.core.half_close(side.core.clients[number])
        elif kind == 8 and self.first.asked:
            at = chance.randrange(len(self.first.asked))
            which = chance.randrange(4)
            for side in sides:
                change = Forward() if side.killed or len(sides) > 1 else Forward(None, side.changed)
                verdict = (Forward(), Answer(("E", "no")), Forward({"x": 2}), change)
                side.answer(at, verdict[which])
        elif kind == 9:
            fd, beside = chance.choice((-1, 9999)), chance.random() < 0.5
            for side in sides:
                side.call("getfd", fd, beside)
        elif kind == 10 and chance.random() < 0.5:
            self.from_qemu(b'{"event": "%s", "data": {}}\r\n' % chance.choice((b"RESUME", b"X")))
        elif kind == 10:
            status = chance.choice(("postcopy-paused", "postcopy-active", "setup", "completed"))
            self.from_qemu(b'{"event": "MIGRATION", "data": {"status": "%s"}}\r\n' % status.encode())
        elif kind == 13:
            word, length = chance.choice((Word.MAY, *Word)), chance.choice((9.0, 1.5))
            for side in sides:
                side.hide(word, length)
        elif kind == 14 and self.first.core.urgent and chance.random() < 0.3:
            for side in sides:
                side.note(Kind.URGENT, 0)
                side.core.pass_urgent()
        elif kind <= 12 and self.qemu:
            one = self.qemu.pop(0)
            value: object = {}
            match one.get("execute"):
                case "query-migrate":
                    value = {"status": chance.choice(("postcopy-paused", "postcopy-active", "active"))}
                case "query-status":
                    value = {"running": True}
                case "query-fdsets":
                    value = [{"fdset-id": 3, "fds": [{"fd": 7}]}]
                case "add-fd":
                    value = {"fdset-id": 3, "fd": 7}
            reply = {"return": value, "id": one["id"]}
            if chance.random() < 0.2:
                reply = {"id": one["id"], "error": {"class": "G", "desc": "d"}}
            self.from_qemu(json.dumps(reply).encode() + b"\r\n")
        for side in sides:
            side.flush()
        self.send()

    def from_qemu(self, data: bytes) -> None:
        self.reply += data
        cut = len(self.reply) if self.chance.random() < 0.6 else self.chance.randrange(len(self.reply))
        data, self.reply = self.reply[:cut], self.reply[cut:]
        for side in self.sides:
            if data:
                side.note(Kind.RECEIVED, 0, data)
                side.core.receive_upstream(data)
                while side.core.upstream_more:
                    side.note(Kind.MORE, 0)
                    side.core.receive_upstream(b"")

    def send(self) -> None:
        chance = self.chance
        for number in list(self.first.core.clients):
            if chance.random() < 0.7:
                most = chance.choice((1, 7, 100, 10_000))
                sent = [side.send_client(number, most) for side in self.sides]
                assert len(set(sent)) == 1
                self.got[number] = self.got.get(number, b"") + sent[0]
        while chance.random() < 0.8:
            most = chance.choice((3, 30, 10_000))
            [went] = {side.send_upstream(most) for side in self.sides}
            for each in self.splitter.feed(went):
                self.qemu.append(one := json.loads(compact(each.raw)))
                fd = -1
                if one.get("execute") in ("getfd", "add-fd"):
                    [fd] = {side.passed for side in self.sides}
                    for side in self.sides:
                        side.passed = -1
                self.ran.append((one, fd))
