"""A descriptor that was lost with a killed refault: its command is answered with an error, in its client's
order, and does not go to QEMU."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.qmp.course import Course, Side
from tests.unit.qmp.played import command

from refault.qmp.access import Rule
from refault.qmp.commands import Forward
from refault.qmp.replies import DESCRIPTOR_LOST

LOST = json.loads(DESCRIPTOR_LOST)["error"]


class Passing(Course):
    """Clients who pass a descriptor more often than not. The nth command has the id n, and perhaps the
    descriptor 5000 + n."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.passing: set[int] = set()

    def data(self) -> tuple[bytes, int]:
        self.serial += 1
        number, fd = self.serial, -1
        match self.chance.randrange(6):
            case 0:
                data = command("plain", number)
            case 1:
                data = command("watched", number)
            case 2 | 3:
                data, fd = command("getfd", number, fdname=f"n{number}"), 5000 + number
            case _:
                data, fd = command("add-fd", number, opaque=f"n{number}"), 5000 + number
        if fd >= 0:
            self.passing.add(number)
        return data, fd

    def kill(self) -> None:
        """Another one follows."""
        following = self.first.next()
        self.first, self.sides = following, [following]
        following.save()
        following.go_on()

    def settle(self) -> None:
        """Until nobody waits for anything."""
        first = self.first
        for number, rest in self.rest.items():
            if number in first.core.clients:
                first.receive(number, rest, -1)
        while first.asked or first.upstream or any(first.backlogs.values()) or self.qemu or self.reply:
            while first.asked:
                first.answer(0, Forward())
            if self.qemu:
                self.from_qemu(json.dumps({"return": {}, "id": self.qemu.pop(0)["id"]}).encode() + b"\r\n")
            elif self.reply:
                self.from_qemu(b"\r\n")
            first.flush()
            self.send()


@given(st.integers(), st.integers(0, 80), st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_each_command_is_answered_once_and_takes_its_own_descriptor(seed: int, until: int, more: int) -> None:
    course = Passing(seed)
    for steps in (until, more, 0):
        for _ in range(steps):
            course.step()
        course.kill()
    course.settle()
    ran = {}
    for one, fd in course.ran:
        arguments = one.get("arguments", {})
        name = arguments.get("fdname", arguments.get("opaque", ""))
        if one["execute"] in ("getfd", "add-fd") and "own" not in name:
            number = int(name.rpartition("n")[2])
            assert number not in ran
            ran[number] = fd
            assert fd == 5000 + number
    for number, client in course.first.core.clients.items():
        replies = [json.loads(line) for line in course.got.get(number, b"").split(b"\r\n") if line]
        ids = [reply["id"] for reply in replies if isinstance(reply.get("id"), int)]
        assert ids == sorted(set(ids))
        lost = {reply["id"] for reply in replies if reply.get("error") == LOST}
        passing = course.passing.intersection(ids)
        assert client.idle
        assert lost == (set() if client.rule.read_only else passing - ran.keys())


class Passed:
    """A core whose only client has negotiated and passes descriptors."""

    def __init__(self) -> None:
        self.course = Course(1)
        self.first = self.course.first
        self.client = self.first.join(Rule()).number
        self.first.receive(self.client, command("qmp_capabilities"), -1)
        self.first.flush()
        self.course.got[self.client] = self.first.send_client(self.client, 10_000)

    def says(self, data: bytes, fd: int = -1, *, consumed: bool = True) -> None:
        self.first.chance.seed(0)  # it is not consumed at once
        self.first.receive(self.client, data, fd)
        if consumed and self.client in self.first.peeked:
            self.first.consume(self.client)
        self.first.flush()

    def next(self) -> Side:
        following = self.first.next()
        following.save()
        following.go_on()
        self.first = following
        return following

    def qemu_has(self) -> list[tuple[bytes, int]]:
        return self.first.upstream

    def answers(self) -> list[dict[str, object]]:
        return [
            json.loads(line) for line in self.first.send_client(self.client, 10_000).split(b"\r\n") if line
        ]


def test_one_that_has_not_begun_to_go_is_answered_and_what_is_behind_goes() -> None:
    passed = Passed()
    passed.says(command("getfd", 1, fdname="a"), 5001)
    passed.says(command("plain", 2))
    passed.next()
    assert passed.answers() == [{"error": LOST, "id": 1}]
    [(plain, _)] = passed.qemu_has()
    assert json.loads(plain)["execute"] == "plain"
    assert not passed.first.core.descriptors.names.has(passed.client, "a")


def test_one_that_has_begun_to_go_goes_on() -> None:
    passed = Passed()
    passed.says(command("getfd", 1, fdname="a"), 5001)
    begun = passed.first.send_upstream(3)
    following = passed.next()
    assert passed.answers() == []
    [(rest, fd)] = passed.qemu_has()
    assert json.loads(begun + rest)["execute"] == "getfd"
    assert fd == -1
    assert following.core.descriptors.request is not None


def test_one_whose_command_is_yet_to_come_is_lost_over_two_kills() -> None:
    passed = Passed()
    said = command("add-fd", 1, opaque="a")
    passed.says(said[:20], 5001)
    passed.next()
    passed.next()
    passed.says(said[20:])
    assert passed.answers() == [{"error": LOST, "id": 1}]
    assert passed.qemu_has() == []


def test_the_next_one_replaces_it() -> None:
    passed = Passed()
    passed.says(b" ", 5001)
    passed.next()
    passed.says(b" ", 5002, consumed=False)
    passed.says(command("getfd", 1, fdname="a"))
    assert passed.answers() == []
    [(sent, fd)] = passed.qemu_has()
    assert json.loads(sent)["execute"] == "getfd"
    assert fd == 5002


@pytest.mark.parametrize("arguments", [{"fdname": 7}, {"fdname": "a", "more": 1}])
def test_what_qemu_refuses_it_is_given(arguments: dict[str, object]) -> None:
    passed = Passed()
    passed.says(command("plain", 1))
    passed.says(command("getfd", 2, **arguments), 5002)
    passed.first.send_upstream(10_000)
    following = passed.next()
    following.core.receive_upstream(b'{"return": {}, "id": 1}\r\n')
    following.flush()
    [(sent, fd)] = passed.qemu_has()
    assert json.loads(sent)["arguments"] == arguments
    assert fd == -1


def test_the_one_that_was_read_behind_it_is_not_taken_for_it() -> None:
    passed = Passed()
    passed.says(command("plain", 1))
    passed.says(command("getfd", 2, fdname="a"), 5002)
    passed.says(command("getfd", 3, fdname="b"), 5003, consumed=False)
    passed.first.send_upstream(10_000)
    following = passed.next()
    following.core.receive_upstream(b'{"return": {}, "id": 1}\r\n')
    following.flush()
    assert passed.answers() == [{"return": {}, "id": 1}, {"error": LOST, "id": 2}]
    [(sent, fd)] = passed.qemu_has()
    assert json.loads(sent)["arguments"] == {"fdname": "b"}
    assert fd == 5003


def test_refaults_own_is_made_by_who_wants_it_now() -> None:
    passed = Passed()
    passed.first.call("getfd", 9999, False)
    passed.first.call("getfd", 9999, False)
    passed.first.call("closefd", -1, False)
    passed.first.flush()
    passed.next()
    [(sent, fd)] = passed.qemu_has()
    assert json.loads(sent)["execute"] == "closefd"
    assert fd == -1
