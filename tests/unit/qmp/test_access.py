"""Who may speak at a listener, and what: the rules, and what a multiplexer makes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.unit.qmp.played import Played, command

from refault.qmp.access import FREE, MOST_READ, READS, Callers, Rule, changes, denied, record
from refault.qmp.commands import Forward

READ_ONLY = Rule(read_only=True)
SETS = [f"query-cpu-model-{what}" for what in ("expansion", "comparison", "baseline")]
NAMES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["quit", "QUERY-status", " query-status", "query", "query_status", "x-query-irq", "qom-set", *SETS]
    ),
)


def nothing() -> dict[str, object]:
    return {}


def refused(rule: Rule, name: str, **arguments: object) -> str | None:
    return rule.refusal(name, lambda: arguments)


@given(name=NAMES)
def test_read_only_is_a_list_of_what_may_be_said(name: str) -> None:
    may = (name.startswith("query-") and name not in SETS) or name in READS or name == "qmp_capabilities"
    assert (refused(READ_ONLY, name) is None) == may
    assert refused(FREE, name) is None
    assert changes(name, nothing) != may


@pytest.mark.parametrize(
    "name", ["quit", "human-monitor-command", "x-query-virtio", "qom-list-get", "", "tomorrow", *SETS]
)
def test_a_refusal_names_the_command_and_the_rule(name: str) -> None:
    assert refused(READ_ONLY, name) == f"The command {name} is refused: this listener is read-only"


def test_a_secret_is_not_read() -> None:
    assert refused(READ_ONLY, "qom-get", path="/objects/s", property="type") is None
    told = refused(READ_ONLY, "qom-get", path="/objects/s", property="data")
    assert told is not None
    assert "may be a secret" in told
    assert changes("qom-get", lambda: {"property": "data"})
    assert str(record("qom-get", {"path": "/objects/s", "property": "data"})) == (
        "qom-get path=/objects/s property=data"
    )


def test_a_read_only_client_cannot_keep_qemu_busy_with_one_message() -> None:
    played = Played()
    large = command("query-status", "x" * MOST_READ)
    for rule, errors in ((FREE, False), (READ_ONLY, True)):
        client = played.client(rule=rule)
        played.core.receive(client, large)
        assert len(played.commands()) == 1 - errors
        assert any("error" in reply for reply in played.replies(client)) == errors


@given(names=st.sets(st.sampled_from(["quit", "device_add", "block-job-cancel", "x"])), name=NAMES)
def test_what_is_denied_is_refused_and_nothing_else(names: set[str], name: str) -> None:
    rule = Rule(deny=denied(names))
    for other in names:
        assert refused(rule, other)
        assert refused(rule, other.replace("-", "_"))
        assert refused(rule, "transaction", actions=[{"type": "abort"}, {"type": other, "data": {}}])
    hit = name.replace("_", "-") in {other.replace("_", "-") for other in names}
    assert bool(refused(rule, name)) == hit
    assert bool(refused(rule, "human-monitor-command")) == bool(names)
    assert refused(rule, "qmp_capabilities") is None


@pytest.mark.parametrize("actions", [None, 1, "quit", ["quit", None, {}, {"type": 1}, {"type": ["quit"]}]])
def test_actions_that_are_none(actions: object) -> None:
    assert refused(Rule(deny=denied(["quit"])), "transaction", actions=actions) is None


@pytest.mark.parametrize(("name", "why"), [("", "no command's name"), ("a b", "no command's name")])
def test_what_cannot_be_denied(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        denied([name])
    with pytest.raises(ValueError, match="it cannot be denied"):
        denied(["qmp-capabilities"])


@given(
    users=st.frozensets(st.integers(0, 5)),
    groups=st.frozensets(st.integers(0, 5)),
    uid=st.one_of(st.none(), st.integers(0, 5)),
    his=st.frozensets(st.integers(0, 5)),
)
def test_who_may_speak(
    users: frozenset[int], groups: frozenset[int], uid: int | None, his: frozenset[int]
) -> None:
    may = Callers(users, groups).admit(uid, lambda: his)
    assert may == ((not users and not groups) or (uid is not None and (uid in users or bool(groups & his))))


SECRET = "hunter2"
JSON = st.recursive(
    st.just(SECRET), lambda inner: st.dictionaries(st.sampled_from("ab"), inner), max_leaves=3
)


@settings(max_examples=25)
@given(
    name=st.sampled_from(
        ["set_password", "expire_password", "object-add", "device_add", "change-vnc-password", "migrate"]
    ),
    arguments=st.dictionaries(
        st.sampled_from(["password", "data", "props", "uri", "tls-creds", "x" * 200, "a\nb"]), JSON
    ),
)
def test_no_value_goes_on_record(name: str, arguments: dict[str, Any]) -> None:
    told = str(record(name, arguments))
    assert told.startswith(name)
    assert SECRET not in told
    assert "\n" not in told
    assert len(told) < 300


def test_what_goes_on_record() -> None:
    assert str(record("device_add", {"driver": "usb-kbd", "id": "k0", "bus": "b"})) == (
        "device_add driver=usb-kbd id=k0 (bus)"
    )
    assert str(record("migrate", {"uri": "exec:cat", "resume": True})) == "migrate resume=on (uri)"
    for line in ("  change vnc password x", "change\tvnc", "change/x 1"):
        assert str(record("human-monitor-command", {"command-line": line})) == (
            "human-monitor-command command-line=change"
        )
    assert str(record("human-monitor-command", {"command-line": 1})) == "human-monitor-command command-line=?"
    assert str(record("qu\nit", {"a b": 1})) == "? (?)"


# in the multiplexer


def test_a_refused_command_answers_in_its_turn() -> None:
    played = Played()
    client = played.client(rule=READ_ONLY)
    played.core.receive(client, command("query-status", 1) + command("quit", 2) + command("query-name", 3))
    [first] = played.commands()
    assert played.replies(client) == []
    played.reply(first["id"])
    replies = played.replies(client)
    assert [reply["id"] for reply in replies] == [1, 2]
    assert replies[1]["error"] == {
        "class": "GenericError",
        "desc": "The command quit is refused: this listener is read-only",
    }
    assert [sent["execute"] for sent in played.commands()] == ["query-name"]


def test_out_of_band_it_is_refused_at_once() -> None:
    played = Played()
    client = played.client("oob", rule=READ_ONLY)
    played.core.receive(client, command("query-status", 1) + b'{"exec-oob": "migrate-pause", "id": 2}')
    assert [reply["id"] for reply in played.replies(client)] == [2]
    assert [sent["execute"] for sent in played.commands()] == ["query-status"]
    assert client.oob_in_flight == client.oob_bytes == 0


def test_before_the_negotiation_qemus_own_error_comes_first() -> None:
    played = Played()
    client = played.core.join(rule=READ_ONLY)
    played.core.receive(client, command("quit", 1) + command("qmp_capabilities", 2))
    _, error, success = played.replies(client)
    assert error["error"]["class"] == "CommandNotFound"
    assert success == {"return": {}, "id": 2}


def test_a_refused_command_is_not_asked_about() -> None:
    played = Played(watch=("migrate",))
    client = played.client(rule=READ_ONLY)
    played.core.receive(client, command("migrate", 1))
    assert played.asked == []
    assert "error" in played.replies(client)[0]


@pytest.mark.parametrize("oob", [False, True])
@pytest.mark.parametrize(
    "denied_one", [b'{"execute": "device_add"}', b'{"execute": "add-fd"}', b'{"execute": "getfd"}']
)
def test_the_descriptor_of_a_refused_command_is_closed(denied_one: bytes, oob: bool) -> None:
    played = Played()
    client = played.client("oob", rule=Rule(deny=denied(["device_add", "add-fd", "getfd"])))
    other = played.client()
    if oob:
        denied_one = denied_one.replace(b"execute", b"exec-oob")
    played.core.receive(client, denied_one[:4], 7)
    played.core.receive(client, denied_one[4:])
    played.core.receive(client, denied_one, 8)
    assert played.closed == [7, 8]
    assert client.queued_fds == 0
    played.core.receive(other, command("getfd", fdname="x"))
    played.commands()
    assert played.fds == []


def test_a_descriptor_behind_a_refused_command_is_its_own_commands() -> None:
    played = Played()
    client = played.client(rule=Rule(deny=denied(["quit"])))
    played.core.receive(client, command("quit") + command("getfd", fdname="x"), 7)
    played.commands()
    assert played.fds == [7]


def test_what_a_refused_command_names_stays_nobodys() -> None:
    played = Played()
    client = played.client(rule=READ_ONLY)
    played.core.receive(client, command("blockdev-add", filename="/dev/fdset/3"))
    assert not played.core.descriptors.sets.named


def test_on_record_is_what_goes_to_qemu_and_what_is_refused() -> None:
    played = Played(watch=("migrate",))
    client = played.client(rule=Rule(deny=denied(["quit", "query-name"]), audit=True))
    silent = played.client()
    played.core.receive(silent, command("stop"))
    names = ["query-status", "stop", "quit", "query-name", "migrate", "cont"]
    for name in names:
        played.core.receive(client, command(name))
        for sent in played.commands():
            played.reply(sent["id"])
    assert [request.name for request in played.audited] == [b"stop", b"quit", b"query-name", b"migrate"]
    assert [bool(request.refusal) for request in played.audited] == [False, True, True, False]
    played.core.answer(played.asked[0], Forward())
    assert [sent["execute"] for sent in played.commands()] == ["migrate", "cont"]
    assert [request.name for request in played.audited[4:]] == [b"cont"]
    played.core.receive(client, command("stop"))
    played.core.leave(client)
    assert len(played.audited) == 5  # what was never sent is not on record


WELL_FORMED = [
    b'{"execute": "quit"}',
    b"{'execute':'quit'}",
    rb'{"ex\u0065cute":"qu\u0069t","id":1}',
    rb'{"arguments":{},"execute":"qui\u0074"}',
    b'{"execute":"quit","exec-oob":"query-status"}',
    b'{"execute":"query-status","execute":"quit"}',
    b'{"exec-oob":"quit"}',
    b'{"return":{},"execute":"quit"}',
    b'{"execute":"quit","arguments":1}',
    b'{"execute":["quit"]}',
    rb'{"execute":"quit\ud800"}',
    rb'{"execute":"\ud800"}',
    b'{"execute":"qmp_capabilities"}',
    b'{"execute":"query-status"}',
    b'{"execute":"human-monitor-command","arguments":{"command-line":"quit"}}',
    b'{"execute":"transaction","arguments":{"actions":[{"type":"quit"}]}}',
]
SPELLINGS = st.sampled_from([*WELL_FORMED, b"[", b"\xff", b"{", b"}"])


@example(said=WELL_FORMED, oob=False, read_only=False, cut=1000)
@example(said=WELL_FORMED, oob=True, read_only=False, cut=1000)
@example(said=WELL_FORMED, oob=True, read_only=True, cut=1000)
@settings(max_examples=40)
@given(
    said=st.lists(SPELLINGS, max_size=6), oob=st.booleans(), read_only=st.booleans(), cut=st.integers(1, 9)
)
def test_however_it_is_spelt_it_does_not_pass(
    said: list[bytes], oob: bool, read_only: bool, cut: int
) -> None:
    played = Played(watch=("quit",))
    rule = READ_ONLY if read_only else Rule(deny=denied(["quit"]))
    client = played.client(*(["oob"] if oob else []), rule=rule)
    data = b"\n".join(said)
    for at in range(0, len(data), cut):
        played.core.receive(client, data[at : at + cut])
        for sent in played.commands():
            name = str(sent.get("execute", sent.get("exec-oob")))
            # What no QEMU takes may pass where it is not denied: it says so itself.
            assert name in ("query-status", "qmp_capabilities") or (not read_only and "\ud800" in name)
            played.core.receive_upstream(json.dumps({"return": {}, "id": sent["id"]}).encode() + b"\r\n")
    assert played.asked == []


def test_an_out_of_band_command_that_waits_as_its_client_leaves_is_on_record_once() -> None:
    """It goes to QEMU all the same, and its client is told of no more."""
    played = Played()
    other, client = played.client(), played.client("oob", rule=Rule(audit=True))
    command = b'{"execute": "getfd", "arguments": {"fdname": "n"}}'
    played.core.receive(other, command, 100)
    [getfd] = played.commands()
    played.reply(getfd["id"])
    played.core.receive(client, command, 101)
    [getfd] = played.commands()
    played.core.receive(client, b'{"exec-oob": "migrate-recover", "arguments": {"uri": "fd:n"}}')
    assert [request.name for request in played.audited] == [b"getfd", b"migrate-recover"]
    played.core.leave(client)
    played.reply(getfd["id"])
    [recover] = played.commands()
    assert recover["arguments"]["uri"] == "fd:" + getfd["arguments"]["fdname"] != "fd:n"
    assert len(played.audited) == 2
