"""What clients are given: the greeting, events and replies, each on a line of its own, and in the end a pause
that was kept from them (hiding.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from refault.qmp.hiding import NOTHING, Hiding, Verdict
from refault.qmp.session import Client, Limits, Request
from refault.qmp.splitter import Message, insert_id

_QUERY_MIGRATE = b"query-migrate"
_EOL = b"\r\n"


@dataclass
class Counters:
    """Totals since the start."""

    commands: int = 0
    """Taken from clients: those that went to QEMU, and those that refault answered, malformed ones too."""
    events: int = 0
    """Delivered, each counted once for each client it went to."""
    slow_clients: int = 0
    dropped_replies: int = 0
    """Replies of QEMU's that nobody waits for."""
    undecided: int = 0
    """What an earlier refault's end left in doubt."""
    hidden_pauses: int = 0
    """Those that were kept from a client, for a time at least."""

    def pause_hidden(self) -> None:
        """One more is kept from a client."""
        self.hidden_pauses += 1


class Delivery:
    """To `clients`, those who are there by their numbers. What `of_nobody` asked for is given to none."""

    def __init__(self, clients: Mapping[int, Client], of_nobody: Client, limits: Limits) -> None:
        self._clients = clients
        self._of_nobody = of_nobody
        self._limits = limits
        self.counters = Counters()
        self.hiding = Hiding()
        """The pause that QEMU is in, for clients that are not to know."""
        self.dirty: list[Client] = []
        """Clients that have something in `out`, or are to be disconnected."""

    def goes_on_from(self, earlier: Delivery) -> None:
        """Counts on where `earlier` ends, in whose place it is."""
        self.counters = earlier.counters

    def put(self, client: Client, line: bytes) -> None:
        """A line for one client; for one that does not read them, the end."""
        if not client.out:
            self.dirty.append(client)
        if client.unsent > 0 and client.unsent + len(line) > self._limits.unsent:
            if not client.overflow:
                client.overflow = True
                self.counters.slow_clients += 1
                self.dirty.append(client)
            return
        client.unsent += len(line)
        client.out.append(line)

    def event(self, name: bytes, data: object, raw: bytes) -> None:
        """QEMU's, for all but those from whom it is kept."""
        line, verdict = raw + _EOL, NOTHING
        if name == b"MIGRATION":
            verdict = self.hiding.event(data.get("status") if isinstance(data, dict) else None, line)
            self.tell(verdict)
        for client in self._clients.values():
            if client.hears and not (verdict.withhold and verdict.concerns(client.rule.hide_pause)):
                self.counters.events += 1
                self.put(client, line)

    def tell(self, verdict: Verdict) -> int:
        """Tells of a pause those from whom it was kept; how many they are."""
        if not verdict.first:
            return 0
        told = 0
        for client in self._clients.values():
            if client.hears and verdict.concerns(client.rule.hide_pause):
                told += 1
                self.put(client, verdict.first)
        self.counters.events += told
        return told

    def greet(self, client: Client, greeting: bytes) -> None:
        """QEMU's greeting, to one client."""
        client.greeted = True
        self.put(client, greeting + _EOL)

    def pass_on(self, request: Request, reply: Message) -> None:
        """QEMU's reply as it is, but for the id."""
        client = request.client
        if client.connected and client is not self._of_nobody:
            raw = reply.with_id(request.spelling) if request.spelling else reply.without_id()
            self.put(client, self.shown(request, raw) + _EOL)

    def answer(self, request: Request) -> None:
        """The answer that stands in a request, to a client whose it is."""
        client, raw = request.client, request.answer
        if request.done or not client.connected or client is self._of_nobody or raw is None:
            return
        if request.spelling:
            raw = insert_id(raw, request.spelling)
        self.put(client, raw + _EOL)

    def shown(self, request: Request, raw: bytes) -> bytes:
        """What of a reply its client is shown."""
        if request.name == _QUERY_MIGRATE and self.hiding.hides_from(request.client.rule.hide_pause):
            return self.hiding.shown(raw)
        return raw

    def close_if_done(self, client: Client) -> None:
        """One that sends nothing more is disconnected once it has its replies."""
        if client.half_closed and not client.closing and client.idle and client.greeted:
            client.closing = True
            self.dirty.append(client)
