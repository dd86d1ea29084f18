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
from refault.qmp.session import Client


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
        self.lost_descriptors = 0
        """Descriptors that clients had passed and QEMU had not got."""
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
            case Kind.MORE:
                core.receive(client, b"")
            case Kind.HALF_CLOSED:
                core.half_close(client)
            case Kind.LEFT:
                core.leave(client)
                self._skip.pop(client.number, None)
            case _:
                raise TornError(f"a client's record of kind {record.kind}")

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
        client's number, or -1."""
        core = self._core

        def real(fd: int) -> int:
            if fd < saved.LOST:
                return fd
            found = recover(fd - saved.LOST) if fd > saved.LOST else -1
            self.lost_descriptors += found < 0
            return found

        core.dirty.clear()
        clients = (*core.internal, *core.clients.values())
        requests = [request for client in clients for request in (*client.queue, *client.line)]
        for request in (*core.window.pending.values(), *core.urgent, *requests):
            request.on_reply = None  # the watcher has gone with its process
        for request in (*core.asked.values(), *core.urgent, *requests):
            if request.fd >= saved.LOST:
                request.fd = real(request.fd)
                request.client.queued_fds -= request.fd < 0
        for client in core.clients.values():
            client.fd = real(client.fd)
            if skip := self._skip.get(client.number, 0):
                client.out[0] = client.out[0][skip:]
            if client.out or client.closing or client.overflow:
                core.dirty.append(client)
        out, core.upstream_out = core.upstream_out, []
        for at, (data, fd) in enumerate(out):
            if at == 0 and self._skip_upstream > 0:  # the descriptor went with the first byte
                core.upstream_out.append((data[self._skip_upstream :], -1))
            else:
                core.upstream_out.append((data, real(fd)))


def _ignore(_: object) -> None:
    pass


def _ignore_event(name: str, data: Mapping[str, object]) -> None:
    pass


def _ignore_nothing() -> None:
    pass
