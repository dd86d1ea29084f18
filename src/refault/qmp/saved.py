"""All that a multiplexer knows of one connection to QEMU and of its clients, as bytes: another one that is
given them goes on as this one does.

Descriptors do not outlive a process: where a command has one, the other core has `LOST` in its place, and for
one that is in its client's socket yet `LOST` and the client's number. `GONE` stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from refault.qmp.access import Rule
from refault.qmp.fdsets import FdSets
from refault.qmp.greeting import Greeting, parse_greeting
from refault.qmp.hiding import Hiding, State
from refault.qmp.multiplexer import Multiplexer, nobody
from refault.qmp.session import Client, Request
from refault.qmp.splitter import MAX_REPLY, Message, Splitter

LOST = 1 << 30
"""In place of a descriptor."""

SplitterState = tuple[bytes, bool, bool]


class _Request(msgspec.Struct, array_like=True):
    client: int
    raw: bytes
    record: list[int]
    problem: str | None
    name: bytes
    oob: bool
    fd: int
    read: int
    refusal: str | None
    answer: bytes | None
    cleared: bool
    data: bytes | None
    rebuilt: bool
    new_name: str | None
    names: dict[str, str]
    prefixes: list[bytes]
    changes: bool
    negotiates: bool
    purpose: str
    own: bool
    asked: int
    call: int
    begun: bool = False


class _Client(msgspec.Struct, array_like=True):
    number: int
    read_only: bool
    deny: list[str]
    audit: bool
    connected: bool
    greeted: bool
    negotiated: bool
    oob: bool
    queue: list[int]
    queued: int
    queued_fds: int
    held: int
    in_flight: int
    oob_in_flight: int
    oob_bytes: int
    ready: bool
    fd: int
    out: bytes
    unsent: int
    overflow: bool
    half_closed: bool
    closing: bool
    splitter: SplitterState
    hide_pause: float | None = None
    line: list[int] = []


class _Names(msgspec.Struct, array_like=True):
    prefix: str
    serial: int
    upstream: list[tuple[int, str, str]]


class _Sets(msgspec.Struct, array_like=True):
    may_add: bool
    older: list[int] | None
    sets: list[tuple[int, int, list[int], list[int]]]
    named: dict[int, int]
    all_named: int
    read: int
    asked_older: bool
    looks: bool
    returned: list[object]


class _Hiding(msgspec.Struct, array_like=True, frozen=True):
    state: str = State.CLEAR.name
    may: bool | None = None
    withheld: bytes = b""
    over: tuple[float, ...] = ()
    began: float | None = None
    events: bool = False


class _Core(msgspec.Struct, array_like=True):
    requests: list[_Request]
    clients: list[_Client]
    last_client: int
    last_asked: int
    last_call: int
    greeting: bytes
    oob: bool
    ready: bool
    negotiation: bytes
    splitter: SplitterState
    upstream: list[tuple[bytes, int]]
    window: list[tuple[int, int]]
    last_id: int
    turns: list[int]
    fd_waiting: list[int]
    takes_fd: int
    asked: list[int]
    early: list[int]
    names: _Names
    sets: _Sets
    hiding: _Hiding = _Hiding()
    urgent: list[int] = []
    urgent_goes: bool = False


def save(
    core: Multiplexer,
    unsent: Callable[[Client], Iterable[bytes | memoryview]],
    upstream: Iterable[tuple[bytes | memoryview, int]],
    peeked: Callable[[int], int],
) -> bytes:
    """`unsent`: what the transport has taken from a client's `out` and not sent; `upstream`: the same of what
    goes to QEMU; `peeked`: the number of the client in whose socket a descriptor is yet, or 0. A core that is
    connected to QEMU."""
    greeting = core.greeting
    assert greeting is not None  # noqa: S101 - it is connected
    requests: list[_Request] = []
    numbers: dict[int, int] = {}
    gone: dict[int, Client] = {}
    internal = core.internal

    def token(fd: int) -> int:
        return LOST + peeked(fd) if fd >= 0 else fd

    def number(request: Request | None) -> int:
        if request is None:
            return -1
        if id(request) not in numbers:
            numbers[id(request)] = len(requests)
            client = request.client
            if client not in internal and core.clients.get(client.number) is not client:
                gone[client.number] = client
            requests.append(_of_request(request, token(request.fd)))
        return numbers[id(request)]

    window = core.window
    saved_window = [(each, number(request)) for each, request in window.pending.items()]
    asked = [number(request) for request in core.asked.values()]
    # A refault of before knows no lines.
    early = [number(each) for client in core.clients.values() for each in client.line if not each.begun]
    urgent = [number(request) for request in core.urgent]
    takes_fd = number(core.descriptors.request)

    def of_client(client: Client) -> _Client:
        return _Client(
            client.number,
            client.rule.read_only,
            sorted(client.rule.deny),
            client.rule.audit,
            client.connected,
            client.greeted,
            client.negotiated,
            client.oob,
            [number(request) for request in client.queue],
            client.queued,
            client.queued_fds,
            number(client.held),
            client.in_flight,
            client.oob_in_flight,
            client.oob_bytes,
            client.ready and client.connected,
            token(client.fd),
            b"".join((*unsent(client), *client.out)),
            client.unsent,
            client.overflow,
            client.half_closed,
            client.closing,
            client.splitter.saved(),
            client.rule.hide_pause,
            [number(request) for request in client.line],
        )

    clients = [of_client(client) for client in (*internal, *core.clients.values())]
    clients += [of_client(client) for client in gone.values()]
    names, sets = core.descriptors.names, core.descriptors.sets
    return msgspec.msgpack.encode(
        _Core(
            requests,
            clients,
            core.last_client,
            core.last_asked,
            core.last_call,
            greeting.raw,
            greeting.oob,
            core.ready,
            core.negotiation,
            core.splitter.saved(),
            [(bytes(data), token(fd)) for data, fd in (*upstream, *core.upstream_out)],
            saved_window,
            window.last_id,
            [client.number for client in core.turns if client.connected],
            [client.number for client in core.fd_waiting if client.connected],
            takes_fd,
            asked,
            early,
            _Names(
                names.prefix,
                names.serial,
                [(client, name, upstream) for (client, name), upstream in names.upstream.items()],
            ),
            _of_sets(sets),
            _of_hiding(core.hiding),
            urgent,
            core.urgent_goes,
        )
    )


def _of_request(request: Request, fd: int) -> _Request:
    message = request.message
    return _Request(
        request.client.number,
        message.raw,
        message.record(),
        message.problem,
        request.name,
        request.oob,
        fd,
        request.read,
        request.refusal,
        request.answer,
        request.cleared,
        request.data,
        request.rebuilt,
        request.new_name,
        request.names,
        sorted(request.prefixes),
        request.on_reply is not None,
        request.negotiates,
        request.purpose,
        request.done is not None,
        request.asked,
        request.call,
        request.begun,
    )


def _of_sets(sets: FdSets) -> _Sets:
    return _Sets(
        sets.may_add,
        None if sets.older is None else sorted(sets.older),
        [(number, mine.since, sorted(mine.fds), sorted(mine.clients)) for number, mine in sets.sets.items()],
        sets.named,
        sets.all_named,
        sets.commands_read,
        sets.asked_older,
        sets.looks,
        sets.returned,
    )


def _of_hiding(hiding: Hiding) -> _Hiding:
    return _Hiding(
        hiding.state.name,
        hiding.may,
        hiding.withheld,
        tuple(sorted(hiding.over)),
        hiding.began,
        hiding.events,
    )


def restore(core: Multiplexer, saved: bytes | memoryview, changed: Callable[[bytes], bytes]) -> None:
    """Makes a new core what the saved one was. All that is unsent is in its `upstream_out` and in the `out`
    of its clients. `changed`: what becomes of a reply that a watcher wanted to change.

    Raises msgspec.DecodeError, or others on nonsense.
    """
    was = msgspec.msgpack.decode(saved, type=_Core)
    clients = {client.number: client for client in core.internal}
    for each in was.clients:
        _client(core, clients, each)
    requests = [_request(each, clients[each.client], changed) for each in was.requests]
    for each in was.clients:
        client = clients[each.number]
        client.queue.extend(requests[at] for at in each.queue)
        client.line.extend(requests[at] for at in each.line)
        client.held = requests[each.held] if each.held >= 0 else None
    greeting = parse_greeting(Message(was.greeting, [0] * 12, None))
    core.greeting = Greeting(greeting.raw, greeting.version, greeting.package, oob=was.oob)
    core.ready = was.ready
    core.negotiation = was.negotiation
    core.last_client, core.last_asked, core.last_call = was.last_client, was.last_asked, was.last_call
    core.splitter = Splitter(max_bytes=MAX_REPLY, lenient=True)
    core.splitter.restore(was.splitter)
    core.upstream_out = list(was.upstream)
    core.window.restore(was.last_id, {each: requests[at] for each, at in was.window})
    core.turns.extend(clients[each] for each in was.turns)
    core.fd_waiting.extend(clients[each] for each in was.fd_waiting)
    core.asked.update((requests[at].asked, requests[at]) for at in was.asked)
    core.urgent.extend(requests[at] for at in was.urgent)
    core.urgent_goes = was.urgent_goes
    _lines(core, [requests[at] for at in was.early])
    core.descriptors.request = requests[was.takes_fd] if was.takes_fd >= 0 else None
    core.descriptors.names.restore(was.names.prefix, was.names.serial, was.names.upstream)
    sets = was.sets
    core.descriptors.sets.restore(
        may_add=sets.may_add,
        older=None if sets.older is None else frozenset(sets.older),
        sets=sets.sets,
        named=sets.named,
        all_named=sets.all_named,
        commands_read=sets.read,
        asked_older=sets.asked_older,
        looks=sets.looks,
        returned=sets.returned,
    )
    _hiding(core.hiding, was.hiding)


def _lines(core: Multiplexer, early: list[Request]) -> None:
    """A refault of before has saved no line. `early`: what it had that QEMU could not take yet."""
    begun = [*core.window.pending.values(), *core.urgent, *core.asked.values()]
    for request in (*begun, *early):
        client = request.client
        mine = request.oob and client.connected and client not in core.internal
        if mine and request not in client.line:
            request.begun = request not in early
            client.line.append(request)


def _hiding(hiding: Hiding, was: _Hiding) -> None:
    hiding.state = State[was.state]
    hiding.may, hiding.withheld, hiding.over = was.may, was.withheld, frozenset(was.over)
    hiding.began, hiding.events = was.began, was.events


def _client(core: Multiplexer, clients: dict[int, Client], was: _Client) -> None:
    client = clients.get(was.number)
    if client is None:
        rule = Rule(was.read_only, frozenset(was.deny), was.audit, was.hide_pause)
        client = clients[was.number] = core.new_client(was.number, rule)
        if was.connected:
            core.clients[client.number] = client
    client.connected = was.connected
    client.greeted, client.negotiated, client.oob = was.greeted, was.negotiated, was.oob
    client.queued, client.queued_fds = was.queued, was.queued_fds
    client.in_flight, client.oob_in_flight, client.oob_bytes = (
        was.in_flight,
        was.oob_in_flight,
        was.oob_bytes,
    )
    client.ready = was.ready
    client.fd = was.fd
    client.out = [was.out] if was.out else []
    client.unsent = was.unsent
    client.overflow, client.half_closed, client.closing = was.overflow, was.half_closed, was.closing
    client.splitter.restore(was.splitter)


def _request(was: _Request, client: Client, changed: Callable[[bytes], bytes]) -> Request:
    request = Request(client, Message(was.raw, was.record, was.problem))
    request.name, request.oob = was.name, was.oob
    request.fd = was.fd
    request.read, request.refusal, request.answer = was.read, was.refusal, was.answer
    request.cleared, request.data, request.rebuilt = was.cleared, was.data, was.rebuilt
    request.new_name, request.names = was.new_name, was.names
    request.prefixes = frozenset(was.prefixes)
    request.on_reply = changed if was.changes else None
    request.negotiates, request.purpose = was.negotiates, was.purpose
    request.done = nobody if was.own else None
    request.asked, request.call, request.begun = was.asked, was.call, was.begun
    return request
