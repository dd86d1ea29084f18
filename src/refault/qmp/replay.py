"""Makes a multiplexer what that of a killed refault was, of what that has written down (journal.py).

The core does the same on the same input, so all that befell it is put in again, in order, with nobody there
to be told of what it says: what it would send is kept, and of that is taken away what the record says was
sent. What was not is sent on, from the very byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from refault.qmp import saved
from refault.qmp.access import Rule
from refault.qmp.commands import Answer, Forward
from refault.qmp.greeting import NotQmpError
from refault.qmp.hiding import Word
from refault.qmp.journal import Kind, Record, TornError
from refault.qmp.multiplexer import Multiplexer, nobody
from refault.qmp.session import GONE, Client, Request


class Joined(msgspec.Struct, array_like=True):
    """Of Kind.JOINED: by which rule a client is served, and what the daemon knows it by."""

    read_only: bool
    deny: list[str]
    audit: bool
    about: msgspec.Raw
    hide_pause: float | None = None

    @property
    def rule(self) -> Rule:
        """The rule."""
        return Rule(self.read_only, frozenset(self.deny), self.audit, self.hide_pause)


class Came(msgspec.Struct, array_like=True):
    """Of Kind.CAME: the connection's cookie, and where it came."""

    cookie: bytes
    address: str


class Called(msgspec.Struct, array_like=True):
    """Of Kind.CALLED."""

    command: str
    arguments: dict[str, object] | None
    oob: bool
    has_fd: bool
    beside: bool


class Verdict(msgspec.Struct, array_like=True):
    """Of Kind.ANSWERED; `asked` is the command's number, `answer` a whole Answer."""

    asked: int
    answers: bool
    error: tuple[str, str] | None = None
    value: object = None
    arguments: dict[str, object] | None = None
    changes: bool = False


class Said(msgspec.Struct, array_like=True):
    """Of Kind.HIDING."""

    word: Word
    value: float


class Replay:
    """Of one journal, into a core that is new. Afterwards all that is to be sent is in the core's
    `upstream_out` and in the `out` of its clients; `finish` gives commands their descriptors."""

    def __init__(self, core: Multiplexer) -> None:
        self.about: dict[int, msgspec.Raw] = {}
        """What the daemon knows the clients by who came while the record was written."""
        self.came: dict[bytes, str] = {}
        """Connections that were accepted meanwhile, and where; those too who have joined since."""
        self.lost_descriptors: list[str] = []
        """Of which clients' commands they were, of those that QEMU had not got."""
        self.peeked: dict[int, int] = {}
        """Bytes that are in the sockets of clients yet, though they are known."""
        self._core = core
        self._skip: dict[int, int] = {}
        """Bytes at the head of a client's `out` that have been sent."""
        self._skip_upstream = 0
        self._ahead: Sequence[Record] = ()
        self._at = 0

    def run(self, before: bytes | memoryview, records: Sequence[Record]) -> None:
        """Raises TornError where they are not of such a core."""
        core = self._core
        callbacks = core.ask, core.discard, core.on_event, core.on_ready, core.audit
        core.ask = core.discard = core.audit = _ignore
        core.on_event, core.on_ready = _ignore_event, _ignore_nothing
        try:
            saved.restore(core, before, self._changed)
            self._ahead = records
            while self._at < len(records):
                record = records[self._at]
                self._at += 1
                self._put_in(record)
        except (
            NotQmpError,
            msgspec.MsgspecError,
            LookupError,
            ValueError,
            TypeError,
            AssertionError,
        ) as error:
            raise TornError(f"it does not fit together: {error!r}") from error
        finally:
            core.ask, core.discard, core.on_event, core.on_ready, core.audit = callbacks

    def _put_in(self, record: Record) -> None:
        core, who = self._core, record.who
        if record.kind is Kind.SENT:
            self._sent(who, record.count)
        elif who == 0:
            self._ours(record)
        elif record.kind is Kind.JOINED:
            joined = msgspec.msgpack.decode(record.data, type=Joined)
            client = core.join(None, joined.rule)
            if client.number != who:
                raise TornError("its clients are in no order")
            self.about[who] = joined.about
        elif who in core.clients or record.kind is not Kind.CONSUMED:  # as it was leaving
            self._clients_do(record, core.clients[who])
        core.dirty.clear()

    def _clients_do(self, record: Record, client: Client) -> None:
        core = self._core
        match record.kind:
            case Kind.RECEIVED:
                core.receive(client, bytes(record.data))
            case Kind.PEEKED:
                self.peeked[client.number] = record.count
                core.receive(client, bytes(record.data), saved.LOST + client.number)
            case Kind.CONSUMED:
                self.peeked.pop(client.number, None)
                self._lose(client)
            case Kind.MORE:
                core.receive(client, b"")
            case Kind.HALF_CLOSED:
                core.half_close(client)
            case Kind.LEFT:
                core.leave(client)
                self._skip.pop(client.number, None)
            case _:
                raise TornError(f"a client's record of kind {record.kind}")

    def _lose(self, client: Client) -> None:
        """What comes in its place in the client's socket is another command's."""
        core, token = self._core, saved.LOST + client.number
        for request in (*client.queue, *client.line, *core.urgent, *core.asked.values()):
            if request.fd == token:
                request.fd = saved.LOST
        if client.fd == token:
            client.fd = saved.LOST
        core.upstream_out = [(data, saved.LOST if fd == token else fd) for data, fd in core.upstream_out]

    def _ours(self, record: Record) -> None:
        core = self._core
        match record.kind:
            case Kind.RECEIVED:
                core.receive_upstream(bytes(record.data))
            case Kind.MORE:
                core.receive_upstream(b"")
            case Kind.CHANGED:
                raise TornError("a change of no reply")
            case Kind.ANSWERED:
                verdict = msgspec.msgpack.decode(record.data, type=Verdict)
                request = core.asked.get(verdict.asked)
                if request is None:
                    pass
                elif verdict.answers:
                    core.answer(request, Answer(verdict.error, verdict.value))
                else:
                    core.answer(
                        request, Forward(verdict.arguments, self._changed if verdict.changes else None)
                    )
            case Kind.CALLED:
                call = msgspec.msgpack.decode(record.data, type=Called)
                core.call(
                    call.command,
                    call.arguments,
                    oob=call.oob,
                    fd=saved.LOST if call.has_fd else -1,
                    done=nobody,
                    beside=call.beside,
                )
            case Kind.CAME:
                came = msgspec.msgpack.decode(record.data, type=Came)
                self.came[came.cookie] = came.address
            case Kind.HIDING:
                said = msgspec.msgpack.decode(record.data, type=Said)
                core.hide(said.word, said.value)
            case Kind.URGENT:
                core.pass_urgent()
            case Kind.FORGOTTEN:
                number = msgspec.msgpack.decode(record.data, type=int)
                for own in core.internal:
                    for request in (*own.queue, *core.urgent):
                        if request.call == number:
                            core.forget(request)
                            return
            case _:
                raise TornError(f"a record of kind {record.kind}")

    def _changed(self, reply: bytes) -> bytes:
        """What a watcher made of a reply: that stands next in the record. A kill may have come before."""
        if self._at < len(self._ahead) and self._ahead[self._at].kind is Kind.CHANGED:
            self._at += 1
            return bytes(self._ahead[self._at - 1].data)
        return reply

    def _sent(self, who: int, count: int) -> None:
        core = self._core
        if who != 0:
            client = core.clients[who]
            client.unsent -= count
            skip = self._skip.get(who, 0) + count
            out = client.out
            while out and skip >= len(out[0]):
                skip -= len(out.pop(0))
            self._skip[who] = skip
            if skip and not out:
                raise TornError("more was sent to a client than there was")
            return
        out_up = core.upstream_out
        skip = self._skip_upstream + count
        while out_up and skip >= len(out_up[0][0]):
            skip -= len(out_up.pop(0)[0])
        self._skip_upstream = skip
        if skip and not out_up:
            raise TornError("more was sent to QEMU than there was")

    def finish(self, recover: Callable[[int], int]) -> None:
        """Takes off what was sent. `recover` gives the descriptor that was in a client's socket yet, by the
        client's number, or -1. Raises TornError."""
        core = self._core

        def real(fd: int) -> int:
            found = recover(fd - saved.LOST) if fd > saved.LOST else -1
            return found if found >= 0 else GONE

        core.dirty.clear()
        for request in (*core.window.pending.values(), *core.urgent, *_not_sent(core)):
            request.on_reply = None  # the watcher has gone with its process
        for client in core.clients.values():
            if skip := self._skip.get(client.number, 0):
                client.out[0] = client.out[0][skip:]
            if client.out or client.closing or client.overflow:
                core.dirty.append(client)
        if self._skip_upstream > 0:  # the descriptor went with the first byte
            data, _ = core.upstream_out[0]
            core.upstream_out[0] = data[self._skip_upstream :], -1
        self.lost_descriptors = give_descriptors(core, real)


def give_descriptors(core: Multiplexer, real: Callable[[int], int]) -> list[str]:
    """Puts the descriptor that `real` gives in the place of each that a command has, or GONE: a command whose
    descriptor that is does not go to QEMU. Of whose commands these are, but for refault's own. What waited
    for one goes on when more befalls its client, and QEMU. Raises TornError."""
    lost: list[str] = []
    for request in (*core.asked.values(), *core.urgent, *_not_sent(core)):
        if request.fd < 0:
            continue
        request.fd = real(request.fd)
        if request.fd != GONE:
            continue
        request.client.queued_fds -= 1
        if request.done is not None:
            core.forget(request)  # whoever made it has gone with its process
        elif core.descriptors.is_lost(request):
            lost.append(_of(request))
    for client in core.clients.values():
        if client.fd >= 0:
            client.fd = real(client.fd)
            if client.fd == GONE:
                lost.append(f"client {client.number}'s, with the beginning of a command")
    out = [(data, real(fd) if fd >= 0 else -1) for data, fd in core.upstream_out]
    core.upstream_out = [each for each in out if each[1] != GONE]
    if len(core.upstream_out) < len(out):
        taken_back = core.take_back()
        if taken_back is None or len(core.upstream_out) + 1 < len(out):
            raise TornError("more descriptors are on their way than may be")
        if taken_back.done is None:
            lost.append(_of(taken_back))
    return lost


def _not_sent(core: Multiplexer) -> list[Request]:
    clients = (*core.internal, *core.clients.values())
    return [request for client in clients for request in (*client.queue, *client.line)]


def _of(request: Request) -> str:
    return f"client {request.client.number}'s {request.name.decode(errors='replace')}"


def _ignore(_: object) -> None:
    pass


def _ignore_event(name: str, data: Mapping[str, object]) -> None:
    pass


def _ignore_nothing() -> None:
    pass
