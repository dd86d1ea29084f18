"""The multiplexer with a QEMU that is played: what real ones cannot be made to do."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.qmp.played import GREETING, Played, command

from refault.qmp.commands import Answer, Forward
from refault.qmp.greeting import NotQmpError
from refault.qmp.multiplexer import SHARE
from refault.qmp.session import Client, Limits, Request
from refault.qmp.splitter import MAX_NESTING, Message
from refault.qmp.window import WINDOW


@pytest.mark.parametrize(("oob", "window"), [(True, WINDOW), (False, 1)])
def test_the_window(oob: bool, window: int) -> None:
    played = Played(oob=oob)
    clients = [played.client() for _ in range(10)]
    for number, client in enumerate(clients):
        played.core.receive(client, command("a", number) * 3)
    for turn in range(30):
        waiting = played.commands()
        assert len(waiting) == (window if turn == 0 else 1 if turn <= 30 - window else 0)
        if turn == 0:
            queue = waiting
        else:
            queue += waiting
        played.reply(queue.pop(0)["id"])
    for number, client in enumerate(clients):
        assert [reply["id"] for reply in played.replies(client)] == [number] * 3


def test_one_clients_share() -> None:
    played = Played()
    first, second = played.client(), played.client()
    played.core.receive(first, command("a") * 20)
    assert len(played.commands()) == SHARE
    played.core.receive(second, command("b"))
    assert [sent["execute"] for sent in played.commands()] == ["b"]


def test_a_big_command_does_not_fill_the_way_to_qemu() -> None:
    played = Played()
    first, second = played.client("oob"), played.client()
    played.core.receive(first, command("big", x="x" * 100_000))
    played.core.receive(second, command("big", x="x" * 100_000))
    [sent] = played.commands()
    played.core.receive(first, b'{"exec-oob": "migrate-pause"}')
    assert [next(iter(later)) for later in played.commands()] == ["exec-oob"]
    played.reply(sent["id"])
    assert len(played.commands()) == 1


def test_out_of_band_commands_are_read_in_advance_up_to_a_size() -> None:
    played = Played(limits=Limits(queued=1000))
    client = played.client("oob")
    data = b'{"exec-oob": "x", "arguments": {"a": "%s"}}' % (b"x" * 400)
    played.core.receive(client, data * 2)
    assert not client.paused
    played.core.receive(client, data)
    assert client.paused
    for sent in played.commands():
        played.reply(sent["id"])
    assert client.resumable
    assert client.oob_bytes == 0


def test_late_replies_are_dropped() -> None:
    played = Played()
    first, second = played.client(), played.client()
    played.core.receive(first, command("a", 1) * 5)
    sent = played.commands()
    played.core.leave(first)
    played.core.receive(second, command("b", 2))
    for one in sent:
        played.reply(one["id"])
    [later] = played.commands()
    assert later["execute"] == "b"
    played.reply(later["id"])
    assert played.replies(second) == [{"return": {}, "id": 2}]
    assert first.out == []


def test_what_ran_before_a_reconnect_is_answered_to_nobody() -> None:
    played = Played()
    client = played.client()
    played.core.receive(client, command("slow", 1))
    [old] = played.commands()
    assert played.core.upstream_lost() == [client]
    played.core.leave(client)
    played.core.upstream_connected(b'"second"')
    played.core.receive_upstream(GREETING % b'"oob"')
    client = played.core.join()
    played.core.receive(client, command("qmp_capabilities") + command("fast", 2))
    played.take()
    played.reply(old["id"], "slow")  # its turn comes before our negotiation's
    played.reply("negotiation-1")
    played.reply("second")
    assert played.core.counters.dropped_replies == 2
    [sent] = played.commands()
    played.reply(sent["id"], "fast")
    assert played.replies(client)[-1] == {"return": "fast", "id": 2}


def test_events_go_to_those_who_negotiated_in_order_with_replies() -> None:
    played = Played()
    client, early = played.client(), played.core.join()
    played.replies(early)
    played.core.receive(client, command("stop", 1))
    [sent] = played.commands()
    played.core.receive_upstream(b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}\r\n')
    played.reply(sent["id"])
    played.core.receive_upstream(b'{"event": "X", "data": {"a": 1}}\r\n')
    assert [reply.get("event", reply.get("id")) for reply in played.replies(client)] == ["STOP", 1, "X"]
    assert early.out == []
    assert played.events == [("STOP", {}), ("X", {"a": 1})]


def test_an_event_counts_once_for_each_client_it_goes_to() -> None:
    played = Played()
    played.client(), played.client(), played.core.join()
    played.core.receive_upstream(b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}\r\n')
    assert played.core.counters.events == 2


def test_every_command_that_a_client_gives_counts_whoever_answers_it() -> None:
    played = Played(watch=("watched",))
    early = played.core.join()
    played.core.receive(early, command("too-early", 1))  # refused
    client = played.client("oob")  # negotiates
    played.core.receive(client, command("a", 1) + command("watched", 2) + b"{,}")
    [sent] = played.commands()
    played.reply(sent["id"])
    [asked] = played.asked
    played.core.answer(asked, Answer())
    assert len(played.replies(client)) == 3
    assert played.core.counters.commands == 5


def test_bytes_are_forwarded_as_they_came() -> None:
    played = Played()
    client = played.client()
    raw = (
        b'{ "arguments":{"b":1.0e2 , "a":18446744073709551615,"s":"\\u00e9\xc3\xa9"} ,"execute":"x","id":7 }'
    )
    played.core.receive(client, raw)
    [(sent, _)] = played.take()
    number = json.loads(sent)["id"]
    arguments = b'{"b":1.0e2 , "a":18446744073709551615,"s":"\\u00e9\xc3\xa9"}'
    assert sent == b'{"execute":"x","arguments":%s,"id":%d}' % (arguments, number)
    played.core.receive_upstream(b'{"return": {"n":1.50, "m": "\\u0041"}, "id": %d}\r\n' % number)
    assert client.out == [b'{"return": {"n":1.50, "m": "\\u0041"}, "id": 7}\r\n']


def test_only_changed_arguments_are_spelt_anew() -> None:
    played = Played(watch=("migrate",))
    client = played.client()
    raw = b"{'execute': 'migrate', 'arguments': {'uri': 'tcp:a:1', 'x': 1.50, 'y': {'z' : 1e2}}, 'id': 'm'}"
    played.core.receive(client, raw)
    [request] = played.asked
    assert request.raw_arguments() == b"{'uri': 'tcp:a:1', 'x': 1.50, 'y': {'z' : 1e2}}"
    played.core.answer(request, Forward({**request.arguments(), "uri": "fd:f", "new": True}))
    [(sent, _)] = played.take()
    assert b'"x":1.50,"y":{"z":1e2}' in sent
    assert json.loads(sent)["arguments"] == {"uri": "fd:f", "x": 1.5, "y": {"z": 100.0}, "new": True}
    assert json.loads(sent)["execute"] == "migrate"


@pytest.mark.parametrize("name", ["getfd", "closefd", "migrate", "x", "qmp_capabilities"])
def test_an_escaped_apostrophe_is_read_as_qemu_reads_it(name: str) -> None:
    played = Played(watch=("migrate",))
    client, other = played.client(), played.client()
    played.core.receive(other, command("getfd", 1, fdname="it's"), 100)
    played.reply(played.commands()[0]["id"])
    raw = b"""{"execute": "%s", "arguments": {"fdname": "it\\'s"}, "id": "\\'"}""" % name.encode()
    played.core.receive(client, raw)
    for request in played.asked:
        assert request.arguments() == {"fdname": "it's"}
        played.core.answer(request, Forward())
    [(sent, _)] = played.take()
    number = json.loads(sent.rpartition(b":")[2][:-1])
    played.reply(number)
    assert [reply["id"] for reply in played.replies(client)] == ["'"]


@pytest.mark.parametrize("name", ["getfd", "closefd", "migrate", "x", "qmp_capabilities"])
@pytest.mark.parametrize("inmost", [b"1", b"1e400"])
def test_commands_as_deep_as_qemu_takes_them(name: str, inmost: bytes) -> None:
    played = Played(watch=("migrate",))
    client, other = played.client(), played.client()
    played.core.receive(other, command("getfd", 1, fdname="n"), 100)
    played.reply(played.commands()[0]["id"])
    deep = b"[" * (MAX_NESTING - 4) + b'{"a": {"b": %s}}' % inmost + b"]" * (MAX_NESTING - 4)
    played.core.receive(
        client, b'{"execute": "%s", "arguments": {"fdname": "n", "x": %s}}' % (name.encode(), deep)
    )
    for request in played.asked:
        played.core.answer(request, Forward({**request.arguments(), "uri": "fd:n"}))
    [(sent, _)] = played.take()
    played.reply(json.loads(sent.rpartition(b":")[2][:-1]))
    assert played.replies(client) == [{"return": {}}]
    played.core.receive(
        client, b'{"execute": "%s", "arguments": {}, "extra": {"a": %s}}' % (name.encode(), deep)
    )
    [reply] = played.replies(client)
    assert reply["error"]["desc"] == "QMP input member 'extra' is unexpected"


def test_watched_commands() -> None:
    played = Played(watch=("migrate", "quit"))
    client, other = played.client("oob"), played.client()
    played.core.receive(client, command("a", 1) + command("migrate", 2) + command("b", 3) + b"}" + b"[]")
    [sent] = played.commands()
    played.core.receive(other, command("c", 4))
    assert [one["execute"] for one in played.commands()] == ["c"]
    played.core.answer(played.asked[0], Answer(error=("GenericError", "no")))
    assert played.replies(client) == []  # a is not answered yet
    played.reply(sent["id"])
    replies = played.replies(client)
    assert [reply["id"] for reply in replies] == [1, 2]
    assert replies[1]["error"] == {"class": "GenericError", "desc": "no"}
    [sent] = played.commands()
    played.reply(sent["id"])
    assert [reply.get("id", "error") for reply in played.replies(client)] == [3, "error", "error"]


def heard() -> tuple[list[bytes], Callable[[bytes], bytes]]:
    """The replies that a watcher has heard, and the watcher."""
    seen: list[bytes] = []

    def on_reply(reply: bytes) -> bytes:
        seen.append(reply)
        return reply

    return seen, on_reply


def test_a_watched_command_outlives_its_client_but_not_its_qemu() -> None:
    played = Played(watch=("migrate",))
    seen, on_reply = heard()
    client = played.client()
    played.core.receive(client, command("migrate", 1) + command("a", 2))
    played.core.leave(client)
    played.core.answer(played.asked[0], Forward(on_reply=on_reply))
    [sent] = played.commands()
    assert sent["execute"] == "migrate"
    played.reply(sent["id"])
    assert seen == [b'{"return": {}}']
    client = played.client()
    played.core.receive(client, command("migrate", 1))
    played.core.upstream_lost()
    played.connect()
    played.core.answer(played.asked[1], Forward())
    assert played.commands() == []


def test_a_watched_command_that_waits_for_its_turn_outlives_its_client() -> None:
    """Who watches waits for the reply."""
    played = Played(watch=("migrate",))
    seen, on_reply = heard()
    client = played.client()
    played.core.receive(client, command("a") * SHARE + command("migrate") + command("b"))
    running = played.commands()
    played.core.answer(played.asked[0], Forward(on_reply=on_reply))
    assert played.commands() == []
    played.core.leave(client)
    [sent] = played.commands()
    assert sent["execute"] == "migrate"
    for one in (*running, sent):
        played.reply(one["id"])
    assert seen == [b'{"return": {}}']
    assert played.commands() == []


@pytest.mark.parametrize("other_leaves", [False, True])
def test_a_watched_command_uses_the_descriptor_of_its_client_who_left(other_leaves: bool) -> None:
    played = Played(watch=("migrate",))
    other, client = played.client(), played.client()
    for one in (other, client):
        played.core.receive(one, command("getfd", 1, fdname="n"), 100)
        [sent] = played.commands()
        played.reply(sent["id"])
    played.core.receive(client, command("migrate", 2, uri="fd:n"))
    played.core.leave(client)
    if other_leaves:
        played.core.leave(other)
    played.core.answer(played.asked[0], Forward())
    assert played.commands()[0]["arguments"]["uri"] == f"fd:{sent['arguments']['fdname']}"


def test_what_is_malformed_has_no_id_and_waits_for_its_turn() -> None:
    """QEMU's parser gives up all of it, and queues the error as an in-band command's."""
    played = Played()
    client = played.client("oob")
    played.core.receive(client, command("a", 1) + b'{"exec-oob": "migrate-pause", "id": 2,}' + b'{"id": 3]')
    assert played.replies(client) == []
    [sent] = played.commands()
    played.reply(sent["id"])
    first, *errors = played.replies(client)
    assert first == {"return": {}, "id": 1}
    assert [list(reply) for reply in errors] == [["error"], ["error"]]


def test_own_commands_run_one_at_a_time_and_out_of_band_ones_at_once() -> None:
    played = Played()
    client = played.client()
    done: list[str] = []

    def call(name: str, oob: bool = False) -> Request:
        def note(reply: Message | None) -> None:
            done.append(f"{name} {'lost' if reply is None else 'replied'}")

        return played.core.call(name, {"x": 1}, oob=oob, fd=-1, done=note)

    call("first")
    second = call("second")
    call("third")
    call("urgent", oob=True)
    played.core.receive(client, command("a"))
    sent = played.commands()
    assert [one.get("execute", one.get("exec-oob")) for one in sent] == ["first", "urgent", "a"]
    played.reply(sent[1]["id"])
    played.core.forget(second)
    played.reply(sent[0]["id"])
    assert done == ["urgent replied", "first replied"]
    assert [one["execute"] for one in played.commands()] == ["third"]
    played.core.upstream_lost()
    assert done[2:] == ["third lost"]


def test_descriptors_go_one_at_a_time_and_never_with_other_commands() -> None:
    played = Played()
    first, second = played.client(), played.client()
    played.core.receive(first, command("getfd", 1, fdname="n"), 101)
    played.core.receive(second, command("getfd", 1, fdname="n"), 102)
    played.core.receive(first, command("a", 2), 103)
    [sent] = played.commands()
    assert sent["execute"] == "getfd"
    assert played.fds == [101]
    played.reply(sent["id"])
    [other] = played.commands()
    assert other["arguments"]["fdname"] != "n"
    assert played.fds == [101, 102]
    played.core.receive_upstream(
        b'{"error": {"class": "GenericError", "desc": "%s"}, "id": %d}\r\n'
        % (b"about " + other["arguments"]["fdname"].encode(), other["id"])
    )
    assert played.replies(second)[-1]["error"]["desc"] == "about n"
    played.core.leave(first)
    assert played.closed == [103]


def test_a_command_that_takes_a_descriptor_is_alone_with_qemu() -> None:
    """Its main thread takes it while another looks at it with each byte that comes, and without a lock."""
    played = Played(watch=("watched",))
    client, other = played.client("oob"), played.client("oob")
    played.core.receive(client, command("a", 1) + command("getfd", 2, fdname="n"), 101)
    played.core.receive(other, command("b", 1))
    a, *early = played.commands()
    for one in (a, *early):
        assert one["execute"] != "getfd"
        played.reply(one["id"])
    [getfd] = [one for one in played.commands() if one["execute"] == "getfd"]
    played.core.receive(other, command("c", 2) + b'{"exec-oob": "o", "id": 3}')
    played.core.receive(other, b'{"exec-oob": "watched", "id": 4}')
    played.core.answer(played.asked.pop(), Forward())
    played.core.call("own", None, oob=True, fd=-1, done=lambda _: None)
    forgotten = played.core.call("forgotten", None, oob=True, fd=-1, done=lambda _: None)
    played.core.forget(forgotten)
    played.core.call("own-in-band", None, oob=False, fd=-1, done=lambda _: None, beside=True)
    assert played.commands() == []
    played.reply(getfd["id"])
    sent = [str(one.get("execute", one.get("exec-oob"))) for one in played.commands()]
    assert sent[:3] == ["o", "watched", "own"]
    assert sorted(sent[3:]) == ["b", "c", "own-in-band"]
    assert played.core.internal[0].oob_in_flight == 1


def test_what_is_urgent_does_not_wait_for_a_descriptor_that_qemu_does_not_take() -> None:
    """As a destination whose main thread waits for a page, which only a recovery brings."""
    played = Played()
    client = played.client("oob")
    played.core.receive(client, command("getfd", 1, fdname="n"), 101)
    [getfd] = played.commands()
    played.core.receive(client, b'{"exec-oob": "o", "id": 2}')
    assert played.commands() == []
    played.core.pass_urgent()
    played.core.receive(client, command("a", 3) + b'{"exec-oob": "p", "id": 4}')
    assert [one["exec-oob"] for one in played.commands()] == ["o", "p"]
    played.reply(getfd["id"])
    [a] = played.commands()
    played.core.receive(client, command("getfd", 5, fdname="m"), 102)
    played.reply(a["id"])
    [getfd] = played.commands()
    played.core.receive(client, b'{"exec-oob": "o", "id": 6}')
    assert played.commands() == []  # the next one is waited for again
    lost: list[Message | None] = []
    played.core.call("own", None, oob=True, fd=-1, done=lost.append)
    played.core.upstream_lost()
    assert lost == [None]
    assert not played.core.urgent


def test_out_of_band_commands_of_one_client_go_in_its_order_and_so_do_the_replies() -> None:
    """Whoever they are answered by, and however long a watcher thinks; nobody else waits."""
    played = Played(watch=("watched",))
    client, other = played.client("oob"), played.client("oob")
    names = ("watched", "watched", "o", "watched")
    for number, name in enumerate(names, 1):
        played.core.receive(client, b'{"exec-oob": "%s", "id": %d}' % (name.encode(), number))
    played.core.receive(client, b'{"exec-oob": "o", "unknown": 1, "id": 5}')
    played.core.receive(other, b'{"exec-oob": "o", "id": 1}' + b'{"exec-oob": "watched", "id": 2}')
    [others] = played.commands()
    first, others_watched = played.asked
    assert (first.client, others_watched.client) == (client, other)
    played.core.answer(first, Forward())
    [sent] = played.commands()
    assert sent["exec-oob"] == "watched"
    assert len(played.asked) == 3
    played.core.answer(played.asked[2], Answer(value={"second": True}))
    [third] = played.commands()
    assert third["exec-oob"] == "o"
    assert len(played.asked) == 4
    assert not client.out
    played.reply(sent["id"])
    assert [one["id"] for one in played.replies(client)] == [1, 2]
    played.reply(others["id"])
    played.core.answer(others_watched, Answer(value={}))
    assert [one["id"] for one in played.replies(other)] == [1, 2]
    played.reply(third["id"])
    assert [one["id"] for one in played.replies(client)] == [3]
    played.core.answer(played.asked[3], Answer(value={}))
    assert [one["id"] for one in played.replies(client)] == [4, 5]
    assert client.oob_in_flight == client.oob_bytes == 0
    assert client.idle


def test_who_says_no_more_is_let_go_when_what_was_answered_here_is_answered() -> None:
    played = Played(watch=("watched",))
    client = played.client("oob")
    for raw in (b'{"exec-oob": "watched", "id": 1}', b'{"exec-oob": "o", "unknown": 1, "id": 2}'):
        played.core.receive(client, raw)
    played.core.half_close(client)
    assert not client.closing
    played.core.answer(played.asked[0], Answer(value={}))
    assert [one["id"] for one in played.replies(client)] == [1, 2]
    assert client.closing


def test_of_a_client_that_has_left_no_out_of_band_command_goes_that_had_not_begun() -> None:
    played = Played(watch=("watched",))
    client = played.client("oob")
    played.core.receive(client, b'{"exec-oob": "watched", "id": 1}' * 2 + b'{"exec-oob": "o", "id": 2}')
    [asked] = played.asked
    played.core.leave(client)
    played.core.answer(asked, Forward())
    [sent] = played.commands()
    assert sent["exec-oob"] == "watched"
    played.reply(sent["id"])
    assert played.asked == [asked]
    assert played.commands() == []


def test_descriptors_of_commands_that_are_never_sent_are_closed() -> None:
    played = Played()
    client, blocker = played.client(), played.client()
    played.core.receive(blocker, command("getfd", 1, fdname="n"), 100)
    for fd in range(101, 110):
        played.core.receive(client, command("getfd", fd, fdname="n"), fd)
    assert client.queued_fds == 9
    played.core.receive(client, b" ", 110)
    played.core.receive(client, b" ", 111)
    assert played.closed == [110]
    played.core.leave(client)
    assert sorted(played.closed) == [*range(101, 110), 110, 111]


def test_descriptors_with_commands_that_are_answered_here_are_closed() -> None:
    played = Played()
    stranger = played.core.join()
    played.core.receive(stranger, command("getfd", 1, fdname="n"), 100)
    played.core.receive(stranger, b'{"exec-oob": "getfd", "arguments": {"fdname": "n"}}', 101)
    client = played.client("oob")
    played.core.receive(client, b'{"exec-oob": "getfd", "arguments": {"fdname": "n"}}', 102)
    played.core.receive(client, b'{"execute": "getfd", "extra": 1}', 103)
    assert played.fds == []
    for one in (stranger, client):
        assert one.queued_fds == 0
        played.core.leave(one)
    assert sorted(played.closed) == [100, 101, 102, 103]


def test_a_descriptor_behind_the_negotiation_in_one_write() -> None:
    played = Played()
    client = played.core.join()
    played.core.receive(client, command("qmp_capabilities") + command("getfd", 1, fdname="n"), 100)
    [sent] = played.commands()
    assert sent["execute"] == "getfd"
    assert played.fds == [100]


def test_descriptors_on_the_way_when_qemu_goes_are_closed() -> None:
    played = Played()
    client = played.client()
    played.core.receive(client, command("getfd", 1, fdname="n"), 100)
    played.core.upstream_lost()
    assert played.closed == [100]
    played.core.receive(client, command("getfd", 1, fdname="n"), 101)
    assert played.closed == [100, 101]


def test_what_a_lost_client_still_sends_is_not_the_next_qemus() -> None:
    played = Played()
    client = played.client()
    played.core.upstream_lost()
    played.core.receive(client, command("quit"))
    played.connect()
    assert played.commands() == []


def test_names_of_descriptors() -> None:
    played = Played()
    first, second = played.client(), played.client()

    def run(client: Client, name: str, error: bool = False) -> str:
        fd = 100 if name == "getfd" else -1
        played.core.receive(client, command(name, 1, fdname="n"), fd)
        [sent] = played.commands()
        if error:
            reply = b'{"error": {"class": "GenericError", "desc": "no"}, "id": %d}\r\n' % sent["id"]
            played.core.receive_upstream(reply)
        else:
            played.reply(sent["id"])
        upstream = sent["arguments"]["fdname"]
        assert isinstance(upstream, str)
        return upstream

    assert run(first, "getfd", error=True) == "n"
    assert run(second, "getfd") == "n"  # the first one's is not there
    mine = run(first, "getfd")
    assert mine != "n"
    assert run(first, "getfd", error=True) == mine  # and the old one is still there
    assert run(first, "closefd") == mine
    assert run(first, "closefd", error=True) not in ("n", mine)
    played.core.leave(second)
    assert run(first, "closefd") == "n"  # what a client left is anybody's, as on QEMU's monitor


ADDRESS = {"type": "fd", "str": "mine"}


def test_a_name_of_ours_is_no_earlier_refaults() -> None:
    """Its descriptors are still with QEMU, where a getfd of the same name would close one that is in use."""
    names = set()
    for negotiation in (b'"refault-1234"', b'"refault-5678"'):
        played = Played()
        played.core.upstream_lost()
        played.negotiation = negotiation
        played.core.upstream_connected(negotiation)
        played.core.receive_upstream(GREETING % b"")
        played.take()
        played.core.receive_upstream(b'{"return": {}, "id": %s}' % negotiation)
        for number in (1, 2):
            played.core.receive(played.client(), command("getfd", number, fdname="n"), 100 + number)
            [sent] = played.commands()
            names.add(sent["arguments"]["fdname"])
            played.reply(sent["id"])
    assert names == {"n", "refault-1234-1-n", "refault-5678-1-n"}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("add_client", {"protocol": "vnc", "fdname": "mine"}),
        ("block-export-add", {"type": "vhost-user-blk", "id": "e", "node-name": "x", "addr": ADDRESS}),
        ("blockdev-create", {"job-id": "j", "options": {"file": {"driver": "nbd", "server": ADDRESS}}}),
        ("display-update", {"type": "vnc", "addresses": [ADDRESS]}),
        ("dump-guest-memory", {"paging": False, "protocol": "fd:mine"}),
        ("netdev_add", {"type": "tap", "id": "t", "fds": "mine:mine", "vhostfds": "mine:mine"}),
        ("netdev_add", {"type": "af-xdp", "id": "t", "sock-fds": "mine:mine"}),
        ("migrate", {"channels": [{"addr": {"transport": "socket", **ADDRESS}}]}),
    ],
)
def test_commands_that_use_a_name_use_the_clients_own(name: str, arguments: dict[str, object]) -> None:
    played = Played()
    for client in (played.client(), played.client()):
        played.core.receive(client, command("getfd", 1, fdname="mine"), 100)
        [sent] = played.commands()
        played.reply(sent["id"])
    played.core.receive(client, command(name, 2, **arguments))
    [used] = played.commands()
    own = json.dumps(arguments).replace("mine", sent["arguments"]["fdname"])
    assert used["arguments"] == json.loads(own) != arguments


def test_a_watcher_is_not_asked_before_it_can_ask_qemu() -> None:
    played = Played(watch=("migrate", "migrate-pause"))
    played.core.upstream_lost()
    played.core.upstream_connected(b'"n"')
    client = played.core.join()
    data = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}' + command("migrate", 1)
    played.core.receive(client, data)
    played.core.receive_upstream(GREETING % b'"oob"')
    played.core.receive(client, b'{"exec-oob": "migrate-pause"}')
    assert played.asked == []
    played.reply("n")
    assert [request.name for request in played.asked] == [b"migrate-pause", b"migrate"]
    assert client.oob_in_flight == 1


def test_a_watchers_own_names_and_the_clients() -> None:
    played = Played(watch=("migrate",))
    client = played.client()
    played.core.receive(client, command("getfd", 1, fdname="n"), 100)
    played.core.call("getfd", {"fdname": "own"}, oob=False, fd=101, done=lambda reply: None)
    for _ in range(2):
        played.reply(played.commands()[0]["id"])
    for name in ("n", "own"):
        played.core.receive(client, command("migrate", 2, uri="tcp:x:1"))
        played.core.answer(played.asked.pop(), Forward({"uri": f"fd:{name}"}))
        [sent] = played.commands()
        assert sent["arguments"]["uri"] == f"fd:{name}"
        played.reply(sent["id"])


def test_a_reply_without_an_id_is_the_oldest_commands() -> None:
    """Should QEMU ever find malformed what is well-formed here."""
    played = Played()
    client = played.client()
    played.core.receive(client, command("a", 1) + command("b", 2))
    sent = played.commands()
    played.core.receive_upstream(b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\r\n')
    played.reply(sent[1]["id"])
    assert [reply["id"] for reply in played.replies(client)] == [1, 2]


@pytest.mark.parametrize(
    ("inside", "problem"),
    [
        (b"[%s0]" % (b"0," * 1048568), "JSON token count limit exceeded"),  # QEMU would count 2^21 + 3
        (b"[%s0]" % (b"0," * 1048566), None),
        (b'"%s"' % (b"x" * ((64 << 20) - 37)), "JSON token size limit exceeded"),  # and 2^26 + 8 bytes
        (b'"%s"' % (b"x" * ((64 << 20) - 53)), None),
    ],
    ids=["tokens", "fewer tokens", "bytes", "fewer bytes"],
)
def test_a_command_and_the_id_that_it_gets_are_within_qemus_limits(
    inside: bytes, problem: str | None
) -> None:
    """QEMU gives several errors for one that is not, without an id, and others would get them."""
    played = Played()
    client = played.client()
    played.core.receive(client, b'{"execute":"x","arguments":{"a":%s}}' % inside)
    if problem is None:
        [(sent, _)] = played.take()
        assert len(sent) < 64 << 20
    else:
        assert played.take() == []
        assert played.replies(client)[0]["error"]["desc"] == problem


def test_a_reply_has_no_limit() -> None:
    played = Played()
    client = played.client()
    played.core.receive(client, command("human-monitor-command", 1))
    text = b"x" * (65 << 20)
    played.core.receive_upstream(b'{"return": "%s", "id": %d}\r\n' % (text, played.commands()[0]["id"]))
    [line] = client.out
    assert line == b'{"return": "%s", "id": 1}\r\n' % text


@pytest.mark.parametrize(
    "early",
    [
        b'{"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 0}}\r\n',
        b'{"return": {}, "id": 1}\r\n',
        b'{"return": {}}\r\n',
        b'{"error": {"class": "GenericError", "desc": "x"}, "id": "negotiation-2"}\r\n',
    ],
)
def test_what_comes_before_the_greeting_is_dropped(early: bytes) -> None:
    """It is of what the connection before had negotiated."""
    played = Played()
    played.core.upstream_lost()
    played.core.upstream_connected(b'"negotiation-2"')
    first = played.core.join()
    played.core.receive_upstream(early)
    assert not first.out
    assert not played.take()
    played.connect()
    assert len(played.replies(first)) == 1
    assert not played.events
    played.core.receive(played.client(), command("a", 1))
    assert played.commands()[0]["execute"] == "a"


@pytest.mark.parametrize("data", [b"220 ready\r\n", b'{"x": {}}', b'{"QMP": {}}', b"}"])
def test_not_qmp(data: bytes) -> None:
    played = Played()
    played.core.upstream_lost()
    played.core.upstream_connected(b"1")
    with pytest.raises(NotQmpError):
        played.core.receive_upstream(data)


def test_a_second_greeting_is_no_news() -> None:
    """QEMU may greet one twice who connects as it starts."""
    played = Played()
    client = played.client()
    played.core.receive_upstream(GREETING % b"")
    played.core.receive(client, command("a", 1))
    [sent] = played.commands()
    played.reply(sent["id"])
    assert [reply["id"] for reply in played.replies(client)] == [1]


def test_a_slow_client_is_marked_and_the_others_are_not() -> None:
    played = Played(limits=Limits(unsent=1000))
    slow, fine = played.client(), played.client()
    for _ in range(100):
        played.core.receive_upstream(b'{"event": "X", "data": {"text": "something"}}\r\n')
        assert len(played.replies(fine)) == 1
    assert slow.overflow
    assert not fine.overflow
    assert slow.unsent <= 1000
    assert played.core.counters.slow_clients == 1


# any course of events: every reply to its asker, in its order

steps = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 4), st.integers(1, 4)),
        st.tuples(st.just("bad"), st.integers(0, 4), st.just(0)),
        st.tuples(st.just("answer"), st.integers(0, 4), st.just(0)),
        st.tuples(st.just("verdict"), st.integers(0, 4), st.just(0)),
        st.tuples(st.just("leave"), st.integers(0, 4), st.just(0)),
        st.tuples(st.just("own"), st.just(0), st.just(0)),
        st.tuples(st.just("pass"), st.integers(0, 4), st.just(0)),
    ),
    max_size=60,
)


@given(steps, st.integers())
@settings(max_examples=300, deadline=None)
def test_every_reply_to_its_asker_in_order(course: list[tuple[str, int, int]], seed: int) -> None:
    chance = random.Random(seed)
    played = Played(watch=("watched",))
    clients = [played.client() for _ in range(5)]
    wanted: dict[int, list[object]] = {client.number: [] for client in clients}
    got: dict[int, list[object]] = {client.number: [] for client in clients}
    running: list[dict[str, Any]] = []
    own: list[object] = []
    serial = 0
    most = 0

    def drain() -> None:
        nonlocal most
        running.extend(played.commands())
        most = max(most, len(running))
        for client in clients:
            got[client.number] += [reply.get("id") for reply in played.replies(client)]

    def note(number: int) -> Callable[[Message | None], None]:
        return lambda reply: own.append(number)

    calls = 0
    for kind, who, count in course:
        client = clients[who]
        if kind == "send":
            data = b""
            for _ in range(count):
                serial += 1
                wanted[client.number].append(serial)
                data += command(chance.choice(("plain", "watched", "getfd")), serial, fdname="n")
            cut = chance.randrange(len(data))
            played.core.receive(client, data[:cut])
            played.core.receive(client, data[cut:])
        elif kind == "pass":
            serial += 1
            wanted[client.number].append(serial)
            played.core.receive(client, command("getfd", serial, fdname="n"), 1000 + serial)
        elif kind == "bad":
            wanted[client.number].append(None)
            played.core.receive(client, b"}")
        elif kind == "answer" and running:
            played.reply(running.pop(0)["id"])
        elif kind == "verdict" and played.asked:
            played.core.answer(
                played.asked.pop(0), chance.choice((Forward(), Answer(), Forward({"fdname": "m"})))
            )
        elif kind == "leave":
            played.core.leave(client)
            clients[who] = played.client()
            for table in (wanted, got):
                table.pop(client.number, None)
                table[clients[who].number] = []
        elif kind == "own":
            played.core.call("own", None, oob=False, fd=-1, done=note(calls))
            calls += 1
        drain()
    for _ in range(1000):
        if played.asked:
            played.core.answer(played.asked.pop(0), Forward())
        if running:
            played.reply(running.pop(0)["id"])
        drain()
        if not running and not played.asked:
            break
    assert got == wanted
    assert own == list(range(calls))
    assert most <= WINDOW
    assert len(set(played.fds)) == len(played.fds)
    assert not set(played.fds) & set(played.closed)
