"""What QEMU has of us: the commands that are with it, by the ids that it got, and what they look like there.

At most `WINDOW` in-band ones, for its queue holds 8 and once that is full QEMU reads nothing, not even
out-of-band commands (monitor/qmp.c, QMP_REQ_QUEUE_LEN_MAX). An id is used again only when its reply has come.
"""

from __future__ import annotations

from refault.qmp.session import Request
from refault.qmp.splitter import EXEC_OOB, VERB_MASK, insert_id

WINDOW = 6
"""In-band commands with QEMU at a time."""
WINDOW_BYTES = 64 << 10
"""Of these commands together, where there is more than one: QEMU reads byte by byte, and an out-of-band
command behind.
"""
SHORT_IDS = 99


class Window:
    """Of one connection to QEMU."""

    def __init__(self) -> None:
        self.pending: dict[int, Request] = {}
        self.last_id = 0
        self._in_flight = 0
        self._in_flight_bytes = 0

    def restore(self, last_id: int, pending: dict[int, Request]) -> None:
        """Goes on as that of another core does."""
        self.last_id, self.pending = last_id, pending
        in_band = [request for request in pending.values() if not request.oob]
        self._in_flight = len(in_band)
        self._in_flight_bytes = sum(request.size for request in in_band)

    def has_room(self, request: Request, *, oob: bool) -> bool:
        """Whether one more in-band command may go. `oob`: QEMU takes more than one at a time."""
        if self._in_flight >= (WINDOW if oob else 1):
            return False
        return self._in_flight == 0 or self._in_flight_bytes + request.size <= WINDOW_BYTES

    @property
    def empty(self) -> bool:
        """Whether no in-band command is with QEMU."""
        return self._in_flight == 0

    def add(self, request: Request) -> int:
        """One more goes; the id that QEMU gets."""
        number = self.last_id
        most = SHORT_IDS if len(self.pending) < SHORT_IDS // 2 else 999_999
        while True:
            number = number % most + 1
            if number not in self.pending:
                break
        self.last_id = number
        self.pending[number] = request
        if not request.oob:
            self._in_flight += 1
            self._in_flight_bytes += request.size
        return number

    def answered(self, spelling: bytes) -> Request | None:
        """Whose reply it is that has this id; None where nobody's. One without an id is that of the oldest
        in-band one: QEMU could not read the command, and answers in order."""
        request = None
        if spelling.isdigit():
            request = self.pending.pop(int(spelling), None)
        elif not spelling:
            oldest = next((number for number, each in self.pending.items() if not each.oob), None)
            request = self.pending.pop(oldest) if oldest is not None else None
        if request is not None and not request.oob:
            self._in_flight -= 1
            self._in_flight_bytes -= request.size
        return request

    def take_back(self, request: Request) -> None:
        """An in-band one has not gone after all."""
        self.pending = {number: each for number, each in self.pending.items() if each is not request}
        self._in_flight -= 1
        self._in_flight_bytes -= request.size

    def lost(self) -> list[Request]:
        """The connection is gone: what QEMU had."""
        pending = list(self.pending.values())
        self.pending = {}
        self._in_flight = self._in_flight_bytes = 0
        return pending


def as_sent(request: Request, number: int) -> bytes:
    """The command with a short id and no white space around its members, whose bytes are as they came: QEMU
    reads a monitor byte by byte (monitor/monitor.c, monitor_can_read), microseconds for each."""
    if request.data is not None:
        return insert_id(request.data, b"%d" % number)
    message = request.message
    raw = message.raw
    head = b'{"exec-oob":' if message.shape & VERB_MASK == EXEC_OOB else b'{"execute":'
    verb = raw[message.verb : message.verb_end]
    if message.arguments_end:
        arguments = raw[message.arguments : message.arguments_end]
        return b'%b%b,"arguments":%b,"id":%d}' % (head, verb, arguments, number)
    return b'%b%b,"id":%d}' % (head, verb, number)
