# ruff: noqa: E501 - tables
"""The same exchanges with a QEMU directly and with another one through refault give the same messages."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.integration.qmp_tools import QEMUS, Client, Message, connected, directory, qemu_process, refault

pytestmark = pytest.mark.qemu

Exchange = list[bytes]

CAPABILITIES = b'{"execute": "qmp_capabilities"}'
OOB = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}'
STATUS = b'{"execute": "query-status"}'

UNSAFE = {
    "quit",  # ends it
    "x-exit-preconfig",
    "dump-guest-memory",
    "query-memory-size-summary",  # needs a machine
    "x-query-virtio",
    "migrate-start-postcopy",
    "rtc-reset-reinjection",  # needs a machine too
    "qom-list-types",  # loads all modules, and aborts where one is of another build
}
"""Commands that change what the others see, or that QEMU does not survive without a machine."""

VOLATILE = {"timestamp", "filename", "pid", "thread-id", "label"}

IDS = [
    b"null",
    b"true",
    b"false",
    b"0",
    b"-1",
    b"42",
    b"9223372036854775807",
    b"-9223372036854775808",
    b"18446744073709551615",
    b"1.5",
    b"-0.25",
    b"1e10",
    b'""',
    b'"x"',
    b"'x'",
    b'"\\u00e9\\n\\"\\\\/"',
    b'"\xc3\xa9"',
    b'"\\ud83d\\ude00"',
    b'"id"',
    b"[]",
    b"{}",
    b"[1, [2, {\n'a' : null}]]",
    b'{"b": 1, "a": {"execute": "id"}}',
    b'"refault-1"',
    b"1",
    b"'it\\'s \"quoted\"'",
    b'"\\u0000"',
    b'"it\\\'s"',
]

TOO_DEEP = [b"[" * 1025, b"{'a':" * 1025]
"""Of which QEMU since 11.1 reads on to the end, and gives one error."""

MALFORMED = [
    b"{]",
    b"[}",
    b"{\xff",
    b"{\x01",
    b"{'bad \xff",
    b"{'execute': 'nonexistent', 'id':'\n",
    b"%p",
    b"null ",
    b"{}",
    b"{ 'execute': true }",
    b"{ 'execute': 'no-such-cmd', 'arguments': [] }",
    b"{ 'execute': 'no-such-cmd', 'extra': true }",
    b"[]",
    b"[1, 2]",
    b'"a string"',
    b"17 ",
    b"-",
    b"nul ",
    b"{,}",
    b"{'a'}",
    b"{'a':}",
    b"{'a':1,}",
    b"{'a' 1}",
    b"{'a':1 'b':2}",
    b"[1,]",
    b"[,]",
    b"[1 2]",
    b"{1:2}",
    b"}",
    b"]",
    b":",
    b",",
    b"{'execute': 'query-status', 'execute': 'query-name'}",
    b"{'execute': 'query-status', 'id': 01}",
    b"{'execute': 'query-status', 'id': 1.}",
    b"{'execute': 'query-status', 'id': .5}",
    b"{'execute': 'query-status', 'id': +5}",
    b"{'execute': 'query-status', 'id': 1e}",
    b"{'execute': 'query-status', 'id': 0x10}",
    b"{'execute': 'query-status', 'id': NaN}",
    b"{'execute': 'query-status', 'id': '\\x'}",
    b"{'execute': 'query-status', 'id': '\\u12'}",
    b"{'execute': 'query-status', 'id': '\\ud800'}",
    b"{'execute': 'query-status', 'id': '\\ud800\\u0041'}",
    b"{'execute': 'query-status', 'id': '\\ufffe'}",
    b"{'execute': 'query-status', 'id': '\xc3'}",
    b"{'execute': 'query-status', 'id': '\xed\xa0\x80'}",
    b"{'execute': 'query-status', 'id': '\xc1\x81'}",
    b"{'execute': 'query-status', 'id': {'a': 1, 'a': 2}}",
    b"{'execute': 'query-status', 'id': {'a': 1, '\\u0061': 2}}",
    *TOO_DEEP,
    b"{'execute': 'query-status'",
    b"'unterminated",
    b"{'execute': 5}",
    b"{'exec-oob': 5}",
    b"{'execute': 'query-status', 'exec-oob': 'query-status'}",
    b"{'arguments': {}}",
    b"{'id': 5}",
    b"{'execute': null, 'id': 'n'}",
    b"{'execute': '', 'id': 'empty'}",
    b"{'execute': 'query-status', 'arguments': null, 'id': 3}",
    b"{'execute': 'query-status', 'control': {}, 'id': 4}",
    b"{'return': {}, 'id': 1}",
    b"{'error': {}}",
    b"{'event': 'STOP'}",
    b"{'QMP': {}}",
    b"\x00",
    b"\xfe\xff",
    b"{'b': 1, 'a': 2, 'execute': 3, 'arguments': 4, 'exec-oob': 5, 'id': 6}",
    b"{'zz': 1, 'yy': 2, 'xx': 3, 'id': 7}",
    b"{'execute': 'query-status', 'exec-oob': 'query-status', 'id': 8}",
    b"{'exec-oob': 'stop', 'control': {}}",
    b"abc",
    b"truefalse ",
    b"{'execute': 'query-status', 'arguments': {'x': undefined}}",
    b"{'execute': 'query-status', 'extra': %s%s}" % (b"[" * 1023, b"]" * 1023),
    b"{'id': 1, 'execute': 'query-status',}",
    b"{'execute': 'query-status', 'id': 1, 'id': 2}",
    b"{'execute': 'query-status', 'id': 1 \x01",
    b"{'id': 1, 'exec-oob': 'migrate-pause']",
]

NEGOTIATIONS: list[Exchange] = [
    [STATUS, CAPABILITIES, STATUS],
    [CAPABILITIES, CAPABILITIES, STATUS],
    [OOB, OOB, CAPABILITIES],
    [CAPABILITIES, OOB],
    [b"{'execute': 'qmp_capabilities', 'arguments': {}}", STATUS],
    [b"{'execute': 'qmp_capabilities', 'arguments': {'enable': []}, 'id': 1}", STATUS],
    [b"{'execute': 'qmp_capabilities', 'arguments': {'enable': ['nope']}, 'id': 1}", STATUS, CAPABILITIES],
    [b"{'execute': 'qmp_capabilities', 'arguments': {'enable': ['oob', 'nope']}, 'id': 1}", STATUS, OOB],
    [b"{'execute': 'qmp_capabilities', 'arguments': {'enable': ['oob', 'oob']}}", STATUS],
    [b"{'execute': 'qmp_capabilities', 'arguments': {'enable': 'oob'}}", STATUS, CAPABILITIES],
    [b"{'execute': 'qmp_capabilities', 'arguments': {'enable': null}}", STATUS],
    [b"{'execute': 'qmp_capabilities', 'arguments': {'enable': [1]}}", STATUS],
    [b"{'execute': 'qmp_capabilities', 'arguments': {'enable': [], 'x': 1}}", STATUS],
    [b"{'execute': 'qmp_capabilities', 'arguments': {'is already complete': 1}}", STATUS],
    [b"{'execute': 'qmp_capabilities', 'arguments': []}", STATUS],
    [b"{'exec-oob': 'qmp_capabilities'}", STATUS, CAPABILITIES],
    [b"{'exec-oob': 'migrate-pause', 'id': 1}", CAPABILITIES, b"{'exec-oob': 'migrate-pause', 'id': 2}"],
    [OOB, b"{'exec-oob': 'qmp_capabilities', 'id': 1}"],
    [OOB, b"{'exec-oob': 'query-status', 'id': 1}", b"{'exec-oob': 'no-such', 'id': 2}"],
    [OOB, b"{'exec-oob': 'migrate-pause'}", b"{'exec-oob': 'migrate-pause', 'id': null}"],
    [OOB, b"{'exec-oob': 'migrate-pause', 'extra': 1, 'id': 2}", b"{'exec-oob': 7, 'id': 3}"],
    [OOB, b"{'exec-oob': 'migrate-pause', 'arguments': {'x': 1}, 'id': 2}"],
    [OOB, b"{'exec-oob': 'x', 'execute': 'query-status', 'id': 2}", STATUS],
    [CAPABILITIES + STATUS + b"{'exec-oob': 'migrate-pause', 'id': 9}" + STATUS],
    [OOB + b"{'exec-oob': 'migrate-pause', 'id': 9}"],
    [b"{'execute': 'nothing-yet'}", b"{'execute': 'query-commands', 'id': 'early'}", CAPABILITIES],
    [b"{]", b"{'execute': 'query-status', 'extra': 1}", b"null ", OOB, STATUS],
    [STATUS * 3 + CAPABILITIES + STATUS * 3],
]

STATEFUL: list[Exchange] = [
    [
        CAPABILITIES,
        b"{'execute': 'stop'}",
        STATUS,
        b"{'execute': 'cont', 'id': 1}",
        STATUS,
        b"{'execute': 'stop'}",
    ],
    [
        CAPABILITIES,
        b"{'execute': 'object-add', 'arguments': {'qom-type': 'memory-backend-ram', 'id': 'm', 'size': 4096}}",
    ],
    [
        CAPABILITIES,
        b"{'execute': 'qom-get', 'arguments': {'path': '/objects/m', 'property': 'size'}, 'id': 2}",
    ],
    [
        CAPABILITIES,
        b"{'execute': 'object-del', 'arguments': {'id': 'm'}}{'execute': 'object-del', 'arguments': {'id': 'm'}}",
    ],
    [
        CAPABILITIES,
        b"{'execute': 'blockdev-add', 'arguments': {'driver': 'null-co', 'node-name': 'n', 'size': 1048576}}",
    ],
    [
        CAPABILITIES,
        b"{'execute': 'query-named-block-nodes'}",
        b"{'execute': 'blockdev-del', 'arguments': {'node-name': 'n'}}",
    ],
    [
        CAPABILITIES,
        b"{'execute': 'getfd', 'arguments': {'fdname': 'a'}}",
        b"{'execute': 'closefd', 'arguments': {'fdname': 'a'}}",
    ],
    [CAPABILITIES, b"{'execute': 'getfd', 'arguments': {'fdname': '1a'}}", b"{'execute': 'add-fd'}"],
    [CAPABILITIES, b"""{"execute": "closefd", "arguments": {"fdname": "it\\'s"}}""" + STATUS],
    [CAPABILITIES, b"""{"execute": "getfd", "arguments": {"fdname": "it\\'s"}}""" + STATUS],
    [CAPABILITIES, b"""{"execute": "qom-get", "extra": "it\\'s"}""" + STATUS],
    [CAPABILITIES, b"{'execute': 'human-monitor-command', 'arguments': {'command-line': 'info version'}}"],
    [CAPABILITIES, b"{'execute': 'human-monitor-command', 'id': 2}"],
    [
        CAPABILITIES,
        b"{'execute': 'chardev-add', 'arguments': {'id': 'c', 'backend': {'type': 'null', 'data': {}}}}",
    ],
    [
        CAPABILITIES,
        b"{'execute': 'chardev-remove', 'arguments': {'id': 'c'}, 'id': {'x': 18446744073709551615}}",
    ],
    [
        CAPABILITIES,
        b"{'execute': 'migrate-set-capabilities', 'arguments': {'capabilities': [{'capability': 'xbzrle', 'state': true}]}}",
        b"{'execute': 'query-migrate-capabilities'}",
    ],
    [
        CAPABILITIES,
        b"{'execute': 'migrate-set-parameters', 'arguments': {'max-bandwidth': 18446744073709551616}}",
    ],
]


def sentinel(serial: int) -> bytes:
    return b'\n{"execute": "query-name", "id": "sentinel-%d"}' % serial


async def run(client: Client, sends: Exchange, *, resynchronise: bool) -> list[Message]:
    """All messages that the exchange causes, in order."""
    messages: list[Message] = []
    for serial, data in enumerate(sends):
        # FF puts the parser into a known state, whatever was sent before it (docs/interop/qmp-spec)
        await client.send(data + (b"\xff" if resynchronise else b"") + sentinel(serial))
        while True:
            message = await client.receive()
            messages.append(message)
            if message.get("id") == f"sentinel-{serial}":
                break
    return messages


def steady(value: object) -> object:
    """The value without what differs from process to process."""
    if isinstance(value, dict):
        return {key: steady(item) for key, item in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [steady(item) for item in value]
    return value


def reworded(message: Message) -> Message:
    """JSON errors may be worded otherwise; since 11 they begin with line and column."""
    if "error" in message and re.match(r"(\d+:\d+: )?JSON ", message["error"]["desc"]):
        return {**message, "error": {"class": message["error"]["class"], "desc": "JSON"}}
    return message


class Pair:
    def __init__(self, direct: Path, through: Path) -> None:
        self.paths = (direct, through)
        self.exchanges = 0

    async def compare(self, sends: Exchange, *, resynchronise: bool = False) -> None:
        results = []
        for path in self.paths:
            async with connected(path) as client:
                messages = [client.greeting, *await run(client, sends, resynchronise=resynchronise)]
                results.append([steady(reworded(message)) for message in messages])
        assert results[1] == results[0], sends
        self.exchanges += len(sends)


@pytest.fixture(params=QEMUS)
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    async with pair_of(request.param) as both:
        yield both


@asynccontextmanager
async def pair_of(qemu: str, suffix: str = "") -> AsyncIterator[Pair]:
    with directory() as path:
        one, other, front = path / "direct", path / "upstream", path / "front"
        with (
            qemu_process(f"unix:{one},server=on,wait=off{suffix}", qemu=qemu),
            qemu_process(f"unix:{other},server=on,wait=off{suffix}", qemu=qemu),
        ):
            async with refault(other, front):
                yield Pair(one, front)


async def test_ids(pair: Pair) -> None:
    commands = [
        b'{"execute": "%s", "id": %s}' % (name, spelling)
        for spelling in IDS
        for name in (b"query-name", b"no")
    ]
    await pair.compare([CAPABILITIES, *commands, STATUS, b"".join(commands)])
    await pair.compare([OOB, *[b'{"id": %s, "exec-oob": "migrate-pause"}' % spelling for spelling in IDS]])
    await pair.compare([b'{"execute": "query-name", "id": %s}' % spelling for spelling in IDS])


async def test_malformed(pair: Pair) -> None:
    async with connected(pair.paths[0]) as client:
        major = client.greeting["QMP"]["version"]["qemu"]["major"]
    malformed = [bad for bad in MALFORMED if major < 11 or bad not in TOO_DEEP]
    for bad in malformed:
        await pair.compare([bad], resynchronise=True)
        await pair.compare([CAPABILITIES, bad, STATUS], resynchronise=True)
    await pair.compare([OOB, *malformed], resynchronise=True)
    print(f"{pair.exchanges} exchanges")
    assert pair.exchanges >= 150


async def test_negotiation(pair: Pair) -> None:
    for exchange in NEGOTIATIONS:
        await pair.compare(exchange)


async def test_state(pair: Pair) -> None:
    for exchange in STATEFUL:
        await pair.compare(exchange)


async def test_every_command(pair: Pair) -> None:
    async with connected(pair.paths[0]) as client:
        await client.negotiate()
        names = sorted(item["name"] for item in await client.command("query-commands"))
    safe = [name for name in names if name not in UNSAFE and not name.startswith("system_")]
    exchanges = [CAPABILITIES]
    for name in safe:
        exchanges.append(json.dumps({"execute": name, "id": name}).encode())
        exchanges.append(
            json.dumps({"execute": name, "arguments": {"no-such-argument": [1, {"a": None}]}}).encode()
        )
    await pair.compare(exchanges)
    print(f"{pair.exchanges} exchanges")
    assert pair.exchanges >= 300
