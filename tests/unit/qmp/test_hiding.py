"""What clients hear of pauses that refault recovers: a model of the promise beside the machine."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.qmp.played import Played, command

from refault.qmp.access import Rule
from refault.qmp.hiding import PAUSED, Hiding, State, Word, status_of
from refault.qmp.session import Client

STATUSES = (
    *("setup", "active", "device", "postcopy-active", "postcopy-paused", "postcopy-recover-setup"),
    *("postcopy-recover", "completed", "failed", "cancelled"),
)
HIDES = Rule(hide_pause=30.0)


@dataclass
class Model:
    """The promise, of one who wants pauses hidden, of a QEMU that sends events: `heard` of what it `said`."""

    heard: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    """What was withheld of the pause that there is."""
    told: bool = False
    """Whether the pause that there is was told."""
    may: bool = False

    def event(self, status: str) -> None:
        pause = status in PAUSED
        if pause and not self.told and (self.kept or self.may):
            self.kept.append(status)
        elif self.kept and status == "setup":
            pass
        elif self.kept and status == "postcopy-active":
            self.kept.clear()
        else:
            self.tell()
            self.heard.append(status)
            self.told = pause or (self.told and status == "setup")

    def tell(self) -> None:
        if self.kept:
            self.heard.append(self.kept[-1])
            self.kept.clear()
            self.told = True

    def says(self, word: Word) -> None:
        if word in (Word.MAY, Word.MAY_NOT):
            self.may = word is Word.MAY
        if word is not Word.MAY:
            self.tell()


def event(status: str) -> bytes:
    line = {"timestamp": {"seconds": 1, "microseconds": 2}, "event": "MIGRATION", "data": {"status": status}}
    return json.dumps(line).encode() + b"\r\n"


def heard(client: Client) -> list[str]:
    return [each["data"]["status"] for each in Played.replies(client)]


def asked(qemu: Played, client: Client, status: str | None) -> dict[str, object]:
    """What a client is answered whose QEMU is at `status`."""
    qemu.core.receive(client, command("query-migrate", 1))
    [sent] = qemu.commands()
    qemu.reply(sent["id"], {"status": status} if status is not None else {})
    return {name: value for each in Played.replies(client) for name, value in each["return"].items()}


words = st.sampled_from((Word.MAY, Word.MAY, Word.MAY_NOT, Word.TELL, Word.OVER))


@given(st.lists(st.one_of(st.sampled_from(STATUSES), words), max_size=25))
@settings(max_examples=50, deadline=None)
def test_who_wants_pauses_hidden_hears_what_was_promised(course: list[str | Word]) -> None:
    qemu, model, said = Played(), Model(), []
    hiding, plain = qemu.client(rule=HIDES), qemu.client()
    for each in course:
        if isinstance(each, Word):
            model.says(each)
            qemu.core.hide(each, 30.0 if each is Word.OVER else 0.0)
            # Who has had his time knows of this pause, and the next is another.
            model.told |= each is Word.OVER and qemu.core.hiding.hidden
            continue
        said.append(each)
        qemu.core.receive_upstream(event(each))
        model.event(each)
        assert qemu.core.hiding.hides_from(30.0) == bool(model.kept)
    assert heard(hiding) == model.heard
    assert heard(plain) == said


@given(st.lists(st.sampled_from(STATUSES), max_size=12), st.data())
@settings(max_examples=40, deadline=None)
def test_a_reply_and_events_tell_the_same(course: list[str], data: st.DataObject) -> None:
    """Whenever it asks, a client sees no pause of which it has not heard, and each of which it has; whoever
    else asks changes nothing of what it hears."""
    qemu, model, status = Played(), Model(may=True), "none"
    hiding, plain = qemu.client(rule=HIDES), qemu.client()
    qemu.core.hide(Word.MAY)
    told: list[str] = []
    for each in course:
        qemu.core.receive_upstream(event(each))
        model.event(each)
        status = status if each == "setup" and status in PAUSED else each
        told += heard(hiding)
        Played.replies(plain)
        if data.draw(st.booleans()):
            shown = asked(qemu, hiding, status)["status"]
            assert shown == ("postcopy-active" if model.kept else status)
            assert asked(qemu, plain, status)["status"] == status
    assert told == model.heard


@pytest.mark.parametrize(
    "reply",
    [
        b'{"return": {"expected-downtime": 300, "status": "postcopy-paused", "error-desc": "\\"status\\": '
        b'\\"postcopy-paused\\""}, "id": 1}',
        b'{"id": {"status": "postcopy-paused"}, "return": {"ram": {"status": "postcopy-recover"},'
        b' "status" :  "postcopy-recover-setup", "x": 1e400}}'.replace(b"1e400", b"1e40"),
    ],
)
def test_no_other_byte_of_a_reply_is_changed(reply: bytes) -> None:
    was = status_of(reply)
    assert was in PAUSED
    shown = Hiding().shown(reply)
    assert status_of(shown) == "postcopy-active"
    at = next(at for at, (a, b) in enumerate(zip(reply, shown, strict=False)) if a != b)
    begin = reply.rindex(b'"', 0, at) + 1
    assert shown == reply[:begin] + b"postcopy-active" + reply[begin + len(was) :]


def test_a_reply_that_says_nothing_of_a_pause_is_as_it_was() -> None:
    for reply in (b'{"return": {}}', b'{"error": {"class": "GenericError", "desc": "status"}}', b"[]"):
        assert Hiding().shown(reply) == reply
        assert status_of(reply) is None


def test_what_qemu_says_of_other_things_is_untouched() -> None:
    qemu = Played()
    client = qemu.client(rule=HIDES)
    qemu.core.hide(Word.MAY)
    others = [b'{"event": "STOP"}\r\n', b'{"event": "MIGRATION_PASS", "data": {"pass": 2}}\r\n']
    others.append(b'{"event": "X", "data": {"status": "postcopy-paused"}}\r\n')
    qemu.core.receive_upstream(b"".join([event("postcopy-paused"), *others, event("postcopy-active")]))
    assert client.out == others


def test_who_comes_in_the_midst_of_a_hidden_pause_is_told_of_it_when_it_is_told() -> None:
    qemu = Played()
    qemu.core.hide(Word.MAY)
    qemu.core.receive_upstream(event("postcopy-active") + event("postcopy-paused"))
    client, early = qemu.client(rule=HIDES), qemu.core.join(rule=HIDES)
    assert asked(qemu, client, "postcopy-paused") == {"status": "postcopy-active"}
    early.out.clear()
    qemu.core.hide(Word.MAY_NOT)
    assert heard(client) == ["postcopy-paused"]
    assert not early.out, "it has not negotiated"
    assert asked(qemu, client, "postcopy-paused") == {"status": "postcopy-paused"}


def test_each_listener_has_its_own_time() -> None:
    qemu = Played()
    short, long = qemu.client(rule=Rule(hide_pause=2.0)), qemu.client(rule=HIDES)
    qemu.core.hide(Word.MAY)
    qemu.core.receive_upstream(event("postcopy-paused"))
    assert qemu.core.hide(Word.OVER, 2.0) == 1
    assert qemu.core.hide(Word.OVER, 2.0) == 0
    qemu.core.receive_upstream(event("postcopy-recover"))
    later = qemu.client(rule=Rule(hide_pause=2.0))
    assert asked(qemu, later, "postcopy-recover") == {"status": "postcopy-recover"}
    assert asked(qemu, long, "postcopy-recover") == {"status": "postcopy-active"}
    qemu.core.receive_upstream(event("postcopy-active") + event("postcopy-paused") + event("failed"))
    assert heard(short) == [
        "postcopy-paused",
        "postcopy-recover",
        "postcopy-active",
        "postcopy-paused",
        "failed",
    ]
    assert heard(long) == ["postcopy-paused", "failed"]


def test_a_qemu_that_sends_no_events_hides_its_pauses_too() -> None:
    qemu = Played()
    client = qemu.client(rule=HIDES)
    qemu.core.hide(Word.MAY)
    for status in ("postcopy-paused", "postcopy-recover", "postcopy-active", "postcopy-paused"):
        assert asked(qemu, client, status) == {"status": "postcopy-active"}
    qemu.core.hide(Word.OVER, 30.0)
    assert asked(qemu, client, "postcopy-paused") == {"status": "postcopy-paused"}
    for status in ("postcopy-active", "postcopy-paused"):
        assert asked(qemu, client, status) == {"status": "postcopy-active"}
    assert asked(qemu, client, "completed") == {"status": "completed"}
    assert qemu.core.hiding.state is State.CLEAR
    # A pause that a client made itself is told to its end, whoever recovers it.
    qemu.core.hide(Word.MAY_NOT)
    assert asked(qemu, client, "postcopy-paused") == {"status": "postcopy-paused"}
    qemu.core.hide(Word.MAY)
    assert asked(qemu, client, "postcopy-recover") == {"status": "postcopy-recover"}


def with_an_old_reply() -> tuple[Played, Client]:
    """A pause that is over, and behind its end a reply of before that."""
    qemu = Played()
    client = qemu.client(rule=HIDES)
    qemu.core.hide(Word.MAY)
    qemu.core.receive_upstream(event("postcopy-paused") + event("postcopy-active"))
    assert asked(qemu, client, "postcopy-recover") == {"status": "postcopy-active"}
    return qemu, client


def test_a_reply_that_is_older_than_the_end_of_the_pause_tells_of_none() -> None:
    qemu, client = with_an_old_reply()
    qemu.core.receive_upstream(event("completed"))
    assert heard(client) == ["completed"]


def test_a_pause_that_was_supposed_for_long_takes_no_time_from_the_next() -> None:
    """The reply was older than the end of the pause before."""
    qemu, client = with_an_old_reply()
    qemu.core.hide(Word.BEGAN, 1.0)
    qemu.core.hide(Word.OVER, 30.0)
    qemu.core.receive_upstream(event("postcopy-paused"))
    assert qemu.core.hiding.began is None
    qemu.core.hide(Word.BEGAN, 2.0)
    qemu.core.receive_upstream(event("postcopy-recover") + event("postcopy-active"))
    assert heard(client) == []


def test_a_reply_that_is_older_than_the_pause_does_not_end_it() -> None:
    qemu = Played()
    client = qemu.client(rule=HIDES)
    qemu.core.hide(Word.MAY)
    qemu.core.receive_upstream(event("postcopy-paused"))
    assert asked(qemu, client, "postcopy-active") == {"status": "postcopy-active"}
    qemu.core.receive_upstream(event("postcopy-recover") + event("postcopy-active"))
    assert heard(client) == []


def test_who_is_disconnected_with_its_qemu_hears_of_the_pause_first() -> None:
    qemu = Played()
    client = qemu.client(rule=HIDES)
    qemu.core.hide(Word.MAY)
    qemu.core.receive_upstream(event("postcopy-paused"))
    qemu.core.upstream_lost()
    assert heard(client) == ["postcopy-paused"]
    qemu.connect()
    assert not qemu.core.hiding.hidden
