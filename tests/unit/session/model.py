"""What cext/session.c must do, in few lines of Python: whole byte strings in place of rings."""

from __future__ import annotations

import struct

from refault.session.stream import Frame
from refault.session.wire import Positions

_PAYLOAD = 128 << 10
_ACKNOWLEDGE = 64 << 10


class Lie(Exception):  # noqa: N818
    """The peer said what cannot be."""


class Model:
    """One end of a lane. `said` and `heard` are all that its local side has said, and the peer's has."""

    def __init__(self, ring: int, window: int, origin: int) -> None:
        self.ring, self.window, self.origin = ring, window, origin
        self.said, self.heard = b"", b""
        self.acknowledged = self.next = self.sent = self.limit = origin
        self.written = self.told = origin
        self.promised = origin + window
        self.fin = self.fin_came = self.fin_written = False
        self.stopped_there = self.stopped_here = False
        self.reset_here = self.reset_there = self.end_here = self.end_there = False
        self.retransmitted = self.wanted = 0
        self.buffer = b""
        self.lost()

    @property
    def data_end(self) -> int:
        return self.origin + len(self.said)

    @property
    def received(self) -> int:
        return self.origin + len(self.heard) + self.fin_came

    def positions(self) -> Positions:
        room = max(self.promised - self.written, 0)
        return Positions(self.received, self.written, self.acknowledged, self.data_end + self.fin, room)

    def room(self) -> int:
        if self.fin or self.reset_here or self.reset_there:
            return 0
        return self.ring - (self.data_end - self.acknowledged)

    def put(self, data: bytes) -> None:
        self.said += data

    def unwritten(self) -> bytes:
        return self.heard[self.written - self.origin :]

    def wrote(self, length: int) -> None:
        self.written += length
        self.promised = max(self.promised, self.written + self.window)

    def at_fin(self) -> bool:
        return self.fin_came and not self.reset_there and self.written == self.received - 1

    def wrote_fin(self) -> None:
        if self.at_fin():
            self.written += 1
            self.acknowledge = True

    def stop(self) -> None:
        self.stopped_here = True
        self._discard()

    def _discard(self) -> None:
        self.wrote(self.received - self.written)
        self.acknowledge = self.acknowledge or self.fin_came

    def lost(self) -> None:
        self.sending, self.receiving = b"", b""
        self.acknowledge = self.stop_sent = self.reset_sent = self.end_sent = False
        self.more_sent = 0

    def tell(self) -> Positions:
        self.told = self.written
        return self.positions()

    def resume(self, peer: Positions) -> None:
        self._judge(peer.written, peer.received, peer.written + peer.window)
        if not peer.first_kept <= self.told or not self.received <= peer.end or peer.first_kept > peer.end:
            raise Lie
        if self.fin_came and peer.end != self.received:
            raise Lie
        if max(peer.received, peer.end) >= 1 << 63 or peer.window > 1 << 40:
            raise Lie
        self.lost()
        self.acknowledged, self.limit = peer.written, peer.written + peer.window
        self.next = peer.received
        self.acknowledge = True

    def _judge(self, written: int, received: int, limit: int) -> None:
        if not self.acknowledged <= written <= received <= self.sent:
            raise Lie
        if limit < self.limit or limit + 1 < written or limit - written > 1 << 40:
            raise Lie

    def to_send(self) -> bytes:
        """All of the frame under way, or of the next one."""
        if not self.sending:
            self.sending = self._next_frame()
        return self.sending

    def gone(self, length: int) -> None:
        """The kernel took so much of it. A payload's bytes count as they go."""
        for _ in range(length):
            self.sending = self.sending[1:]
            if len(self.sending) < self.payload_left:
                at = self.next - self.payload_left
                self.retransmitted += at < self.sent
                self.sent = max(self.sent, at + 1)
                self.payload_left -= 1

    def _next_frame(self) -> bytes:
        self.payload_left = 0
        may_go = min(self.data_end, self.limit)
        speaks = not (self.reset_sent or self.reset_there or self.end_here)
        if self.end_sent:
            return b""
        if self.stopped_here and not self.stop_sent:
            self.stop_sent = True
            return _frame(Frame.STOP, self.written)
        if not self.reset_sent and (self.acknowledge or self.written - self.told >= _ACKNOWLEDGE):
            self.told, self.acknowledge = self.written, False
            return _frame(Frame.ACK, self.written, struct.pack(">Q", self.promised))
        if speaks and self.next < may_go:
            length = min(may_go - self.next, _PAYLOAD, self.ring - self.next % self.ring)
            at = self.next - self.origin
            self.next, self.payload_left = self.next + length, length
            return _frame(Frame.DATA, self.next - length, self.said[at : at + length])
        if speaks and self.fin and self.next == self.data_end:
            self.retransmitted += self.next < self.sent
            self.next += 1
            self.sent = max(self.sent, self.next)
            return _frame(Frame.FIN, self.next - 1)
        if speaks and self.reset_here:
            self.reset_sent = True
            return _frame(Frame.RESET, self.next)
        if self.end_here:
            self.end_sent = True
            return _frame(Frame.END, 0)
        full = self.data_end > self.limit or self.data_end - self.acknowledged == self.ring
        if speaks and full and self.next == self.limit != self.more_sent:
            self.more_sent = self.limit
            return _frame(Frame.MORE, self.limit)
        return b""

    def take(self, data: bytes) -> None:
        """What came. A payload is taken as it comes, anything else when it is whole."""
        self.receiving += data
        while len(self.receiving) >= 16:
            kind, length, offset = struct.unpack(">B3xIQ", self.receiving[:16])
            body = self.receiving[16 : 16 + length]
            if kind == Frame.DATA:
                if offset > self.received or offset + length > self.promised:
                    raise Lie
                if self.fin_came and offset + length >= self.received:
                    raise Lie
                self._take_data(body[max(self.received - offset, 0) :])
            if len(body) < length:
                return
            self.receiving = self.receiving[16 + length :]
            self._take_frame(Frame(kind), offset, body)

    def _take_data(self, new: bytes) -> None:
        if new and not self.fin_came:
            self.heard += new
            if self.stopped_here or self.reset_here or self.reset_there:
                self._discard()

    def _take_frame(self, kind: Frame, offset: int, body: bytes) -> None:
        if kind is Frame.ACK:
            limit = struct.unpack(">Q", body)[0]
            self._judge(offset, offset, limit)
            self.acknowledged, self.limit = offset, limit
        elif kind is Frame.FIN and not self.fin_came:
            if offset != self.received:
                raise Lie
            self.fin_came = True
            if self.stopped_here:
                self._discard()
        elif kind is Frame.STOP:
            end = max(self.sent, self.next if self.payload_left else 0)
            if end <= self.data_end:
                self.said, self.fin = self.said[: end - self.origin], True
            self.stopped_there = True
        elif kind is Frame.RESET:
            self.reset_there = True
        elif kind is Frame.END:
            self.end_there = True
        elif kind is Frame.MORE:
            if offset > self.promised:
                raise Lie
            self.wanted = offset


def _frame(kind: Frame, offset: int, body: bytes = b"") -> bytes:
    return struct.pack(">B3xIQ", kind, len(body), offset) + body
