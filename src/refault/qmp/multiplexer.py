"""Many clients on one QEMU monitor: the protocol, without sockets, tasks or clocks.

    client.out ◀── replies, in the client's order ──┐                  ┌── receive_upstream(bytes)
    client.out ◀── events, to all, in QEMU's order ─┤   Multiplexer    │
    receive(client, bytes) ── client.queue ─▶ turns ┘──▶ window ──▶ upstream_out ──▶ QEMU

The transport feeds what it reads, and after each feeding empties `upstream_out` and the `out` of the clients
in `dirty`.

In-band commands: a client's go in its order; clients take turns, as far as the window has room (window.py).
Out-of-band commands of clients that have the right go at once, but what is behind one that a watcher thinks
about, of the same client, waits for him: they go in its order, and so do the replies, as at QEMU
(monitor/qmp.c, handle_qmp_command). Descriptors go with them (descriptors.py).

A command that takes a descriptor goes alone: when nothing in-band is with QEMU, and nothing follows before
its reply. QEMU's main thread takes the descriptor, and its monitor's thread looks at it with every byte that
it reads, without a lock (chardev/char-socket.c, tcp_get_msgfds and tcp_chr_recv): tried: 7.2 and 10.0 die.
Out-of-band commands wait for the reply too, until `pass_urgent`: a main thread that waits for a page, which
they may bring, takes no descriptor.

Ids: QEMU gets ours. What a connection before this one left running is answered before our qmp_capabilities,
which is in-band too; so that one's id is unlike any other, and replies that come before its are dropped. QEMU
takes a connection before it forgets what the last one had negotiated (monitor/qmp.c, monitor_qmp_event):
events and replies can come before its greeting. They are of the time before and are dropped: refault asks
QEMU what it is at once it is connected.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import msgspec

from refault.qmp import replies
from refault.qmp.access import FREE, MOST_READ, Rule, changes
from refault.qmp.commands import Answer, Forward
from refault.qmp.decoding import decode_members, verb_name
from refault.qmp.delivery import Counters, Delivery
from refault.qmp.descriptors import Descriptors
from refault.qmp.fdnames import TAKES_FD, USES_NAMES
from refault.qmp.greeting import Greeting, NotQmpError, parse_greeting
from refault.qmp.hiding import Word, status_of
from refault.qmp.negotiation import negotiate, negotiated_by_qemu
from refault.qmp.session import Client, Limits, Request
from refault.qmp.splitter import (
    ERROR,
    EVENT,
    EXEC_OOB,
    EXECUTE,
    GREETING,
    MAX_REPLY,
    NOT_OBJECT,
    RETURN,
    UNUSUAL,
    VERB_MASK,
    Message,
    Splitter,
)
from refault.qmp.window import Window, as_sent

SHARE = 2
"""In-band commands of one client with QEMU: it always has its next one, and others need not wait for many."""

_CAPABILITIES = b"qmp_capabilities"
_QUERY_MIGRATE = b"query-migrate"


class Multiplexer:
    """The state of one QEMU's monitor and of its clients.

    `watch`: names of commands about which `ask` is called; it arranges that `answer` is. `discard` closes a
    descriptor. `on_event` gets each event's name and data; `on_ready` is called when commands can go to QEMU.
    `audit` is told of each command that read-only refuses, of clients whose rule asks for it, as it goes to
    QEMU or to a watcher, and of each that is refused.
    """

    def __init__(
        self,
        *,
        limits: Limits,
        watch: Iterable[str],
        ask: Callable[[Request], None],
        discard: Callable[[int], None],
        on_event: Callable[[str, Mapping[str, object]], None],
        on_ready: Callable[[], None],
        audit: Callable[[Request], None],
    ) -> None:
        self.limits = limits
        self._watch = frozenset(name.encode() for name in watch)
        self.ask = ask
        self.discard = discard
        self.on_event = on_event
        self.on_ready = on_ready
        self.audit = audit
        self.clients: dict[int, Client] = {}
        self.upstream_out: list[tuple[bytes, int]] = []
        """What goes to QEMU, each with the descriptor that goes with its first byte, or -1."""
        self.greeting: Greeting | None = None
        self.ungreeted = b""
        """The beginning of what came last without a greeting before it."""
        self.ready = False
        self.taking = False
        """Whether a batch of QEMU's messages is being taken."""
        self.spent = False
        """Set when a command is over that may have a secret in it: what was written down of it is to go."""
        self._own = self._internal(0)
        self._orphans = self._internal(-1)
        self._keeper = self._internal(-2)
        """Asks what becomes of fd sets, beside refault's other commands."""
        self.delivery = Delivery(self.clients, self._orphans, limits)
        self.dirty, self.hiding = self.delivery.dirty, self.delivery.hiding
        self.last_client = 0
        self.splitter = Splitter(max_bytes=MAX_REPLY, lenient=True)
        self.negotiation = b""
        self.window = Window()
        self.turns: deque[Client] = deque()
        self.fd_waiting: list[Client] = []
        """Those whose next command takes a descriptor, while another's does."""
        self.descriptors = Descriptors(lambda fd: self.discard(fd), self._keep, self._fd_free)
        self.asked: dict[int, Request] = {}
        self.last_asked = 0
        self.last_call = 0
        self.urgent: deque[Request] = deque()
        """Out-of-band commands that are to go, and wait until QEMU has taken a descriptor."""
        self.urgent_goes = False
        """Whether those no longer wait for the command that takes one now."""

    @property
    def counters(self) -> Counters:
        """Totals since the start."""
        return self.delivery.counters

    def goes_on_from(self, earlier: Multiplexer) -> None:
        """It is in the place of `earlier`, which has failed: it counts on, and knows whether refault would
        recover a pause."""
        self.delivery.goes_on_from(earlier.delivery)
        self.hiding.goes_on_from(earlier.hiding)

    def forgotten(self) -> None:
        """What was written down of commands that are over is gone."""
        self.spent = False

    def take_upstream(self) -> list[tuple[bytes, int]]:
        """Takes what goes to QEMU."""
        out, self.upstream_out = self.upstream_out, []
        return out

    def leave_undecided(self, count: int) -> None:
        """So many things are not known of what an earlier refault's end broke off."""
        self.counters.undecided += count

    def _internal(self, number: int) -> Client:
        client = Client(number, Limits())
        client.greeted = client.negotiated = client.oob = True
        return client

    @property
    def _oob_offered(self) -> bool:
        return self.greeting is not None and self.greeting.oob

    @property
    def internal(self) -> tuple[Client, ...]:
        """Those whose commands are not a client's that is there."""
        return self._own, self._orphans, self._keeper

    # clients

    def join(self, transport: object = None, rule: Rule = FREE) -> Client:
        """A client connected. It is greeted as soon as QEMU has greeted."""
        self.last_client += 1
        client = self.new_client(self.last_client, rule)
        client.transport = transport
        self.clients[client.number] = client
        if self.greeting:
            self._greet(client, self.greeting)
        return client

    def new_client(self, number: int, rule: Rule) -> Client:
        """One with the limits that its rule asks for."""
        limits = self.limits
        if rule.read_only:
            limits = replace(limits, message=min(limits.message, MOST_READ))
        return Client(number, limits, rule=rule)

    def leave(self, client: Client) -> None:
        """A client is gone. What it has not had sent is dropped, and so are the replies that will still come
        for it.

        A command about which a watcher is asked counts as sent.
        """
        if self.clients.pop(client.number, None) is None:
            return
        client.connected = False
        # What it had not finished saying may be anything.
        unsaid = (*client.queue, *client.line)
        self.spent |= client.splitter.held > 0 or any(each.may_have_secret for each in unsaid)
        asked = [request for request in self.asked.values() if request.client is client]
        answered = [request for request in client.queue if request.cleared]
        for request in client.queue:
            if not request.cleared:
                self.descriptors.drop(request)
        client.queue.clear()
        client.queued = 0
        for request in client.line:
            self.descriptors.drop(request)
        client.line.clear()
        if client.fd >= 0:
            self.discard(client.fd)
            client.fd = -1
        client.out.clear()
        urgent = [request for request in self.urgent if request.client is client]
        for request in (*asked, *answered, *urgent):
            request.names = self.descriptors.names.of(client.number)
        self.descriptors.names.leave(client.number)
        for request in answered:
            self._queue_first(self._orphans, request)
        self.descriptors.sets.left(client.number)
        self._pump()

    def name_upstream(self, client: int, name: str) -> str:
        """QEMU's name for a descriptor that a client passed as `name`; `name` where it passed none."""
        return self.descriptors.names.of(client).get(name, name)

    def half_close(self, client: Client) -> None:
        """A client will send nothing more; it leaves once it has its replies, as with QEMU."""
        client.half_closed = True
        self.delivery.close_if_done(client)

    def receive(self, client: Client, data: bytes, fd: int = -1) -> None:
        """Bytes from a client, and the descriptor that came with the last of the writes that they are from.

        A descriptor belongs to the last command in `data` that takes one, else to the next; one that is never
        taken is replaced by a later one, as in QEMU (chardev/char-socket.c, tcp_chr_recv).

        Takes one batch of messages: while `client.splitter.more`, call again with nothing, after others had
        their turn.
        """
        if client.closing:
            if fd >= 0:
                self.discard(fd)
            return
        requests = [self._request(client, message) for message in client.splitter.feed(data, batch=fd < 0)]
        if fd >= 0 or client.fd != -1:
            self.descriptors.hand_out(client, requests, fd, ends=data.endswith(b"}"))
        for request in requests:
            if client.oob and request.asks_oob():
                self._out_of_band(request)
                continue
            client.queue.append(request)
            client.queued += request.size
            if not client.negotiated:
                self._settle(client)  # what follows may be out-of-band already
        if client.queue:
            self._settle(client)
            self._pump()

    def _request(self, client: Client, message: Message) -> Request:
        request = Request(client, message)
        shape = message.shape
        if message.problem is not None:
            request.answer = replies.error(replies.GENERIC, message.problem)
        elif shape & NOT_OBJECT:
            request.answer = replies.NOT_OBJECT
        elif not shape & UNUSUAL and shape & VERB_MASK in (EXECUTE, EXEC_OOB):
            request.name = verb_name(message)
            request.refusal = client.rule.refusal(request.name.decode(errors="replace"), request.arguments)
        if request.refusal is None:
            self.descriptors.sets.read(request)
        return request

    # a client's commands

    def _settle(self, client: Client) -> None:
        """Does what can be done with the head of a client's queue without sending: answers, asks, or has it
        take its turn.
        """
        queue = client.queue
        while queue and not client.ready and client.held is None and client.greeted:
            request = queue[0]
            if request.answer is None and not request.cleared:
                if client.oob and request.asks_oob():
                    self._out_of_band(self._unqueue(client))
                    continue
                if not client.negotiated and client.in_flight:
                    return  # that is a qmp_capabilities
                request.answer = self._own_answer(client, request)
            if request.answer is not None:
                if client.in_flight:
                    return  # replies come in the client's order
                self._answer_here(self._unqueue(client))
            elif request.cleared or not self._is_watched(client, request):
                client.ready = True
                self.turns.append(client)
            elif not self.ready:
                return  # the watcher may want to ask QEMU something
            else:
                self._unqueue(client)
                client.held = request
                self._ask(request)
        if client.half_closed or client.closing:
            self.delivery.close_if_done(client)

    def _unqueue(self, client: Client) -> Request:
        request = client.queue.popleft()
        client.queued -= request.size
        return request

    def _is_watched(self, client: Client, request: Request) -> bool:
        return client is not self._own and request.name in self._watch

    def _ask(self, request: Request) -> None:
        self._on_record(request)
        self.last_asked += 1
        request.asked = self.last_asked
        self.asked[request.asked] = request
        self.ask(request)

    def _on_record(self, request: Request) -> None:
        if not request.client.rule.audit:
            return
        if request.refusal is not None or changes(request.name.decode(errors="replace"), request.arguments):
            self.audit(request)

    def _refused(self, request: Request) -> bytes | None:
        """The answer to a command that its client's listener does not let pass, or None."""
        if request.refusal is None:
            return None
        self._on_record(request)
        return replies.error(replies.GENERIC, request.refusal)

    def _own_answer(self, client: Client, request: Request) -> bytes | None:
        """The answer to a command that QEMU need not see, or None."""
        shape = request.message.shape
        if shape & UNUSUAL or shape & VERB_MASK != EXECUTE:
            error = replies.shape_error(decode_members(request.message), oob=client.oob)
            if error is not None:
                return replies.error(replies.GENERIC, error)
        if client.negotiated:
            return self._refused(request)
        if request.name != _CAPABILITIES:
            return replies.NOT_NEGOTIATED
        return negotiate(client, request, offered=self._oob_offered)

    def _out_of_band(self, request: Request) -> None:
        client = request.client
        request.oob = True
        client.oob_in_flight += 1
        client.oob_bytes += request.size
        client.line.append(request)
        self._settle_line(client)

    def _settle_line(self, client: Client) -> None:
        """Does what can be done with a client's out-of-band commands: answers, asks, or sends."""
        line = client.line
        for request in tuple(line):
            if not request.begun and not self._begin(request):
                break
            if self.asked.get(request.asked) is request:
                break
        while line and line[0].answer is not None:
            self._answer_oob(line.popleft())
        if client.half_closed:
            self.delivery.close_if_done(client)

    def _begin(self, request: Request) -> bool:
        """False where it came before QEMU can take any."""
        if request.message.shape & UNUSUAL:
            error = replies.shape_error(decode_members(request.message), oob=True)
            if error is not None:
                request.answer = replies.error(replies.GENERIC, error)
        if request.answer is None and request.refusal is None and not self.ready:
            return False
        request.begun = True
        if request.answer is None:
            request.answer = self._refused(request)
        if request.answer is None:
            if self._is_watched(request.client, request):
                self._ask(request)
            else:
                self._send_urgent(request)
        return True

    def _oob_over(self, request: Request) -> None:
        request.client.oob_in_flight -= 1
        request.client.oob_bytes -= request.size

    def _answer_oob(self, request: Request) -> None:
        self._oob_over(request)
        self._answer_here(request)

    def answer(self, request: Request, verdict: Forward | Answer) -> None:
        """What a watcher says about the command that it was asked about. Nothing, if QEMU went away
        meanwhile.
        """
        if self.asked.get(request.asked) is not request:
            return
        del self.asked[request.asked]
        client = request.client
        if isinstance(verdict, Answer):
            request.answer = (
                replies.success(verdict.value) if verdict.error is None else replies.error(*verdict.error)
            )
        else:
            request.cleared = True
            request.on_reply = verdict.on_reply
            if verdict.arguments is not None:
                request.rebuild(verdict.arguments)
                request.rebuilt = True
        if request.oob:
            if request.answer is None:
                self._send_urgent(request)
            elif not client.connected:
                self._answer_oob(request)
            self._settle_line(client)
            return
        client.held = None
        if not client.connected:
            if request.answer is not None:
                return
            client = self._orphans
        self._queue_first(client, request)
        self._pump()

    def _queue_first(self, client: Client, request: Request) -> None:
        request.client = client
        client.queue.appendleft(request)
        client.queued += request.size
        self._settle(client)

    # to QEMU

    def _pump(self) -> None:
        """Sends the in-band commands for which there is room, one from each client in turn."""
        turns = self.turns
        while turns and self.descriptors.request is None:
            client = turns[0]
            if not client.queue:
                client.ready = False
                turns.popleft()
                continue
            request = client.queue[0]
            if not (self.ready and self.window.has_room(request, oob=self._oob_offered)):
                return
            if request.name in TAKES_FD and not self.window.empty:
                return
            turns.popleft()
            client.ready = False
            if request.name in TAKES_FD:
                if self.descriptors.is_lost(request):
                    self._answer_lost(self._unqueue(client))
                    self._settle(client)
                    continue
                if not self.descriptors.may_go(request):
                    self.fd_waiting.append(client)
                    client.ready = True
                    continue
            if client.in_flight >= (1 if client is self._own else SHARE):
                continue  # comes back when one is answered
            self._unqueue(client)
            self._send_in_band(request)
            self._settle(client)

    def _answer_lost(self, request: Request) -> None:
        self.descriptors.drop(request)
        request.answer = replies.DESCRIPTOR_LOST
        self.counters.commands += request.done is None
        self.delivery.answer(request)

    def take_back(self) -> Request | None:
        """The command that is with QEMU and takes a descriptor has not gone there, for that is lost: it is
        answered. What its client said behind it waits until more befalls that. None where there is none."""
        request = self.descriptors.take_back()
        if request is not None:
            self.window.take_back(request)
            request.client.in_flight -= 1
            self._answer_lost(request)
            if request.client in self.internal:
                self._settle(request.client)
        return request

    def _send_in_band(self, request: Request) -> None:
        request.client.in_flight += 1
        self._send(request)

    def _send_urgent(self, request: Request) -> None:
        if self.descriptors.request is not None and not self.urgent_goes:
            if not request.cleared:  # its client may leave before it goes, and counts as its sender
                self._on_record(request)
                request.cleared = True
            self.urgent.append(request)
        else:
            self._send(request)

    def pass_urgent(self) -> None:
        """QEMU does not come to a descriptor: what is out-of-band waits for that no longer."""
        self.urgent_goes = True
        self._send_all_urgent()

    def _send_all_urgent(self) -> None:
        while self.urgent:
            self._send(self.urgent.popleft())

    def _send(self, request: Request) -> None:
        number = self.window.add(request)
        if not request.cleared:
            self._on_record(request)
        if request.name in USES_NAMES:
            self.descriptors.rename(request, self._own.number)
        fd = self.descriptors.take(request) if request.name in TAKES_FD else -1
        if request.done is None:
            self.counters.commands += 1
        self.upstream_out.append((as_sent(request, number), fd))

    # from QEMU

    def upstream_connected(self, negotiation_id: bytes) -> None:
        """A connection to QEMU stands. `negotiation_id`: a JSON string without escapes, unique among all that
        was ever sent to this QEMU.
        """
        self.splitter = Splitter(max_bytes=MAX_REPLY, lenient=True)
        self.descriptors.names.begin(negotiation_id.decode().strip('"'))
        self.negotiation = negotiation_id
        self.ungreeted = b""

    def upstream_lost(self) -> list[Client]:
        """The connection to QEMU is gone. The clients to be disconnected are returned; they have been told
        all there is.
        """
        self.delivery.tell(self.hiding.lost())
        pending = self.window.lost()
        queued = [*self._own.queue, *self._keeper.queue, *self.urgent]
        self.ready = False
        self.greeting = None
        for _, fd in self.upstream_out:
            if fd >= 0:
                self.discard(fd)
        self.upstream_out.clear()
        self.turns.clear()
        self.fd_waiting.clear()
        self.descriptors.lost()
        self.asked.clear()
        self.urgent.clear()
        self.urgent_goes = False
        for client in (self._own, self._orphans, self._keeper):
            self._forget_commands(client)
        lost = [client for client in self.clients.values() if client.greeted]
        for client in lost:
            self._forget_commands(client)
            client.closing = True
            self.dirty.append(client)
        for request in (*pending, *queued):
            if request.done:
                request.done(None)
        return lost

    def _forget_commands(self, client: Client) -> None:
        for request in (*client.queue, *client.line):
            self.descriptors.drop(request)
        client.queue.clear()
        client.line.clear()
        client.queued = client.in_flight = client.oob_in_flight = client.oob_bytes = 0
        client.held = None
        client.ready = False

    @property
    def upstream_more(self) -> bool:
        """Whether QEMU has said more than was taken: `receive_upstream` with nothing, after others had their
        turn."""
        return self.splitter.more

    def receive_upstream(self, data: bytes) -> None:
        """Bytes from QEMU; one batch of messages is taken. Raises NotQmpError where they cannot be."""
        self.taking = True
        try:
            self._take_upstream(data)
        finally:
            self.taking = False

    def _take_upstream(self, data: bytes) -> None:
        for message in self.splitter.feed(data, batch=True):
            if message.problem is not None:
                raise NotQmpError(f"it sent {message.raw[:60]!r}")
            verb = message.shape & VERB_MASK
            if verb == GREETING:
                # One that comes early can be greeted twice: by its acceptance, and as the monitor's handlers
                # are set in another thread (chardev/char-fe.c, qemu_chr_fe_set_handlers_full).
                if not self.greeting:
                    self._greeted(message)
            elif verb not in (EVENT, RETURN, ERROR):
                raise NotQmpError(f"it sent {message.raw[:60]!r}")
            elif not self.greeting:
                self.ungreeted = message.raw[:60]
            elif verb == EVENT:
                self._event(message)
            else:
                self._reply(message)
        if self.turns:
            self._pump()

    def _greeted(self, message: Message) -> None:
        greeting = parse_greeting(message)
        self.greeting = greeting
        self._ask_capabilities(greeting.oob)
        for client in list(self.clients.values()):
            if not client.closing:
                self._greet(client, greeting)

    def _ask_capabilities(self, oob: bool) -> None:
        enable = b'["oob"]' if oob else b"[]"
        self.upstream_out.append(
            (
                b'{"execute": "qmp_capabilities", "arguments": {"enable": %s}, "id": %s}'
                % (enable, self.negotiation),
                -1,
            )
        )

    def _greet(self, client: Client, greeting: Greeting) -> None:
        self.delivery.greet(client, greeting.raw)
        self._settle(client)

    def _event(self, message: Message) -> None:
        data = decode_members(message).get("data", {})
        name = verb_name(message)
        self.delivery.event(name, data, message.raw)
        if name in (b"RESUME", b"MIGRATION"):
            self.descriptors.sets.look()
        self.on_event(name.decode(), data if isinstance(data, dict) else {})

    def hide(self, word: Word, value: float = 0.0) -> int:
        """What refault says about pauses; how many clients hear of one by that. Not while `taking`."""
        return self.delivery.tell(self.hiding.says(word, value))

    def _reply(self, message: Message) -> None:
        spelling = message.raw[message.id : message.id_end]
        if not self.ready:
            if spelling == self.negotiation:
                self._capabilities_reply(message)
            else:
                self.counters.dropped_replies += 1
            return
        request = self.window.answered(spelling)
        if request is None:
            self.counters.dropped_replies += 1
            return
        client = request.client
        self.spent |= request.may_have_secret
        if request.oob:
            self._oob_over(request)
        else:
            client.in_flight -= 1
        self.descriptors.answered(request, message, _returned)
        if request.name == _QUERY_MIGRATE:
            self.delivery.tell(self.hiding.read(status_of(message.raw)))
        if request.purpose:
            self.descriptors.sets.told(request.purpose, _returned(message))
        elif request.done:
            request.done(message)
        else:
            self._deliver(request, message)
        if request.oob and request in client.line:
            client.line.remove(request)
            self._settle_line(client)
        if client.queue or client.half_closed:
            self._settle(client)

    def _capabilities_reply(self, message: Message) -> None:
        greeting = self.greeting
        if message.shape & VERB_MASK == ERROR:
            if greeting is None or not greeting.oob:
                raise NotQmpError(f"it refuses the negotiation with {message.raw[:200]!r}")
            self.greeting = Greeting(greeting.raw, greeting.version, greeting.package, oob=False)
            self._ask_capabilities(oob=False)
            return
        self.ready = True
        self.on_ready()
        for client in list(self.clients.values()):
            self._settle_line(client)
        for client in list(self.clients.values()):
            self._settle(client)
        self._pump()

    def _fd_free(self) -> None:
        if self.descriptors.request is None:
            self.urgent_goes = False
            self._send_all_urgent()
        waiting, self.fd_waiting = self.fd_waiting, []
        for client in reversed(waiting):
            self.turns.appendleft(client)

    def _deliver(self, request: Request, message: Message) -> None:
        """QEMU's reply, to whom it belongs."""
        if request.on_reply is None and not request.prefixes and not request.negotiates:
            self.delivery.pass_on(request, message)
            return
        raw = message.without_id()
        for prefix in request.prefixes:
            raw = raw.replace(prefix, b"")
        if request.on_reply:
            raw = request.on_reply(raw)
        if request.negotiates:
            raw = negotiated_by_qemu(request, raw, offered=self._oob_offered)
        request.answer = self.delivery.shown(request, raw)
        self.delivery.answer(request)

    def _answer_here(self, request: Request) -> None:
        """Gives the answer that refault has for it; QEMU sees nothing of it."""
        self.descriptors.drop(request)
        self.counters.commands += 1
        self.spent |= request.may_have_secret
        self.delivery.answer(request)

    # refault's own commands

    def call(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        *,
        oob: bool,
        fd: int,
        done: Callable[[Message | None], None],
        beside: bool = False,
    ) -> Request:
        """Sends a command of refault's own. `done` gets the reply, or None if QEMU goes away. Takes over `fd`
        (or -1). One that goes `beside` the others waits for none of them.
        """
        own = self._keeper if beside else self._own
        request = self._internal_request(own, command, arguments, oob=oob)
        request.done = done
        self.last_call += 1
        request.call = self.last_call
        if fd >= 0:
            self.descriptors.give(request, fd)
        if oob:
            request.oob = True
            own.oob_in_flight += 1
            own.oob_bytes += request.size
            self._send_urgent(request)
        else:
            own.queue.append(request)
            own.queued += request.size
            self._settle(own)
            self._pump()
        return request

    def _internal_request(
        self, client: Client, command: str, arguments: Mapping[str, object] | None, *, oob: bool
    ) -> Request:
        members: dict[str, object] = {"exec-oob" if oob else "execute": command}
        if arguments:
            members["arguments"] = arguments
        [message] = client.splitter.feed(msgspec.json.encode(members))
        request = Request(client, message)
        request.name = command.encode()
        request.cleared = True
        return request

    def _keep(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        purpose: str,
        *,
        at_once: bool = False,
    ) -> None:
        """Sends a command about fd sets: `refault.qmp.fdsets.Call`."""
        keeper = self._keeper
        request = self._internal_request(keeper, command, arguments, oob=False)
        request.purpose = purpose
        request.done = nobody
        if at_once:
            self._send_in_band(request)
            return
        keeper.queue.append(request)
        keeper.queued += request.size
        self._settle(keeper)
        self._pump()

    def call_all(self) -> None:
        """Sends what is to go beside the others and has no room yet: nobody will be there to send it later.

        A core that a journal makes anew would not have done so.
        """
        keeper = self._keeper
        while self.ready and keeper.queue:
            self._send_in_band(self._unqueue(keeper))

    def forget(self, request: Request) -> None:
        """Nobody waits for an own command any more: unsent it is dropped, else its reply will be."""
        request.done = nobody
        own = request.client
        if request in own.queue:
            own.queue.remove(request)
            own.queued -= request.size
            self.descriptors.drop(request)
        elif request in self.urgent:
            self.urgent.remove(request)
            self._oob_over(request)
            self.descriptors.drop(request)


def nobody(reply: Message | None) -> None:
    """Is told of a reply that nobody waits for."""


def _returned(reply: Message) -> object:
    """What a command returned; None for an error."""
    return decode_members(reply).get("return")
