"""Which fd sets are taken back from QEMU, and which stay: a QEMU that is played has them."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tests.unit.qmp.played import Played, command

from refault.qmp import fdsets
from refault.qmp.session import Client

ADD = command("add-fd")
RESUME = b'{"event": "RESUME"}\r\n'


class PlayedQemu(Played):
    """With fd sets as in monitor/fds.c: a number that is free, or the one that add-fd gives."""

    def __init__(self, *, running: bool = True) -> None:
        self.sets: dict[int, set[int]] = {}
        self.running = running
        self.migration: dict[str, object] = {}
        self.refuses: set[str] = set()
        self.last_fd = 10
        self.questions = 0
        super().__init__()

    def add(self, arguments: dict[str, Any]) -> dict[str, int]:
        self.last_fd += 1
        number = arguments.get("fdset-id", min(set(range(len(self.sets) + 1)) - set(self.sets)))
        self.sets.setdefault(number, set()).add(self.last_fd)
        return {"fdset-id": number, "fd": self.last_fd}

    def run(self) -> None:
        """Runs what has come to QEMU, and what that brings about."""
        while sent := self.commands():
            for one in sent:
                self.execute(one)

    def execute(self, one: dict[str, Any]) -> None:
        name, arguments = one.get("execute"), one.get("arguments", {})
        value: object = {}
        error = name in self.refuses
        match name:
            case _ if error:
                pass
            case "add-fd":
                value = self.add(arguments)
            case "remove-fd":
                if "fd" in arguments:
                    self.sets.get(arguments["fdset-id"], set()).discard(arguments["fd"])
                error = self.sets.pop(arguments["fdset-id"], None) is None
            case "query-fdsets":
                self.questions += 1
                value = [
                    {"fdset-id": number, "fds": [{"fd": fd} for fd in fds]}
                    for number, fds in self.sets.items()
                ]
            case "query-status":
                value = {"running": self.running, "status": "running" if self.running else "paused"}
            case "query-migrate":
                value = self.migration
        if error:
            text = b'{"error": {"class": "GenericError", "desc": "no"}, "id": %d}\r\n' % one["id"]
            self.core.receive_upstream(text)
        else:
            self.core.receive_upstream(json.dumps({"return": value, "id": one["id"]}).encode() + b"\r\n")

    def add_fd(self, client: Client, **arguments: object) -> int:
        self.core.receive(
            client, command("add-fd", 1, **{k.replace("_", "-"): v for k, v in arguments.items()}), 3
        )
        self.run()
        number: int = self.replies(client)[-1]["return"]["fdset-id"]
        return number

    def left_by(self, client: Client) -> None:
        self.core.leave(client)
        self.run()


NAMING = [
    pytest.param(command("blockdev-add", driver="file", filename="/dev/fdset/0"), id="path"),
    pytest.param(rb'{"execute": "x", "arguments": {"a": [{"b": "\/dev\/fdset\/0"}]}}', id="escaped slashes"),
    pytest.param(rb'{"execute": "x", "arguments": {"a": "/dev/f\u0064set/\u0030"}}', id="escaped letters"),
    pytest.param(b"{'execute': 'x', 'arguments': {'a': '/dev/fdset/0'}}", id="single quotes"),
    pytest.param(b'{"exec-oob": "x", "arguments": {"a": "/dev/fdset/0"}}', id="out of band"),
    pytest.param(b'{"execute": "x", "arguments": {"a": "/dev/fdset/ +00"}}', id="as strtol takes it"),
    pytest.param(command("migrate", uri="file:/dev/fdset/0,offset=4096"), id="with more behind"),
    pytest.param(
        command("human-monitor-command", **{"command-line": "drive_add 0 file=/dev/fdset/0"}), id="hmp"
    ),
    pytest.param(command("x", a=json.dumps({"filename": "/dev/fdset/0"})), id="JSON in a string"),
    pytest.param(
        command("x", a=r'json:{"filename": "\u002fdev\/fdset\/0"}'), id="JSON with escapes in a string"
    ),
    pytest.param(command("remove-fd", **{"fdset-id": 0, "fd": 999}), id="remove-fd"),
    pytest.param(b'{"execute": "x", "arguments": {"a": "%b fdset"}}' % (b"0" * (1 << 20)), id="too long"),
]


@pytest.mark.parametrize("naming", NAMING)
def test_what_was_named_stays(naming: bytes) -> None:
    """Whoever named it, and whether QEMU took the command."""
    played = PlayedQemu()
    adder, other = played.client(), played.client("oob")
    played.refuses.add("remove-fd")
    assert played.add_fd(adder) == 0
    played.core.receive(other, naming)
    played.run()
    played.refuses.clear()
    played.left_by(adder)
    played.left_by(other)
    assert played.sets.keys() == {0}
    assert played.questions == 1  # before the first add-fd


@pytest.mark.parametrize(
    "other",
    [
        command("blockdev-add", driver="file", filename="/dev/fdset/1"),
        command("blockdev-add", driver="file", filename="/img/0"),
        command("x", a="\u00e9 0"),
        b'{"execute": "x", "arguments": {"a": "fdset0" }',
    ],
)
def test_what_was_not_named_is_taken_back(other: bytes) -> None:
    played = PlayedQemu()
    client = played.client()
    played.add_fd(client)
    played.core.receive(client, other)
    played.run()
    assert played.sets
    played.left_by(client)
    assert not played.sets


def test_named_before_its_reply_and_before_its_turn() -> None:
    """Pipelined by a client that knows which number it will be; another's add-fd is in the way."""
    played = PlayedQemu()
    first, client = played.client(), played.client()
    played.add_fd(first)
    played.core.receive(first, ADD, 3)
    played.core.receive(client, command("add-fd"), 4)
    played.core.receive(client, command("blockdev-add", filename="/dev/fdset/2"))
    played.run()
    assert played.sets.keys() == {0, 1, 2}
    played.left_by(first)
    played.left_by(client)
    assert played.sets.keys() == {2}


def test_a_number_that_is_used_again() -> None:
    """QEMU gives it to a new set: that it was named when it was another's does not count."""
    played = PlayedQemu()
    client = played.client()
    assert played.add_fd(client) == 0
    played.core.receive(client, command("blockdev-add", filename="/dev/fdset/0"))
    played.core.receive(client, command("remove-fd", **{"fdset-id": 0}))
    played.run()
    assert not played.sets
    assert played.add_fd(client) == 0
    played.left_by(client)
    assert not played.sets


def test_a_set_that_several_have_a_share_in() -> None:
    played = PlayedQemu()
    one, other = played.client(), played.client()
    assert played.add_fd(one) == played.add_fd(other, fdset_id=0) == 0
    played.left_by(one)
    assert played.sets.keys() == {0}
    played.left_by(other)
    assert not played.sets


def test_a_share_counts_from_when_its_command_was_read() -> None:
    played = PlayedQemu()
    one, other, busy = played.client(), played.client(), played.client()
    played.add_fd(one)
    played.core.receive(busy, command("getfd", fdname="x"), 4)
    [getfd] = played.commands()
    played.core.receive(other, command("add-fd", **{"fdset-id": 0}), 5)
    played.core.leave(one)
    played.execute(getfd)
    played.run()
    assert played.sets.keys() == {0}
    assert len(played.sets[0]) == 2
    played.left_by(other)
    assert not played.sets


def test_sets_with_a_chosen_number_do_not_pile_up() -> None:
    played = PlayedQemu()
    for turn in range(10):
        client = played.client()
        assert played.add_fd(client, fdset_id=7, opaque=f"turn {turn}") == 7
        played.left_by(client)
        assert not played.sets


@pytest.mark.parametrize("fds", [set(), {5}])
def test_a_set_that_was_there_before_stays(fds: set[int]) -> None:
    """From QEMU's command line, or an earlier connection; one in use may have no descriptor left."""
    played = PlayedQemu()
    played.sets[2] = set(fds)
    client = played.client()
    played.add_fd(client, fdset_id=2)
    assert played.add_fd(client) == 0
    played.left_by(client)
    assert played.sets.keys() == {2}
    assert fds < played.sets[2]


def test_a_set_that_another_monitor_adds_to_stays() -> None:
    played = PlayedQemu()
    client = played.client()
    number = played.add_fd(client)
    played.sets[number].add(999)
    played.left_by(client)
    assert played.sets[number] >= {999}


def test_a_client_that_leaves_before_its_reply() -> None:
    played = PlayedQemu()
    client = played.client()
    played.core.receive(client, ADD, 3)
    played.core.leave(client)
    played.run()
    assert not played.sets  # nothing went to QEMU yet
    assert played.closed == [3]
    client = played.client()
    played.add_fd(client)
    played.core.receive(client, ADD, 4)
    [sent] = played.commands()
    played.core.leave(client)
    played.execute(sent)
    played.run()
    assert not played.sets


def test_named_while_the_window_is_full() -> None:
    """Nothing that was read after QEMU's answer goes ahead of remove-fd."""
    played = PlayedQemu()
    client, *busy = [played.client() for _ in range(9)]
    played.add_fd(client)
    played.core.leave(client)
    for other in busy:
        played.core.receive(other, command("a") * 3)
    order = []
    while sent := played.commands():
        for one in sent:
            order.append(one["execute"])
            played.execute(one)
            if one["execute"] == "query-fdsets":
                played.core.receive(busy[0], command("b", x="/dev/fdset/0"))
    assert order.index("remove-fd") < order.index("b")
    assert not played.sets


def test_named_while_qemu_is_asked() -> None:
    played = PlayedQemu()
    client, other = played.client(), played.client()
    played.add_fd(client)
    played.core.leave(client)
    [status, migration] = played.commands()
    played.core.receive(other, command("b", x="/dev/fdset/0"))
    for sent in (status, migration, *played.commands()):
        played.execute(sent)
    played.run()
    assert played.sets.keys() == {0}


def test_the_guest_does_not_run() -> None:
    played = PlayedQemu(running=False)
    for _ in range(3):
        client = played.client()
        played.add_fd(client)
        played.left_by(client)
    assert played.sets.keys() == {0, 1, 2}
    later = played.client()
    played.core.receive(later, command("b", x="/dev/fdset/1"))
    played.run()
    played.running = True
    played.core.receive_upstream(RESUME)
    played.run()
    assert played.sets.keys() == {1}


@pytest.mark.parametrize(
    "status", ["setup", "active", "postcopy-active", "postcopy-paused", "postcopy-recover"]
)
def test_a_migration_comes_in(status: str) -> None:
    played = PlayedQemu()
    client = played.client()
    played.add_fd(client)
    played.migration = {"status": status}
    played.left_by(client)
    assert played.sets
    played.migration = {"status": "completed"}
    played.core.receive_upstream(b'{"event": "MIGRATION", "data": {"status": "completed"}}\r\n')
    played.run()
    assert not played.sets


def test_a_migration_goes_out() -> None:
    played = PlayedQemu()
    client = played.client()
    played.add_fd(client)
    played.migration = {"status": "active", "ram": {}}
    played.left_by(client)
    assert not played.sets


@pytest.mark.parametrize("question", ["query-status", "query-migrate", "query-fdsets", "remove-fd"])
def test_qemu_does_not_say(question: str) -> None:
    """They stay, and nothing is tried again without cause."""
    played = PlayedQemu()
    client = played.client()
    played.add_fd(client)
    played.refuses = {question}
    played.left_by(client)
    assert played.sets
    assert not played.take()


def test_sets_cannot_be_asked_for_before_the_first() -> None:
    """add-fd goes to QEMU all the same; sets with a chosen number stay."""
    played = PlayedQemu()
    played.refuses = {"query-fdsets"}
    client = played.client()
    played.add_fd(client, fdset_id=3)
    assert played.add_fd(client) == 0
    played.refuses.clear()
    played.left_by(client)
    assert played.sets.keys() == {3}


def test_qemu_goes_away_while_it_is_asked() -> None:
    played = PlayedQemu()
    client = played.client()
    played.add_fd(client)
    played.core.leave(client)
    assert played.commands()
    played.core.upstream_lost()
    played.connect()
    client = played.client()
    assert played.add_fd(client) == 1  # of the set 0 nothing is known any more
    played.left_by(client)
    assert played.sets.keys() == {0}


def test_more_numbers_than_are_kept() -> None:
    played = PlayedQemu()
    client, other = played.client(), played.client()
    played.add_fd(client)
    names = [f"/dev/fdset/{number}" for number in range(5, fdsets.MAX_NAMED + 6)]
    played.core.receive(other, command("x", names=names))
    played.run()
    assert played.add_fd(other) == 1
    played.left_by(client)
    played.left_by(other)
    assert played.sets.keys() == {0}


@pytest.mark.parametrize("seed", range(20))
def test_random_courses(seed: int) -> None:
    """No set is taken back that was named since it was made, or that a client who is there has a share in."""
    random_ = random.Random(seed)
    played = PlayedQemu()
    clients = [played.client() for _ in range(4)]
    shares: dict[int, set[int]] = {}
    named: set[int] = set()
    for _ in range(200):
        client = random_.choice(clients)
        number = random_.randrange(4)
        match random_.randrange(4):
            case 0:
                added = played.add_fd(client)
                shares[added] = {client.number}
                named.discard(added)
            case 1 if number in played.sets:
                played.add_fd(client, fdset_id=number)
                shares[number].add(client.number)
            case 2 if number in played.sets:
                played.core.receive(client, command("x", file=f"/dev/fdset/{number}"))
                named.add(number)
                played.run()
            case 3:
                played.left_by(client)
                clients[clients.index(client)] = played.client()
                for share in shares.values():
                    share.discard(client.number)
        assert played.sets.keys() == {n for n, share in shares.items() if n in named or share}
        shares = {n: share for n, share in shares.items() if n in played.sets}
